r"""Noise schedules :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`: the base class and closed-form schedules."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gencompare.errors import UserError, check_positive
from gencompare.hyperparameters import StoresArguments
from gencompare.rng import draw_normal, full_precision

T = TypeVar("T")

MAX_START_LOG_SNR = -4.0
"""Highest log-SNR at which sampling may start from pure noise: the remaining fraction alpha = 0.13 of the image is
considered negligible. Published schedules end lower, between -5 (VDM) and -20."""
ZERO_SNR = -60.0
"""The log-SNR that stands for a signal-to-noise ratio of 0. There alpha is 1e-13, so that alpha x_0 is lost in the
rounding of x_t, while ratios of alphas and their squares are finite in float32."""
NO_SIGNAL = -50.0
"""Below this log-SNR, x_t is pure noise: eps is x_t itself and does not determine x_0."""
CLEAN = -1.0
"""The time that stands for clean data. It is not 0, because a schedule may still have noise at time 0."""


class NoiseSchedule(nn.Module, StoresArguments, ABC):
    r"""Base class of noise schedules :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`, :math:`t \in [t_{min}, t_{max}]`.

    A subclass sets ``t_min`` and ``t_max`` and implements ``log_alpha`` and ``log_snr``. Both are needed, since
    computing sigma by subtraction, or the log-SNR from rounded alpha and sigma, loses precision in float32.

    A schedule is a module so that its tables move to the device and its parameters, if any, can be trained. Times are
    float tensors of any shape; results have the same shape.
    """

    t_min: float
    t_max: float = 1.0

    @cached_property
    def _tabulated(self) -> dict[int, tuple[GridValues, int]]:
        """Values at the times of running samplers, by the identity of the time."""
        return {}

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        r"""Compute :math:`\log \alpha_t`.

        Args:
            t: times in [t_min, t_max], of any shape.

        Returns:
            A tensor shaped like ``t``.
        """

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        r"""Compute the log-SNR :math:`\lambda_t = \log(\alpha_t^2 / \sigma_t^2)`, which strictly decreases in t.

        Args:
            t: times in [t_min, t_max], of any shape.

        Returns:
            A tensor shaped like ``t``.
        """

    @property
    def discrete_times(self) -> Tensor | None:
        """The times of a discrete schedule, increasing from t_min to t_max, (T,); None for continuous time."""
        return None

    def require_discrete_times(self) -> Tensor:
        """Return `discrete_times`. Raise `UserError` if there are none.

        Returns:
            The times, (T,).

        Raises:
            UserError: if the schedule has no discrete times.
        """
        if self.discrete_times is None:
            raise UserError(
                f"{type(self).__name__} is a continuous-time schedule, but a part of this model needs a schedule with"
                " discrete steps (linear, cosine, ...)."
            )
        return self.discrete_times

    def discrete_index(self, t: Tensor) -> Tensor:
        """Find the index of the first discrete time that is not before ``t``.

        Args:
            t: times, of any shape.

        Returns:
            Indices from 0 to T - 1, shaped like ``t``.

        Raises:
            UserError: if the schedule has no discrete times.
        """
        times, rounding = self.require_discrete_times().to(t), 8 * torch.finfo(t.dtype).eps
        return torch.searchsorted(times, (t * (1 - rounding)).contiguous()).clamp(max=len(times) - 1)

    @property
    def prior_std(self) -> Tensor | float:
        """Standard deviation of the prior at t_max."""
        return self.prior_std_at(torch.tensor(self.t_max, device=self.device))

    def prior_std_at(self, t: Tensor) -> Tensor | float:
        """Compute the standard deviation of the noise for a start at time ``t``: sigma(t), as if x_0 were 0.

        Args:
            t: the time, ().

        Returns:
            The standard deviation, ().
        """
        return self.at(t).sigma

    @torch.no_grad()
    def prior_mismatch(self, t: Tensor) -> str | None:
        """Return a message if x_t contains too much of the image for sampling to start from pure noise at time ``t``.

        Args:
            t: the time, ().

        Returns:
            A message for the user; None if sampling can start at ``t``.
        """
        if (log_snr := float(self.log_snr(t.to(self.device)))) <= MAX_START_LOG_SNR:
            return None
        return (
            f"Sampling starts from pure noise, but under {type(self).__name__} it would start at log-SNR {log_snr:.3g},"
            f" where a fraction {float(self.log_alpha(t.to(self.device)).exp()):.2g} of the image remains, which would"
            f" be missing from samples. Lower the log-SNR to {MAX_START_LOG_SNR:g} or below, either with the schedule"
            " (for T steps, betas are 1000 / T times as large as for 1000) or with model.sampler.grid.log_snr_start."
        )

    @property
    def device(self) -> torch.device | None:
        """Device of the tables or parameters. If there are none, None: values are on the device of the times."""
        return next((tensor.device for tensor in [*self.parameters(), *self.buffers()]), None)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tables or parameters; torch's default type if there are none."""
        return next((tensor.dtype for tensor in [*self.parameters(), *self.buffers()]), torch.get_default_dtype())

    @property
    @torch.no_grad()
    def ends_in_pure_noise(self) -> bool:
        """Whether no signal is left at t_max (zero terminal SNR, Lin et al. 2023, https://arxiv.org/abs/2305.08891)."""
        return bool(self.log_snr(torch.tensor(self.t_max, device=self.device, dtype=self.dtype)) < NO_SIGNAL)

    def at(self, t: Tensor, x: Tensor | None = None) -> ScheduleValues:
        """Evaluate alpha, sigma, the log-SNR and their derivatives at times ``t``.

        Args:
            t: times, () or (n,).
            x: tensor (n, ...); the values are shaped and cast to broadcast with x. If None, they keep the shape of
                ``t``.

        Returns:
            The values, each computed on first access. If ``t`` is one of the times of a running sampler, they are
            looked up.
        """
        grid, index = self._tabulated.get(id(t), (None, 0))
        if grid is not None and x is not None and x.dtype == grid.dtype:
            return grid[index]
        return ScheduleValues(self, t, x)

    @contextmanager
    def tabulated(self, grid: GridValues) -> Iterator[None]:
        """Let `at` look up the values of a grid in the block.

        Times are looked up by identity: pass the elements of `GridValues.times` to the denoiser.
        """
        keys = {id(t): (grid, index) for index, t in enumerate(grid.times)}
        self._tabulated |= keys
        try:
            yield
        finally:
            for key in keys:
                del self._tabulated[key]

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Compute the derivatives :math:`d \log \alpha / dt` and :math:`d \lambda / dt`.

        Args:
            t: times in [t_min, t_max], of any shape.

        Returns:
            The derivatives, each shaped like ``t``.
        """
        return _time_derivative(self.log_alpha, t), self.log_snr_slope(t)

    def log_snr_slope(self, t: Tensor) -> Tensor:
        r"""Compute :math:`d \lambda / dt`, by forward-mode differentiation unless overridden.

        Args:
            t: times in [t_min, t_max], of any shape.

        Returns:
            A tensor shaped like ``t``.
        """
        return _time_derivative(self.log_snr, t)

    def sde(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Compute the drift f and squared diffusion g^2 of the forward SDE :math:`dx = f(t)\, x\, dt + g(t)\, dw`.

        .. math:: f = \frac{d \log \alpha}{dt}, \qquad g^2 = -\sigma^2 \frac{d\lambda}{dt}

        Kingma et al. (2021), "Variational Diffusion Models", eq. 10 and the text around it,
        https://arxiv.org/abs/2107.00630.

        Args:
            t: times in [t_min, t_max], of any shape.

        Returns:
            f and g^2, each shaped like ``t``.
        """
        sigma2 = torch.exp(2 * self.log_alpha(t) - self.log_snr(t))
        drift, log_snr_slope = self.slopes(t)
        return drift, -sigma2 * log_snr_slope

    @torch.no_grad()
    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Find the time whose log-SNR is closest to the given log-SNR, by bisection unless overridden.

        Args:
            log_snr: log-SNRs, of any shape.

        Returns:
            Times in [t_min, t_max], shaped like ``log_snr``.
        """
        low = torch.full_like(log_snr, self.t_min)
        high = torch.full_like(log_snr, self.t_max)
        for _ in range(-math.floor(math.log2(torch.finfo(log_snr.dtype).eps)) + 8):
            middle = (low + high) / 2
            too_early = self.log_snr(middle) > log_snr
            low, high = torch.where(too_early, middle, low), torch.where(too_early, high, middle)
        return (low + high) / 2

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        t: Tensor | None = None,
    ) -> Tensor:
        """Draw the noise that sampling starts from: N(0, prior_std_at(t)^2).

        Args:
            shape: shape of the noise.
            generator: source of the random numbers.
            device: device of the noise.
            t: first time of the sampling grid, (); None for t_max.

        Returns:
            The noise, in the dtype of ``t``, or the default dtype without it.
        """
        dtype = torch.get_default_dtype() if t is None else full_precision(t.dtype)
        noise = draw_normal(shape, generator, device, dtype)
        return noise * (self.prior_std if t is None else self.prior_std_at(t.to(device)))

    @torch.no_grad()
    def check(self, points: int = 1001) -> None:
        """Check the schedule at evenly spaced times.

        Args:
            points: number of times.

        Raises:
            UserError: if the times are not within [0, 1], the schedule is not finite, or its SNR is not strictly
                decreasing.
        """
        name = type(self).__name__
        if not 0 <= self.t_min < self.t_max <= 1:
            raise UserError(f"{name} is defined from t={self.t_min} to {self.t_max}, which is not within [0, 1].")
        t = torch.linspace(self.t_min, self.t_max, points, device=self.device)
        log_snr, log_alpha = self.log_snr(t), self.log_alpha(t)
        for quantity, values in (("log-SNR", log_snr), ("log alpha", log_alpha)):
            if not torch.isfinite(values).all():
                first = float(t[~torch.isfinite(values)][0])
                raise UserError(f"{name}: {quantity} is not finite at t={first:.4g}; change the schedule settings.")
        not_decreasing = log_snr.diff() >= 0
        if not_decreasing.any():
            first = float(t[1:][not_decreasing][0])
            raise UserError(f"{name}: the signal-to-noise ratio is not strictly decreasing at t={first:.4g}.")


class ScheduleValues:
    r"""Values of a schedule at given times: alpha, sigma, log-SNR and their derivatives, each computed on first access.

    At the time ``CLEAN``, alpha = 1, sigma = 0 and the log-SNR is infinite.
    """

    def __init__(self, schedule: NoiseSchedule, t: Tensor, x: Tensor | None = None) -> None:
        self.schedule, self.t, self._x = schedule, t, x
        self._derived: dict[Callable[[ScheduleValues], Any], Any] = {}
        self._is_clean = t == CLEAN
        self._valid_t = torch.where(self._is_clean, schedule.t_min, t)

    def _broadcast(self, values: Tensor) -> Tensor:
        if self._x is None:
            return values
        if values.ndim:
            values = values.reshape(-1, *[1] * (self._x.ndim - 1))
        return values.to(self._x.dtype)

    def derive(self, function: Callable[[ScheduleValues], T]) -> T:
        """Return ``function(self)``, a tensor or a tuple of tensors, each element of which depends on one time only.

        It is computed once for these values, and once for all times of a running sampler.
        """
        if function not in self._derived:
            self._derived[function] = function(self)
        return self._derived[function]

    @cached_property
    def _logs(self) -> tuple[Tensor, Tensor]:
        log_alpha = self.schedule.log_alpha(self._valid_t).masked_fill(self._is_clean, 0.0)
        log_snr = self.schedule.log_snr(self._valid_t).masked_fill(self._is_clean, math.inf)
        return log_alpha, log_snr

    @cached_property
    def previous_step(self) -> ScheduleValues:
        """Values one discrete step earlier, or at ``CLEAN`` for the first step; needs a discrete schedule."""
        index = self.schedule.discrete_index(self._valid_t)
        times = self.schedule.require_discrete_times().to(self.t)
        previous = torch.where(index > 0, times[index - 1], CLEAN)
        return ScheduleValues(self.schedule, previous, self._x)

    @cached_property
    def log_snr(self) -> Tensor:
        return self._broadcast(self._logs[1])

    @cached_property
    def alpha(self) -> Tensor:
        return self._broadcast(self._logs[0].exp())

    @cached_property
    def sigma(self) -> Tensor:
        log_alpha, log_snr = self._logs
        return self._broadcast(torch.exp(log_alpha - log_snr / 2))

    @cached_property
    def dlog_alpha_dt(self) -> Tensor:
        """The derivative d log alpha / dt, which is the drift f of the SDE; undefined at ``CLEAN``."""
        return self._broadcast(self._slopes[0])

    @cached_property
    def dlog_snr_dt(self) -> Tensor:
        """The derivative d lambda / dt of the log-SNR, which is negative; undefined at ``CLEAN``."""
        return self._broadcast(self._slopes[1])

    @cached_property
    def _slopes(self) -> tuple[Tensor, Tensor]:
        return self.schedule.slopes(self._valid_t)


class GridValues(ScheduleValues):
    """Values at the times of a trajectory, (k,), computed together. An index gives those at one time, ()."""

    def __init__(self, schedule: NoiseSchedule, times: Tensor, x: Tensor) -> None:
        super().__init__(schedule, times)
        self.dtype, self.times = x.dtype, times.unbind()
        self._at = [_PartOfGrid(self, index) for index in range(len(times))]
        self._per_time: dict[Callable[[ScheduleValues], Any], Any] = {}

    def __getitem__(self, index: int) -> ScheduleValues:
        return self._at[index]

    def __iter__(self) -> Iterator[ScheduleValues]:
        return iter(self._at)

    def steps(self) -> Iterator[tuple[Tensor, Tensor, ScheduleValues, ScheduleValues]]:
        """Yield (t, s, values at t, values at s) for each pair of neighbouring times. Meanwhile, `NoiseSchedule.at`
        looks these values up."""
        with self.schedule.tabulated(self):
            for (t, s), (at_t, at_s) in zip(pairwise(self.times), pairwise(self), strict=True):
                yield t, s, at_t, at_s

    def coefficients(
        self, function: Callable[[ScheduleValues, ScheduleValues], tuple[Tensor, ...]]
    ) -> list[tuple[Tensor, ...]]:
        """Return the coefficients of every step, each (), from one call for all steps.

        Args:
            function: computes them from the values at the beginnings and ends of the steps, each (k - 1,).
        """
        values = function(_PartOfGrid(self, slice(None, -1)), _PartOfGrid(self, slice(1, None)))
        return _unbind(torch.broadcast_tensors(*values))

    def _broadcast(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)

    @cached_property
    def previous_step(self) -> ScheduleValues:
        return GridValues(self.schedule, super().previous_step.t, self.log_snr)

    def derive_at(self, function: Callable[[ScheduleValues], Any], index: int) -> Any:
        """Return the elements with this index of what ``function`` computes for all times."""
        if function not in self._per_time:
            self._per_time[function] = _unbind(self.derive(function))
        return self._per_time[function][index]


class _PartOfGrid(ScheduleValues):
    """Values at one time of a trajectory, or at a slice of its times."""

    def __init__(self, grid: GridValues, index: int | slice) -> None:
        self._grid, self._index, self.schedule = grid, index, grid.schedule

    def derive(self, function: Callable[[ScheduleValues], Any]) -> Any:
        if isinstance(self._index, int):
            return self._grid.derive_at(function, self._index)
        whole = self._grid.derive(function)
        return whole[self._index] if isinstance(whole, Tensor) else tuple(part[self._index] for part in whole)

    t = property(lambda self: self.derive(_TIME))  # type: ignore[assignment]
    log_snr = property(lambda self: self.derive(_LOG_SNR))  # type: ignore[assignment]
    alpha = property(lambda self: self.derive(_ALPHA))  # type: ignore[assignment]
    sigma = property(lambda self: self.derive(_SIGMA))  # type: ignore[assignment]
    dlog_alpha_dt = property(lambda self: self.derive(_DLOG_ALPHA_DT))  # type: ignore[assignment]
    dlog_snr_dt = property(lambda self: self.derive(_DLOG_SNR_DT))  # type: ignore[assignment]


_TIME, _LOG_SNR, _ALPHA, _SIGMA, _DLOG_ALPHA_DT, _DLOG_SNR_DT = map(
    attrgetter, ("t", "log_snr", "alpha", "sigma", "dlog_alpha_dt", "dlog_snr_dt")
)


def _unbind(values: Tensor | tuple[Tensor, ...]) -> list[Any]:
    """Split tensors (k,) into k entries: tensors (), or a tuple of them for a tuple of tensors."""
    return list(values.unbind() if isinstance(values, Tensor) else zip(*(v.unbind() for v in values), strict=True))


class VariancePreserving(NoiseSchedule):
    r"""Base class of schedules with :math:`\alpha^2 + \sigma^2 = 1`, so that :math:`\alpha^2 = sigmoid(\lambda)`."""

    def log_alpha(self, t: Tensor) -> Tensor:
        return logsigmoid(self.log_snr(t)) / 2

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr_slope = self.log_snr_slope(t)
        return torch.sigmoid(-self.log_snr(t)) / 2 * log_snr_slope, log_snr_slope

    def prior_std_at(self, t: Tensor) -> float:
        """Return 1, since data of unit variance have unit variance at all times."""
        return 1.0


class VarianceExploding(NoiseSchedule):
    r"""Base class of schedules with :math:`\alpha = 1`, so that :math:`\log \sigma = -\lambda / 2`."""

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), self.log_snr_slope(t)

    def prior_mismatch(self, t: Tensor) -> None:
        """Return None: the image is not scaled down, and sampling can start from noise of std sigma(t) at any time.

        Whether this noise hides the image depends on the largest sigma. (In NCSN it is only 2, but the Langevin steps
        forget their starting point.)
        """


def _time_derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    suppress_jvp_warning()
    times = t.reshape(-1)  # with a tensor of shape (), jvp mixes float32 and float64
    return torch.func.jvp(function, (times,), (torch.ones_like(times),))[1].reshape(t.shape)


@cache
def suppress_jvp_warning() -> None:
    """Call torch.func.jvp once with warnings suppressed, since the first call warns about code in torch itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


class _LinearBeta(NoiseSchedule):
    r"""Base class of schedules with :math:`\alpha_t = \exp(-B(t) / 2)` and linear :math:`\beta(t)`.

    .. math:: B(t) = \int_0^t \beta(s)\, ds, \qquad \beta(s) = \beta_{min} + s\, (\beta_{max} - \beta_{min})

    The log-SNR is infinite at t = 0, so time starts at ``t_min`` > 0.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0 < beta_min <= beta_max:
            raise UserError(f"{name}: beta_min={beta_min} must be positive and not above beta_max={beta_max}.")
        if not 0 < t_min < 1:
            raise UserError(f"{name}: t_min={t_min} must lie between 0, where the log-SNR is infinite, and 1.")
        self.beta_min, self.beta_max, self.t_min = beta_min, beta_max, t_min

    def beta_integral(self, t: Tensor) -> Tensor:
        r"""Compute :math:`B(t) = t \beta_{min} + t^2 (\beta_{max} - \beta_{min}) / 2`."""
        return t * (self.beta_min + t * (0.5 * (self.beta_max - self.beta_min)))

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta_integral(t)

    def _t_from_beta_integral(self, integral: Tensor) -> Tensor:
        """Find the time t in [t_min, t_max] for which B(t), the integral of beta, is closest to ``integral``."""
        slope = self.beta_max - self.beta_min
        b_at_1 = self.beta_min + 0.5 * slope
        b = integral.clamp(max=b_at_1)  # the integral may be infinite
        t = 2 * b / (self.beta_min + (self.beta_min**2 + 2 * slope * b).sqrt())
        return t.clamp(self.t_min, self.t_max)


class VP(_LinearBeta, VariancePreserving):
    r"""The variance-preserving SDE: :math:`\sigma^2 = 1 - e^{-B}`, :math:`f = -\beta / 2`, :math:`g^2 = \beta`.

    This is the limit of DDPM's linear table for many steps, whose :math:`\beta_i T` is :math:`\beta` here. Song et al.
    (2021), "Score-Based Generative Modeling through SDEs", eq. 11 and 29, https://arxiv.org/abs/2011.13456.

    Args:
        beta_min: beta at time 0.
        beta_max: beta at time 1.
        t_min: smallest time; published models are trained and evaluated with 1e-5, where sigma is 0.001.
    """

    def log_snr(self, t: Tensor) -> Tensor:
        b = self.beta_integral(t)
        return -b - torch.log(-torch.expm1(-b))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        # alpha^2 = exp(-B) = sigmoid(lambda)
        return self._t_from_beta_integral(-logsigmoid(log_snr))


class SubVP(_LinearBeta):
    r"""The sub-VP SDE: :math:`\sigma = 1 - e^{-B}`, :math:`f = -\beta / 2`, :math:`g^2 = \beta (1 - e^{-2B})`.

    It has less noise than `VP` at every time. Song et al. (2021), "Score-Based Generative Modeling through SDEs", eq.
    12 and 29, https://arxiv.org/abs/2011.13456.

    Args:
        beta_min: beta at time 0.
        beta_max: beta at time 1.
        t_min: smallest time. Published models are trained and evaluated with 1e-5, where sigma is 1e-6, about ten times
            the float32 rounding error of x_t. The default 1e-3, where published samplers end, keeps sigma at 1e-4.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> None:
        super().__init__(beta_min, beta_max, t_min)

    def log_snr(self, t: Tensor) -> Tensor:
        b = self.beta_integral(t)
        return -b - 2 * torch.log(-torch.expm1(-b))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        # sigma / alpha = exp(-lambda / 2) = 2 sinh(B / 2)
        return self._t_from_beta_integral(2 * torch.asinh(0.5 * torch.exp(-0.5 * log_snr)))


class VE(VarianceExploding):
    r"""The variance-exploding SDE: :math:`\sigma(t) = \sigma_{min} (\sigma_{max} / \sigma_{min})^t`.

    :math:`\alpha = 1`, :math:`f = 0` and :math:`g^2 = 2 \sigma^2 \log(\sigma_{max} / \sigma_{min})`. The log-SNR is
    linear in time and finite at 0. Song et al. (2021), "Score-Based Generative Modeling through SDEs", eq. 9 and
    appendix C, https://arxiv.org/abs/2011.13456.

    Args:
        sigma_min: sigma at time 0 for data in [-1, 1], which is twice the published value for data in [0, 1].
        sigma_max: sigma at time 1. (The published 0.01 and 50 become 0.02 and 100 here.)
    """

    t_min = 0.0

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__()
        check_sigmas(type(self).__name__, sigma_min, sigma_max)
        self.log_sigma_min = math.log(sigma_min)
        self.log_sigma_range = math.log(sigma_max / sigma_min)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (self.log_sigma_min + self.log_sigma_range * t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-0.5 * log_snr - self.log_sigma_min) / self.log_sigma_range).clamp(self.t_min, self.t_max)


def check_sigmas(name: str, sigma_min: float, sigma_max: float) -> None:
    """Raise `UserError` unless 0 < sigma_min < sigma_max, both finite."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"{name}: sigma_min={sigma_min} must be positive and below a finite sigma_max={sigma_max}.")


class RectifiedFlow(NoiseSchedule):
    r"""The straight line from image to noise: :math:`\alpha = 1 - t`, :math:`\sigma = t`.

    Liu et al. (2023), "Flow Straight and Fast", eq. 1 with time reversed, https://arxiv.org/abs/2209.03003; also the
    optimal-transport path of Lipman et al. (2023), "Flow Matching", eq. 20 with sigma_min = 0,
    https://arxiv.org/abs/2210.02747.

    The log-SNR :math:`2 \log((1 - t) / t)` is infinite at both ends, so time runs from 1e-4 to 1 - 1e-4 and the log-SNR
    from 18.4 to -18.4. At these ends float32 still represents eps in x_t, and alpha as 1 - t, to three digits. The
    fraction of the image that remains at the end, 1e-4, is negligible, so the prior is N(0, 1) in practice.
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
    r"""The schedule of EDM: :math:`\sigma(t) = (a + t\, (b - a))^\rho`, :math:`\alpha = 1`.

    :math:`a = \sigma_{min}^{1 / \rho}` and :math:`b = \sigma_{max}^{1 / \rho}`. Evenly spaced times give the noise
    levels of EDM's sampling grid. Karras et al. (2022), "Elucidating the Design Space", eq. 5 with time reversed,
    https://arxiv.org/abs/2206.00364. Their sigmas are for data in [-1, 1], as here.

    Args:
        sigma_min: sigma at time 0.
        sigma_max: sigma at time 1.
        rho: controls how much time is spent at low noise. sigma increases linearly if rho is 1, and geometrically in
            the limit of large rho.
    """

    t_min = 0.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__()
        check_sigmas(type(self).__name__, sigma_min, sigma_max)
        check_positive("schedule.rho", rho)
        self.rho = rho
        self.root_min = sigma_min ** (1 / rho)
        self.root_range = sigma_max ** (1 / rho) - self.root_min

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * self.rho * torch.log(self.root_min + self.root_range * t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        root = torch.exp(-0.5 / self.rho * log_snr)  # sigma^(1 / rho)
        return ((root - self.root_min) / self.root_range).clamp(self.t_min, self.t_max)


@torch.no_grad()
def schedule_curve(schedule: NoiseSchedule, points: int = 101) -> dict[str, np.ndarray]:
    r"""Evaluate a schedule at evenly spaced times from t_min to t_max.

    The values are ``t``, ``log_snr``, ``alpha``, ``sigma`` and ``density``, each (points,) in float64.

    ``density`` is the density of the log-SNR for uniform times, :math:`1 / ((t_{max} - t_{min})\, |d\lambda / dt|)`: it
    shows the noise levels that training with uniform times, or sampling on a uniform grid, concentrates on.
    """
    t = torch.linspace(schedule.t_min, schedule.t_max, points, dtype=torch.float64, device=schedule.device)
    at = schedule.at(t)
    density = 1 / ((schedule.t_max - schedule.t_min) * at.dlog_snr_dt.abs())
    values = {"t": t, "log_snr": at.log_snr, "alpha": at.alpha, "sigma": at.sigma, "density": density}
    return {name: value.double().cpu().numpy() for name, value in values.items()}


@torch.no_grad()
def is_same_schedule(schedule: NoiseSchedule, other: NoiseSchedule, points: int = 9) -> bool:
    """Return whether two schedules have the same noise at the same times."""
    return torch.allclose(_curve(schedule, points), _curve(other, points), rtol=1e-3, atol=1e-3)


def _curve(schedule: NoiseSchedule, points: int) -> Tensor:
    """Return times from t_min to t_max, with the log-SNR and log alpha at these times."""
    t = torch.linspace(schedule.t_min, schedule.t_max, points, device=schedule.device)
    return torch.stack([t, schedule.log_snr(t), schedule.log_alpha(t)]).float().cpu()
