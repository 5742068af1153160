"""Data with an exact denoiser, and the moments of samples without Monte Carlo error.

On Gaussian data every sampler step is affine in the initial image and the random numbers. One batch contains an image
for which all of these are 0, one image per pixel for which only that pixel starts at 1, and one image per random number
for which only that number is 1. The results determine the affine map from noise to samples, and hence the mean and
covariance of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from composing import options
from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.multistep_samplers import SASolver
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import CLEAN, NoiseSchedule, VarianceExploding
from gencompare.diffusion.sde_samplers import EulerMaruyama
from gencompare.diffusion.times import TimeDistribution
from gencompare.rng import RandomSource, generator
from parts import part

MEAN = torch.tensor([0.6, -0.3, 0.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.25, 1.7, 0.04], dtype=torch.float64)
AXES = torch.tensor([[2, -1, 2], [2, 2, -1], [-1, 2, 2]], dtype=torch.float64) / 3
COVARIANCE = AXES * VARIANCE @ AXES.T
"""Covariance of three Gaussian pixels, with correlations -0.5, -0.8 and 0.8. Along AXES, the columns of a rotation, the
data are independent with variances VARIANCE, none of which is 1."""
ALONE = torch.eye(3, dtype=torch.float64)
"""Replaces AXES to make the pixels independent."""


SCHEDULES = options("model/schedule")
SENSIBLE = [name for name in SCHEDULES if name != "steep"]
"""All schedules but the deliberately bad one, whose noise falls in the last few steps."""


def schedule_named(name: str) -> NoiseSchedule:
    return part("schedule", name).requires_grad_(False)


def times_of(sampler: Sampler, schedule: NoiseSchedule) -> Tensor:
    """Return the sampler's times, or times evenly spaced in log-SNR if the schedule has fewer steps."""
    table = schedule.discrete_times
    fits = table is None or len(table) >= sampler.num_steps
    return sampler.times(schedule).double() if fits else even_levels(schedule, sampler.num_steps)


