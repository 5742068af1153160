"""Times to train at, drawn at random: a function of the seed alone, for any number of processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.errors import UserError
from gencompare.seeds import Draws


class TimeDistribution(ABC):
    """Draws a time for each training image."""

    @abstractmethod
    def __call__(self, schedule: NoiseSchedule, draws: Draws) -> Tensor:
        """Times in [t_min, t_max], (n,); steps of the schedule's table where it has one."""


@dataclass(frozen=True)
class UniformTimes(TimeDistribution):
    """Every time of the schedule equally likely: each step of its table, or all of [t_min, t_max] where it has none.

    Args:
        stratified: spread the times of a batch evenly, which lowers the variance of its loss (Kingma et al. 2021,
            appendix I.1); False draws them independently (Ho et al. 2020, algorithm 1).
    """

    stratified: bool = True

    def __call__(self, schedule: NoiseSchedule, draws: Draws) -> Tensor:
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

    def __call__(self, schedule: NoiseSchedule, draws: Draws) -> Tensor:
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

    def __call__(self, schedule: NoiseSchedule, draws: Draws) -> Tensor:
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
