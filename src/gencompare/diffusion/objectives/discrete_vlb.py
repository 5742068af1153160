"""The variational bound of a model with so many steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.bound import chain, prior_kl, reconstruction, step_kl
from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.objectives.base import Noised, Objective
from gencompare.diffusion.parameterization import Parameterization, Prediction
from gencompare.diffusion.pixels import Pixels
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.errors import UserError
from gencompare.seeds import Draws


@dataclass(frozen=True)
class DiscreteVLB(Objective):
    r"""The bound on -log p(x_0) in bits/dim of a model of T steps, one of its T terms an image at random, times T.

    Ho et al. (2020), eq. 5; with `LearnedVariance`, L_vlb of Nichol and Dhariwal (2021), eq. 4. Else the variance is
    that of q(x_s | x_t, x_0).

    Args:
        steps: T; None takes every step of a schedule that has steps.
    """

    trains_schedule: ClassVar[bool] = True
    trains_variance: ClassVar[bool] = True

    steps: int | None = None
    pixels: Pixels | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"objective.steps={self.steps}: give at least 1.")

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        table = schedule.discrete_times
        if self.steps is None and table is None:
            raise UserError(
                f"The objective DiscreteVLB bounds a model of steps, and schedule {type(schedule).__name__} runs in"
                " continuous time: say how many there are (model.objective.steps=50), or use model/objective=vlb."
            )
        if self.steps is not None and table is not None and self.steps > len(table):
            raise UserError(f"model.objective.steps={self.steps}: the schedule has no more than {len(table)} steps.")

    def bound_to(self, pixels: Pixels) -> Objective:
        return replace(self, pixels=pixels)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        assert self.pixels is not None, "a bound must know its pixels: bound_to() tells it"
        schedule = denoiser.schedule
        times = chain(schedule, self.steps).to(x0.device)
        step, noised = at_random_step(schedule, times, x0, draws)
        prediction = denoiser(noised.x_t, noised.t, cond)
        term = self.pixels.bits(len(times) * chain_term(prediction, noised, step, times, schedule, self.pixels))
        prior = self.pixels.bits(prior_kl(schedule, x0))
        return {"loss": prior + term, "prior": prior.detach(), "terms": term.detach()}


def at_random_step(schedule: NoiseSchedule, times: Tensor, x0: Tensor, draws: Draws) -> tuple[Tensor, Noised]:
    """A step for each image, (n,) from 0, each equally likely, and the image noised to its time."""
    step = (draws.stratified() * len(times)).long().clamp(max=len(times) - 1)
    t = times[step]
    return step, Noised.make(x0, draws.normal(x0.shape[1:]).to(x0.dtype), t, schedule.at(t, x0))


def chain_term(
    prediction: Prediction, noised: Noised, step: Tensor, times: Tensor, schedule: NoiseSchedule, pixels: Pixels
) -> Tensor:
    """The term of each image's step in nats, (n,): of the first the reconstruction, of the others the divergence."""
    # Before the first step comes clean data, infinitely sure: a step to itself stands in, and is not used.
    then = schedule.at(times[(step - 1).clamp(min=0)], noised.x0)
    kl = step_kl(prediction, noised.eps, noised.at, then)
    return torch.where(step == 0, reconstruction(prediction, noised.x0, noised.at, pixels), kl)
