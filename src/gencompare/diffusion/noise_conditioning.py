"""How a network is told the amount of noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from gencompare.diffusion.schedules import NoiseSchedule, Scales
from gencompare.diffusion.schedules.tables import on_step
from gencompare.errors import UserError


class NoiseConditioning(ABC):
    """The number, () or (n,), that tells a network how much noise there is at time t."""

    @abstractmethod
    def __call__(self, t: Tensor, at: Scales) -> Tensor: ...

    def check(self, schedule: NoiseSchedule) -> None:  # noqa: B027
        """Raises `UserError` where the number has no meaning under ``schedule``."""

    def levels(self, schedule: NoiseSchedule) -> int | None:
        """L where the number is the index of one of L noise levels, from 0 to L - 1; None where it is another."""
        return None


@dataclass(frozen=True)
class LogSNR(NoiseConditioning):
    """The log-SNR, clamped to [-limit, limit] and brought to [0, 1000], the range that DDPM's embedding is made for.

    It means the same under every schedule, so a schedule may be changed for another after training.
    """

    limit: float = 20.0

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise UserError(f"noise.limit={self.limit}: give a positive number.")

    def __call__(self, t: Tensor, at: Scales) -> Tensor:
        return (at.log_snr.flatten().clamp(-self.limit, self.limit) + self.limit) * (500 / self.limit)


@dataclass(frozen=True)
class LogSigma(NoiseConditioning):
    """factor ln(sigma / alpha): EDM's c_noise with 1/4 (Karras et al. 2022, table 1).

    With factor 1 it is what the Fourier features of the VE models are given (Song et al. 2021, appendix C). With factor
    0 the network is told nothing, and has to see in x how much noise there is (Song and Ermon 2020, technique 3).
    """

    factor: float = 0.25

    def __call__(self, t: Tensor, at: Scales) -> Tensor:
        return -0.5 * self.factor * at.log_snr.flatten()


@dataclass(frozen=True)
class Timestep(NoiseConditioning):
    """steps t - 1: the index, counted from 0, of a step in a table of so many; what published DDPMs were trained on."""

    steps: int = 1000

    def __call__(self, t: Tensor, at: Scales) -> Tensor:
        return on_step(t * self.steps) - 1


@dataclass(frozen=True)
class ContinuousTime(NoiseConditioning):
    """factor t: what the published VP and sub-VP models of Song et al. (2021) are given, with 999."""

    factor: float = 999.0

    def __call__(self, t: Tensor, at: Scales) -> Tensor:
        return self.factor * t


@dataclass(frozen=True)
class LevelIndex(NoiseConditioning):
    """The index of the noise level, 0 for the noisiest, as NCSN counts them (Song and Ermon 2019, algorithm 1).

    A whole number: of a time between two levels, that of the noisier one.
    """

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.steps()

    def levels(self, schedule: NoiseSchedule) -> int:
        return len(schedule.steps())

    def __call__(self, t: Tensor, at: Scales) -> Tensor:
        schedule = at.schedule
        return (len(schedule.steps()) - 1 - schedule.step_index(t)).to(t.dtype)
