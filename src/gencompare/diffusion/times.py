"""Time grids for sampling, and time distributions for training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.schedules import CLEAN, NO_SIGNAL, NoiseSchedule
from gencompare.errors import UserError, check_number, check_positive
from gencompare.rng import RandomSource


@dataclass(frozen=True)
class TimeGrid(ABC):
    """Base class of time grids for sampling."""

    @abstractmethod
    def __call__(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        """Return ``num_steps`` strictly decreasing times, followed by ``CLEAN``.

        The first time is t_max and the last before ``CLEAN`` is t_min, unless the grid sets other ends; a single step
        starts at t_max.

        Args:
            schedule: the noise schedule.
            num_steps: number of sampling steps.

        Returns:
            The times, (num_steps + 1,), on the CPU.

        Raises:
            UserError: if the schedule does not have that many distinct times.
        """

    def describe(self) -> str:
        """Return the name and settings, for a table; empty for the default grid."""
        settings = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None]
        return " ".join([type(self).__name__, *[f"{name} {value:g}" for name, value in settings]])


@dataclass(frozen=True)
class _PowerGrid(TimeGrid):
    """Base class of grids with even spacing in t^(1 / power)."""

    power: ClassVar[float]

    def __call__(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        discrete_times = schedule.discrete_times
        if discrete_times is None:
            times = self._spaced(schedule.t_max, schedule.t_min, num_steps).to(schedule.dtype)
        else:
            times = discrete_times.cpu()[self._indices(len(discrete_times), num_steps)]
        return _append_clean(times, schedule)

    def _spaced(self, high: float, low: float, num_steps: int) -> Tensor:
        roots = torch.linspace(high ** (1 / self.power), low ** (1 / self.power), num_steps, dtype=torch.float64)
        times = roots**self.power
        times[-1], times[0] = low, high  # exact, without rounding
        return times

    def _indices(self, T: int, num_steps: int) -> Tensor:
        """Return the zero-based indices of the nearest discrete steps. Duplicates move up to the next free step."""
        if num_steps > T:
            raise UserError(
                f"sampler.num_steps={num_steps}: the schedule has no more than {T} steps. Use fewer, or a grid that"
                " interpolates between them: model/sampler/grid=log_snr."
            )
        nearest = (self._spaced(T, 1, num_steps) - 1).round().long().flip(0)
        rank = torch.arange(num_steps)
        increasing = (nearest - rank).cummax(0).values + rank
        return increasing.minimum(rank + T - num_steps).flip(0)


@dataclass(frozen=True)
class UniformGrid(_PowerGrid):
    """Evenly spaced times; for a discrete schedule, the nearest steps."""

    power = 1.0

    def describe(self) -> str:
        return ""


@dataclass(frozen=True)
class EqualStepsGrid(_PowerGrid):
    r"""Equal steps from t_max to clean data: :math:`t_k = t_{max} - (t_{max} - t_{min})\, k / N` for N steps.

    The last step, into clean data, is as long as the others. `UniformGrid` ends at t_min instead, where next to nothing
    is left to do, so that one of a few steps is lost.
    """

    power = 1.0

    def _spaced(self, high: float, low: float, num_steps: int) -> Tensor:
        return super()._spaced(high, low, num_steps + 1)[:-1]


@dataclass(frozen=True)
class QuadraticGrid(_PowerGrid):
    r"""Times evenly spaced in :math:`\sqrt t`, with short steps near the data: :math:`\tau_i = c i^2`.

    Song et al. (2021), "Denoising Diffusion Implicit Models", appendix D.2, https://arxiv.org/abs/2010.02502. For a
    discrete schedule, times are rounded to the nearest steps; if two round to the same step, one moves up to the next
    free step. (The published code starts at 0.8 T, but this grid starts at t_max, the time of the prior.)
    """

    power = 2.0


@dataclass(frozen=True)
class _LogSNRRangeGrid(TimeGrid):
    """Base class of grids on the log-SNR, with optional start and end."""

    log_snr_start: float | None = None
    log_snr_end: float | None = None

    def __post_init__(self) -> None:
        start, end = self.log_snr_start, self.log_snr_end
        if start is not None and end is not None and not start < end:
            raise UserError(
                f"sampler.grid.log_snr_start={start} must be below log_snr_end={end}: sampling goes from noise to data."
            )

    @abstractmethod
    def interpolate(self, u: Tensor, start: float, end: float) -> Tensor:
        """Interpolate the log-SNR from ``start`` (u = 0) to ``end`` (u = 1), at fractions ``u``, (n,)."""

    @torch.no_grad()
    def __call__(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        ends = torch.tensor([schedule.t_max, schedule.t_min], device=schedule.device, dtype=schedule.dtype)
        low, high = schedule.log_snr(ends).tolist()
        table = schedule.discrete_times
        if low < NO_SIGNAL and self.log_snr_start is None and num_steps > 1 and table is not None:
            # The first step leaves pure noise. The others are spaced from the step before it.
            low = float(schedule.log_snr(table[-2]))
            others = replace(self, log_snr_start=low)(schedule, num_steps - 1)
            return torch.cat([others.new_tensor([schedule.t_max]), others])
        start = low if self.log_snr_start is None else _check_end("log_snr_start", self.log_snr_start, low, high)
        end = high if self.log_snr_end is None else _check_end("log_snr_end", self.log_snr_end, low, high)
        u = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        times = schedule.t_from_log_snr(self.interpolate(u, start, end).to(ends)).cpu()
        # Set the ends of the schedule exactly, without rounding.
        if self.log_snr_start is None:
            times[0] = schedule.t_max
        if self.log_snr_end is None and num_steps > 1:
            times[-1] = schedule.t_min
        return _append_clean(times, schedule)


@dataclass(frozen=True)
class LogSNRGrid(_LogSNRRangeGrid):
    r"""Times evenly spaced in log-SNR.

    If both ends are given, models trained under different schedules are sampled at the same noise levels. Lu et al.
    (2022), "DPM-Solver", section 3.3, https://arxiv.org/abs/2206.00927.

    Args:
        log_snr_start: log-SNR at the start of sampling, within the range of the schedule. If None, the log-SNR at
            t_max.
        log_snr_end: log-SNR before the step into clean data, within the range of the schedule. If None, the log-SNR at
            t_min.
    """

    def interpolate(self, u: Tensor, start: float, end: float) -> Tensor:
        return start + (end - start) * u


@dataclass(frozen=True)
class KarrasGrid(_LogSNRRangeGrid):
    r"""Times evenly spaced in :math:`(\sigma / \alpha)^{1 / \rho}`.

    Karras et al. (2022), "Elucidating the Design Space", eq. 5, https://arxiv.org/abs/2206.00364 (where alpha = 1).

    Args:
        log_snr_start: see `LogSNRGrid`.
        log_snr_end: see `LogSNRGrid`.
        rho: larger values make steps shorter at low noise (7 in the paper); 1 is even spacing in sigma / alpha.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("sampler.grid.rho", self.rho)

    def interpolate(self, u: Tensor, start: float, end: float) -> Tensor:
        root_start, root_end = (math.exp(-0.5 * log_snr / self.rho) for log_snr in (start, end))
        return -2 * self.rho * torch.log(root_start + (root_end - root_start) * u)


