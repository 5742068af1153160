"""Autoencoders for latent diffusion: KL-regularised or vector-quantised."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from gencompare.distributed import all_reduce_sum, world_size
from gencompare.errors import UserError, check_non_negative
from gencompare.generative_model import Cond, DataSpec, TrainedModel
from gencompare.models.adversarial import Hinge
from gencompare.models.autoencoder_core import AutoencoderCore
from gencompare.models.bottlenecks import Bottleneck
from gencompare.models.manual_optimization import frozen, manual_step
from gencompare.networks.layers import at_least_float32
from gencompare.networks.perceptual import PerceptualNetwork
from gencompare.rng import RandomSource

VGG16_FILE = "hub/checkpoints/vgg16-397923af.pth"
"""Path of the VGG-16 weights, relative to TORCH_HOME (by default ~/.cache/torch)."""


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity on VGG-16, from torchmetrics, with frozen weights.

    Zhang et al. (2018), "The unreasonable effectiveness of deep features as a perceptual metric",
    https://arxiv.org/abs/1801.03924. Maps two batches of images (n, 3, H, W) in [-1, 1] to distances (n,).
    """

    name = "vgg16"

    def __init__(self) -> None:
        super().__init__()
        try:
            self.network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
        except OSError as error:
            raise UserError(
                f"LPIPS needs the weights of VGG-16, which could not be downloaded ({error}): fetch"
                " https://download.pytorch.org/models/vgg16-397923af.pth on a machine with internet access, and put it"
                f" at TORCH_HOME/{VGG16_FILE}. The offline default is model/perceptual=trained."
            ) from error
        self.network.requires_grad_(False)
        digest = hashlib.sha256()
        for value in self.network.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.sha256 = digest.hexdigest()

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in eval mode, because the network is frozen."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(x, y).flatten()


def lpips(channels: int) -> LPIPS:
    """Build `LPIPS`.

    Raises:
        UserError: if the images do not have three channels.
    """
    if channels != 3:
        raise UserError(f"LPIPS needs images with 3 channels, but these have {channels}: use model/perceptual=trained.")
    with torch.random.fork_rng(devices=[]):
        return LPIPS()


