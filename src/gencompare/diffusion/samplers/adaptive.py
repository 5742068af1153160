r"""A solver of the probability-flow ODE that chooses its steps itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.parameterization import Prediction
from gencompare.diffusion.samplers.base import Sampler, Step, steps_between
from gencompare.errors import UserError

# Dormand and Prince (1980), table 2: nodes, stages, and what the fifth order differs from the fourth by.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True, kw_only=True)
class RK45(Sampler):
    r"""Dormand and Prince's Runge-Kutta pair of orders 5 and 4 on dy / d lambda = -e^(-lambda / 2) eps / 2.

    y = x / alpha. Song et al. (2021), "Score-Based Generative Modeling through SDEs", section 4.3, solve in t; in the
    log-SNR lambda the right-hand side has no kink where a table of betas has one. A step is taken when its error, over
    atol + rtol |y|, is at most 1 in the mean square over all images drawn together, and the next is chosen by it
    (Hairer et al. 1993, "Solving Ordinary Differential Equations I", section II.4). Each try is six network calls.

    Raises `UserError` where the step size collapses.

    Args:
        steps: intervals of the grid. A state is given at the end of each, and no step leads beyond it; the last is one
            into clean data, the predicted image.
        rtol: relative tolerance.
        atol: absolute tolerance, in units of the data.
    """

    order = None
    SHORTEST: ClassVar[float] = 0.2
    LONGEST: ClassVar[float] = 5.0
    """Bounds on what one step is longer than the one before."""
    COLLAPSED: ClassVar[float] = 1e-4
    """A step of the log-SNR that is too short to go on with: it would take a million calls to the image."""

    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise UserError(f"sampler.steps={self.steps}: RK45 needs at least 2, the last of which is into clean data.")
        for name in ("rtol", "atol"):
            if not getattr(self, name) > 0:
                raise UserError(f"sampler.{name}={getattr(self, name)}: give a positive number.")

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        step = 1.0  # of the log-SNR: its natural unit
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            # Asked anew at each point of the grid, where x may have been changed (inpainting).
            state = _State.said(denoiser, x / now.alpha, t, float(now.log_snr), cond)
            if then.sigma == 0:
                x = state.prediction.x0
            else:
                state, step = self._solve(denoiser, state, float(then.log_snr), step, times, cond)
                x = then.alpha * state.y
            yield Step(s, x, state.prediction)

    def _solve(
        self, denoiser: Denoises, state: _State, end: float, step: float, times: Tensor, cond: Cond
    ) -> tuple[_State, float]:
        """The state at log-SNR ``end``, and the length of step with which to go on."""
        while state.log_snr < end:
            left = end - state.log_snr
            h = left if 1.01 * step > left else step
            if h < min(self.COLLAPSED, left):
                raise UserError(
                    f"RK45: the step size collapsed at log-SNR {state.log_snr:.4g}. The network changes too abruptly"
                    f" for rtol={self.rtol:g} and atol={self.atol:g}: raise them, or take another sampler."
                )
            slopes, trial = [state.slope], state
            for node, stage in zip(_NODES, _STAGES, strict=True):
                log_snr = end if h == left and node == 1 else state.log_snr + node * h
                t = denoiser.schedule.t_from_log_snr(times.new_tensor(log_snr))
                trial = _State.said(denoiser, state.y + h * _sum(stage, slopes), t, log_snr, cond)
                slopes.append(trial.slope)
            allowed = self.atol + self.rtol * torch.maximum(state.y.abs(), trial.y.abs())
            error = float((h * _sum(_ERROR, slopes) / allowed).square().mean().sqrt())
            if not 1 < error < math.inf:  # what is not finite is let through, for `sample` to name its place
                state = trial
            if math.isfinite(error):
                longer = h * min(self.LONGEST, max(self.SHORTEST, 0.9 * max(error, 1e-10) ** -0.2))
                step = max(step, longer) if h < step and error <= 1 else longer  # a grid point does not cut it for good
        return state, step


class _State(NamedTuple):
    log_snr: float
    y: Tensor
    """x / alpha."""
    slope: Tensor
    """dy / d lambda there."""
    prediction: Prediction

    @classmethod
    def said(cls, denoiser: Denoises, y: Tensor, t: Tensor, log_snr: float, cond: Cond) -> _State:
        at = denoiser.schedule.at(t, y)
        prediction = denoiser(at.alpha * y, t, cond)
        return cls(log_snr, y, -0.5 * at.sigma / at.alpha * prediction.eps, prediction)


def _sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * slope for w, slope in zip(weights, slopes, strict=True) if w]).sum(0)
