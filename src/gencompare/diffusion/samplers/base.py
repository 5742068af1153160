r"""Samplers: from noise to images, one denoiser call after another.

Each is written in alpha, sigma and lambda, so it works with every schedule and knows neither network nor trainer.
Arithmetic is in the type of x, float32 or float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.parameterization import Prediction
from gencompare.diffusion.schedules import CLEAN, NoiseSchedule, Scales
from gencompare.diffusion.times import TimeGrid, UniformGrid
from gencompare.errors import UserError, check_number


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


def steps_between(times: Tensor, schedule: NoiseSchedule, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Scales, Scales]]:
    """(t, s, scales at t, scales at s) for each pair of neighbouring times, scales in the type of x."""
    every = schedule.at(times, x)
    scales = [_OneTime(every, i) for i in range(len(times))]
    for (t, s), (now, then) in zip(pairwise(times), pairwise(scales), strict=True):
        yield t, s, now, then


class _OneTime(Scales):
    """The scales of one time out of many that are computed together: a step then takes no work of the schedule."""

    def __init__(self, every: Scales, i: int) -> None:
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