class Autoencoder(TrainedModel):
    r"""An autoencoder whose latents are small images, for latent diffusion.

    Esser et al. (2021), "Taming transformers for high-resolution image synthesis", https://arxiv.org/abs/2012.09841;
    Rombach et al. (2022), "High-resolution image synthesis with latent diffusion models",
    https://arxiv.org/abs/2112.10752. The loss of encoder and decoder per image is

    .. math:: |x - y|_1 + w_{perc} d(x, y) + L_{reg} - w_{adv} \lambda D(y),

    where y is the reconstruction, the norm is a mean over all pixels except padding, d is a perceptual distance
    (`networks.perceptual`), and :math:`L_{reg}` is the penalty of the bottleneck (KL or commitment). A patch
    discriminator with hinge loss is trained once a fraction ``adversarial_start`` of the budget is spent; before that,
    the last term is absent. The adaptive weight

    .. math:: \lambda = |\nabla L_{rec}| / |\nabla D|,

    with the gradients of the first three terms and of the mean D(y) with respect to the weight of the last decoder
    layer, balances the two (Esser et al. 2021, eq. 6 and 7; Rombach et al. 2022, appendix G).

    Args:
        spec: shape and value range of the data.
        encoder: a factory ``(shape, out_channels) -> module(x)``.
        decoder: a factory ``(in_channels, shape) -> module(z)``, whose last layer is ``out``.
        bottleneck: `GaussianPosterior` (KL) or `VectorQuantizer` (VQ).
        perceptual: a factory ``channels -> module(x, y)``, which maps images to distances (n,) and has ``name`` and
            ``sha256``; None disables the term.
        perceptual_weight: :math:`w_{perc}`.
        discriminator: a factory ``shape -> module(x)``, which maps images to scores (n, patches); None disables the
            term.
        adversarial_weight: :math:`w_{adv}`.
        adversarial_start: fraction of the budget after which the discriminator starts.
        kwargs: see `TrainedModel`.
    """

    MAX_ADAPTIVE_WEIGHT = 1e4

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
        adversarial_start: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(spec, **kwargs)
        check_non_negative("model.perceptual_weight", perceptual_weight)
        check_non_negative("model.adversarial_weight", adversarial_weight)
        if not 0 <= adversarial_start <= 1:
            raise UserError(f"model.adversarial_start={adversarial_start} must be a fraction of the budget in [0, 1].")
        self.automatic_optimization = False
        self.coder = AutoencoderCore(spec, encoder=encoder, decoder=decoder, bottleneck=bottleneck)
        self.perceptual = None if perceptual is None else perceptual(channels=spec.shape[0])
        self.perceptual_weight = perceptual_weight
        self.discriminator = None if discriminator is None else discriminator(shape=spec.shape)
        self.adversarial = Hinge()
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start

    @property
    def step_kind(self) -> str:
        return "adversarial" if self.discriminator is not None and self.progress >= self.adversarial_start else ""

    def fit_batch(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        y, metrics = self.coder(x, rng)
        metrics = self._reconstruction_metrics(x, y) | metrics
        loss = metrics["loss"] = (metrics["loss"] + metrics["penalty"]).mean()
        if self.discriminator is None or not self.step_kind:
            manual_step(self, 0, loss, list(self.coder.parameters()))
            return {name: value.detach().mean() for name, value in metrics.items()}
        with frozen(self.discriminator):
            generator_loss = self.adversarial.generator_loss(None, self._scores(y)).mean()
            adaptive_weight = self._adaptive_weight(loss, generator_loss)
            metrics |= {"balance": adaptive_weight, "fooling": generator_loss}
            total = loss + self.adversarial_weight * adaptive_weight * generator_loss
            manual_step(self, 0, total, list(self.coder.parameters()))
        metrics |= self._discriminator_step(x, y.detach())
        return {name: value.detach().mean() for name, value in metrics.items()}

    def _reconstruction_metrics(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Compute the distances between images and reconstructions, (n,) each; ``loss`` is their weighted sum."""
        l1 = (x - y).abs().flatten(1).sum(1) / self.spec.num_values
        metrics = {"loss": l1, "l1": l1}
        if self.perceptual is not None:
            metrics["perceptual"] = at_least_float32(self.perceptual(x, y))
            metrics["loss"] = l1 + self.perceptual_weight * metrics["perceptual"]
        return metrics

    def _adaptive_weight(self, loss: Tensor, generator_loss: Tensor) -> Tensor:
        r"""Compute the adaptive weight :math:`\lambda`: the ratio of gradient norms at the last layer, over the global
        batch."""
        weight: Tensor = self.coder.decoder.out.weight  # type: ignore[union-attr,assignment]
        gradients = torch.stack(
            [torch.autograd.grad(term, weight, retain_graph=True)[0] for term in (loss, generator_loss)]
        )
        loss_norm, generator_norm = (all_reduce_sum(gradients) / world_size()).flatten(1).norm(dim=1)
        return (loss_norm / (generator_norm + 1e-6)).clamp(max=self.MAX_ADAPTIVE_WEIGHT)

    def _scores(self, x: Tensor) -> Tensor:
        """Compute the discriminator's scores of patches, in full precision."""
        assert self.discriminator is not None
        return at_least_float32(self.discriminator(x))

    def _discriminator_step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        assert self.discriminator is not None
        real, fake = self._scores(torch.cat([x, y])).chunk(2)
        loss = self.adversarial.discriminator_loss(real, fake).mean()
        manual_step(self, 1, loss, list(self.discriminator.parameters()))
        return {"d_loss": loss, "d_real": real, "d_fake": fake}

    @torch.no_grad()
    def validation_metrics(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute reconstruction metrics without noise on the latents; ``psnr`` is in dB for the range [-1, 1]."""
        self.coder.bottleneck.check_collapse()
        y = self.reconstruct(x, cond, generator=rng.generator)
        mse = (x - y).square().flatten(1).sum(1) / self.spec.num_values
        return self._reconstruction_metrics(x, y) | {"psnr": 10 * torch.log10(4 / mse.clamp(min=1e-10))}

    @torch.no_grad()
    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        """Encode and decode images; deterministic."""
        return self.coder.decode(self.coder.encode(x)).clamp(-1, 1)

    @property
    def possibly_collapsed(self) -> bool:
        return self.coder.bottleneck.possibly_collapsed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.coder.bottleneck.check_collapse()  # keep the previous checkpoint

    @property
    def perceptual_networks(self) -> list[str]:
        return [] if self.perceptual is None else [self.perceptual.name, self.perceptual.sha256]

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Create the optimisers for the autoencoder core and, if there is one, the discriminator."""
        networks = [self.coder, *([] if self.discriminator is None else [self.discriminator])]
        return [self.new_optimizer(network.parameters()) for network in networks]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the autoencoder core, the only part used after training."""
        return {name: p for name, p in self.named_parameters() if name.startswith("coder.")}
