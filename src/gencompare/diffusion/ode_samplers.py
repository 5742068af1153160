"""Single-step and adaptive solvers of the probability-flow ODE, some of them with noise."""

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
    check_noise,
    linear_combination,
    read_on_host,
    select,
    steps_between,
)
from gencompare.diffusion.schedules import CLEAN, NO_SIGNAL, GridValues, NoiseSchedule, ScheduleValues
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
        return _add_noise(x, at_t, churned, self.s_noise * normal_like(x, generator)), t, churned


def _add_noise(x: Tensor, at: ScheduleValues, noisier: ScheduleValues, z: Tensor) -> Tensor:
    """Add noise to a state, as the forward process does."""
    ratio = noisier.alpha / at.alpha
    std = (noisier.sigma**2 - (ratio * at.sigma) ** 2).clamp(min=0.0).sqrt()  # 0 at the end of the schedule
    return ratio * x + std * z


def euler_step(x: Tensor, eps: Tensor, at_t: ScheduleValues, at_s: ScheduleValues) -> Tensor:
    r"""Take an Euler step of :math:`d(x / \alpha) / d(\sigma / \alpha) = \epsilon` from t to s."""
    coef_x, coef_eps = _euler_coefficients(at_t, at_s)
    return linear_combination((coef_x, x), (coef_eps, eps))


def _euler_coefficients(at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, Tensor]:
    """Compute the coefficients of x and eps in `euler_step`."""
    return at_s.alpha / at_t.alpha, at_s.sigma - at_s.alpha * at_t.sigma / at_t.alpha


