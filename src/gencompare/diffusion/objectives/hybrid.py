"""The objective of improved DDPM."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.objectives.base import Objective
from gencompare.diffusion.objectives.discrete_vlb import at_random_step, chain_term
from gencompare.diffusion.parameterization import Parameterization
from gencompare.diffusion.pixels import Pixels
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.diffusion.weightings import Simple, Weighting
from gencompare.errors import UserError
from gencompare.seeds import Draws


@dataclass(frozen=True)
class Hybrid(Objective):
    r"""L_simple + ``vlb`` L_vlb, where L_vlb trains the variance alone (Nichol and Dhariwal 2021, eq. 16).

    L_vlb is in bits/dim, all T terms of it (its prior has no gradient); the mean in it is held fixed.

    Args:
        vlb: weight of the bound.
        weighting: how errors of the noise count in L_simple.
    """

    trains_variance: ClassVar[bool] = True

    vlb: float = 0.001
    weighting: Weighting = field(default_factory=Simple)
    pixels: Pixels | None = None

    def __post_init__(self) -> None:
        if self.vlb <= 0:
            raise UserError(f"objective.vlb={self.vlb}: give a positive number, or take model/objective=simple.")

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        if not parameterization.learns_variance:
            raise UserError(
                "The objective Hybrid trains the variance of the reverse steps, which this model does not learn: use"
                " model/parameterization=eps_learned_variance, or model/objective=simple."
            )
        if schedule.discrete_times is None:
            raise UserError(
                f"The objective Hybrid trains a model of steps, and schedule {type(schedule).__name__} runs in"
                " continuous time: use a table (model/schedule=cosine), or a fixed variance"
                " (model/parameterization=eps model/objective=simple)."
            )

    def bound_to(self, pixels: Pixels) -> Objective:
        return replace(self, pixels=pixels)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        assert self.pixels is not None, "a bound must know its pixels: bound_to() tells it"
        times = denoiser.schedule.steps()
        step, noised = at_random_step(denoiser.schedule, times, x0, draws)
        out = denoiser.output(noised.x_t, noised.t, noised.at, cond)
        eps_mse = noised.eps_error(denoiser, out).flatten(1).mean(1)
        prediction = denoiser.parameterization.invert(out, noised.x_t, noised.at)
        fixed = prediction._replace(x0=prediction.x0.detach(), eps=prediction.eps.detach())
        term = chain_term(fixed, noised, step, times, denoiser.schedule, self.pixels)
        bound = self.pixels.bits(len(times) * term)
        simple = self.weighting(noised.at).flatten() * eps_mse
        return {"loss": simple + self.vlb * bound, "eps_mse": eps_mse.detach(), "terms": bound.detach()}
