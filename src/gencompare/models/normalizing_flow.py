"""Normalizing flows: exact densities by a change of variables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.dequantization import UNIFORM_DEQUANTIZATION, dequantize, log_bin_volume
from gencompare.errors import UserError, check_non_negative, check_number, check_positive
from gencompare.generative_model import Cond, DataSpec, GenerativeModel, LikelihoodEstimate
from gencompare.models import visualization
from gencompare.networks.bijection import Bijection
from gencompare.rng import RandomSource, draw_normal, uniform_like

TEMPERATURES = (1.0, 0.85, 0.7, 0.5, 0.0)
"""Temperatures that `NormalizingFlow.visualize` shows."""


class NormalizingFlow(GenerativeModel):
    r"""A flow :math:`z = f(x)` with the prior N(0, I):

    .. math:: \log p(x) = \log N(f(x); 0, I) + \log \left| \det \frac{\partial f(x)}{\partial x} \right|.

    Rezende and Mohamed (2015), "Variational inference with normalizing flows", https://arxiv.org/abs/1505.05770; Dinh
    et al. (2017), "Density estimation using Real NVP", https://arxiv.org/abs/1605.08803. The loss is
    :math:`-\log_2 p(x)` per value, and samples are :math:`f^{-1}(T \epsilon)` with temperature T, clamped to [-1, 1].

    The density is that of the pixels without padding. Discrete data are dequantised (`gencompare.dequantization`).

    With ``noise_std`` :math:`\sigma`, training adds Gaussian noise instead, which gives better samples of images than
    the uniform noise, and each sample is denoised by

    .. math:: x \leftarrow x + \sigma^2 \nabla_x \log p(x),

    the mean of the clean image given the noisy one if p is the density of noisy images (Tweedie's formula). Zhai et al.
    (2024), "Normalizing flows are capable generative models", sections 2.4 and 2.5, https://arxiv.org/abs/2412.06329.
    Denoising takes a forward and a backward pass. Bits/dim are those of the density p before denoising.

    Args:
        spec: shape, number of classes and value range of the data.
        bijection: a factory ``(shape, num_classes) -> Bijection`` for images without padding.
        noise_std: :math:`\sigma`; None for uniform dequantisation.
        temperature: T, the standard deviation of z in sampling; 1 samples from p.
        label_dropout: probability of dropping the label of a training image, for guidance.
        guidance_scale: strength of classifier-free guidance in sampling; 1 for none.
        kwargs: see `TrainedModel`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        bijection: Callable[..., Bijection],
        noise_std: float | None = None,
        temperature: float = 1.0,
        label_dropout: float = 0.0,
        guidance_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(spec, **kwargs)
        check_positive("model.noise_std", noise_std, null="uniform dequantisation")
        check_non_negative("model.temperature", temperature)
        check_number("model.label_dropout", label_dropout)
        check_non_negative("model.guidance_scale", guidance_scale)
        self.noise_std, self.temperature = noise_std, temperature
        self.label_dropout, self.guidance_scale = label_dropout, guidance_scale
        (c, h, w), p = spec.shape, spec.padding
        self.bijection = bijection((c, h - 2 * p, w - 2 * p), spec.num_classes if self.conditional else 0)
        _check_guidance(self)

    # Density

    def log_prob(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Compute log p(x) in nats, (n,), at points x without padding; ``label`` is (n,), or None."""
        return torch.stack(self._log_prob_terms(x, label)).sum(0)

    def _log_prob_terms(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute log N(z; 0, I) and the log-determinant, each (n,)."""
        z, log_det = self.bijection(x, label)
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1), log_det

    def _bits_terms(self, x: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """Compute the terms of bits/dim of dequantised images x without padding, each (n,)."""
        prior, log_det = self._log_prob_terms(x, label)
        nats_per_bit = self.spec.num_values * math.log(2)
        log_volume = log_bin_volume(self.spec.num_bins, self.spec.num_values)
        return {"prior": -prior / nats_per_bit, "log_det": -(log_det + log_volume) / nats_per_bit}

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute ``loss`` in bits per value, and its terms ``prior`` and ``log_det``.

        With uniform dequantisation, the loss is also ``bits_per_dim``.
        """
        x, label = self.spec.crop(x), self.label(cond)
        if self.noise_std is None:
            noisy = dequantize(x, rng.uniform(x.shape[1:]).to(x), self.spec.num_bins)
        else:
            noisy = x + self.noise_std * rng.normal(x.shape[1:]).to(x)
        if label is not None and self.training and self.label_dropout:
            label = label.masked_fill(rng.uniform().to(x.device) < self.label_dropout, self.spec.num_classes)
        terms = self._bits_terms(noisy, label)
        loss = terms["prior"] + terms["log_det"]
        return {"loss": loss, **({"bits_per_dim": loss} if self.noise_std is None else {}), **terms}

    def validation_metrics(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute the metrics of `losses`, and ``bits_per_dim`` with uniform dequantisation in any case."""
        metrics = super().validation_metrics(x, cond, rng)
        if "bits_per_dim" not in metrics:
            x = self.spec.crop(x)
            x = dequantize(x, rng.uniform(x.shape[1:]).to(x), self.spec.num_bins)
            metrics["bits_per_dim"] = torch.stack(list(self._bits_terms(x, self.label(cond)).values())).sum(0)
        return metrics

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        """Return the exact density, of dequantised pixels if they are discrete."""
        method = "continuous" if self.spec.num_bins is None else UNIFORM_DEQUANTIZATION
        return {"flow": LikelihoodEstimate("exact", self._terms, method)}

    @torch.no_grad()
    def _terms(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        x = self.spec.crop(x)
        x = dequantize(x, uniform_like(x, generator), self.spec.num_bins)
        return self._bits_terms(x, self.label(self.select_conditions(cond)))

    def micro_batched_networks(self) -> list[nn.Module]:
        return [self.bijection] if self.bijection.maps_each_sample else []

    # Sampling

    @torch.no_grad()
    def encode(self, x: Tensor, cond: Cond) -> Tensor:
        """Map images (n, C, H, W) to latents, (n, ``spec.num_values``)."""
        return self.bijection(self.spec.crop(x), self.label(self.select_conditions(cond)))[0]

    @torch.no_grad()
    def decode(self, z: Tensor, cond: Cond) -> Tensor:
        """Invert `encode` exactly, up to rounding; the padding is black."""
        return self.spec.pad(self.bijection.inverse(z, self.label(self.select_conditions(cond))))

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        label = self.label(self.select_conditions(cond))
        z = self.temperature * self._noise(n, generator)
        x = self.bijection.inverse(z, label, self.guidance_scale)
        if self.noise_std is not None:
            x = self.denoise(x, label)
        return self.spec.pad(x.clamp(-1, 1))

    def denoise(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        r"""Compute :math:`x + \sigma^2 \nabla_x \log p(x)` of noisy images x without padding."""
        assert self.noise_std is not None
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x, label).sum(), x)
        return x.detach() + self.noise_std**2 * score

    def sampling_description(self) -> str:
        parts = [f"inverse of the flow ({self.bijection.describe_inverse()}), temperature {self.temperature:g}"]
        parts += [] if self.guidance_scale == 1 else [f"guidance {self.guidance_scale:g}"]
        return ", ".join(parts + ([] if self.noise_std is None else [f"denoised (sigma {self.noise_std:g})"]))

    def nfe_networks(self) -> dict[str, nn.Module]:
        return self.bijection.nfe_networks()

    @torch.no_grad()
    def visualize(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Create image grids, without guidance and denoising.

        Returns:
            ``interpolation``: one row per pair of images, between their latents. ``temperatures``: one row per value of
            `TEMPERATURES`, from the same noise.
        """
        noise = self._noise(len(x), generator)
        return {
            "interpolation": visualization.interpolation(self.decode, self.encode(x, cond), cond),
            "temperatures": torch.stack([self.decode(t * noise, cond) for t in TEMPERATURES]),
        }

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw standard normal noise (n, ``spec.num_values``), generated on the device of the generator."""
        return draw_normal((n, self.spec.num_values), generator, self.device, self.dtype)


def _check_guidance(model: NormalizingFlow) -> None:
    """Raise `UserError` unless label dropout and guidance fit the model."""
    if not 0 <= model.label_dropout <= 1:
        raise UserError(f"model.label_dropout={model.label_dropout} must be in [0, 1].")
    name = type(model.bijection).__name__
    for option, value, none in (
        ("label_dropout", model.label_dropout, 0),
        ("guidance_scale", model.guidance_scale, 1),
    ):
        if value != none and not model.bijection.supports_guidance:
            raise UserError(f"model.{option}={value}: {name} has no guidance: use model.{option}={none}.")
        if value != none and not model.conditional:
            raise UserError(f"model.{option}={value} needs labels: add model.conditional=true.")
    if model.guidance_scale != 1 and not model.label_dropout:
        raise UserError(
            f"model.guidance_scale={model.guidance_scale} needs a model that was also trained without labels: train it"
            " with model.label_dropout=0.1, or use model.guidance_scale=1."
        )