@dataclass(frozen=True)
class TabulatedGrid(TimeGrid):
    """Given times, such as those that ``task=optimize_sampler`` finds.

    Args:
        times: the times of all steps, strictly decreasing and within the schedule, without ``CLEAN``.
    """

    times: Sequence[float]

    def __post_init__(self) -> None:
        if not self.times:
            raise UserError("sampler.grid.times must be set to one time per step; task=optimize_sampler finds some.")
        for time in self.times:
            check_number("sampler.grid.times", time)

    def __call__(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        if num_steps != len(self.times):
            raise UserError(
                f"sampler.num_steps={num_steps}, but sampler.grid.times has {len(self.times)} times: they belong"
                " together."
            )
        times = torch.tensor([float(time) for time in self.times], dtype=torch.float64)
        rounding = 1e-6  # of printed times
        if float(times.min()) < schedule.t_min - rounding or float(times.max()) > schedule.t_max + rounding:
            raise UserError(
                f"sampler.grid.times range from {float(times.min()):.4g} to {float(times.max()):.4g}, but"
                f" {type(schedule).__name__} is defined from {schedule.t_min:.4g} to {schedule.t_max:.4g}: they"
                " belong to another schedule."
            )
        if not (times.diff() < 0).all():
            raise UserError(f"sampler.grid.times={list(self.times)} must be strictly decreasing.")
        return _append_clean(times.clamp(schedule.t_min, schedule.t_max).to(schedule.dtype), schedule)

    def describe(self) -> str:
        return "times " + " ".join(f"{time:.2g}" for time in self.times)


def _check_end(name: str, log_snr: float, low: float, high: float) -> float:
    """Return ``log_snr``, or raise `UserError` if it is outside [low, high]."""
    tolerance = 1e-4  # for values copied from a printed message or rounded to float32
    if not low - tolerance <= log_snr <= high + tolerance:
        raise UserError(
            f"sampler.grid.{name}={log_snr}: the schedule's log-SNR runs from {low:.4g} to {high:.4g}; choose a value"
            " in this range, or null for the end of the schedule."
        )
    return log_snr


def _append_clean(times: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Append ``CLEAN`` to the times. Raise `UserError` unless the times are strictly decreasing."""
    if not (times.diff() < 0).all():
        raise UserError(
            f"sampler.num_steps={len(times)}: under {type(schedule).__name__}, this many steps give duplicate times;"
            " use fewer steps, or another model/sampler/grid."
        )
    return torch.cat([times, times.new_tensor([CLEAN])])


class TimeDistribution(ABC):
    """Base class of distributions of training times."""

    @abstractmethod
    def __call__(self, schedule: NoiseSchedule, rng: RandomSource) -> Tensor:
        """Draw one time per image; for a discrete schedule, one of its steps.

        Args:
            schedule: the noise schedule.
            rng: source of the random numbers; its length n is the number of images.

        Returns:
            Times in [t_min, t_max], (n,).
        """


@dataclass(frozen=True)
class UniformTimes(TimeDistribution):
    """The uniform distribution over the steps of a discrete schedule, or over [t_min, t_max] in continuous time.

    Args:
        stratified: spread the times of a batch evenly, which lowers the variance of the loss (Kingma et al. 2021,
            appendix I.1, https://arxiv.org/abs/2107.00630); if False, draw them independently (Ho et al. 2020,
            algorithm 1, https://arxiv.org/abs/2006.11239).
    """

    stratified: bool = True

    def __call__(self, schedule: NoiseSchedule, rng: RandomSource) -> Tensor:
        u = rng.stratified() if self.stratified else rng.uniform()
        discrete_times = schedule.discrete_times
        if discrete_times is None:
            return schedule.t_min + (schedule.t_max - schedule.t_min) * u
        T = len(discrete_times)
        return discrete_times[(u * T).long().clamp(max=T - 1)]


@dataclass(frozen=True)
class LogNormalTimes(TimeDistribution):
    r""":math:`\ln(\sigma / \alpha) \sim N(mean, std^2)`, independently for each image.

    It defines noise levels rather than times. Levels outside the range of the schedule are moved to its nearest end. No
    gradient reaches a learned schedule through these times. Karras et al. (2022), "Elucidating the Design Space", table
    1, for data in [-1, 1] as here, https://arxiv.org/abs/2206.00364.

    Args:
        mean: P_mean of the paper.
        std: P_std of the paper.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        check_positive("LogNormalTimes.std", self.std)

    def __call__(self, schedule: NoiseSchedule, rng: RandomSource) -> Tensor:
        log_sigma = self.mean + self.std * rng.normal()
        with torch.no_grad():
            return _nearest_discrete_time(schedule, schedule.t_from_log_snr(-2 * log_sigma))


@dataclass(frozen=True)
class LogitNormalTimes(TimeDistribution):
    r""":math:`t = t_{min} + (t_{max} - t_{min})\, u` with :math:`logit(u) \sim N(mean, std^2)`: mostly central times.

    Esser et al. (2024), "Scaling Rectified Flow Transformers", section 3.1, for rectified flow,
    https://arxiv.org/abs/2403.03206; here for any schedule.

    Args:
        mean: m of the paper.
        std: s of the paper.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_positive("LogitNormalTimes.std", self.std)

    def __call__(self, schedule: NoiseSchedule, rng: RandomSource) -> Tensor:
        u = torch.sigmoid(self.mean + self.std * rng.normal())
        return _nearest_discrete_time(schedule, schedule.t_min + (schedule.t_max - schedule.t_min) * u)


def _nearest_discrete_time(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Round ``t`` to the nearest steps of a discrete schedule; return it unchanged in continuous time."""
    discrete_times = schedule.discrete_times
    if discrete_times is None:
        return t
    return discrete_times[torch.bucketize(t, (discrete_times[1:] + discrete_times[:-1]).to(t.dtype) / 2)]
