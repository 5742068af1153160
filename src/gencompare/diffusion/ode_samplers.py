"""Solvers of the probability-flow ODE: single-step, multistep and adaptive."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import (
    Sampler,
    Step,
    linear_combination,
    read_on_host,
    select,
    steps_between,
)
from gencompare.diffusion.schedules import NO_SIGNAL, GridValues, NoiseSchedule, ScheduleValues
from gencompare.errors import UserError
from gencompare.rng import normal_like


@dataclass(frozen=True, kw_only=True)
class Euler(Sampler):
    r"""Euler's method on the probability-flow ODE in time: :math:`x_s = x_t + (s - t)\, dx/dt`.

    .. math:: \frac{dx}{dt} = f x - \tfrac{1}{2} g^2 \nabla \log p(x) = \alpha' x_0 + \sigma' \epsilon

    Song et al. (2021), "Score-Based Generative Modeling through SDEs", eq. 13, https://arxiv.org/abs/2011.13456. Under
    rectified flow this is :math:`x_t + (s - t)(\epsilon - x_0)` (Liu et al. 2022, "Flow Straight and Fast", eq. 1,
    https://arxiv.org/abs/2209.03003) and equals `DDIM`, because alpha and sigma are linear in time. The step into clean
    data, a step out of pure noise, and a step that would make sigma negative are DDIM steps.
    """

    order = 1

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(self._coefficients)
        for k, (t, s, _, _) in enumerate(grid.steps()):
            prediction = denoiser(x, t, cond)
            x = linear_combination(*zip(coefficients[k], (x, prediction.x0, prediction.eps), strict=True))
            yield Step(s, x, prediction)

    @staticmethod
    def _coefficients(at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, ...]:
        """Compute the coefficients of x_t, x_0 and eps."""
        h = (at_s.t - at_t.t).to(at_t.alpha.dtype)
        delta_alpha = h * at_t.alpha * at_t.dlog_alpha_dt
        delta_sigma = h * at_t.sigma * (at_t.dlog_alpha_dt - at_t.dlog_snr_dt / 2)
        use_ddim = (at_t.sigma + delta_sigma < 0) | (at_s.sigma == 0) | (at_t.log_snr < NO_SIGNAL)
        return select(use_ddim, (0.0 * h, at_s.alpha, at_s.sigma), (torch.ones_like(h), delta_alpha, delta_sigma))


@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    r"""Heun's method on :math:`d(x / \alpha) / d(\sigma / \alpha) = \epsilon`, with optional churn.

    Karras et al. (2022), "Elucidating the Design Space", algorithms 1 and 2 (there alpha = 1),
    https://arxiv.org/abs/2206.00364. A step takes two denoiser calls. If sigma / alpha decreases by more than a factor
    of `MAX_NOISE_RATIO`, the second-order correction is meaningless, and the step is an Euler step with one call. This
    concerns the step to clean data, and the first step under schedules that end in almost pure noise.

    Churn adds noise before a step, which raises sigma / alpha by the factor :math:`1 + \gamma` with
    :math:`\gamma = \min(s_{churn} / N, \sqrt 2 - 1)` for :math:`N` steps, but not beyond the end of the schedule.

    Args:
        s_churn: total amount of churn; 0 is deterministic.
        s_min: smallest sigma / alpha with churn.
        s_max: largest sigma / alpha with churn.
        s_noise: standard deviation of the added noise.
    """

    order = 2
    MAX_NOISE_RATIO: ClassVar[float] = 100.0

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("s_churn", "s_min", "s_max", "s_noise"):
            if not getattr(self, name) >= 0:
                raise UserError(f"sampler.{name}={getattr(self, name)} must be at least 0.")
        if self.s_min > self.s_max:
            raise UserError(f"sampler.s_min={self.s_min} is above sampler.s_max={self.s_max}.")

    def settings(self) -> list[str]:
        return super().settings() if self.s_churn else []

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        gamma = min(self.s_churn / (len(times) - 1), math.sqrt(2) - 1)
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(_euler_coefficients)
        noise, signal = read_on_host(grid)
        for k, (t, s, at_t, at_s) in enumerate(grid.steps()):
            coef_x, coef_eps = coefficients[k]
            noise_t = noise[k]
            if gamma > 0 and self.s_min <= noise_t <= self.s_max:
                x, t, at_t = self._churn(denoiser.schedule, x, t, at_t, gamma, generator)
                coef_x, coef_eps = _euler_coefficients(at_t, at_s)
                noise_t = float(at_t.sigma / at_t.alpha)
            prediction = denoiser(x, t, cond)
            x_t, eps_t = x, prediction.eps
            if signal[k]:
                x = linear_combination((coef_x, x_t), (coef_eps, eps_t))
            else:  # The same, but eps does not determine x_0 where x_t is pure noise.
                x = linear_combination((at_s.alpha, prediction.x0), (at_s.sigma, prediction.eps))
            if noise[k + 1] * self.MAX_NOISE_RATIO >= noise_t:
                prediction = denoiser(x, s, cond)
                x = linear_combination((coef_x, x_t), (coef_eps / 2, eps_t + prediction.eps))
            yield Step(s, x, prediction)

    def _churn(
        self,
        schedule: NoiseSchedule,
        x: Tensor,
        t: Tensor,
        at_t: ScheduleValues,
        gamma: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, ScheduleValues]:
        """Add noise to x. Return the noisier x, its time, and the schedule values at this time."""
        t = schedule.t_from_log_snr((at_t.log_snr - 2 * math.log1p(gamma)).to(t.dtype)).reshape(())
        churned = schedule.at(t, x)
        ratio = churned.alpha / at_t.alpha
        std = (churned.sigma**2 - (ratio * at_t.sigma) ** 2).clamp(min=0.0).sqrt()  # 0 at the end of the schedule
        return ratio * x + self.s_noise * std * normal_like(x, generator), t, churned


def euler_step(x: Tensor, eps: Tensor, at_t: ScheduleValues, at_s: ScheduleValues) -> Tensor:
    r"""Take an Euler step of :math:`d(x / \alpha) / d(\sigma / \alpha) = \epsilon` from t to s."""
    coef_x, coef_eps = _euler_coefficients(at_t, at_s)
    return linear_combination((coef_x, x), (coef_eps, eps))


def _euler_coefficients(at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, Tensor]:
    """Compute the coefficients of x and eps in `euler_step`."""
    return at_s.alpha / at_t.alpha, at_s.sigma - at_s.alpha * at_t.sigma / at_t.alpha


def _of_previous_step(values: Tensor) -> Tensor:
    """Return the value of the step before each step, and 0 for the first one."""
    return torch.cat([torch.zeros_like(values[:1]), values[:-1]])


MAX_STEP_GROWTH = 2.0
"""Multistep solvers extrapolate linearly from the previous step only up to this ratio of step sizes in log-SNR; beyond
it they fall back to a first-order step."""


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(Sampler):
    r"""DPM-Solver++(2M), a second-order multistep solver with one denoiser call per step.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h}) \left(x_0 + \frac{h}{2 h'} (x_0 - x_0')\right),
        \qquad h = (\lambda_s - \lambda_t) / 2,

    where primes mark the previous step. The first step is of first order. (In the paper lambda is half the log-SNR.) Lu
    et al. (2022), "DPM-Solver++: Fast Solver for Guided Sampling", algorithm 2, https://arxiv.org/abs/2211.01095.
    """

    order = 2

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(self._coefficients)
        previous = x  # x_0 of the previous step, with weight 0 in the first step
        for k, (t, s, _, _) in enumerate(grid.steps()):
            prediction = denoiser(x, t, cond)
            coef_x, coef_x0, coef_previous = coefficients[k]
            x = linear_combination((coef_x, x), (coef_x0, prediction.x0), (coef_previous, previous))
            previous = prediction.x0
            yield Step(s, x, prediction)

    @staticmethod
    def _coefficients(at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, ...]:
        """Compute the coefficients of x_t, x_0 and the previous x_0."""
        h = (at_s.log_snr - at_t.log_snr) / 2
        previous_h = _of_previous_step(h)
        ratio = torch.where(h <= MAX_STEP_GROWTH * previous_h, h / (2 * previous_h), 0.0)
        coef_x0 = -at_s.alpha * torch.expm1(-h)
        return at_s.sigma / at_t.sigma, coef_x0 * (1 + ratio), -coef_x0 * ratio


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    r"""UniPC-2 with data prediction: a second-order predictor and a third-order corrector, one denoiser call per step.

    The predictor interpolates x_0 linearly through t and the previous time; the corrector uses the parabola that also
    passes through the prediction at s. The prediction at s is used by the corrector and by the next step. The first
    step uses one point fewer. Zhao et al. (2023), "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
    Diffusion Models", theorem 3.1, https://arxiv.org/abs/2302.04867; their p = 2 is the order of the predictor.

    Args:
        variant: the function B(h): "bh1" is :math:`h`, "bh2" is :math:`e^h - 1` (:math:`1 - e^{-h}` in data
            prediction).
    """

    order = 3
    VARIANTS: ClassVar[tuple[str, ...]] = ("bh1", "bh2")
    variant: str = "bh2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in self.VARIANTS:
            raise UserError(f"sampler.variant={self.variant}: choose from {', '.join(self.VARIANTS)}.")

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(self._coefficients)
        noise, _ = read_on_host(grid)
        previous = x  # x_0 of the previous step, with weight 0 in the first step
        prediction = denoiser(x, times[0], cond)
        for k, (_, s, _, _) in enumerate(grid.steps()):
            x0 = prediction.x0
            coef_x, coef_x0, predictor, corrector, correction = coefficients[k]
            x = linear_combination((coef_x, x), (coef_x0, x0))
            if noise[k + 1] > 0:
                difference = x0 - previous
                prediction = denoiser(torch.addcmul(x, predictor, difference), s, cond)
                change = (corrector, difference), (correction, prediction.x0 - x0)
                x = x + linear_combination(*change)
            previous = x0
            yield Step(s, x, prediction)

    def _coefficients(self, at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, ...]:
        """Compute the coefficients of x_t, x_0, of its change since the previous step in the predictor and in the
        corrector, and of the correction of x_0."""
        h = (at_s.log_snr - at_t.log_snr) / 2
        c = -torch.expm1(-h)
        b = c if self.variant == "bh2" else h
        previous_h = _of_previous_step(h)
        extrapolates = h <= MAX_STEP_GROWTH * previous_h
        # Integrals of (u / h)^k e^(u - h) over [0, h] for k = 1, 2, and the weights of the parabola.
        moment1 = 1 - c / h
        moment2 = 1 - 2 * moment1 / h
        slope_weight = (moment1 - moment2) / (1 + previous_h / h)
        first = (torch.arange(len(h), device=h.device) == 0) & (at_t.log_snr >= NO_SIGNAL)
        alone = torch.where(first, b / 2, 0.0)  # the correction without a slope
        predictor, corrector, correction = select(
            extrapolates,
            (b * h / (2 * previous_h), slope_weight * h / previous_h, moment1 - slope_weight),
            (0.0 * h, 0.0 * h, alone),
        )
        alpha = at_s.alpha
        return at_s.sigma / at_t.sigma, alpha * c, alpha * predictor, alpha * corrector, alpha * correction


# Dormand and Prince (1980), table 2: nodes, stages, and the difference of the fifth- and fourth-order weights.
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
    r"""Adaptive Runge-Kutta method of orders 5 and 4 (Dormand and Prince) on the probability-flow ODE in log-SNR.

    .. math:: \frac{dy}{d\lambda} = -\tfrac{1}{2} e^{-\lambda / 2} \epsilon, \qquad y = x / \alpha

    Song et al. (2021), "Score-Based Generative Modeling through SDEs", section 4.3, https://arxiv.org/abs/2011.13456,
    solve in t. In lambda, the right-hand side has no kinks if the schedule is a table of betas. A step is accepted if
    the ratio of its error to atol + rtol \|y\| has a root mean square of at most 1 over all images of the batch. This
    value determines the next step size (Hairer et al. 1993, "Solving Ordinary Differential Equations I", section II.4).
    Each attempt takes six denoiser calls.

    Args:
        num_steps: number of grid intervals. A state is yielded at the end of each interval, and no step extends beyond
            it. The last interval is the step to clean data, which returns the predicted image.
        rtol: relative tolerance.
        atol: absolute tolerance, in units of the data.

    Raises:
        UserError: while sampling, if the step size collapses.
    """

    order = None
    MIN_STEP_FACTOR: ClassVar[float] = 0.2
    MAX_STEP_FACTOR: ClassVar[float] = 5.0
    """Bounds on the ratio of consecutive step sizes."""
    MIN_STEP: ClassVar[float] = 1e-4
    """Minimum step size in log-SNR. Below it, an image would take about a million denoiser calls."""

    FIRST_LOG_SNR: ClassVar[float] = -12.0
    """Log-SNR at which the integration starts after pure noise. The step to it has an error of the order of its SNR."""

    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 2:
            raise UserError(
                f"sampler.num_steps={self.num_steps}: RK45 needs at least 2 steps, because the last goes to clean data."
            )
        for name in ("rtol", "atol"):
            if not getattr(self, name) > 0:
                raise UserError(f"sampler.{name}={getattr(self, name)} must be positive.")

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        h = 1.0  # step size in log-SNR
        for t, s, at_t, at_s in steps_between(times, denoiser.schedule, x):
            if at_t.log_snr < NO_SIGNAL:
                # y = x / alpha is not finite: take a DDIM step to where the image first shows.
                prediction = denoiser(x, t, cond)
                t = denoiser.schedule.t_from_log_snr(times.new_tensor(self.FIRST_LOG_SNR)).maximum(s)
                at_t = denoiser.schedule.at(t, x)
                x = at_t.alpha * prediction.x0 + at_t.sigma * prediction.eps
                if t == s:
                    yield Step(s, x, prediction)
                    continue
            # Evaluate at every grid point, because the caller may have changed x (inpainting).
            state = _State.evaluate(denoiser, x / at_t.alpha, t, float(at_t.log_snr), cond)
            if at_s.sigma == 0:
                x = state.prediction.x0
            else:
                state, h = self._solve(denoiser, state, float(at_s.log_snr), h, times, cond)
                x = at_s.alpha * state.y
            yield Step(s, x, state.prediction)

    def _solve(
        self, denoiser: DenoiserProtocol, state: _State, end: float, step: float, times: Tensor, cond: Cond
    ) -> tuple[_State, float]:
        """Integrate to log-SNR ``end``. Return the state there, and the size of the next step."""
        while state.log_snr < end:
            left = end - state.log_snr
            h = left if 1.01 * step > left else step
            if h < min(self.MIN_STEP, left):
                raise UserError(
                    f"RK45: the step size collapsed at log-SNR {state.log_snr:.4g}. The network changes too abruptly"
                    f" for rtol={self.rtol:g} and atol={self.atol:g}: raise them, or use another sampler."
                )
            slopes, trial = [state.slope], state
            for node, stage in zip(_NODES, _STAGES, strict=True):
                log_snr = end if h == left and node == 1 else state.log_snr + node * h
                t = denoiser.schedule.t_from_log_snr(times.new_tensor(log_snr))
                trial = _State.evaluate(denoiser, state.y + h * _weighted_sum(stage, slopes), t, log_snr, cond)
                slopes.append(trial.slope)
            tolerance = self.atol + self.rtol * torch.maximum(state.y.abs(), trial.y.abs())
            error = float((h * _weighted_sum(_ERROR, slopes) / tolerance).square().mean().sqrt())
            if not 1 < error < math.inf:  # NaN and infinity pass, so that `sample` reports the step
                state = trial
            if math.isfinite(error):
                factor = min(self.MAX_STEP_FACTOR, max(self.MIN_STEP_FACTOR, 0.9 * max(error, 1e-10) ** -0.2))
                # A step that was shortened to end with the interval does not reduce the next step size.
                step = max(step, h * factor) if h < step and error <= 1 else h * factor
        return state, step


class _State(NamedTuple):
    log_snr: float
    y: Tensor
    """The integrated state y = x / alpha."""
    slope: Tensor
    """The derivative dy / d lambda."""
    prediction: Prediction

    @classmethod
    def evaluate(cls, denoiser: DenoiserProtocol, y: Tensor, t: Tensor, log_snr: float, cond: Cond) -> _State:
        at_t = denoiser.schedule.at(t, y)
        prediction = denoiser(at_t.alpha * y, t, cond)
        return cls(log_snr, y, -0.5 * at_t.sigma / at_t.alpha * prediction.eps, prediction)


def _weighted_sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * slope for w, slope in zip(weights, slopes, strict=True) if w]).sum(0)
