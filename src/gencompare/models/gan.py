"""Generative adversarial networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.errors import UserError, check_counts
from gencompare.generative_model import Cond, DataSpec, GenerativeModel
from gencompare.models.adversarial import AdversarialLoss
from gencompare.models.discriminator_augmentation import DiscriminatorAugmentation
from gencompare.models.gan_penalties import DiscriminatorStep, Penalty
from gencompare.models.manual_optimization import frozen, manual_step
from gencompare.networks.gan_networks import apply_spectral_norm
from gencompare.networks.layers import at_least_float32
from gencompare.rng import RandomSource, draw_normal


class GAN(GenerativeModel):
    r"""A generator and a discriminator, optimised alternately.

    Goodfellow et al. (2014), "Generative adversarial nets", https://arxiv.org/abs/1406.2661.

    Each training step splits the batch into ``d_steps`` parts. On each part the discriminator takes one step on

    .. math:: \operatorname{mean}_i L_D(D(x_i), D(G(z_i))) + \sum_p w_p \operatorname{mean}_i p_i,

    with fresh fakes and the penalties p; then the generator takes one step on :math:`\operatorname{mean}_i L_G` over
    the first part. Fakes have the labels of the real images. No layer uses batch statistics, so results do not depend
    on the number of processes that share a batch.

    Args:
        spec: shape, number of classes and value range of the data.
        generator: a factory ``(latent_dim, shape, num_classes) -> module(z, label)`` that returns images (n, C, H, W).
        discriminator: a factory ``(shape, num_classes) -> module(x, label)`` that returns scores (n,).
        adversarial: the losses :math:`L_D` and :math:`L_G`.
        penalty: penalties on the discriminator gradient, by their name in the logs.
        discriminator_augmentation: a factory ``spec -> DiscriminatorAugmentation``; None disables augmentation.
        latent_dim: dimension of :math:`z \sim N(0, I)`.
        spectral_norm: whether to apply spectral normalisation to the discriminator weights.
        d_steps: number of discriminator steps per training step.
        kwargs: see `TrainedModel`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        generator: Callable[..., nn.Module],
        discriminator: Callable[..., nn.Module],
        adversarial: AdversarialLoss,
        penalty: Mapping[str, Penalty] | None = None,
        discriminator_augmentation: Callable[[DataSpec], DiscriminatorAugmentation] | None = None,
        latent_dim: int = 64,
        spectral_norm: bool = False,
        d_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(spec, **kwargs)
        check_counts("model", latent_dim=latent_dim, d_steps=d_steps)
        self.automatic_optimization = False
        self.adversarial, self.penalty = adversarial, dict(penalty or {})
        self.latent_dim, self.d_steps = latent_dim, d_steps
        num_classes = spec.num_classes if self.conditional else 0
        self.generator = generator(latent_dim, spec.shape, num_classes)
        self.discriminator = discriminator(spec.shape, num_classes)
        if spectral_norm:
            apply_spectral_norm(self.discriminator)
        self.augmentation = None if discriminator_augmentation is None else discriminator_augmentation(spec)
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.seen: Tensor
        """Number of training images seen, for schedules of penalty weights and augmentation."""

    def generate(self, z: Tensor, cond: Cond) -> Tensor:
        """Generate images (n, C, H, W), with black padding, from latents (n, latent_dim)."""
        return at_least_float32(self.generator(z, self.label(cond))) * self.mask - (1 - self.mask)

    def score(self, x: Tensor, cond: Cond, rng: RandomSource) -> Tensor:
        """Compute discriminator logits of augmented images, (n,) in full precision."""
        augmented = x if self.augmentation is None else self.augmentation(x, rng)
        return at_least_float32(self.discriminator(augmented, self.label(cond)))

    def fit_batch(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        parts = list(self._split_batch(x, cond, rng))
        metrics: dict[str, Tensor] = {}
        for part in parts:
            metrics = self._discriminator_step(*part)
        return metrics | self._generator_step(*parts[0])

    def check_batch_size(self, batch_size: int, processes: int) -> None:
        local = batch_size // processes
        if batch_size < self.d_steps or not (processes == 1 or local % self.d_steps == 0):
            raise UserError(
                f"The {local} images of each process are not divisible by model.d_steps={self.d_steps}: make"
                " trainer.global_batch_size a multiple of d_steps times the number of processes."
            )

    def _split_batch(self, x: Tensor, cond: Cond, rng: RandomSource) -> Iterator[tuple[Tensor, Cond, RandomSource]]:
        """Split the batch into ``d_steps`` parts; part k has images k, k + d_steps, ... of the global batch."""
        self.check_batch_size(rng.total, rng.total // len(rng))
        for k in range(self.d_steps):
            rows = slice((k - rng.start) % self.d_steps, None, self.d_steps)
            yield x[rows], {name: value[rows] for name, value in cond.items()}, rng.strided(self.d_steps, k)

    def _discriminator_step(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self.generate(rng.normal((self.latent_dim,)), cond)
        real, fake = (images.detach().requires_grad_(bool(self.penalty)) for images in (x, fake))
        score = partial(self.score, cond=cond, rng=rng)
        step = DiscriminatorStep(real, fake, score(real), score(fake), score, rng)
        loss = self.adversarial.discriminator_loss(step.real_scores, step.fake_scores).mean()
        metrics = {"d_loss": loss, "d_real": step.real_scores.mean(), "d_fake": step.fake_scores.mean()}
        self.seen += rng.total
        for name, penalty in self.penalty.items():
            metrics[name] = penalty(step).mean()
            loss = loss + penalty.factor(self.seen) * metrics[name]
        metrics["d_grad"] = manual_step(self, 0, loss, list(self.discriminator.parameters()))
        if self.augmentation is not None:
            margin = self.adversarial.margin(step.real_scores.detach(), step.fake_scores.detach())
            self.augmentation.update(margin, rng.total, self.seen)
            metrics["augmentation"] = self.augmentation.strength.clone()
        return {name: value.detach() for name, value in metrics.items()}

    def _generator_step(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        with frozen(self.discriminator):
            fake = self.generate(rng.normal((self.latent_dim,)), cond)
            real_scores = None
            if self.adversarial.needs_real_scores:
                with torch.no_grad():
                    real_scores = self.score(x, cond, rng)
            loss = self.adversarial.generator_loss(real_scores, self.score(fake, cond, rng)).mean()
            grad_norm = manual_step(self, 1, loss, list(self.generator.parameters()))
        return {"g_loss": loss.detach(), "g_grad": grad_norm}

    @torch.no_grad()
    def validation_metrics(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute the scores of held-out images and of fakes.

        The discriminator overfits if held-out images score far below training images (``d_real``).
        """
        cond = self.select_conditions(cond)
        fake = self.generate(rng.normal((self.latent_dim,)), cond)
        return {"d_held_out": self.score(x, cond, rng), "d_fake": self.score(fake, cond, rng)}

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Create the optimisers for the discriminator and the generator."""
        return [self.new_optimizer(network.parameters()) for network in (self.discriminator, self.generator)]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the generator, the only network used for sampling."""
        return {f"generator.{name}": p for name, p in self.generator.named_parameters()}

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        z = draw_normal((n, self.latent_dim), generator, self.device, self.dtype)
        return self.generate(z, self.select_conditions(cond)).clamp(-1, 1)

    def sampling_description(self) -> str:
        return "one pass, z ~ N(0, I)"

    def nfe_networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}
