"""The hierarchical variational autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gencompare.errors import TrainingStopped, UserError
from gencompare.generative_model import Cond, DataSpec, GenerativeModel, LikelihoodEstimate
from gencompare.models import visualization
from gencompare.models.elbo import kl_warmup
from gencompare.models.pixel_likelihoods import PixelLikelihood
from gencompare.networks.hierarchical import DiagonalGaussian, TopDownBlock, TopDownDecoder
from gencompare.rng import RandomSource

TEMPERATURES = (1.0, 0.85, 0.7, 0.5, 0.0)
"""Those that ``task=explore`` shows."""
MAX_SKIPPED = 50
"""Steps in a row that may be skipped."""


class HVAE(GenerativeModel):
    r"""A VAE whose latents z_1, ..., z_L stand on a ladder of resolutions, each given those above it.

    log p(x) >= E_q[log p(x | z)] - sum_l E_q KL(q(z_l | z_<l, x) || p(z_l | z_<l)),

    all of them diagonal Gaussians, with p and q running from coarse to fine in one network (`networks.hierarchical`):
    Child 2021, "Very deep VAEs generalize autoregressive models and can outperform them on images". What is minimised
    is minus this bound in nats per real pixel value, one draw of z an image.

    With KL warm-up the weight of the divergences rises in even steps to 1 over the first ``kl_warmup_steps`` steps of
    training (Sonderby et al. 2016, "Ladder variational autoencoders"; NVAE does so too): while the distribution of the
    pixels is still wide, latents cost more than they tell, and die. What is reported is always the bound.

    A step whose gradient has a norm above ``grad_skip``, or one that is not finite, is not taken: weights and the
    optimiser's state stay as they are ("gradient skipping" of the same paper, whose thresholds hold for a loss in nats
    per value; its code, too, leaves out what is not finite). The networks have no normalisation, and now
    and then a single image's posterior overflows, at weights that do well before and after it. ``skipped`` is the share
    of such steps in what is logged, and ``skipped_steps`` counts them all; `MAX_SKIPPED` in a row end the run. The
    decision costs the host one wait for the device a step.

    Samples at temperature T draw z_l from N(mu_l, (T sigma_l)^2) in place of the prior N(mu_l, sigma_l^2): T = 1 is the
    model, and less of it gives more usual images. Their pixels are the mean of p(x | z), or draws with ``pixel_noise``.

    Args:
        ladder: a factory ``(shape, maps, num_classes) -> Ladder``.
        likelihood: a factory ``spec -> PixelLikelihood``.
        kl_warmup_steps: steps until the divergences have their full weight; 0 gives it from the start.
        temperature: T, at least 0; of samples alone.
        grad_skip: the largest norm of a gradient, before clipping, with which a step is taken; None takes all.
        pixel_noise: whether samples are draws from p(x | z).
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        ladder: Callable[..., TopDownDecoder],
        likelihood: Callable[..., PixelLikelihood],
        kl_warmup_steps: int = 0,
        temperature: float = 1.0,
        grad_skip: float | None = None,
        pixel_noise: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        if not temperature >= 0:
            raise UserError(
                f"model.temperature={temperature}: give 0 (the means of the priors) or more; 1 is the model."
            )
        if grad_skip is not None and not grad_skip > 0:
            raise UserError(f"model.grad_skip={grad_skip}: give a norm above 0, or null to take every step.")
        if not kl_warmup_steps >= 0:
            raise UserError(f"model.kl_warmup_steps={kl_warmup_steps}: it cannot be negative (0 leaves it out).")
        self.kl_warmup_steps, self.temperature, self.grad_skip = kl_warmup_steps, temperature, grad_skip
        self.pixel_noise = pixel_noise
        self.likelihood = likelihood(spec)
        self.ladder = ladder(spec.shape, self.likelihood.maps, spec.num_classes if self.conditional else 0)
        self.latent_dim = sum(math.prod(layer.latent_shape) for layer in self.ladder.layers)
        """Numbers in all latents together."""
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        self.skipped_steps: Tensor
        self._skipped_in_a_row = 0
        self._gradient = torch.zeros(2)
        """Norm of the gradient of the step in progress, and whether the step is skipped."""

    # The bound

    def terms(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """What adds up to minus the bound in nats, each (n,): ``reconstruction``, -log p(x | z), and the KL of each
        resolution that has latents, ``kl_1x1`` to that of the finest."""
        features = self.ladder.encode(x)
        kl: dict[str, Tensor] = {}

        def draw(layer: TopDownBlock, state: Tensor, prior: DiagonalGaussian) -> Tensor:
            posterior = layer.posterior(state, features[layer.level], prior)
            _, h, w = layer.latent_shape
            told, name = posterior.kl(prior).flatten(1).sum(1), f"kl_{h}x{w}"
            kl[name] = kl[name] + told if name in kl else told
            return posterior.at(draws.normal(layer.latent_shape).to(x.device))

        h = self.ladder(self._labels(cond, x), draw)
        return {"reconstruction": -self.likelihood.log_prob(h, x), **kl}

    def losses(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """``loss`` in nats a value, the terms of the bound in bits a value, and, where the likelihood is one of these
        pixels, the bound in bits/dim that they add up to, ``bits_per_dim``."""
        terms = self.terms(x, cond, draws)
        nats = torch.stack(list(terms.values())).sum(0)
        loss = terms["reconstruction"] + self.kl_weight * (nats - terms["reconstruction"])
        figures = {"loss": loss / self.spec.dims}
        if self.likelihood.gives_bits:
            figures["bits_per_dim"] = self._bits(nats)
        return figures | {name: self._bits(value) for name, value in terms.items()}

    @property
    def kl_weight(self) -> float:
        """What the divergences weigh at the step in progress; 1 outside of training."""
        return kl_warmup(self, self.kl_warmup_steps)

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        return {"elbo": LikelihoodEstimate("bound", self._elbo)} if self.likelihood.gives_bits else {}

    @torch.no_grad()
    def _elbo(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        terms = self.terms(x, self.used(cond), RandomSource.whole(generator, len(x)))
        return {name: self._bits(value) for name, value in terms.items()}

    def _bits(self, nats: Tensor) -> Tensor:
        """Nats an image as bits a real value."""
        return nats / (self.spec.dims * math.log(2))

    # Gradient skipping

    def training_step(self, batch: tuple[Tensor, Cond], batch_idx: int) -> dict[str, Tensor]:
        figures = super().training_step(batch, batch_idx)
        assert figures is not None
        # Known after the backward pass alone: `on_before_optimizer_step` writes them in before they are logged.
        self._gradient = torch.zeros(2, device=self.device)
        skipped = {} if self.grad_skip is None else {"skipped": self._gradient[1]}
        return {**figures, "grad_norm": self._gradient[0], **skipped}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, or take it away: an optimiser does nothing to a parameter without one.

        Gradients are the mean over the processes and without the scale of 16-mixed by now, so that all processes decide
        alike.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.grad_skip is not None and not norm <= self.grad_skip:
            for p in parameters:
                p.grad = None
            self.skipped_steps += 1
            self._gradient[1] = 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row == MAX_SKIPPED:
                raise TrainingStopped(
                    f"{MAX_SKIPPED} steps in a row had a gradient that is longer than model.grad_skip={self.grad_skip}"
                    f" or not finite (the last one's norm: {norm:.4g})",
                    "Try a lower learning rate (model.optimizer.lr), or a larger model.grad_skip.",
                )
        else:
            self._skipped_in_a_row = 0
            if self.grad_clip is not None:
                clip_grads_with_norm_(parameters, self.grad_clip, norm)
        self._gradient[0] = norm

    # Latents as one vector of deviations from the priors; samples and pictures

    def encode(self, x: Tensor, cond: Cond) -> Tensor:
        """The posteriors' means (n, `latent_dim`), layer after layer, each as u = (z - mu) / sigma with mu and sigma of
        the prior that the layers before leave: no random numbers."""
        features, found = self.ladder.encode(x), []

        def mean(layer: TopDownBlock, state: Tensor, prior: DiagonalGaussian) -> Tensor:
            posterior = layer.posterior(state, features[layer.level], prior)
            found.append(prior.standardized(posterior.mean).flatten(1))
            return posterior.mean

        self.ladder(self._labels(cond, x), mean)
        return torch.cat(found, dim=1)

    def decode(self, u: Tensor, cond: Cond) -> Tensor:
        """The parameters of p(x | z), with z given as by ``encode``: standard normal u are draws from the prior."""
        left = iter(u.split([math.prod(layer.latent_shape) for layer in self.ladder.layers], dim=1))

        def given(layer: TopDownBlock, state: Tensor, prior: DiagonalGaussian) -> Tensor:
            return prior.at(next(left).unflatten(1, layer.latent_shape))

        return self.ladder(self._labels(cond, u), given)

    def decoded_mean(self, u: Tensor, cond: Cond) -> Tensor:
        """The mean of p(x | z), black where there are no real pixels."""
        return self.likelihood.picture(self.likelihood.mean(self.decode(u, cond)))

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        u, cond = self.temperature * self._noise(n, generator), self.used(cond)
        if self.pixel_noise:
            return self.likelihood.picture(self.likelihood.sample(self.decode(u, cond), generator))
        return self.decoded_mean(u, cond)

    def sampling_description(self) -> str:
        pixels = "draw from" if self.pixel_noise else "mean of"
        return f"{pixels} p(x | z), z from the prior at temperature {self.temperature:g}"

    @torch.no_grad()
    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        """The mean of p(x | z) at the posteriors' means: no random numbers."""
        cond = self.used(cond)
        return self.decoded_mean(self.encode(x, cond), cond)

    @torch.no_grad()
    def pictures(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """What `Explores` asks for, as means of p(x | z).

        - ``kept_latents``: a row an image; the image, then what comes of it when its latents are kept down to each
          resolution that has some, from 1x1 alone to all of them, and the finer ones are sampled at the model's
          temperature.
        - ``temperatures``: a row for each of `TEMPERATURES`, of the same random numbers.
        - ``interpolation``: a row for each pair of images.
        """
        cond = self.used(cond)
        code, noise = self.encode(x, cond), self._noise(len(x), generator)
        levels = [layer.level for layer in self.ladder.layers for _ in range(math.prod(layer.latent_shape))]
        level_of = torch.tensor(levels, device=x.device)
        kept = [
            self.decoded_mean(torch.where(level_of >= level, code, self.temperature * noise), cond)
            for level in sorted(set(levels), reverse=True)
        ]
        return {
            "kept_latents": torch.stack([x, *kept], dim=1),
            "temperatures": torch.stack([self.decoded_mean(t * noise, cond) for t in TEMPERATURES]),
            "interpolation": visualization.interpolation(self.decoded_mean, code, cond),
        }

    def counted_networks(self) -> dict[str, nn.Module]:
        return {"ladder": self.ladder}

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Standard normal numbers (n, `latent_dim`), drawn where the generator lives."""
        return torch.randn(n, self.latent_dim, generator=generator, device=generator.device).to(self.device)

    def _labels(self, cond: Cond, like: Tensor) -> Tensor:
        """The class of each row of ``like``; noughts for a model without classes."""
        label = self.label(cond)
        return torch.zeros(len(like), dtype=torch.int64, device=like.device) if label is None else label