@dataclass(frozen=True, kw_only=True)
class Restart(Sampler):
    r"""Restart sampling: `Heun`, which returns to higher noise several times.

    At the time of the grid whose :math:`\sigma / \alpha` is nearest to ``s_min`` (in its logarithm), noise raises
    :math:`\sigma / \alpha` to ``s_max``, and Heun steps lead back to that time; this is repeated ``num_restarts``
    times. The noise contracts the errors that have accumulated. Xu et al. (2023), "Restart Sampling for Improving
    Generative Processes", algorithm 2 and eq. 3 and 4, https://arxiv.org/abs/2306.14878. As there, the levels of a
    restart are evenly spaced in :math:`\sigma^{1/7}`. The defaults are those of 43 denoiser calls for VP on CIFAR-10
    (table 3). If the schedule ends below ``s_max``, restarts begin at its end; if no time of the grid has noise below
    ``s_max``, there are none.

    Args:
        num_steps: number of steps of the grid, without those of restarts.
        num_restarts: K, the number of restarts; 0 is `Heun`.
        restart_steps: number of Heun steps in each restart, :math:`N_{Restart} - 1` in the paper, which counts levels.
        s_min: :math:`\sigma / \alpha` at the end of restarts.
        s_max: :math:`\sigma / \alpha` at the beginning of restarts.
    """

    order = None
    RHO: ClassVar[float] = 7.0
    num_restarts: int = 2
    restart_steps: int = 2
    s_min: float = 0.06
    s_max: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_restarts < 0:
            raise UserError(f"sampler.num_restarts={self.num_restarts} must be at least 0.")
        if self.restart_steps < 1:
            raise UserError(f"sampler.restart_steps={self.restart_steps} must be at least 1.")
        if not 0 < self.s_min < self.s_max < math.inf:
            raise UserError(
                f"sampler.s_min={self.s_min} must be positive and below sampler.s_max={self.s_max}, where restarts"
                " begin."
            )

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        noise, _ = read_on_host(GridValues(denoiser.schedule, times, x))
        below = [k for k, level in enumerate(noise) if k and 0 < level < self.s_max]
        last = min(below, key=lambda k: abs(math.log(noise[k] / self.s_min)), default=None)
        heun = Heun(num_steps=self.num_steps)
        for k, step in enumerate(heun.trajectory(denoiser, x, times, cond, generator), start=1):
            if k == last:
                # Into the tensor that the next step of Heun's method starts from.
                step.x.copy_(self._restart(denoiser, step.x, times[k], cond, generator))
            yield step

    def _restart(
        self, denoiser: DenoiserProtocol, x: Tensor, s: Tensor, cond: Cond, generator: torch.Generator
    ) -> Tensor:
        """Add noise to the state at time s and return to that time, ``num_restarts`` times."""
        schedule = denoiser.schedule
        start = schedule.t_from_log_snr(s.new_tensor(-2 * math.log(self.s_max)))
        ends = schedule.at(torch.stack([start, s]))
        roots = (ends.sigma / ends.alpha) ** (1 / self.RHO)
        fractions = torch.linspace(0, 1, self.restart_steps + 1, dtype=roots.dtype, device=roots.device)
        levels = -2 * self.RHO * torch.log(roots[0] + (roots[1] - roots[0]) * fractions)
        times = torch.cat([start[None], schedule.t_from_log_snr(levels[1:-1]).to(s), s[None]])
        heun = Heun(num_steps=self.restart_steps)
        for _ in range(self.num_restarts):
            x = _add_noise(x, schedule.at(s, x), schedule.at(start, x), normal_like(x, generator))
            *_, step = heun.trajectory(denoiser, x, times, cond, generator)
            x = step.x
        return x


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2S(Sampler):
    r"""DPM-Solver++(2S), a second-order single-step solver with two denoiser calls per step, and DPM-Solver++ SDE.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t + \alpha_s (1 - e^{-(1 + \eta) h})\, x_0(x_m, m)
            + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z, \qquad h = (\lambda_s - \lambda_t) / 2,

    where m is the time whose log-SNR is halfway, and :math:`x_m` is the result of a first-order step to it. The noise
    of the whole step consists of the noise in :math:`x_m` and that of the second half. (k-diffusion draws both from one
    Brownian motion in :math:`\sigma / \alpha` instead.) The step into clean data is of first order. Lu et al. (2022),
    "DPM-Solver++: Fast Solver for Guided Sampling", algorithm 1 with r = 1/2, and its solvers of the SDE,
    https://arxiv.org/abs/2211.01095.

    Args:
        num_steps: number of steps, each with two denoiser calls.
        eta: :math:`\eta`, the noise: 0 solves the probability-flow ODE (2S) and 1 the reverse SDE (``sample_dpmpp_sde``
            of k-diffusion).
    """

    order = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_noise("eta", self.eta)

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, self._with_middles(denoiser.schedule, times), x)
        coefficients = grid.coefficients(self._coefficients)
        noise, _ = read_on_host(grid)
        halves = grid.steps()
        for k, ((t, m, _, _), (_, s, _, _)) in enumerate(zip(halves, halves, strict=True)):
            prediction = denoiser(x, t, cond)
            coef_x, coef_x0, std = coefficients[2 * k]
            x = coef_x * x
            if self.eta:
                x = torch.addcmul(x, std, normal_like(x, generator))
            if noise[2 * k + 1] > 0:
                prediction = denoiser(torch.addcmul(x, coef_x0, prediction.x0), m, cond)
            x = torch.addcmul(x, coef_x0, prediction.x0)
            if noise[2 * k + 1] > 0:  # the second half, with the same x_0
                coef_x, coef_x0, std = coefficients[2 * k + 1]
                x = linear_combination((coef_x, x), (coef_x0, prediction.x0))
                if self.eta:
                    x = torch.addcmul(x, std, normal_like(x, generator))
            yield Step(s, x, prediction)

    @staticmethod
    def _with_middles(schedule: NoiseSchedule, times: Tensor) -> Tensor:
        """Insert the middle of each step in log-SNR; the step into clean data has only a first half."""
        log_snr = schedule.at(times).log_snr
        middles = schedule.t_from_log_snr((log_snr[1:] + log_snr[:-1]) / 2).to(times)
        middles = torch.where(times[1:] == CLEAN, CLEAN, middles)
        return torch.cat([times[:1], torch.stack([middles, times[1:]], 1).flatten()])

    def _coefficients(self, at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, ...]:
        """Compute the coefficients of x_t, x_0 and z in half steps of first order."""
        h = (at_s.log_snr - at_t.log_snr) / 2
        coef_x = at_s.sigma / at_t.sigma * (torch.exp(-self.eta * h) if self.eta else 1.0)
        coef_x0 = -at_s.alpha * torch.expm1(-(1 + self.eta) * h)
        return coef_x, coef_x0, at_s.sigma * torch.sqrt(-torch.expm1(-2 * self.eta * h))


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
