r"""Samplers: from noise to images, one denoiser call after another.

Each is written in alpha, sigma and lambda, so it works with every schedule and knows neither network nor trainer.
Arithmetic is in the type of x, float32 or float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.parameterization import Prediction
from gencompare.diffusion.schedules import CLEAN, NoiseSchedule, Scales
from gencompare.diffusion.times import TimeGrid, UniformGrid
from gencompare.errors import UserError


class Step(NamedTuple):
    """Where a sampler stands after a step."""

    t: Tensor
    """The time reached, ()."""
    x: Tensor
    """The state there, (n, C, H, W)."""
    prediction: Prediction
    """What the denoiser said last on the way."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Base of every sampler; a subclass declares ``order`` and writes ``walk``.

    Args:
        steps: steps from noise to image.
        grid: the times between which they lead.
    """

    order: ClassVar[int | None]
    """The power of the step size with which the error falls (for a random sampler: of means and covariances)."""

    steps: int
    grid: TimeGrid = field(default_factory=UniformGrid)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sampler.steps={self.steps}: give at least 1.")

    @abstractmethod
    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        """Yields once a step, from ``times[0]``, where x is, to ``times[-1]``. The state yielded is the one it goes on
        from. Draws random numbers from ``generator`` alone."""

    def iterate(
        self,
        denoiser: Denoises,
        x: Tensor,
        cond: Cond | None = None,
        *,
        generator: torch.Generator,
        times: Tensor | None = None,
    ) -> Iterator[Step]:
        """The steps one by one, from noise ``x`` (n, C, H, W) at the first of ``times`` (by default the grid's)."""
        if times is None:
            times = self.times(denoiser.schedule)
        check_times(times, denoiser.schedule)
        return self.walk(denoiser, x, times.to(x.device), cond or {}, generator)

    def sample(
        self,
        denoiser: Denoises,
        x: Tensor,
        cond: Cond | None = None,
        *,
        generator: torch.Generator,
        times: Tensor | None = None,
    ) -> Tensor:
        """Where the steps lead to. Raises `UserError` naming the step at which a NaN or an infinity appeared."""
        good = torch.zeros((), device=x.device)
        done = 0
        for step in self.iterate(denoiser, x, cond, generator=generator, times=times):
            x, done = step.x, done + 1
            # Counted on the device, read once at the end. Clipping can hide an infinite prediction from x.
            good += torch.isfinite(x).all() & torch.isfinite(step.prediction.eps).all()
        if good < done:
            raise UserError(
                f"Sampling broke off: step {int(good) + 1} of {done} gave NaN or infinite values. The network's weights"
                " or outputs are not finite, or it was trained too little for these settings."
            )
        return x

    def times(self, schedule: NoiseSchedule) -> Tensor:
        """The grid's times, (steps + 1,). Raises `UserError` where schedule and number of steps do not fit."""
        return self.grid(schedule, self.steps)

    def describe(self) -> str:
        """Name and settings, in words for a table."""
        others = [f"{f.name} {getattr(self, f.name):g}" for f in fields(self) if f.name not in ("steps", "grid")]
        return ", ".join([type(self).__name__, f"{self.steps} steps", *others])


@dataclass(frozen=True, kw_only=True)
class Ancestral(Sampler):
    r"""Draws from p(x_s | x_t) = N(mean of q(x_s | x_t, x_0), std^2), step by step (Ho et al. 2020, algorithm 2).

    With c = 1 - SNR_t / SNR_s, the mean is (alpha_t sigma_s^2) / (alpha_s sigma_t^2) x_t + alpha_s c x_0 (their eq. 7)
    and std = sqrt(c) sigma_s^(1 - v) sigma_t^v; into clean data no noise is added.

    Args:
        variance: v, from 0 ("fixed small", their beta tilde) to 1 ("fixed large", their beta), geometric in between
            (Nichol and Dhariwal 2021, eq. 15).
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
            c = -torch.expm1(now.log_snr - then.log_snr)
            kept = (1 - c) * then.alpha / now.alpha  # = alpha_t sigma_s^2 / (alpha_s sigma_t^2)
            std = c.sqrt() * then.sigma ** (1 - self.variance) * now.sigma**self.variance * (then.sigma > 0)
            x = kept * x + then.alpha * c * prediction.x0 + std * normal_like(x, generator)
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


@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    r"""Heun's method on the probability-flow ODE d(x / alpha) / d(sigma / alpha) = eps.

    Karras et al. (2022), "Elucidating the Design Space", algorithm 1, which has alpha = 1. Two denoiser calls a step.
    Where sigma / alpha falls more than `FURTHEST`-fold in one step the mean of two slopes says nothing, and the step is
    Euler's, with one call: the step into clean data, and the first one of schedules that end in almost pure noise.
    """

    order = 2
    FURTHEST: ClassVar[float] = 100.0

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            start, slope = x, prediction.eps
            x = _along(start, slope, now, then)
            if then.sigma / then.alpha * self.FURTHEST >= now.sigma / now.alpha:
                prediction = denoiser(x, s, cond)
                x = _along(start, (slope + prediction.eps) / 2, now, then)
            yield Step(s, x, prediction)


def steps_between(times: Tensor, schedule: NoiseSchedule, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Scales, Scales]]:
    """(t, s, scales at t, scales at s) for each pair of neighbouring times, scales in the type of x."""
    scales = [schedule.at(t, x) for t in times]
    for (t, s), (now, then) in zip(pairwise(times), pairwise(scales), strict=True):
        yield t, s, now, then


def _along(x: Tensor, slope: Tensor, now: Scales, then: Scales) -> Tensor:
    """x / alpha moved along ``slope`` by the change of sigma / alpha, times the new alpha."""
    return then.alpha / now.alpha * x + (then.sigma - then.alpha * now.sigma / now.alpha) * slope


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape and type of x, drawn where the generator lives."""
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)


def check_times(times: Tensor, schedule: NoiseSchedule) -> None:
    """Raises `UserError` unless ``times`` fall strictly and lie within the schedule (but for a last ``CLEAN``)."""
    inside = times[:-1] if len(times) > 1 and times[-1] == CLEAN else times
    if len(times) < 2 or not (times.diff() < 0).all():
        raise UserError(f"The times of a sampler must fall, from noise to data; these do not: {times.tolist()}.")
    slack = 1e-6
    if inside.min() < schedule.t_min - slack or inside.max() > schedule.t_max + slack:
        raise UserError(
            f"A sampler was asked for times {float(inside.min()):.4g} to {float(inside.max()):.4g}, but schedule"
            f" {type(schedule).__name__} runs from {schedule.t_min:.4g} to {schedule.t_max:.4g}."
        )
