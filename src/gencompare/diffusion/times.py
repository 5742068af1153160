"""Which times are used: drawn at random to train at, or laid out in a grid to sample through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.diffusion.schedules import CLEAN, NoiseSchedule
from gencompare.errors import UserError
from gencompare.seeds import Draws

# Times to train at


class TimeDistribution(ABC):
    """Draws a time for each training image."""

    @abstractmethod
    def __call__(self, schedule: NoiseSchedule, draws: Draws) -> Tensor:
        """Times in [t_min, t_max], (n,)."""


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


# Times to sample through


class TimeGrid(ABC):
    """Lays out the times that a sampler visits."""

    @abstractmethod
    def __call__(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        """``steps`` falling times from t_max to t_min, then ``CLEAN``: (steps + 1,), on the CPU."""


@dataclass(frozen=True)
class UniformGrid(TimeGrid):
    """Evenly spaced times; under a schedule with a table, each is the nearest of its steps."""

    def __call__(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        table = schedule.discrete_times
        if table is None:
            times = torch.linspace(schedule.t_max, schedule.t_min, steps)
        else:
            if steps > len(table):
                raise UserError(f"sampler.steps={steps}: the schedule has no more than {len(table)} steps.")
            index = torch.linspace(len(table) - 1, 0, steps, dtype=torch.float64).round().long()
            times = table.cpu()[index]
        return torch.cat([times, times.new_tensor([CLEAN])])
