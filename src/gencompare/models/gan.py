"""The generative adversarial network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.contract import Cond, DataSpec, GenerativeModel
from gencompare.errors import UserError
from gencompare.models.adversarial import Adversarial, squared_gradient
from gencompare.models.alternating import frozen, take_step
from gencompare.networks.projection import ProjectionDiscriminator
from gencompare.seeds import Draws


class GAN(GenerativeModel):
    """A generator against a discriminator, optimised in turn (Goodfellow et al. 2014).

    For each batch the discriminator takes ``d_steps`` steps on ``adversarial.discriminator`` plus
    r1 / 2 |grad_x D(x)|^2 at real images (Mescheder et al. 2018), each against fresh fakes, then the generator one step
    on ``adversarial.generator``. The latent enters the generator at its root and modulates its normalisations. No layer
    uses a statistic of the batch: several processes with a part of the batch each learn what one with all of it learns.

    Fakes wear the labels of the real batch; with labels the discriminator is a projection discriminator.

    Args:
        generator: a factory ``(in_features, shape, embed_dim) -> module(z, e)``.
        discriminator: a factory ``(shape, out_features, 0) -> module(x)``, the trunk under a linear head.
        adversarial: the pair of losses.
        latent_dim: numbers in z ~ N(0, I).
        label_dim: size of the label's embedding in the generator of a conditional model.
        features: size of the trunk's output.
        spectral_norm: normalise the discriminator's weights.
        r1: weight gamma of the gradient penalty; 0 leaves it out.
        d_steps: discriminator steps a batch.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        generator: Callable[..., nn.Module],
        discriminator: Callable[..., nn.Module],
        adversarial: Adversarial,
        latent_dim: int = 64,
        label_dim: int = 32,
        features: int = 128,
        spectral_norm: bool = True,
        r1: float = 0.0,
        d_steps: int = 1,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        if latent_dim < 1 or d_steps < 1:
            raise UserError(f"model.latent_dim={latent_dim}, model.d_steps={d_steps}: both must be at least 1.")
        if r1 < 0:
            raise UserError(f"model.r1={r1}: the weight of a penalty cannot be negative.")
        self.automatic_optimization = False
        self.adversarial, self.latent_dim, self.r1, self.d_steps = adversarial, latent_dim, r1, d_steps
        classes = spec.num_classes if self.conditional else 0
        embed_dim = latent_dim + (label_dim if self.conditional else 0)
        self.generator = generator(latent_dim, spec.shape, embed_dim)
        self.labels = nn.Embedding(classes, label_dim) if self.conditional else None
        self.discriminator = ProjectionDiscriminator(
            discriminator(spec.shape, features, 0), features, classes, spectral_norm=spectral_norm
        )
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor

    def generate(self, z: Tensor, cond: Cond) -> Tensor:
        """Images (n, C, H, W) in (-1, 1), black outside of the real pixels, from latents (n, latent_dim)."""
        style = z if self.labels is None else torch.cat([z, self.labels(_label(cond))], dim=1)
        return torch.tanh(self.generator(z, style).float()) * self.mask - (1 - self.mask)

    def score(self, x: Tensor, cond: Cond) -> Tensor:
        """The discriminator's logits, (n,) in float32."""
        return self.discriminator(x, _label(cond) if self.conditional else None).float()

    def training_step(self, batch: tuple[Tensor, Cond], batch_idx: int) -> dict[str, Tensor]:
        x, cond = batch[0], self.used(batch[1])
        assert self.draws is not None, "the trainer's clock sets the draws of a step"
        figures: dict[str, Tensor] = {}
        for _ in range(self.d_steps):
            figures = self._discriminator_step(x, cond, self.draws)
        return figures | self._generator_step(cond, self.draws)

    def _discriminator_step(self, x: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        with torch.no_grad():
            fakes = self.generate(draws.normal((self.latent_dim,)), cond)
        x = x.detach().requires_grad_(self.r1 > 0)
        twice = {name: torch.cat([value, value]) for name, value in cond.items()}
        real, fake = self.score(torch.cat([x, fakes]), twice).chunk(2)
        loss = self.adversarial.discriminator(real, fake).mean()
        figures = {"d_loss": loss, "d_real": real.mean(), "d_fake": fake.mean()}
        if self.r1:
            figures["r1"] = squared_gradient(real, x).mean()
            loss = loss + 0.5 * self.r1 * figures["r1"]
        figures["d_grad"] = take_step(self, 0, loss, list(self.discriminator.parameters()))
        return {name: value.detach() for name, value in figures.items()}

    def _generator_step(self, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        with frozen(self.discriminator):
            fakes = self.generate(draws.normal((self.latent_dim,)), cond)
            loss = self.adversarial.generator(self.score(fakes, cond)).mean()
            gradient = take_step(self, 1, loss, self._generator_parameters())
        return {"g_loss": loss.detach(), "g_grad": gradient}

    @torch.no_grad()
    def validation_figures(self, x: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        """Scores of held-out images and of fakes. Held-out images that score far below the training images
        (``d_real``) tell of a discriminator that knows its training set by heart."""
        cond = self.used(cond)
        fakes = self.generate(draws.normal((self.latent_dim,)), cond)
        return {"d_held_out": self.score(x, cond), "d_fake": self.score(fakes, cond)}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The discriminator's and the generator's."""
        assert self.optimizer_factory is not None
        return [
            self.optimizer_factory(self.discriminator.parameters()),
            self.optimizer_factory(self._generator_parameters()),
        ]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """The generator's: nothing else is used to sample."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("discriminator.")}

    def _generator_parameters(self) -> list[nn.Parameter]:
        return list(self.averaged_parameters().values())

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.latent_dim, generator=generator, device=generator.device)
        return self.generate(z.to(self.device), self.used(cond))

    def sampling_description(self) -> str:
        return "one pass, z ~ N(0, I)"

    def counted_networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}


def _label(cond: Cond) -> Tensor:
    if "label" not in cond:
        raise UserError("This GAN is conditional: it needs a class for each image, cond['label'].")
    return cond["label"]
