"""Times: grids to sample along, and distributions to train at."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.schedules import CLEAN, NoiseSchedule
from gencompare.errors import UserError
from gencompare.rng import RandomSource


@dataclass(frozen=True)
class TimeGrid(ABC):
    """Lays out the times that a sampler visits."""

    @abstractmethod
    def __call__(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        """``steps`` strictly falling times, then ``CLEAN``: (steps + 1,), on the CPU.

        The first is t_max and the last before ``CLEAN`` is t_min, unless the grid says otherwise; of a single step only
        the first is left. Raises `UserError` where the schedule has no room for them.
        """

    def describe(self) -> str:
        """Name and settings, in words for a table; nothing for the grid that is usual."""
        settings = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None]
        return " ".join([type(self).__name__, *[f"{name} {value:g}" for name, value in settings]])


@dataclass(frozen=True)
class _InTime(TimeGrid):
    """Even steps in t^(1 / power)."""

    power: ClassVar[float]

    def __call__(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        table = schedule.discrete_times
        if table is None:
            times = self._spread(schedule.t_max, schedule.t_min, steps).to(torch.get_default_dtype())
        else:
            times = table.cpu()[self._indices(len(table), steps)]
        return _to_clean(times, schedule)

    def _spread(self, high: float, low: float, steps: int) -> Tensor:
        roots = torch.linspace(high ** (1 / self.power), low ** (1 / self.power), steps, dtype=torch.float64)
        times = roots**self.power
        times[-1], times[0] = low, high  # not what rounding makes of them
        return times

    def _indices(self, T: int, steps: int) -> Tensor:
        """The nearest of steps 1 to T, counted from 0, but none twice: of equal ones the later move up to the next."""
        if steps > T:
            raise UserError(
                f"sampler.steps={steps}: the schedule has no more than {T} steps. Take fewer, or a grid that goes"
                " between them: model/sampler/grid=log_snr."
            )
        nearest = (self._spread(T, 1, steps) - 1).round().long().flip(0)
        rank = torch.arange(steps)
        rising = (nearest - rank).cummax(0).values + rank
        return rising.minimum(rank + T - steps).flip(0)


@dataclass(frozen=True)
class UniformGrid(_InTime):
    """Evenly spaced times; under a schedule with a table, each is the nearest of its steps."""

    power = 1.0

    def describe(self) -> str:
        return ""


@dataclass(frozen=True)
class QuadraticGrid(_InTime):
    r"""Even steps in sqrt(t): short ones near the data (Song et al. 2021, "DDIM", appendix D.2: tau_i = c i^2).

    Where rounding makes two steps of a table one, the later moves up to the next that is free. (The published code
    starts at 0.8 T; here the grid starts at t_max, where the prior is.)
    """

    power = 2.0


@dataclass(frozen=True)
class _InLogSNR(TimeGrid):
    first: float | None = None
    last: float | None = None

    def __post_init__(self) -> None:
        if self.first is not None and self.last is not None and not self.first < self.last:
            raise UserError(
                f"sampler.grid: log-SNR from first={self.first} to last={self.last} must rise: sampling goes from noise"
                " to data."
            )

    @abstractmethod
    def spread(self, u: Tensor, first: float, last: float) -> Tensor:
        """Log-SNRs, (n,), at shares ``u``, (n,), from 0 at the ``first`` to 1 at the ``last``."""

    @torch.no_grad()
    def __call__(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        ends = torch.tensor([schedule.t_max, schedule.t_min], device=schedule.device)
        low, high = schedule.log_snr(ends).tolist()
        first, last = _within("first", self.first, low, high), _within("last", self.last, low, high)
        u = torch.linspace(0, 1, steps, dtype=torch.float64)
        times = schedule.t_from_log_snr(self.spread(u, first, last).to(ends)).cpu()
        # The schedule's ends themselves, not what rounding makes of them.
        if self.first is None:
            times[0] = schedule.t_max
        if self.last is None and steps > 1:
            times[-1] = schedule.t_min
        return _to_clean(times, schedule)


@dataclass(frozen=True)
class LogSNRGrid(_InLogSNR):
    r"""Even steps in log-SNR (Lu et al. 2022, "DPM-Solver", section 3.3).

    With both ends given, runs that were trained under different schedules are sampled through the same noise levels.

    Args:
        first, last: log-SNR to start from and to end at, before the step into clean data; None is the schedule's end.
            They must lie within the schedule's range.
    """

    def spread(self, u: Tensor, first: float, last: float) -> Tensor:
        return first + (last - first) * u


@dataclass(frozen=True)
class KarrasGrid(_InLogSNR):
    r"""Even steps in (sigma / alpha)^(1 / rho) (Karras et al. 2022, eq. 5, whose alpha is 1).

    Args:
        rho: how much shorter steps are where there is less noise; 7 is theirs, 1 is even steps in sigma / alpha.
        first, last: as for `LogSNRGrid`.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho <= 0:
            raise UserError(f"sampler.grid.rho={self.rho}: give a positive number.")

    def spread(self, u: Tensor, first: float, last: float) -> Tensor:
        start, end = (math.exp(-0.5 * log_snr / self.rho) for log_snr in (first, last))
        return -2 * self.rho * torch.log(start + (end - start) * u)


