"""The base class of samplers, and those of DDPM and DDIM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.schedules import CLEAN, NoiseSchedule, ScheduleValues
from gencompare.diffusion.times import TimeGrid, UniformGrid
from gencompare.errors import UserError, check_number
from gencompare.rng import normal_like


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
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise UserError(f"sampler.steps={self.steps}: give a whole number, at least 1.")
        for setting in fields(self):
            if setting.type in ("int", "float"):  # as written, for annotations are not evaluated
                check_number(f"sampler.{setting.name}", getattr(self, setting.name))

    @abstractmethod
    def walk(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        """Yields once a step, from ``times[0]``, where x is, to ``times[-1]``. The state yielded is the one it goes on
        from. Draws random numbers from ``generator`` alone."""

    def iterate(
        self,
        denoiser: DenoiserProtocol,
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
        denoiser: DenoiserProtocol,
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

    def describe(self, learned: Collection[str] = ()) -> str:
        """Name and settings, in words for a table. Those that are ``learned`` the network says itself, and what was set
        has no part in sampling."""
        said = {name: _said(getattr(self, name)) for name in self.settings()}
        others = [f"learned {name}" if name in learned else f"{name} {value}" for name, value in said.items()]
        grid = self.grid.describe()
        return ", ".join([type(self).__name__, f"{self.steps} steps", *([grid] if grid else []), *others])

    def settings(self) -> list[str]:
        """The names of the settings that ``describe`` tells, beside the steps."""
        return [f.name for f in fields(self) if f.name not in ("steps", "grid")]


def _said(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def steps_between(
    times: Tensor, schedule: NoiseSchedule, x: Tensor
) -> Iterator[tuple[Tensor, Tensor, ScheduleValues, ScheduleValues]]:
    """(t, s, scales at t, scales at s) for each pair of neighbouring times, scales in the type of x."""
    every = schedule.at(times, x)
    scales = [_OneTime(every, i) for i in range(len(times))]
    for (t, s), (now, then) in zip(pairwise(times), pairwise(scales), strict=True):
        yield t, s, now, then


class _OneTime(ScheduleValues):
    """The scales of one time out of many that are computed together: a step then takes no work of the schedule."""

    def __init__(self, every: ScheduleValues, i: int) -> None:
        self._every, self._i = every, i

    @cached_property
    def log_snr(self) -> Tensor:
        return self._every.log_snr[self._i]

    @cached_property
    def alpha(self) -> Tensor:
        return self._every.alpha[self._i]

    @cached_property
    def sigma(self) -> Tensor:
        return self._every.sigma[self._i]

    @cached_property
    def log_alpha_slope(self) -> Tensor:
        return self._every.log_alpha_slope[self._i]

    @cached_property
    def log_snr_slope(self) -> Tensor:
        return self._every.log_snr_slope[self._i]


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
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
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
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            share = self.eta**2 * -torch.expm1(now.log_snr - then.log_snr)  # tau^2 / sigma_s^2
            x = then.alpha * prediction.x0 + then.sigma * (1 - share).sqrt() * prediction.eps
            if self.eta > 0:
                x = x + then.sigma * share.sqrt() * normal_like(x, generator)
            yield Step(s, x, prediction)


def posterior(
    now: ScheduleValues, then: ScheduleValues, variance: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The step of `Ancestral` from ``now`` to ``then``: what it multiplies x_t, x_0 and standard normal noise by."""
    c = -torch.expm1(now.log_snr - then.log_snr)
    # = alpha_t sigma_s^2 / (alpha_s sigma_t^2), for (1 - c) loses its last digits where c is nearly 1
    kept = torch.exp(now.log_snr - then.log_snr) * then.alpha / now.alpha
    std = c.sqrt() * then.sigma ** (1 - variance) * now.sigma**variance * (then.sigma > 0)
    return kept, then.alpha * c, std
