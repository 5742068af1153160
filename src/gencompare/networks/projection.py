"""The discriminator's head: a score, and with labels how well the image fits its class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class ProjectionDiscriminator(nn.Module):
    r"""D(x, y) = w . phi(x) + b + v_y . phi(x), (n, C, H, W) and labels (n,) to scores (n,).

    Miyato and Koyama 2018, "cGANs with projection discriminator", eq. 3. phi is the trunk's output after a leaky ReLU;
    without classes the last term is left out.

    Args:
        trunk: (n, C, H, W) -> (n, features).
        spectral_norm: divide every weight by its largest singular value, estimated by one power iteration a training
            step (Miyato et al. 2018, "Spectral normalization for GANs", eq. 8 and algorithm 1).
    """

    def __init__(self, trunk: nn.Module, features: int, num_classes: int = 0, *, spectral_norm: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.score = nn.Linear(features, 1)
        self.classes = nn.Embedding(num_classes, features) if num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight) if not spectral_norm else nn.init.orthogonal_(self.classes.weight)
        if spectral_norm:
            normalize_spectrally(self)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        phi = F.leaky_relu(self.trunk(x), 0.2)
        score = self.score(phi).squeeze(1)
        if self.classes is None:
            return score
        return score + (self.classes(label) * phi).sum(1)


def normalize_spectrally(network: nn.Module) -> None:
    """Give every convolution, linear layer and embedding of ``network`` a weight of spectral norm 1."""
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            with torch.no_grad():
                spectral_norm(module)
