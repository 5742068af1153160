"""The discriminator's head: a score, and with labels how well the image fits its class; and spectral norm."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class ProjectionHead(nn.Module):
    r"""D(x, y) = w . phi(x) + b + v_y . phi(x), features (n, features) and labels (n,) to scores (n,).

    Miyato and Koyama 2018, "cGANs with projection discriminator", eq. 3. Without classes the last term is left out.
    """

    def __init__(self, features: int, num_classes: int = 0) -> None:
        super().__init__()
        self.score = nn.Linear(features, 1)
        self.classes = nn.Embedding(num_classes, features) if num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, phi: Tensor, label: Tensor | None = None) -> Tensor:
        score = self.score(phi).squeeze(1)
        if self.classes is None:
            return score
        return score + (self.classes(label) * phi).sum(1)


def normalize_spectrally(network: nn.Module) -> None:
    """Give every convolution, linear layer and embedding of ``network`` a weight of spectral norm 1.

    Weights are divided by their largest singular value, which one power iteration each time that the network runs in
    training keeps up to date (Miyato et al. 2018, "Spectral normalization for GANs", eq. 8 and algorithm 1).
    """
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            if not module.weight.is_meta and not module.weight.any():
                nn.init.orthogonal_(module.weight)  # noughts have no direction that could be normalised
            spectral_norm(module)
