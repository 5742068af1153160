"""The samplers of DDPM and DDIM: step by step from x_t to x_s through the predicted image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.samplers.base import Sampler, Step, steps_between
from gencompare.diffusion.schedules import Scales
from gencompare.errors import UserError
from gencompare.seeds import normal_like


@dataclass(frozen=True, kw_only=True)
class Ancestral(Sampler):
    r"""Draws from p(x_s | x_t) = N(mean of q(x_s | x_t, x_0), std^2), step by step (Ho et al. 2020, algorithm 2).

    With c = 1 - SNR_t / SNR_s, the mean is (alpha_t sigma_s^2) / (alpha_s sigma_t^2) x_t + alpha_s c x_0 (their eq. 7)
    and std = sqrt(c) sigma_s^(1 - v) sigma_t^v; into clean data no noise is added.

    Args:
        variance: v, from 0 ("fixed small", their beta tilde) to 1 ("fixed large", their beta), geometric in between
            (Nichol and Dhariwal 2021, eq. 15). Where the network learns v, value by value, its own is used.
    """

    order = 1
    variance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.variance <= 1:
            raise UserError(f"sampler.variance={self.variance}: give a number from 0 (fixed small) to 1 (fixed large).")

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            v = self.variance if prediction.variance_share is None else prediction.variance_share
            kept, gain, std = posterior(now, then, v)
            x = kept * x + gain * prediction.x0 + std * normal_like(x, generator)
            yield Step(s, x, prediction)


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    r"""x_s = alpha_s x_0 + sqrt(sigma_s^2 - tau^2) eps + tau z (Song et al. 2021, "DDIM", eq. 12 and 16).

    tau = eta sigma_s sqrt(1 - SNR_t / SNR_s). With eta = 0 it is deterministic, and Euler's method on the
    probability-flow ODE in x / alpha over sigma / alpha; with eta = 1 it is `Ancestral` with small variance.
    """

    order = 1
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise UserError(f"sampler.eta={self.eta}: give a number from 0 (deterministic) to 1 (ancestral).")

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            share = self.eta**2 * -torch.expm1(now.log_snr - then.log_snr)  # tau^2 / sigma_s^2
            x = then.alpha * prediction.x0 + then.sigma * (1 - share).sqrt() * prediction.eps
            if self.eta > 0:
                x = x + then.sigma * share.sqrt() * normal_like(x, generator)
            yield Step(s, x, prediction)


def posterior(now: Scales, then: Scales, variance: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The step of `Ancestral` from ``now`` to ``then``: what it multiplies x_t, x_0 and standard normal noise by."""
    c = -torch.expm1(now.log_snr - then.log_snr)
    # = alpha_t sigma_s^2 / (alpha_s sigma_t^2), for (1 - c) loses its last digits where c is nearly 1
    kept = torch.exp(now.log_snr - then.log_snr) * then.alpha / now.alpha
    std = c.sqrt() * then.sigma ** (1 - variance) * now.sigma**variance * (then.sigma > 0)
    return kept, then.alpha * c, std
