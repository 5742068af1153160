"""Solvers of the probability-flow ODE, one step at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.samplers.base import Sampler, Step, steps_between
from gencompare.diffusion.schedules import NoiseSchedule, Scales
from gencompare.errors import UserError
from gencompare.seeds import normal_like


@dataclass(frozen=True, kw_only=True)
class Euler(Sampler):
    r"""x_s = x_t + (s - t) dx/dt, with dx/dt = f x - g^2 / 2 score = alpha' x_0 + sigma' eps.

    The probability-flow ODE in t (Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 13). Under
    rectified flow, alpha = 1 - t and sigma = t, that is x_t + (s - t) (eps - x_0) (Liu et al. 2022, "Flow Straight and
    Fast", eq. 1), and nothing but `DDIM`, since alpha and sigma are straight lines. Where the straight line would lead
    to less than no noise, and into clean data, the step is DDIM's.
    """

    order = 1

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            h = (s - t).to(x.dtype)
            gain = h * now.alpha * now.log_alpha_slope
            rise = h * now.sigma * (now.log_alpha_slope - now.log_snr_slope / 2)
            straight = x + gain * prediction.x0 + rise * prediction.eps
            ddim = then.alpha * prediction.x0 + then.sigma * prediction.eps
            x = torch.where((now.sigma + rise < 0) | (then.sigma == 0), ddim, straight)
            yield Step(s, x, prediction)


@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    r"""Heun's method on the probability-flow ODE d(x / alpha) / d(sigma / alpha) = eps, with churn where asked for.

    Karras et al. (2022), "Elucidating the Design Space", algorithms 1 and 2, which have alpha = 1. Two denoiser calls a
    step. Where sigma / alpha falls more than `FURTHEST`-fold in one step the mean of two slopes says nothing, and the
    step is Euler's, with one call: the step into clean data, and the first one of schedules that end in almost pure
    noise.

    Churn adds fresh noise before a step, as much as raises sigma / alpha by the factor 1 + gamma, gamma = min(s_churn /
    steps, sqrt(2) - 1), but not beyond the schedule's end.

    Args:
        s_churn: how much, in all; 0 is deterministic.
        s_min: least sigma / alpha at which it is added.
        s_max: greatest sigma / alpha at which it is added.
        s_noise: standard deviation of the noise that is added.
    """

    order = 2
    FURTHEST: ClassVar[float] = 100.0

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("s_churn", "s_min", "s_max", "s_noise"):
            if not getattr(self, name) >= 0:
                raise UserError(f"sampler.{name}={getattr(self, name)}: give 0 or a positive number.")
        if self.s_min > self.s_max:
            raise UserError(f"sampler.s_min={self.s_min} is above sampler.s_max={self.s_max}.")

    def settings(self) -> list[str]:
        return super().settings() if self.s_churn else []

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        gamma = min(self.s_churn / (len(times) - 1), math.sqrt(2) - 1)
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            if gamma > 0 and self.s_min <= now.sigma / now.alpha <= self.s_max:
                x, t, now = self._churned(denoiser.schedule, x, t, now, gamma, generator)
            prediction = denoiser(x, t, cond)
            start, slope = x, prediction.eps
            x = along(start, slope, now, then)
            if then.sigma / then.alpha * self.FURTHEST >= now.sigma / now.alpha:
                prediction = denoiser(x, s, cond)
                x = along(start, (slope + prediction.eps) / 2, now, then)
            yield Step(s, x, prediction)

    def _churned(
        self, schedule: NoiseSchedule, x: Tensor, t: Tensor, now: Scales, gamma: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Scales]:
        """x with fresh noise, the time to which that belongs, and the scales there."""
        t = schedule.t_from_log_snr((now.log_snr - 2 * math.log1p(gamma)).to(t.dtype)).reshape(())
        raised = schedule.at(t, x)
        kept = raised.alpha / now.alpha
        added = (raised.sigma**2 - (kept * now.sigma) ** 2).clamp(min=0.0).sqrt()  # 0 at the end of the schedule
        return kept * x + self.s_noise * added * normal_like(x, generator), t, raised


def along(x: Tensor, slope: Tensor, now: Scales, then: Scales) -> Tensor:
    """x / alpha moved along ``slope`` by the change of sigma / alpha, times the new alpha."""
    return then.alpha / now.alpha * x + (then.sigma - then.alpha * now.sigma / now.alpha) * slope
