r"""Solvers of the reverse SDE dx = (f x - g^2 score) dt + g dw, which runs from noise to data.

Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations", eq. 6. Into clean data
every solver goes to the predicted image, without noise (Jolicoeur-Martineau et al. 2021, section 3.1).

Where the log-SNR rises by more than `LONG` in one step they take the step of `Ancestral`, which none is too long for:
beyond, Euler-Maruyama leads past the predicted image and blows up, and reverse diffusion adds more noise than there is
to be at the end. So it is at the noisy end of schedules that end in almost pure noise, and in few steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.parameterization import Prediction
from gencompare.diffusion.samplers.ancestral import posterior
from gencompare.diffusion.samplers.base import Sampler, Step, steps_between
from gencompare.diffusion.schedules import Scales
from gencompare.seeds import normal_like

LONG = 1.0


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(Sampler):
    r"""x_s = x_t - h (f x_t - g^2 score) + g sqrt(h) z, with h = t - s and f, g at t. Weak order 1.

    g^2 h = r sigma^2, where r = -h d lambda / dt is what the log-SNR would rise by at the slope that it has at t.
    """

    order = 1

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            h = (t - s).to(x.dtype)
            r = -h * now.log_snr_slope
            kept = 1 - h * now.log_alpha_slope - r
            euler = kept, r * now.alpha, r.sqrt() * now.sigma
            long = (r > LONG) | (then.sigma == 0)
            yield Step(s, x := _moved(x, prediction, _either(long, posterior(now, then), euler), generator), prediction)


@dataclass(frozen=True, kw_only=True)
class ReverseDiffusion(Sampler):
    r"""x_s = (2 - a) x_t + b^2 score + b z, where x_t = a x_s + b z is the forward step. Weak order 1.

    a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2: the reverse SDE in the steps in which the forward one was
    taken (Song et al. 2021, appendix E, eq. 46; appendix F with their a = sqrt(1 - beta) for VP, 1 for VE).
    """

    order = 1

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            yield Step(s, x := reverse_diffusion(x, prediction, now, then, generator), prediction)


def reverse_diffusion(
    x: Tensor, prediction: Prediction, now: Scales, then: Scales, generator: torch.Generator
) -> Tensor:
    """One step of `ReverseDiffusion`."""
    rise = then.log_snr - now.log_snr
    c = -torch.expm1(-rise)  # = b^2 / sigma_t^2
    reverse = 2 - now.alpha / then.alpha - c, c * now.alpha, c.sqrt() * now.sigma
    return _moved(x, prediction, _either(rise > LONG, posterior(now, then), reverse), generator)


def _moved(x: Tensor, prediction: Prediction, by: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """kept x + gain x_0 + std z. (sigma eps = x - alpha x_0 has the score written in x and x_0.)"""
    kept, gain, std = by
    return kept * x + gain * prediction.x0 + std * normal_like(x, generator)


def _either(condition: Tensor, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Chosen on the device: the host need not wait for it.
    return tuple(torch.where(condition, a, b) for a, b in zip(one, other, strict=True))