def _within(name: str, value: float | None, low: float, high: float) -> float:
    """``value``, or the end of the range that it stands for. Raises `UserError` where it lies outside."""
    if value is None:
        return low if name == "first" else high
    slack = 1e-4  # of a figure that was printed, or rounded to float32
    if not low - slack <= value <= high + slack:
        raise UserError(
            f"sampler.grid.{name}={value}: the schedule's log-SNR runs from {low:.4g} to {high:.4g}; choose a value in"
            " there, or null for its end."
        )
    return value


def _to_clean(times: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The times, then ``CLEAN``. Raises `UserError` unless they fall strictly."""
    if not (times.diff() < 0).all():
        raise UserError(
            f"sampler.steps={len(times)}: so many steps fall together under schedule {type(schedule).__name__}; take"
            " fewer, or another model/sampler/grid."
        )
    return torch.cat([times, times.new_tensor([CLEAN])])


class TimeDistribution(ABC):
    """Draws a time for each training image."""

    @abstractmethod
    def __call__(self, schedule: NoiseSchedule, draws: RandomSource) -> Tensor:
        """Times in [t_min, t_max], (n,); steps of the schedule's table where it has one."""


@dataclass(frozen=True)
class UniformTimes(TimeDistribution):
    """Every time of the schedule equally likely: each step of its table, or all of [t_min, t_max] where it has none.

    Args:
        stratified: spread the times of a batch evenly, which lowers the variance of its loss (Kingma et al. 2021,
            appendix I.1); False draws them independently (Ho et al. 2020, algorithm 1).
    """

    stratified: bool = True

    def __call__(self, schedule: NoiseSchedule, draws: RandomSource) -> Tensor:
        u = draws.stratified() if self.stratified else draws.uniform()
        table = schedule.discrete_times
        if table is None:
            return schedule.t_min + (schedule.t_max - schedule.t_min) * u
        return table[(u * len(table)).long().clamp(max=len(table) - 1)]


@dataclass(frozen=True)
class LogNormalTimes(TimeDistribution):
    r"""ln(sigma / alpha) ~ N(mean, std^2), independently: noise levels rather than times are what is drawn.

    Karras et al. (2022), "Elucidating the Design Space", table 1, for data in [-1, 1] as here. A level outside of the
    schedule's range becomes its nearest end. No gradient reaches a learned schedule through these times.

    Args:
        mean, std: of ln(sigma / alpha); their P_mean and P_std.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_std("LogNormalTimes", self.std)

    def __call__(self, schedule: NoiseSchedule, draws: RandomSource) -> Tensor:
        log_level = self.mean + self.std * draws.normal()
        with torch.no_grad():
            return _on_table(schedule, schedule.t_from_log_snr(-2 * log_level))


@dataclass(frozen=True)
class LogitNormalTimes(TimeDistribution):
    r"""logit(u) ~ N(mean, std^2), independently, t = t_min + (t_max - t_min) u: most times lie in the middle.

    Esser et al. (2024), "Scaling Rectified Flow Transformers", section 3.1, for rectified flow; here for any schedule.

    Args:
        mean, std: of logit(u); their m and s.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_std("LogitNormalTimes", self.std)

    def __call__(self, schedule: NoiseSchedule, draws: RandomSource) -> Tensor:
        u = torch.sigmoid(self.mean + self.std * draws.normal())
        return _on_table(schedule, schedule.t_min + (schedule.t_max - schedule.t_min) * u)


def _on_table(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The nearest steps of the schedule's table; ``t`` itself where time is continuous."""
    table = schedule.discrete_times
    if table is None:
        return t
    return table[torch.bucketize(t, (table[1:] + table[:-1]).to(t.dtype) / 2)]


def _check_std(name: str, std: float) -> None:
    if std <= 0:
        raise UserError(f"{name}: std={std}: give a positive number.")
