"""The generative adversarial network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec, GenerativeModel
from gencompare.models.discriminator_augmentation import DiscriminatorAugmentation
from gencompare.models.gan_penalties import DiscriminatorStep, Penalty
from gencompare.models.manual_optimization import frozen, manual_step
from gencompare.networks.gan_networks import normalize_spectrally
from gencompare.rng import RandomSource


class Adversarial(ABC):
    """A pair of losses. Scores are (n,), or (n, patches) where images are not paired, and losses too; each player
    minimises the mean of its own.

    ``real`` and ``fake`` are the discriminator's scores D(x_i) of real images and D(G(z_i)) of as many fakes.
    """

    pairs: ClassVar[bool] = False
    """Whether the generator's loss looks at the real images' scores too, which are then worked out for it."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor: ...

    @abstractmethod
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """``real`` is None unless ``pairs``."""

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        """By how much the discriminator takes real images for real, (n,): its sign says whether it is right."""
        return real


@dataclass(frozen=True)
class NonSaturating(Adversarial):
    """-log S(real) - log(1 - S(fake)), against -log S(fake), S the logistic function (Goodfellow et al. 2014)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real) + F.softplus(fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return F.softplus(-fake)


@dataclass(frozen=True)
class Hinge(Adversarial):
    """max(0, 1 - real) + max(0, 1 + fake), against -fake (Lim and Ye 2017; Miyato et al. 2018, eq. 16 and 17)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return -fake


@dataclass(frozen=True)
class Wasserstein(Adversarial):
    """fake - real, against -fake (Arjovsky et al. 2017, "Wasserstein GAN", algorithm 1).

    It estimates a distance as long as D is 1-Lipschitz, which a penalty (``wgan_gp``) or spectral norm sees to. A
    constant added to D changes nothing, so its sign alone says nothing: `margin` is the difference.
    """

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return -fake

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        return real - fake


@dataclass(frozen=True)
class Relativistic(Adversarial):
    """-log S(real - fake), against -log S(fake - real): is x_i more real than its partner G(z_i)?

    The relativistic pairing loss of Jolicoeur-Martineau (2019), with f(t) = -log(1 + e^-t) as in Huang et al. (2024),
    "The GAN is dead; long live the GAN!", eq. 2. No fake can win by being far from all real ones, as each is judged
    beside its partner, which is what keeps modes from being dropped (their section 2.1).
    """

    pairs = True

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        assert real is not None
        return F.softplus(real - fake)

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        return real - fake