def even_levels(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Return times over the whole schedule, evenly spaced in log-SNR, and finally the time of clean data."""
    noisy, clean = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min])).tolist()
    times = schedule.t_from_log_snr(torch.linspace(noisy, clean, steps))
    return torch.cat([times, torch.tensor([CLEAN])])


def scales(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma, computed from log alpha and log-SNR."""
    if t == CLEAN:
        return torch.tensor(1.0), torch.tensor(0.0)
    log_alpha = schedule.log_alpha(t)
    return log_alpha.exp(), (log_alpha - schedule.log_snr(t) / 2).exp()


@dataclass(frozen=True)
class ExactDenoiser:
    """The exact denoiser of Gaussian data: E[x_0 | x_t] = m + alpha C (alpha^2 C + sigma^2)^-1 (x_t - alpha m)."""

    schedule: NoiseSchedule
    axes: Tensor = field(default_factory=lambda: AXES, repr=False, compare=False)
    _seen: dict[float, tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        if (key := float(t)) not in self._seen:
            alpha, sigma = scales(self.schedule, t)
            inverse = self.axes / (alpha**2 * VARIANCE + sigma**2) @ self.axes.T
            self._seen[key] = alpha * MEAN, sigma * inverse, alpha * (self.axes * VARIANCE) @ self.axes.T @ inverse
        mean, to_eps, to_x0 = (each.to(x_t) for each in self._seen[key])
        off = x_t - mean  # images are row vectors, and both matrices are symmetric
        return Prediction(x0=MEAN.to(x_t) + off @ to_x0, eps=off @ to_eps)


class UnitNoise:
    """Replaces random numbers: for images of d values, the k-th number is 1 in image 1 + d + k and 0 in all others."""

    draws = 0

    def randn(self, *shape: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        x = torch.zeros(*shape, dtype=dtype)
        flat = x.view(len(x), -1)
        first, d = 1 + flat.shape[1] * (1 + self.draws), flat.shape[1]
        flat[first : first + d] = torch.eye(d, dtype=dtype)[: max(len(x) - first, 0)]
        self.draws += 1
        return x


@contextmanager
def unit_noise() -> Iterator[UnitNoise]:
    noise = UnitNoise()
    with mock.patch("torch.randn", noise.randn):
        yield noise


_ROWS: dict[tuple[Sampler, int], int] = {}
"""Number of images that `moments` needs, for stochastic samplers and their number of times."""


def moments(sampler: Sampler, denoiser: DenoiserProtocol, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact mean, (3,), and covariance, (3, 3), of samples that start from the exact marginal at
    ``times[0]``."""
    rows = _ROWS.get((sampler, len(times)), 4)
    while True:
        x = torch.zeros(rows, 1, 1, 3)
        x[1:4, 0, 0] = torch.eye(3)
        with unit_noise() as noise:
            out = sampler.sample(denoiser, x, generator=generator("cpu", 0), times=times)[:, 0, 0].double()
        if 4 + 3 * noise.draws == rows:
            break
        # A stochastic sampler: repeat with one image per random number, and remember their number.
        rows = _ROWS[sampler, len(times)] = 4 + 3 * noise.draws
    gains = out[1:] - out[0]
    mean, covariance = true_moments(denoiser.schedule, times[0])
    return out[0] + mean @ gains[:3], gains[:3].T @ covariance @ gains[:3] + gains[3:].T @ gains[3:]


def true_moments(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = scales(schedule, t)
    return alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * torch.eye(3)


def root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance."""
    values, axes = torch.linalg.eigh(covariance)
    return axes * values.clamp(min=0).sqrt() @ axes.T


def error(sampler: Sampler, denoiser: DenoiserProtocol, times: Tensor) -> float:
    """Compute the error of the mean and of the square root of the covariance, over all pixels."""
    mean, covariance = moments(sampler, denoiser, times)
    true_mean, true_covariance = true_moments(denoiser.schedule, times[-1])
    off = (mean - true_mean).square().sum() + (root(covariance) - root(true_covariance)).square().sum()
    return float(off.sqrt())


def inner_times(schedule: NoiseSchedule, steps: int, *, noise_left: bool = False) -> Tensor:
    """Return about ``steps`` equal steps in time that exclude a tenth of the range at each end.

    A table with fewer steps has a kink at each of its steps. The times then include these steps, with equally many
    times between each pair, so that no step crosses a kink. With ``noise_left`` the times end at log-SNR 2.
    """
    margin = 0.1 * (schedule.t_max - schedule.t_min)
    first, last = schedule.t_max - margin, schedule.t_min + margin
    if noise_left:
        last = max(last, float(schedule.t_from_log_snr(torch.tensor(2.0))))
    table = schedule.discrete_times
    if table is not None and len(table) < steps:
        inside = table[(table >= last) & (table <= first)]
        first, last, pieces = float(inside[-1]), float(inside[0]), len(inside) - 1
        steps = pieces * math.ceil(steps / pieces)
    return torch.linspace(first, last, steps + 1)


def measured_order(sampler: Sampler, denoiser: DenoiserProtocol, coarse: Tensor | None = None) -> float:
    """Return log2 of the ratio of the errors before and after halving the steps between the times ``coarse``.

    Euler-Maruyama under a VE schedule stops at a higher noise level, because without noise at the end it exceeds its
    order. With s = sigma^2 and P = V + s, where V is the variance of the data along one axis, a step h has an error of
    h^2 (s'^2 / P - s'' / 2) in the variance, of which (V / P)^2 remains at the end. The sum is h times the integral of
    s'^2 / P^3 - s'' / (2 P^2), which is -[s' / (2 P^2)]: it vanishes where s' is small and where P is large.

    Samplers that interpolate three or more points take more and shorter steps at the start, where they have fewer
    points, and stop at the same higher noise level.
    """
    assert sampler.order is not None
    many_points = sampler.order > 2 or isinstance(sampler, SASolver)
    if coarse is None:
        better = isinstance(denoiser.schedule, VarianceExploding) and (
            isinstance(sampler, EulerMaruyama) or many_points
        )
        steps = 160 if sampler.order > 2 else 100 if many_points else 50
        coarse = inner_times(denoiser.schedule, steps, noise_left=better)
    fine = torch.linspace(float(coarse[0]), float(coarse[-1]), 2 * len(coarse) - 1)
    grids = (slow_start(coarse), slow_start(fine)) if many_points else (coarse, fine)
    coarse_error, fine_error = (error(sampler, denoiser, times) for times in grids)
    return math.log2(coarse_error / fine_error)


def slow_start(times: Tensor) -> Tensor:
    """Replace the first two steps by 24 steps, each 1.5 times as long as the one before it."""
    lengths = 1.5 ** torch.arange(24.0, dtype=times.dtype)
    inside = times[0] + (times[2] - times[0]) * (lengths.cumsum(0) / lengths.sum())[:-1]
    return torch.cat([times[:1], inside, times[2:]])


@dataclass(frozen=True)
class Mixture:
    """The exact denoiser of a mixture of Gaussians, each with equal variance in all pixels.

    E[x_0 | x_t] is the mean over the components, weighted by p(k | x_t).
    """

    schedule: NoiseSchedule
    weights: tuple[float, ...] = (0.2, 0.8)
    means: tuple[float, ...] = (-0.5, 0.5)
    """Mean of every pixel, for each component."""
    std: float = 0.2

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        total = alpha**2 * self.std**2 + sigma**2
        means, weights = torch.tensor(self.means, dtype=x_t.dtype), torch.tensor(self.weights, dtype=x_t.dtype)
        # -||x - alpha m||^2 / 2 for each component, up to a common term
        pixels, summed = x_t[0].numel(), x_t.flatten(1).sum(1, keepdim=True)
        closeness = alpha * means * summed - (alpha * means) ** 2 * pixels / 2
        centre = (weights.log() + closeness / total).softmax(1) @ means
        noise = (x_t - alpha * centre.reshape(-1, *[1] * (x_t.ndim - 1))) / total
        return Prediction(x0=(x_t - sigma**2 * noise) / alpha, eps=sigma * noise)

    def draw(self, n: int, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
        """Draw images, (n, *shape)."""
        which = torch.multinomial(torch.tensor(self.weights), n, replacement=True, generator=source)
        centre = torch.tensor(self.means)[which].reshape(-1, *[1] * len(shape))
        return centre + self.std * torch.randn(n, *shape, generator=source)


@dataclass(frozen=True)
class GivenNoise(RandomSource):
    """Random numbers for training whose normal numbers are given, (n, C, H, W)."""

    noise: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, noise: Tensor) -> GivenNoise:
        return cls(generator("cpu", 0), 0, len(noise), len(noise), noise=noise)

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        return self.noise


@dataclass(frozen=True)
class GivenTimes(TimeDistribution):
    """The given times, (n,)."""

    times: Tensor

    def __call__(self, schedule: NoiseSchedule, rng: RandomSource) -> Tensor:
        return self.times


def cubature(mean: float, variance: float) -> tuple[Tensor, Tensor]:
    """Return four pairs of an image of one pixel from N(mean, variance) and its noise, each (4, 1, 1, 1).

    The mean over them of a polynomial of degree 3 is its expectation."""
    points = math.sqrt(2) * torch.cat([torch.eye(2), -torch.eye(2)])
    x0, eps = points.view(4, 2, 1, 1, 1).unbind(1)
    return mean + variance**0.5 * x0, eps
