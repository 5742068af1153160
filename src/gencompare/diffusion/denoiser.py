"""Denoisers: anything that says what image and what noise an x_t is made of. Samplers know nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from gencompare.diffusion.parameterizations import Parameterization, Prediction
from gencompare.diffusion.schedules import NoiseSchedule, ScheduleValues

Cond = Mapping[str, Tensor]


class DenoiserProtocol(Protocol):
    """A network with its schedule, or something that wraps one (guidance, clipping): it takes and gives the same."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """``x_t`` (n, C, H, W) at time ``t``, () or (n,), in [t_min, t_max]; ``cond`` as the network knows it."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """A network, told what the parameterisation says, under a schedule.

    It is no module: network and schedule belong to the model that trains them.
    """

    network: nn.Module
    """(x (n, C, H, W), noise_cond (n,), cond) -> (n, outputs C, H, W)."""
    schedule: NoiseSchedule
    parameterization: Parameterization

    def output(self, x_t: Tensor, t: Tensor, at: ScheduleValues, cond: Cond) -> Tensor:
        """What the network itself says, in the type of x_t (under autocast it may come in a shorter one)."""
        return self.network(*self.parameterization.input(x_t, t, at), cond).to(x_t.dtype)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        at = self.schedule.at(t, x_t)
        return self.parameterization.invert(self.output(x_t, t, at, cond), x_t, at)


@dataclass(frozen=True)
class ClipX0:
    """Holds the predicted image within [low, high], the range of the data, and lets eps follow.

    Without it a small error in eps at high noise, divided by a small alpha, throws x_0 far out of range. (Ho et al.'s
    own sampler does this, and so does every sampler here, since they see the denoiser alone.)
    """

    denoiser: DenoiserProtocol
    low: float = -1.0
    high: float = 1.0

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        prediction = self.denoiser(x_t, t, cond)
        at = self.schedule.at(t, x_t)
        x0 = prediction.x0.clamp(self.low, self.high)
        # The noise moves by what the image was moved: exact where nothing was clipped, however small sigma is.
        eps = prediction.eps + at.alpha / at.sigma * (prediction.x0 - x0)
        return prediction._replace(x0=x0, eps=eps)
