"""The autoencoder that makes the latents of latent diffusion: KL-regularised, or vector-quantised."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from gencompare.distributed import all_reduce_sum, world_size
from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec, TrainedModel
from gencompare.models.adversarial import Hinge
from gencompare.models.autoencoder_core import AutoencoderCore
from gencompare.models.bottlenecks import Bottleneck
from gencompare.models.manual_optimization import frozen, manual_step
from gencompare.networks.perceptual import PerceptualNetwork
from gencompare.rng import RandomSource

FILE = "hub/checkpoints/vgg16-397923af.pth"
"""Where torch keeps the network's weights, under TORCH_HOME (by default ~/.cache/torch)."""


class LPIPS(nn.Module):
    """The distance of Zhang et al. (2018), "The unreasonable effectiveness of deep features as a perceptual metric",
    with their learned weights on VGG-16, by torchmetrics. Images (n, 3, H, W) in [-1, 1], twice, to (n,). Frozen."""

    name = "vgg16"

    def __init__(self) -> None:
        super().__init__()
        try:
            self.network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
        except OSError as error:
            raise UserError(
                f"LPIPS needs the weights of VGG-16, and they could not be downloaded ({error}): fetch"
                " https://download.pytorch.org/models/vgg16-397923af.pth where there is a network, and put it at"
                f" TORCH_HOME/{FILE}. The offline default is model/perceptual=trained."
            ) from error
        self.network.requires_grad_(False)
        digest = hashlib.sha256()
        for value in self.network.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.sha256 = digest.hexdigest()

    def train(self, mode: bool = True) -> LPIPS:
        """Always in eval mode: it is frozen."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(x, y).flatten()


def lpips(channels: int) -> LPIPS:
    """`LPIPS` for images of three channels."""
    if channels != 3:
        raise UserError(f"LPIPS compares colour images; these have {channels} channel: use model/perceptual=trained.")
    with torch.random.fork_rng(devices=[]):
        return LPIPS()


class Autoencoder(TrainedModel):
    r"""Encodes images into small images of latents, and gives them back.

    What the coder minimises, per image,

        |x - y|_1 + ``perceptual_weight`` d(x, y) + penalty + ``adversarial_weight`` lambda (-D(y)),

    y the image made again, the norm a mean over real pixels, d a distance of features (`networks.perceptual`), penalty
    the bottleneck's (KL, or the commitment of a vector-quantised one). A discriminator of patches joins once
    ``adversarial_after`` of the budget is spent, with the hinge loss of each patch; lambda = |grad of the first three
    terms| / |grad of -D|, both at the weight of the decoder's last layer, keeps the two in balance (Esser et al. 2021,
    "Taming transformers for high-resolution image synthesis", eq. 6 and 7; Rombach et al. 2022, "High-resolution image
    synthesis with latent diffusion models", appendix G).

    Args:
        encoder: a factory ``(shape, out_channels) -> module(x)``.
        decoder: a factory ``(in_channels, shape) -> module(z)``, whose last layer is ``out``.
        bottleneck: KL or VQ.
        perceptual: a factory ``channels -> module(x, y)`` with ``name`` and ``sha256``, images twice to (n,); None
            compares pixels alone.
        discriminator: a factory ``shape -> module(x)``, images to scores (n, patches); None leaves it out.
    """

    LARGEST_LAMBDA = 1e4

    def __init__(
        self,
        spec: DataSpec,
        *,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        bottleneck: Bottleneck,
        perceptual: Callable[..., PerceptualNetwork | LPIPS] | None = None,
        perceptual_weight: float = 1.0,
        discriminator: Callable[..., nn.Module] | None = None,
        adversarial_weight: float = 0.5,
        adversarial_after: float = 0.5,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        if perceptual_weight < 0 or adversarial_weight < 0 or not 0 <= adversarial_after <= 1:
            raise UserError(
                f"model.perceptual_weight={perceptual_weight}, model.adversarial_weight={adversarial_weight},"
                f" model.adversarial_after={adversarial_after}: no weight is negative, and the last is a share of the"
                " budget, 0 to 1."
            )
        self.automatic_optimization = False
        self.coder = AutoencoderCore(spec, encoder=encoder, decoder=decoder, bottleneck=bottleneck)
        self.perceptual = None if perceptual is None else perceptual(channels=spec.shape[0])
        self.perceptual_weight = perceptual_weight
        self.discriminator = None if discriminator is None else discriminator(shape=spec.shape)
        self.adversarial = Hinge()
        self.adversarial_weight, self.adversarial_after = adversarial_weight, adversarial_after

    @property
    def step_kind(self) -> str:
        return "adversarial" if self.discriminator is not None and self.progress >= self.adversarial_after else ""

    def fit_batch(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        again, figures = self.coder(x, rng)
        figures = self._likeness(x, again) | figures
        loss = figures["loss"] = (figures["loss"] + figures["penalty"]).mean()
        if self.discriminator is None or not self.step_kind:
            manual_step(self, 0, loss, list(self.coder.parameters()))
            return {name: value.detach().mean() for name, value in figures.items()}
        with frozen(self.discriminator):
            fooling = self.adversarial.generator(None, self.discriminator(again)).mean()
            balance = self._balance(loss, fooling)
            figures |= {"balance": balance, "fooling": fooling}
            manual_step(self, 0, loss + self.adversarial_weight * balance * fooling, list(self.coder.parameters()))
        figures |= self._discriminator_step(x, again.detach())
        return {name: value.detach().mean() for name, value in figures.items()}

    def _likeness(self, x: Tensor, again: Tensor) -> dict[str, Tensor]:
        """How far images made again are from their originals, (n,) each; ``loss`` is what is weighed of it."""
        difference = (x - again).abs().flatten(1).sum(1) / self.spec.num_values
        figures = {"loss": difference, "l1": difference}
        if self.perceptual is not None:
            figures["perceptual"] = self.perceptual(x, again)
            figures["loss"] = difference + self.perceptual_weight * figures["perceptual"]
        return figures

    def _balance(self, loss: Tensor, fooling: Tensor) -> Tensor:
        """lambda: how much longer the gradient of ``loss`` is than that of ``fooling``, over the whole batch."""
        last: Tensor = self.coder.decoder.out.weight  # type: ignore[union-attr,assignment]
        gradients = torch.stack([torch.autograd.grad(part, last, retain_graph=True)[0] for part in (loss, fooling)])
        of_loss, of_fooling = (all_reduce_sum(gradients) / world_size()).flatten(1).norm(dim=1)
        return (of_loss / (of_fooling + 1e-6)).clamp(max=self.LARGEST_LAMBDA)

    def _discriminator_step(self, x: Tensor, again: Tensor) -> dict[str, Tensor]:
        assert self.discriminator is not None
        real, fake = self.discriminator(torch.cat([x, again])).chunk(2)
        loss = self.adversarial.discriminator(real, fake).mean()
        manual_step(self, 1, loss, list(self.discriminator.parameters()))
        return {"d_loss": loss, "d_real": real, "d_fake": fake}

    @torch.no_grad()
    def validation_metrics(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """What is given back without noise on the latents; ``psnr`` in dB, of values in [-1, 1]."""
        self.coder.bottleneck.check()
        again = self.reconstruct(x, cond, generator=rng.generator)
        figures = self._likeness(x, again)
        error = (x - again).square().flatten(1).sum(1) / self.spec.num_values
        return figures | {"psnr": 10 * torch.log10(4 / error.clamp(min=1e-10))}

    @torch.no_grad()
    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        """Images decoded from the latents that stand for them: no random numbers."""
        return self.coder.decode(self.coder.encode(x)).clamp(-1, 1)

    @property
    def possibly_collapsed(self) -> bool:
        return self.coder.bottleneck.possibly_collapsed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.coder.bottleneck.check()  # the last good checkpoint stays

    @property
    def perceptual_networks(self) -> list[str]:
        return [] if self.perceptual is None else [self.perceptual.name, self.perceptual.sha256]

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """The coder's, and the discriminator's where there is one."""
        assert self.optimizer_factory is not None
        players = [self.coder, *([] if self.discriminator is None else [self.discriminator])]
        return [self.optimizer_factory(player.parameters()) for player in players]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """The coder's: nothing else is used once it is trained."""
        return {name: p for name, p in self.named_parameters() if name.startswith("coder.")}
