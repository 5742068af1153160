"""Solvers of the probability-flow ODE: one-step, multistep and adaptive."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import Sampler, Step, steps_between
from gencompare.diffusion.schedules import NoiseSchedule, ScheduleValues
from gencompare.errors import UserError
from gencompare.rng import normal_like


@dataclass(frozen=True, kw_only=True)
class Euler(Sampler):
    r"""x_s = x_t + (s - t) dx/dt, with dx/dt = f x - g^2 / 2 score = alpha' x_0 + sigma' eps.

    The probability-flow ODE in t (Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 13). Under
    rectified flow, alpha = 1 - t and sigma = t, that is x_t + (s - t) (eps - x_0) (Liu et al. 2022, "Flow Straight and
    Fast", eq. 1), and nothing but `DDIM`, since alpha and sigma are straight lines. Where the straight line would lead
    to less than no noise, and into clean data, the step is DDIM's.
    """

    order = 1

    def walk(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            h = (s - t).to(x.dtype)
            gain = h * now.alpha * now.log_alpha_slope
            rise = h * now.sigma * (now.log_alpha_slope - now.log_snr_slope / 2)
            straight = x + gain * prediction.x0 + rise * prediction.eps
            ddim = then.alpha * prediction.x0 + then.sigma * prediction.eps
            x = torch.where((now.sigma + rise < 0) | (then.sigma == 0), ddim, straight)
            yield Step(s, x, prediction)


@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    r"""Heun's method on the probability-flow ODE d(x / alpha) / d(sigma / alpha) = eps, with churn where asked for.

    Karras et al. (2022), "Elucidating the Design Space", algorithms 1 and 2, which have alpha = 1. Two denoiser calls a
    step. Where sigma / alpha falls more than `FURTHEST`-fold in one step the mean of two slopes says nothing, and the
    step is Euler's, with one call: the step into clean data, and the first one of schedules that end in almost pure
    noise.

    Churn adds fresh noise before a step, as much as raises sigma / alpha by the factor 1 + gamma, gamma = min(s_churn /
    steps, sqrt(2) - 1), but not beyond the schedule's end.

    Args:
        s_churn: how much, in all; 0 is deterministic.
        s_min: least sigma / alpha at which it is added.
        s_max: greatest sigma / alpha at which it is added.
        s_noise: standard deviation of the noise that is added.
    """

    order = 2
    FURTHEST: ClassVar[float] = 100.0

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("s_churn", "s_min", "s_max", "s_noise"):
            if not getattr(self, name) >= 0:
                raise UserError(f"sampler.{name}={getattr(self, name)}: give 0 or a positive number.")
        if self.s_min > self.s_max:
            raise UserError(f"sampler.s_min={self.s_min} is above sampler.s_max={self.s_max}.")

    def settings(self) -> list[str]:
        return super().settings() if self.s_churn else []

    def walk(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        gamma = min(self.s_churn / (len(times) - 1), math.sqrt(2) - 1)
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            if gamma > 0 and self.s_min <= now.sigma / now.alpha <= self.s_max:
                x, t, now = self._churned(denoiser.schedule, x, t, now, gamma, generator)
            prediction = denoiser(x, t, cond)
            start, slope = x, prediction.eps
            x = euler_step(start, slope, now, then)
            if then.sigma / then.alpha * self.FURTHEST >= now.sigma / now.alpha:
                prediction = denoiser(x, s, cond)
                x = euler_step(start, (slope + prediction.eps) / 2, now, then)
            yield Step(s, x, prediction)

    def _churned(
        self,
        schedule: NoiseSchedule,
        x: Tensor,
        t: Tensor,
        now: ScheduleValues,
        gamma: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, ScheduleValues]:
        """x with fresh noise, the time to which that belongs, and the scales there."""
        t = schedule.t_from_log_snr((now.log_snr - 2 * math.log1p(gamma)).to(t.dtype)).reshape(())
        raised = schedule.at(t, x)
        kept = raised.alpha / now.alpha
        added = (raised.sigma**2 - (kept * now.sigma) ** 2).clamp(min=0.0).sqrt()  # 0 at the end of the schedule
        return kept * x + self.s_noise * added * normal_like(x, generator), t, raised


def euler_step(x: Tensor, slope: Tensor, now: ScheduleValues, then: ScheduleValues) -> Tensor:
    """x / alpha moved along ``slope`` by the change of sigma / alpha, times the new alpha."""
    return then.alpha / now.alpha * x + (then.sigma - then.alpha * now.sigma / now.alpha) * slope


STRETCH = 2.0


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(Sampler):
    r"""x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) (x_0 + h / (2 h') (x_0 - x_0')), primes for the step before.

    Lu et al. (2022), "DPM-Solver++: Fast Solver for Guided Sampling", algorithm 2. The first step has no slope.
    """

    order = 2

    def walk(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        past: tuple[Tensor, Tensor] | None = None
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            x0, h = prediction.x0, (then.log_snr - now.log_snr) / 2
            image = x0
            if past and h <= STRETCH * past[0]:
                image = x0 + h / (2 * past[0]) * (x0 - past[1])
            past = h, x0
            yield Step(s, x := then.sigma / now.sigma * x - then.alpha * torch.expm1(-h) * image, prediction)


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    r"""A predictor with a line through x_0 at t and before, then a corrector with the parabola through x_0 at s too.

    Zhao et al. (2023), "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", UniPC-2
    in data prediction: their order p = 2 is the predictor's, and the corrector raises it by one (theorem 3.1). What the
    denoiser said of the predicted x_s serves the corrector and the next step, so that a step costs one call. The first
    step has one point less.

    Args:
        variant: their B(h): "bh1" is h, "bh2" is e^h - 1 (in data prediction, 1 - e^-h).
    """

    order = 3
    VARIANTS: ClassVar[tuple[str, ...]] = ("bh1", "bh2")
    variant: str = "bh2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in self.VARIANTS:
            raise UserError(f"sampler.variant={self.variant}: give one of {', '.join(self.VARIANTS)}.")

    def walk(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        past: tuple[Tensor, Tensor] | None = None
        prediction = denoiser(x, times[0], cond)
        for _, s, now, then in steps_between(times, denoiser.schedule, x):
            x0, h = prediction.x0, (then.log_snr - now.log_snr) / 2
            c = -torch.expm1(-h)
            x = then.sigma / now.sigma * x + then.alpha * c * x0
            if then.sigma > 0:
                b = c if self.variant == "bh2" else h
                slope, bend, lift = torch.zeros_like(x0), 0.0, b / 2
                if past and h <= STRETCH * past[0]:
                    slope = (x0 - past[1]) / past[0]
                    # The integrals of u / h and (u / h)^2 against e^(u - h), and from them what the parabola weighs.
                    first = 1 - c / h
                    second = 1 - 2 * first / h
                    bend = (first - second) / (1 + past[0] / h)
                    lift = first - bend
                elif past:
                    lift = 0.0
                prediction = denoiser(x + then.alpha * b * h / 2 * slope, s, cond)
                x = x + then.alpha * (bend * h * slope + lift * (prediction.x0 - x0))
            past = h, x0
            yield Step(s, x, prediction)


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
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
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
        self, denoiser: DenoiserProtocol, state: _State, end: float, step: float, times: Tensor, cond: Cond
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
    def said(cls, denoiser: DenoiserProtocol, y: Tensor, t: Tensor, log_snr: float, cond: Cond) -> _State:
        at = denoiser.schedule.at(t, y)
        prediction = denoiser(at.alpha * y, t, cond)
        return cls(log_snr, y, -0.5 * at.sigma / at.alpha * prediction.eps, prediction)


def _sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * slope for w, slope in zip(weights, slopes, strict=True) if w]).sum(0)
