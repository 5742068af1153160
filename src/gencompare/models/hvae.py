"""Hierarchical variational autoencoders."""

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
from gencompare.rng import RandomSource, draw_normal

TEMPERATURES = (1.0, 0.85, 0.7, 0.5, 0.0)
"""Sampling temperatures that ``task=visualize`` shows."""
MAX_CONSECUTIVE_SKIPS = 50
"""Consecutive skipped steps after which training stops."""


class HVAE(GenerativeModel):
    r"""A VAE with latents :math:`z_1, ..., z_L` at several resolutions, from coarse to fine.

    Child (2021), "Very deep VAEs generalize autoregressive models and can outperform them on images",
    https://arxiv.org/abs/2011.10650. The evidence lower bound is

    .. math:: \log p(x) \ge E_q[\log p(x | z)] - \sum_l E_q KL(q(z_l | z_{<l}, x) \| p(z_l | z_{<l})),

    with diagonal Gaussians p and q computed in one top-down network (`networks.hierarchical`). The loss is the negative
    bound in nats per value, with one sample of z per image.

    With KL warm-up, the weight of the KL terms increases linearly to 1 over the first ``kl_warmup_steps`` training
    steps (Sonderby et al. 2016, "Ladder variational autoencoders", https://arxiv.org/abs/1602.02282; also NVAE).
    Without warm-up, latents cost more than they explain while p(x | z) is still wide, and collapse to the prior. The
    reported bound is not affected.

    Gradient skipping (Child 2021): a step whose gradient norm is not finite or above ``grad_skip`` changes neither
    weights nor optimiser state. The networks have no normalisation, and occasionally the posterior of a single image
    overflows. The thresholds of the paper apply, since its loss is in nats per value too. The metric ``skipped`` is the
    fraction of skipped steps, and the buffer ``skipped_steps`` is their total number; `MAX_CONSECUTIVE_SKIPS` skips in
    a row end the run. The decision costs one device synchronisation per step.

    At temperature T, :math:`z_l \sim N(\mu_l, (T \sigma_l)^2)` is sampled instead of the prior
    :math:`N(\mu_l, \sigma_l^2)`. T = 1 is the model; lower temperatures give more typical images. Samples are means of
    p(x | z) or, with ``pixel_noise``, samples from p(x | z).

    Args:
        spec: shape, number of classes and value range of the data.
        decoder: a factory ``(shape, out_channels, num_classes) -> TopDownDecoder``, which includes the encoder.
        likelihood: a factory ``spec -> PixelLikelihood``.
        kl_warmup_steps: training steps until the KL terms have full weight; 0 disables warm-up.
        temperature: sampling temperature T, at least 0.
        grad_skip: gradient norm, before clipping, above which a step is skipped; None takes all steps.
        pixel_noise: whether to sample from p(x | z) instead of taking its mean.
        kwargs: see `TrainedModel`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        decoder: Callable[..., TopDownDecoder],
        likelihood: Callable[..., PixelLikelihood],
        kl_warmup_steps: int = 0,
        temperature: float = 1.0,
        grad_skip: float | None = None,
        pixel_noise: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(spec, **kwargs)
        if not temperature >= 0:
            raise UserError(
                f"model.temperature={temperature} must be at least 0 (0: the means of the priors, 1: the model itself)."
            )
        if grad_skip is not None and not grad_skip > 0:
            raise UserError(f"model.grad_skip={grad_skip} must be positive, or null to take every step.")
        if not kl_warmup_steps >= 0:
            raise UserError(f"model.kl_warmup_steps={kl_warmup_steps} must be at least 0 (0 disables warm-up).")
        network = getattr(decoder, "func", decoder)
        if isinstance(network, type) and not issubclass(network, TopDownDecoder):
            raise UserError(
                f"A hierarchical VAE needs a top-down decoder (model/decoder=vdvae), not {network.__name__}."
            )
        self.kl_warmup_steps, self.temperature, self.grad_skip = kl_warmup_steps, temperature, grad_skip
        self.pixel_noise = pixel_noise
        self.likelihood = likelihood(spec)
        # Named `ladder` in the state dict of existing checkpoints.
        self.ladder = decoder(spec.shape, self.likelihood.decoder_channels, spec.num_classes if self.conditional else 0)
        self.latent_dim = sum(math.prod(layer.latent_shape) for layer in self.ladder.layers)
        """Total dimension of all latents."""
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        self.skipped_steps: Tensor
        self._consecutive_skips = 0
        self._grad_status = torch.zeros(2)
        """Gradient norm of the current step, and a flag that is 1 if the step is skipped, otherwise 0."""

    # Evidence lower bound

    def terms(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        r"""Compute the terms of the negative ELBO in nats, each (n,).

        Returns:
            ``reconstruction``, :math:`-\log p(x | z)`, and the KL of each resolution with latents: ``kl_1x1``,
            ``kl_4x4``, and so on.
        """
        features = self.ladder.encode(x)
        kl: dict[str, Tensor] = {}

        def sample_posterior(layer: TopDownBlock, state: Tensor, prior: DiagonalGaussian) -> Tensor:
            posterior = layer.posterior(state, features[layer.level], prior)
            _, height, width = layer.latent_shape
            name, layer_kl = f"kl_{height}x{width}", posterior.kl(prior).flatten(1).sum(1)
            kl[name] = kl[name] + layer_kl if name in kl else layer_kl
            return posterior.reparameterize(rng.normal(layer.latent_shape).to(x.device))

        h = self.ladder(self._labels(cond, x), sample_posterior)
        return {"reconstruction": -self.likelihood.log_prob(h, x), **kl}

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute ``loss`` in nats per value, and the terms of the bound in bits per value.

        ``bits_per_dim``, the sum of the terms, is included if the likelihood is that of the data.
        """
        terms = self.terms(x, cond, rng)
        nats = torch.stack(list(terms.values())).sum(0)
        loss = terms["reconstruction"] + self.kl_weight * (nats - terms["reconstruction"])
        metrics = {"loss": loss / self.spec.num_values}
        if self.likelihood.is_data_likelihood:
            metrics["bits_per_dim"] = self._bits(nats)
        return metrics | {name: self._bits(value) for name, value in terms.items()}

    @property
    def kl_weight(self) -> float:
        """Weight of the KL terms in the current step; 1 outside training."""
        return kl_warmup(self, self.kl_warmup_steps)

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        return {"elbo": LikelihoodEstimate("bound", self._elbo)} if self.likelihood.is_data_likelihood else {}

    @torch.no_grad()
    def _elbo(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        terms = self.terms(x, self.select_conditions(cond), RandomSource.for_batch(generator, len(x)))
        return {name: self._bits(value) for name, value in terms.items()}

    def _bits(self, nats: Tensor) -> Tensor:
        """Convert nats per image to bits per value."""
        return nats / (self.spec.num_values * math.log(2))

    # Gradient skipping

    @property
    def skips_bad_gradients(self) -> bool:
        return self.grad_skip is not None

    def training_step(self, batch: tuple[Tensor, Cond], batch_idx: int) -> dict[str, Tensor]:
        metrics = super().training_step(batch, batch_idx)
        assert metrics is not None
        # `on_before_optimizer_step` fills these in after the backward pass, before they are logged.
        self._grad_status = torch.zeros(2, device=self.device)
        skipped = {} if self.grad_skip is None else {"skipped": self._grad_status[1]}
        return {**metrics, "grad_norm": self._grad_status[0], **skipped}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, or remove it to skip the step. (Optimisers ignore parameters without a gradient.)

        Gradients are already averaged over processes and unscaled (16-mixed), so all processes make the same decision.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.grad_skip is not None and not norm <= self.grad_skip:
            for p in parameters:
                p.grad = None
            self.skipped_steps += 1
            self._grad_status[1] = 1
            self._consecutive_skips += 1
            if self._consecutive_skips == MAX_CONSECUTIVE_SKIPS:
                raise TrainingStopped(
                    f"{MAX_CONSECUTIVE_SKIPS} consecutive steps had a gradient norm that was not finite or above"
                    f" model.grad_skip={self.grad_skip} (last norm: {norm:.4g})",
                    "Try a lower learning rate (model.optimizer.lr), or a larger model.grad_skip.",
                )
        else:
            self._consecutive_skips = 0
            if self.grad_clip is not None:
                clip_grads_with_norm_(parameters, self.grad_clip, norm)
        self._grad_status[0] = norm

    # Latents as one vector of standardised deviations from the priors; samples

    def encode(self, x: Tensor, cond: Cond) -> Tensor:
        r"""Compute the posterior means of all layers as one vector, (n, `latent_dim`); deterministic.

        Each mean is standardised by its prior given the earlier layers: :math:`u = (z - \mu) / \sigma`.
        """
        features, latents = self.ladder.encode(x), []

        def posterior_mean(layer: TopDownBlock, state: Tensor, prior: DiagonalGaussian) -> Tensor:
            posterior = layer.posterior(state, features[layer.level], prior)
            latents.append(prior.standardize(posterior.mean).flatten(1))
            return posterior.mean

        self.ladder(self._labels(cond, x), posterior_mean)
        return torch.cat(latents, dim=1)

    def decode(self, u: Tensor, cond: Cond) -> Tensor:
        """Decode standardised latents, as returned by `encode`, to the parameters of p(x | z).

        If ``u`` is standard normal, the latents are samples from the prior.
        """
        remaining = iter(u.split([math.prod(layer.latent_shape) for layer in self.ladder.layers], dim=1))

        def given_latent(layer: TopDownBlock, state: Tensor, prior: DiagonalGaussian) -> Tensor:
            return prior.reparameterize(next(remaining).unflatten(1, layer.latent_shape))

        return self.ladder(self._labels(cond, u), given_latent)

    def decoded_mean(self, u: Tensor, cond: Cond) -> Tensor:
        """Compute the mean of p(x | z), (n, C, H, W), with black padding."""
        return self.likelihood.mask_padding(self.likelihood.mean(self.decode(u, cond)))

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        u, cond = self.temperature * self._noise(n, generator), self.select_conditions(cond)
        if self.pixel_noise:
            return self.likelihood.mask_padding(self.likelihood.sample(self.decode(u, cond), generator))
        return self.decoded_mean(u, cond)

    def sampling_description(self) -> str:
        pixels = "sample of" if self.pixel_noise else "mean of"
        return f"{pixels} p(x | z), z from the prior at temperature {self.temperature:g}"

    @torch.no_grad()
    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        """Compute the mean of p(x | z) at the posterior means; deterministic."""
        cond = self.select_conditions(cond)
        return self.decoded_mean(self.encode(x, cond), cond)

    @torch.no_grad()
    def visualize(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Create image grids of means of p(x | z).

        Returns:
            ``kept_latents``: one row per image, with the image and then decodings that keep its latents up to each
            resolution, from the coarsest to the finest, and sample the remaining latents at the model's temperature.
            ``temperatures``: one row per value of `TEMPERATURES`, from the same noise. ``interpolation``: one row per
            pair of images.
        """
        cond = self.select_conditions(cond)
        u, noise = self.encode(x, cond), self._noise(len(x), generator)
        levels = [layer.level for layer in self.ladder.layers for _ in range(math.prod(layer.latent_shape))]
        level_of = torch.tensor(levels, device=x.device)
        kept = [
            self.decoded_mean(torch.where(level_of >= level, u, self.temperature * noise), cond)
            for level in sorted(set(levels), reverse=True)
        ]
        return {
            "kept_latents": torch.stack([x, *kept], dim=1),
            "temperatures": torch.stack([self.decoded_mean(t * noise, cond) for t in TEMPERATURES]),
            "interpolation": visualization.interpolation(self.decoded_mean, u, cond),
        }

    def nfe_networks(self) -> dict[str, nn.Module]:
        return {"decoder": self.ladder}

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw standard normal noise (n, `latent_dim`), generated on the device of the generator."""
        return draw_normal((n, self.latent_dim), generator, self.device, self.dtype)

    def _labels(self, cond: Cond, like: Tensor) -> Tensor:
        """Return the class of each entry of ``like``; zeros for an unconditional model."""
        label = self.label(cond)
        return torch.zeros(len(like), dtype=torch.int64, device=like.device) if label is None else label