class GAN(GenerativeModel):
    """A generator against a discriminator, optimised in turn (Goodfellow et al. 2014).

    In each training step the discriminator takes ``d_steps`` steps on ``adversarial.discriminator`` plus the
    penalties, each on its own part of the batch and against fresh fakes, then the generator one step on
    ``adversarial.generator``, on as many fakes. Fakes wear the labels of real images. No layer uses a statistic of the
    batch: several processes with a part of the batch each learn what one with all of it learns.

    Args:
        generator: a factory ``(latent_dim, shape, num_classes) -> module(z, label)``, images (n, *shape).
        discriminator: a factory ``(shape, num_classes) -> module(x, label)``, scores (n,).
        adversarial: the pair of losses.
        penalty: penalties on the discriminator's gradient, by the name under which they are logged.
        discriminator_augmentation: a factory ``spec -> DiscriminatorAugmentation``; None shows images as they are.
        latent_dim: numbers in z ~ N(0, I).
        spectral_norm: normalise the discriminator's weights.
        d_steps: discriminator steps a training step.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        generator: Callable[..., nn.Module],
        discriminator: Callable[..., nn.Module],
        adversarial: Adversarial,
        penalty: Mapping[str, Penalty] | None = None,
        discriminator_augmentation: Callable[[DataSpec], DiscriminatorAugmentation] | None = None,
        latent_dim: int = 64,
        spectral_norm: bool = False,
        d_steps: int = 1,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        if latent_dim < 1 or d_steps < 1:
            raise UserError(f"model.latent_dim={latent_dim}, model.d_steps={d_steps}: both must be at least 1.")
        self.automatic_optimization = False
        self.adversarial, self.penalty = adversarial, dict(penalty or {})
        self.latent_dim, self.d_steps = latent_dim, d_steps
        classes = spec.num_classes if self.conditional else 0
        self.generator = generator(latent_dim, spec.shape, classes)
        self.discriminator = discriminator(spec.shape, classes)
        if spectral_norm:
            normalize_spectrally(self.discriminator)
        self.augmentation = None if discriminator_augmentation is None else discriminator_augmentation(spec)
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.seen: Tensor
        """Training images so far, which the weights of penalties may depend on."""

    def generate(self, z: Tensor, cond: Cond) -> Tensor:
        """Images (n, C, H, W), black outside of the real pixels, from latents (n, latent_dim)."""
        return self.generator(z, self.label(cond)).float() * self.mask - (1 - self.mask)

    def score(self, x: Tensor, cond: Cond, draws: RandomSource) -> Tensor:
        """The discriminator's logits of augmented images, (n,) in float32."""
        shown = x if self.augmentation is None else self.augmentation(x, draws)
        return self.discriminator(shown, self.label(cond)).float()

    def fit_batch(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        parts = list(self._parts(x, cond, draws))
        figures: dict[str, Tensor] = {}
        for part in parts:
            figures = self._discriminator_step(*part)
        return figures | self._generator_step(*parts[0])

    def _parts(self, x: Tensor, cond: Cond, draws: RandomSource) -> Iterator[tuple[Tensor, Cond, RandomSource]]:
        """The batch in ``d_steps`` parts: part k is every d_steps-th image of the global batch from image k on."""
        alone = len(draws) == draws.total
        if draws.total < self.d_steps or not (alone or len(draws) % self.d_steps == 0):
            raise UserError(
                f"model.d_steps={self.d_steps} takes the batch of each process apart, and it has {len(draws)} images:"
                " make trainer.global_batch_size a multiple of d_steps times the number of processes."
            )
        for k in range(self.d_steps):
            rows = slice((k - draws.start) % self.d_steps, None, self.d_steps)
            yield x[rows], {name: value[rows] for name, value in cond.items()}, draws.every(self.d_steps, k)

    def _discriminator_step(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        with torch.no_grad():
            made = self.generate(draws.normal((self.latent_dim,)), cond)
        real, fake = (images.detach().requires_grad_(bool(self.penalty)) for images in (x, made))
        score = partial(self.score, cond=cond, draws=draws)
        duel = DiscriminatorStep(real, fake, score(real), score(fake), score, draws)
        loss = self.adversarial.discriminator(duel.real_scores, duel.fake_scores).mean()
        figures = {"d_loss": loss, "d_real": duel.real_scores.mean(), "d_fake": duel.fake_scores.mean()}
        self.seen += draws.total
        for name, penalty in self.penalty.items():
            figures[name] = penalty(duel).mean()
            loss = loss + penalty.factor(self.seen) * figures[name]
        figures["d_grad"] = manual_step(self, 0, loss, list(self.discriminator.parameters()))
        if self.augmentation is not None:
            margin = self.adversarial.margin(duel.real_scores.detach(), duel.fake_scores.detach())
            self.augmentation.update(margin, draws.total, self.seen)
            figures["augmentation"] = self.augmentation.strength.clone()
        return {name: value.detach() for name, value in figures.items()}

    def _generator_step(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        with frozen(self.discriminator):
            fakes = self.generate(draws.normal((self.latent_dim,)), cond)
            real = None
            if self.adversarial.pairs:
                with torch.no_grad():
                    real = self.score(x, cond, draws)
            loss = self.adversarial.generator(real, self.score(fakes, cond, draws)).mean()
            gradient = manual_step(self, 1, loss, list(self.generator.parameters()))
        return {"g_loss": loss.detach(), "g_grad": gradient}

    @torch.no_grad()
    def validation_figures(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """Scores of held-out images and of fakes. Held-out images that score far below the training images
        (``d_real``) tell of a discriminator that knows its training set by heart."""
        cond = self.used(cond)
        fakes = self.generate(draws.normal((self.latent_dim,)), cond)
        return {"d_held_out": self.score(x, cond, draws), "d_fake": self.score(fakes, cond, draws)}

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """The discriminator's and the generator's."""
        assert self.optimizer_factory is not None
        return [self.optimizer_factory(player.parameters()) for player in (self.discriminator, self.generator)]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """The generator's: nothing else is used to sample."""
        return {f"generator.{name}": p for name, p in self.generator.named_parameters()}

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.latent_dim, generator=generator, device=generator.device)
        return self.generate(z.to(self.device), self.used(cond)).clamp(-1, 1)

    def sampling_description(self) -> str:
        return "one pass, z ~ N(0, I)"

    def counted_networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}
