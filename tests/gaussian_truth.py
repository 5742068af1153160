"""Data whose denoiser is known exactly, and samplers' results on them without Monte Carlo error.

On Gaussian data every step of a sampler is affine. One run carries a row with no noise at all, a row that starts one
unit higher, and one row for each random number, in which that number alone is 1. What comes out is the affine map from
the noise to the sample, and with it the mean and the covariance of what the sampler gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from composing import options
from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.parameterization import Prediction
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import CLEAN, NoiseSchedule
from gencompare.seeds import generator
from parts import part

MEAN = torch.tensor([0.6, -0.3, 0.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.25, 1.7, 0.04], dtype=torch.float64)
"""Data: three independent Gaussian pixels, none of unit variance."""


SCHEDULES = options("model/schedule")
SENSIBLE = [name for name in SCHEDULES if name != "steep"]
"""Without the one that is bad on purpose: its noise falls in the last few steps."""


def schedule_named(name: str) -> NoiseSchedule:
    return part("schedule", name).requires_grad_(False)


def times_of(sampler: Sampler, schedule: NoiseSchedule) -> Tensor:
    """The sampler's own times; even ones in log-SNR where the schedule is a table of fewer steps."""
    table = schedule.discrete_times
    fits = table is None or len(table) >= sampler.steps
    return sampler.times(schedule).double() if fits else even_levels(schedule, sampler.steps)


def even_levels(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Times from end to end of the schedule, evenly spaced in log-SNR, then clean data."""
    ends = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min])).tolist()
    times = schedule.t_from_log_snr(torch.linspace(*ends, steps))
    return torch.cat([times, torch.tensor([CLEAN])])


def scales(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, from the two logarithms that a schedule is."""
    if t == CLEAN:
        return torch.tensor(1.0), torch.tensor(0.0)
    log_alpha = schedule.log_alpha(t)
    return log_alpha.exp(), (log_alpha - schedule.log_snr(t) / 2).exp()


@dataclass(frozen=True)
class Truth:
    """The perfect denoiser of the Gaussian data: E[x_0 | x_t] = m + alpha V (x_t - alpha m) / (alpha^2 V + sigma^2)."""

    schedule: NoiseSchedule
    _seen: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        if (key := float(t)) not in self._seen:
            self._seen[key] = scales(self.schedule, t)
        alpha, sigma = self._seen[key]
        noise = (x_t - alpha * MEAN.to(x_t)) / (alpha**2 * VARIANCE.to(x_t) + sigma**2)
        return Prediction(x0=MEAN.to(x_t) + alpha * VARIANCE.to(x_t) * noise, eps=sigma * noise)


class UnitNoise:
    """In place of random numbers: the k-th draw is 1 in row k + 2 and 0 elsewhere."""

    draws = 0

    def randn(self, *shape: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        x = torch.zeros(*shape, dtype=dtype)
        if self.draws + 2 < len(x):
            x[self.draws + 2] = 1
        self.draws += 1
        return x


@contextmanager
def unit_noise() -> Iterator[UnitNoise]:
    noise = UnitNoise()
    with mock.patch("torch.randn", noise.randn):
        yield noise


def moments(sampler: Sampler, denoiser: Denoises, times: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and variance, (3,) each, of what comes out when the exact marginal at ``times[0]`` goes in."""
    rows = len(times) + 2
    while True:
        x = torch.zeros(rows, 1, 1, 3)
        x[1] = 1
        with unit_noise() as noise:
            out = sampler.sample(denoiser, x, generator=generator("cpu", 0), times=times)[:, 0, 0]
        if noise.draws + 2 <= rows:
            break
        rows = noise.draws + 2  # a sampler of many draws a step: once more, with room for all
    gains = out[1:] - out[0]
    alpha, sigma = scales(denoiser.schedule, times[0])
    mean = out[0] + gains[0] * alpha * MEAN
    return mean, gains[0] ** 2 * (alpha**2 * VARIANCE + sigma**2) + gains[1:].square().sum(0)


def true_moments(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = scales(schedule, t)
    return alpha * MEAN, alpha**2 * VARIANCE + sigma**2


def error(sampler: Sampler, denoiser: Denoises, times: Tensor) -> float:
    """How far mean and standard deviation are off, over all pixels."""
    mean, variance = moments(sampler, denoiser, times)
    true_mean, true_variance = true_moments(denoiser.schedule, times[-1])
    off = (mean - true_mean).square().sum() + (variance.sqrt() - true_variance.sqrt()).square().sum()
    return float(off.sqrt())


def inner_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """``steps`` equal steps in time that keep off both ends.

    They end where there is still noise, at log-SNR 2: of an SDE solver's leading error what is made above a pixel's
    variance and what is made below it cancel, where the log-SNR is even in time and all of it is passed through.
    """
    margin = 0.1 * (schedule.t_max - schedule.t_min)
    noisy, clean = schedule.t_from_log_snr(torch.tensor([-6.0, 2.0]))
    return torch.linspace(min(schedule.t_max - margin, noisy), max(schedule.t_min + margin, clean), steps + 1)


def measured_order(sampler: Sampler, denoiser: Denoises) -> float:
    """log2 of what the error is divided by when the steps are halved."""
    steps = 160 if sampler.order == 3 else 50
    coarse, fine = (error(sampler, denoiser, inner_times(denoiser.schedule, n)) for n in (steps, 2 * steps))
    return math.log2(coarse / fine)


@dataclass(frozen=True)
class Mixture:
    """The perfect denoiser of a mixture of Gaussians, each with equal variance in all pixels.

    p(k | x_t) is by Bayes, and E[x_0 | x_t] the mean of the components' own, weighed by it.
    """

    schedule: NoiseSchedule
    weights: tuple[float, ...] = (0.2, 0.8)
    means: tuple[float, ...] = (-0.5, 0.5)
    """Of every pixel."""
    std: float = 0.2

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        total = alpha**2 * self.std**2 + sigma**2
        means, weights = torch.tensor(self.means, dtype=x_t.dtype), torch.tensor(self.weights, dtype=x_t.dtype)
        # -||x - alpha m||^2 / 2 for each component, but for what all have in common
        pixels, summed = x_t[0].numel(), x_t.flatten(1).sum(1, keepdim=True)
        closeness = alpha * means * summed - (alpha * means) ** 2 * pixels / 2
        centre = (weights.log() + closeness / total).softmax(1) @ means
        noise = (x_t - alpha * centre.reshape(-1, *[1] * (x_t.ndim - 1))) / total
        return Prediction(x0=(x_t - sigma**2 * noise) / alpha, eps=sigma * noise)

    def draw(self, n: int, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
        """Images, (n, *shape)."""
        which = torch.multinomial(torch.tensor(self.weights), n, replacement=True, generator=source)
        centre = torch.tensor(self.means)[which].reshape(-1, *[1] * len(shape))
        return centre + self.std * torch.randn(n, *shape, generator=source)
