"""Noise schedules x_t = alpha_t x_0 + sigma_t eps: the base class and the schedules in closed form."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gencompare.errors import UserError
from gencompare.hyperparameters import KeepsArguments

NOISE_ALONE = -4.0
"""The highest log-SNR at which what is left of an image, a share alpha = 0.13, may be taken for nothing. Published
schedules end lower, at -5 (VDM) to -20."""
CLEAN = -1.0
"""The time that stands for clean data. (Not 0: a schedule may have noise left at time 0.)"""


class NoiseSchedule(nn.Module, KeepsArguments, ABC):
    r"""Base of every schedule; a subclass sets ``t_min`` and ``t_max`` and writes ``log_alpha`` and ``log_snr``.

    It is a module so that tables move to the device and a learned schedule trains. Times are float tensors of any
    shape, and what is returned has that shape. Both logarithms are asked for, since sigma by subtraction, or
    log-SNR from rounded alpha and sigma, cancels in float32.
    """

    t_min: float
    t_max: float = 1.0

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha(t), for t in [t_min, t_max]."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha(t)^2 / sigma(t)^2), falling strictly."""

    @property
    def discrete_times(self) -> Tensor | None:
        """The times that the model is defined at, rising from t_min to t_max; None where time is continuous."""
        return None

    def steps(self) -> Tensor:
        """``discrete_times``. Raises `UserError` for a schedule that has none."""
        if self.discrete_times is None:
            raise UserError(
                f"Schedule {type(self).__name__} runs in continuous time, and a part of this model needs one with"
                " steps (linear, cosine, ...)."
            )
        return self.discrete_times

    def step_index(self, t: Tensor) -> Tensor:
        """Index, counted from 0, of the first of ``steps()`` that is not before ``t``."""
        steps, rounding = self.steps().to(t), 8 * torch.finfo(t.dtype).eps
        return torch.searchsorted(steps, (t * (1 - rounding)).contiguous()).clamp(max=len(steps) - 1)

    @property
    def prior_std(self) -> Tensor | float:
        """Standard deviation of the noise that sampling starts from: sigma(t_max)."""
        return self.start_std(torch.tensor(self.t_max, device=self.device))

    def start_std(self, t: Tensor) -> Tensor | float:
        """Standard deviation of the noise to start from at time ``t``, (): sigma(t), which takes the data for 0."""
        return self.at(t).sigma

    @torch.no_grad()
    def start_problem(self, t: Tensor) -> str | None:
        """Why noise alone is no start at time ``t``, (), or None: too much is left of the image, which noise lacks."""
        if (log_snr := float(self.log_snr(t.to(self.device)))) <= NOISE_ALONE:
            return None
        return (
            f"Sampling starts from noise alone, and under schedule {type(self).__name__} it would at log-SNR"
            f" {log_snr:.3g}, where a share {float(self.log_alpha(t.to(self.device)).exp()):.2g} of the image is left:"
            f" samples would lack that. Let the log-SNR fall to {NOISE_ALONE:g} or lower, by the schedule (betas for T"
            " steps are 1000 / T times as large as for 1000) and by model.sampler.grid.first."
        )

    @property
    def device(self) -> torch.device | None:
        """Where its tables or parameters lie; None where it has none, and goes by the times that it is given."""
        return next((tensor.device for tensor in [*self.parameters(), *self.buffers()]), None)

    def at(self, t: Tensor, x: Tensor | None = None) -> ScheduleValues:
        """Everything that the schedule says of times ``t``, () or (n,), shaped and cast to meet ``x`` (n, ...)."""
        return ScheduleValues(self, t, x)

    def sde(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Drift f and squared diffusion g^2 of dx = f(t) x dt + g(t) dw, whose marginals the schedule gives.

        f = d log alpha / dt, g^2 = -sigma^2 d lambda / dt (Kingma et al. 2021, "Variational Diffusion Models", eq. 10
        and the text around it), by forward differentiation.
        """
        sigma2 = torch.exp(2 * self.log_alpha(t) - self.log_snr(t))
        return _slope(self.log_alpha, t), -sigma2 * _slope(self.log_snr, t)

    @torch.no_grad()
    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """The time in [t_min, t_max] at which the log-SNR is nearest to the given one; by bisection."""
        low = torch.full_like(log_snr, self.t_min)
        high = torch.full_like(log_snr, self.t_max)
        for _ in range(-math.floor(math.log2(torch.finfo(log_snr.dtype).eps)) + 8):
            middle = (low + high) / 2
            below = self.log_snr(middle) > log_snr
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        t: Tensor | None = None,
    ) -> Tensor:
        """Noise that sampling starts from, float32: N(0, prior_std^2), or N(0, start_std(t)^2) for a grid whose first
        time ``t``, (), is not t_max."""
        noise = torch.randn(*shape, generator=generator, device=generator.device).to(device)
        return noise * (self.prior_std if t is None else self.start_std(t.to(device)))

    @torch.no_grad()
    def check(self, points: int = 1001) -> None:
        """Raises `UserError` for a schedule that is not finite or whose SNR does not fall strictly."""
        name = type(self).__name__
        if not 0 <= self.t_min < self.t_max <= 1:
            raise UserError(f"Schedule {name} runs from t={self.t_min} to {self.t_max}: not a part of [0, 1].")
        t = torch.linspace(self.t_min, self.t_max, points, device=self.device)
        log_snr, log_alpha = self.log_snr(t), self.log_alpha(t)
        for what, values in (("log-SNR", log_snr), ("log alpha", log_alpha)):
            if not torch.isfinite(values).all():
                bad = float(t[~torch.isfinite(values)][0])
                raise UserError(f"Schedule {name}: {what} is not finite at t={bad:.4g}; change its settings.")
        rises = log_snr.diff() >= 0
        if rises.any():
            bad = float(t[1:][rises][0])
            raise UserError(f"Schedule {name}: the signal-to-noise ratio does not fall at t={bad:.4g}.")


class ScheduleValues:
    r"""A schedule at given times: alpha, sigma, lambda and slopes, each computed when first asked for.

    Where the time is ``CLEAN``, alpha = 1, sigma = 0 and lambda = inf.
    """

    def __init__(self, schedule: NoiseSchedule, t: Tensor, x: Tensor | None = None) -> None:
        self.schedule, self._t, self._x = schedule, t, x
        self._clean = t == CLEAN
        self._inside = torch.where(self._clean, schedule.t_min, t)

    def _shaped(self, values: Tensor) -> Tensor:
        if self._x is None:
            return values
        if values.ndim:
            values = values.reshape(-1, *[1] * (self._x.ndim - 1))
        return values.to(self._x.dtype)

    @cached_property
    def _logs(self) -> tuple[Tensor, Tensor]:
        log_alpha = self.schedule.log_alpha(self._inside).masked_fill(self._clean, 0.0)
        log_snr = self.schedule.log_snr(self._inside).masked_fill(self._clean, math.inf)
        return log_alpha, log_snr

    @cached_property
    def step_before(self) -> ScheduleValues:
        """The schedule at the last of its steps before each time, ``CLEAN`` before the first. `UserError` if none."""
        index = self.schedule.step_index(self._inside)
        steps = self.schedule.steps().to(self._t)
        before = torch.where(index > 0, steps[index - 1], CLEAN)
        return ScheduleValues(self.schedule, before, self._x)

    @cached_property
    def log_snr(self) -> Tensor:
        return self._shaped(self._logs[1])

    @cached_property
    def alpha(self) -> Tensor:
        return self._shaped(self._logs[0].exp())

    @cached_property
    def sigma(self) -> Tensor:
        log_alpha, log_snr = self._logs
        return self._shaped(torch.exp(log_alpha - log_snr / 2))

    @cached_property
    def log_alpha_slope(self) -> Tensor:
        """d log alpha / dt, which is the drift f of the SDE; without meaning in clean data."""
        return self._shaped(_slope(self.schedule.log_alpha, self._inside))

    @cached_property
    def log_snr_slope(self) -> Tensor:
        """d lambda / dt, below 0; without meaning in clean data."""
        return self._shaped(_slope(self.schedule.log_snr, self._inside))


class VariancePreserving(NoiseSchedule):
    r"""alpha^2 + sigma^2 = 1, so that log alpha follows from the log-SNR: alpha^2 = sigmoid(lambda)."""

    def log_alpha(self, t: Tensor) -> Tensor:
        return logsigmoid(self.log_snr(t)) / 2

    def start_std(self, t: Tensor) -> float:
        """1: the standard deviation that data of unit variance keep at all times."""
        return 1.0


class VarianceExploding(NoiseSchedule):
    r"""alpha = 1: noise is added to an image that is not scaled down, so that log sigma = -lambda / 2."""

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def start_problem(self, t: Tensor) -> None:
        """None: the image stays as it is at all times, and sampling starts from noise of sigma(t). Whether that drowns
        the image is up to the largest sigma. (NCSN's is 2; its Langevin steps forget where they start.)"""


def _slope(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    _warm_up()
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]


@cache
def _warm_up() -> None:
    """A first call of torch.func.jvp, in which torch warns the user of what torch itself does (torch.jit.script)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


class _LinearBeta(NoiseSchedule):
    r"""alpha(t) = exp(-B / 2), B(t) = integral of beta from 0 to t, beta(s) = beta_min + s (beta_max - beta_min).

    The noise vanishes at t = 0, where the log-SNR is infinite: ``t_min`` keeps off it.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0 < beta_min <= beta_max:
            raise UserError(f"{name}: beta from {beta_min} to {beta_max} must be positive and must not fall.")
        if not 0 < t_min < 1:
            raise UserError(f"{name}: t_min={t_min} must lie between 0, where the log-SNR is infinite, and 1.")
        self.beta_min, self.beta_max, self.t_min = beta_min, beta_max, t_min

    def integral(self, t: Tensor) -> Tensor:
        """B(t) = t beta_min + t^2 (beta_max - beta_min) / 2."""
        return t * (self.beta_min + t * (0.5 * (self.beta_max - self.beta_min)))

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * self.integral(t)

    def _t_from_integral(self, integral: Tensor) -> Tensor:
        """The time in [t_min, t_max] at which B is nearest to the given one."""
        rise = self.beta_max - self.beta_min
        highest = self.beta_min + 0.5 * rise
        b = integral.clamp(max=highest)  # B(1); it may be infinite
        t = 2 * b / (self.beta_min + (self.beta_min**2 + 2 * rise * b).sqrt())
        return t.clamp(self.t_min, self.t_max)


class VP(_LinearBeta, VariancePreserving):
    r"""sigma^2 = 1 - exp(-B), the variance-preserving SDE: f = -beta / 2, g^2 = beta (Song et al. 2021, eq. 11, 29).

    The limit of DDPM's linear table in many steps: beta_i T there is beta here.

    Args:
        beta_min, beta_max: beta at time 0 and 1.
        t_min: where time starts; 1e-5, where sigma is 0.001, is what published models are trained and scored with.
    """

    def log_snr(self, t: Tensor) -> Tensor:
        b = self.integral(t)
        return -b - torch.log(-torch.expm1(-b))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        # alpha^2 = exp(-B) = sigmoid(lambda)
        return self._t_from_integral(-logsigmoid(log_snr))


class SubVP(_LinearBeta):
    r"""sigma = 1 - exp(-B), the sub-VP SDE: f = -beta / 2, g^2 = beta (1 - exp(-2 B)) (Song et al. 2021, eq. 12, 29).

    Less noise than `VP` at every time. As sigma, not sigma^2, is proportional to t at the start, x_t soon cannot hold
    the noise in float32: at the published t_min of 1e-5 sigma is 1e-6, some ten roundings of x_t. So time starts at
    1e-3, where published samplers end, unless told otherwise; there sigma is 1e-4.

    Args:
        beta_min, beta_max: beta at time 0 and 1.
        t_min: where time starts; 1e-5 is what published models are trained and scored with.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> None:
        super().__init__(beta_min, beta_max, t_min)

    def log_snr(self, t: Tensor) -> Tensor:
        b = self.integral(t)
        return -b - 2 * torch.log(-torch.expm1(-b))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        # sigma / alpha = exp(-lambda / 2) = 2 sinh(B / 2)
        return self._t_from_integral(2 * torch.asinh(0.5 * torch.exp(-0.5 * log_snr)))


class VE(VarianceExploding):
    r"""sigma(t) = sigma_min (sigma_max / sigma_min)^t, alpha = 1 (Song et al. 2021, eq. 9, appendix C).

    f = 0 and g^2 = 2 sigma^2 log(sigma_max / sigma_min). Log-SNR is linear in time, and finite at 0.

    Args:
        sigma_min, sigma_max: noise at time 0 and 1, for data in [-1, 1]. Published figures are for data in [0, 1]: 0.01
            and 50 there are 0.02 and 100 here.
    """

    t_min = 0.0

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__()
        check_sigmas(type(self).__name__, sigma_min, sigma_max)
        self.start = math.log(sigma_min)
        self.rise = math.log(sigma_max / sigma_min)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (self.start + self.rise * t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-0.5 * log_snr - self.start) / self.rise).clamp(self.t_min, self.t_max)


def check_sigmas(name: str, sigma_min: float, sigma_max: float) -> None:
    """Raises `UserError` unless 0 < sigma_min < sigma_max, both finite."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"{name}: sigma_min={sigma_min} must be positive and below sigma_max={sigma_max}.")


class RectifiedFlow(NoiseSchedule):
    r"""alpha = 1 - t, sigma = t: a straight line from image to noise (Liu et al. 2023, eq. 1, with time turned round).

    Also the optimal-transport path of Lipman et al. (2023, eq. 20, sigma_min = 0). The log-SNR 2 log((1 - t) / t) is
    infinite at both ends, so time runs from 1e-4 to 1 - 1e-4, and lambda from 18.4 to -18.4. There x_t still holds eps,
    and 1 - t still holds alpha, to three digits in float32. What is left of the image at the end, a ten thousandth, is
    nothing to a network, and the prior is N(0, 1) in practice.
    """

    t_min = 1e-4
    t_max = 1 - 1e-4

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr).clamp(self.t_min, self.t_max)


class EDMSchedule(VarianceExploding):
    r"""sigma(t) = (a + t (b - a))^rho, a = sigma_min^(1 / rho), b = sigma_max^(1 / rho), alpha = 1.

    Karras et al. (2022), "Elucidating the Design Space", eq. 5, turned round: evenly spaced times of this schedule are
    the noise levels of their grid. Their sigmas are for data in [-1, 1] and are not rescaled here.

    Args:
        sigma_min, sigma_max: noise at time 0 and 1.
        rho: how much time is spent where the noise is small: at 1 sigma rises evenly, for large rho geometrically.
    """

    t_min = 0.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__()
        check_sigmas(type(self).__name__, sigma_min, sigma_max)
        if rho <= 0:
            raise UserError(f"Karras: rho={rho}: give a positive number.")
        self.rho = rho
        self.start = sigma_min ** (1 / rho)
        self.rise = sigma_max ** (1 / rho) - self.start

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * self.rho * torch.log(self.start + self.rise * t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        root = torch.exp(-0.5 / self.rho * log_snr)  # sigma^(1 / rho)
        return ((root - self.start) / self.rise).clamp(self.t_min, self.t_max)


@torch.no_grad()
def schedule_curve(schedule: NoiseSchedule, points: int = 101) -> dict[str, np.ndarray]:
    """``t``, evenly from t_min to t_max, ``log_snr``, ``alpha``, ``sigma`` and ``density`` there: (points,), float64.

    ``density`` is that of the log-SNR when times are drawn uniformly, 1 / ((t_max - t_min) |d lambda / dt|): where
    training, or a grid of even times, spends its effort.
    """
    t = torch.linspace(schedule.t_min, schedule.t_max, points, dtype=torch.float64, device=schedule.device)
    at = schedule.at(t)
    density = 1 / ((schedule.t_max - schedule.t_min) * at.log_snr_slope.abs())
    values = {"t": t, "log_snr": at.log_snr, "alpha": at.alpha, "sigma": at.sigma, "density": density}
    return {name: value.double().cpu().numpy() for name, value in values.items()}
