r"""Multistep samplers: a step integrates the polynomial through the predictions at this time and earlier ones.

With :math:`u = \lambda / 2`, half the log-SNR, :math:`h = u_s - u_t` and :math:`\rho = \sigma / \alpha`, the exact
solutions of the probability-flow ODE and of the reverse SDE with noise :math:`\eta` are

.. math::
    \frac{x_s}{\alpha_s} &= \frac{x_t}{\alpha_t} + \int_{\rho_t}^{\rho_s} \epsilon\, d\rho, \\
    x_s &= \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t
        + \alpha_s (1 + \eta) \int_0^h e^{-(1 + \eta)(h - v)} x_0(u_t + v)\, dv
        + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z.

`AdamsBashforth` replaces :math:`\epsilon` by a polynomial, and the other samplers :math:`x_0`. The first steps
use fewer points. With equal steps their error is of second order (third with a corrector), whatever the number of
points; the declared orders are those of the other steps, which the samplers reach if the first steps are short.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.multistep_weights import (
    fractions_like,
    interpolation_weights,
    num_usable_points,
    with_previous,
)
from gencompare.diffusion.samplers import Sampler, Step, check_noise, linear_combination, read_on_host
from gencompare.diffusion.schedules import NO_SIGNAL, GridValues, ScheduleValues
from gencompare.errors import UserError
from gencompare.rng import normal_like


@dataclass(frozen=True, kw_only=True)
class AdamsBashforth(Sampler):
    r"""Adams-Bashforth methods for :math:`\epsilon`: DEIS, LMS and iPNDM.

    .. math::
        x_s = \frac{\alpha_s}{\alpha_t} x_t
            + \alpha_s \int_{\rho_t}^{\rho_s} P\, d\rho, \qquad \rho = \sigma / \alpha,

    where P is the polynomial through the predicted noise at this time and at ``solver_order`` - 1 times before it. A
    step takes one denoiser call. ``solver_order=1`` is `DDIM`. Zhang and Chen (2023), "Fast Sampling of Diffusion
    Models with Exponential Integrator", https://arxiv.org/abs/2204.13902.

    The methods differ in the variable of the polynomial:

    - ``log_rho``: DEIS in diffusers. Its order does not depend on the schedule.
    - ``t``: tAB-DEIS. Under a table of betas, :math:`\epsilon` has a kink in t at every entry, so it needs a fine
      table.
    - ``rho``: rhoAB-DEIS, which is the linear multistep method (LMS) of k-diffusion.
    - ``step``: iPNDM, where P is a polynomial in the index of the step and its mean over the step stands for that over
      :math:`\rho`, so that the coefficients, such as (3, -1) / 2, are constant. Its order is at most 2. This is the
      linear multistep method of Liu et al. (2022), "Pseudo Numerical Methods for Diffusion Models on Manifolds",
      https://arxiv.org/abs/2202.09778, without their Runge-Kutta steps at the start, as in Zhang and Chen.

    Args:
        solver_order: the number of points of the polynomial, from 1 to 4.
        variable: the variable of the polynomial.
    """

    VARIABLES: ClassVar[tuple[str, ...]] = ("log_rho", "t", "rho", "step")
    solver_order: int = 3
    variable: str = "log_rho"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order("solver_order", self.solver_order, 1, 4)
        if self.variable not in self.VARIABLES:
            raise UserError(f"sampler.variable={self.variable}: choose from {', '.join(self.VARIABLES)}.")

    @property
    def order(self) -> int:
        return min(self.solver_order, 2) if self.variable == "step" else self.solver_order

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(self._coefficients)
        history: deque[Tensor] = deque(maxlen=self.solver_order)  # eps of this step and of those before it
        for k, (t, s, _, _) in enumerate(grid.steps()):
            prediction = denoiser(x, t, cond)
            history.appendleft(prediction.eps)
            coef_x0, *coef_eps = coefficients[k]
            x = linear_combination((coef_x0, prediction.x0), *zip(coef_eps, history, strict=False))
            yield Step(s, x, prediction)

    def _coefficients(self, at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, ...]:
        """Compute the coefficients of x_0, eps and earlier eps: a `DDIM` step and a correction of its eps, because eps
        and x_t do not determine x_0 where x_t is pure noise."""
        h = (at_s.log_snr - at_t.log_snr) / 2
        num_points = num_usable_points(h, self.solver_order)
        first, *others = interpolation_weights(num_points, *self._polynomial(at_t, at_s, h))
        integral = at_s.sigma - at_s.alpha * at_t.sigma / at_t.alpha  # alpha_s (rho_s - rho_t)
        return at_s.alpha, at_s.sigma + integral * (first - 1), *(integral * weight for weight in others)

    def _polynomial(self, at_t: ScheduleValues, at_s: ScheduleValues, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute nodes (n, k), quadrature points and measure (q, k) in the variable of the polynomial."""
        fractions, weights = fractions_like(h)
        if self.variable == "step":
            nodes = -torch.arange(self.solver_order, dtype=h.dtype, device=h.device)
            return nodes[:, None].expand(-1, len(h)), fractions, weights
        if self.variable == "rho":
            rho_t, rho_s = at_t.sigma / at_t.alpha, at_s.sigma / at_s.alpha
            return with_previous(rho_t, self.solver_order), rho_t + (rho_s - rho_t) * fractions, weights
        measure = weights * torch.exp(-h * fractions)  # proportional to d rho / du
        if self.variable == "log_rho":
            u = at_t.log_snr / 2
            return with_previous(u, self.solver_order) - u, h * fractions, measure
        t, schedule = at_t.t.to(h.dtype), at_t.schedule
        return with_previous(t, self.solver_order), schedule.t_from_log_snr(at_t.log_snr + 2 * h * fractions), measure


class Integral(NamedTuple):
    """The parts of steps in which a polynomial replaces x_0, each (k,) unless said otherwise."""

    coef_x: Tensor
    """Coefficient of x_t."""
    coef_x0: Tensor
    """Coefficient of x_0, if it were constant."""
    std: Tensor
    """Standard deviation of the noise."""
    start: Tensor
    """The variable of the polynomial at t."""
    end: Tensor
    """The same at s."""
    points: Tensor
    """The same at quadrature points, (q, k)."""
    measure: Tensor
    """The weights of these points, (q, k)."""


@dataclass(frozen=True, kw_only=True)
class _DataMultistep(Sampler):
    """Base class of multistep samplers that replace x_0 by a polynomial.

    The predictor interpolates x_0 at this time and earlier ones. The corrector, if there is one, repeats the step with
    the same noise and a polynomial that also passes through the prediction at s. That prediction, at the state before
    the correction, is used by the next step, too, so that a step takes one denoiser call.
    """

    @property
    @abstractmethod
    def num_predictor_points(self) -> int:
        """Number of points of the predictor's polynomial."""

    @property
    def num_corrector_points(self) -> int:
        """Number of points of the corrector's polynomial, including the one at s; 0 disables the corrector."""
        return 0

    @property
    def noise(self) -> float:
        r"""The noise :math:`\eta` of the reverse SDE; 0 for the ODE."""
        return 0.0

    @property
    def is_stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.noise > 0

    def linear_integral(self, h: Tensor) -> Tensor | None:
        r"""Compute the integral of v / h that is used with two points, for steps (k,); None is the exact integral.

        Exact is :math:`(1 + \eta) \int_0^h e^{-(1 + \eta)(h - v)} \frac{v}{h}\, dv`.
        """
        return None

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(self._coefficients)
        sigma_over_alpha, _ = read_on_host(grid)
        n = self.num_predictor_points
        history: deque[Tensor] = deque(maxlen=max(n, self.num_corrector_points - 1))
        prediction = None
        for k, (t, s, _, _) in enumerate(grid.steps()):
            if prediction is None or not self.num_corrector_points:
                prediction = denoiser(x, t, cond)
            history.appendleft(prediction.x0)  # x_0 of this step and of those before it
            coef_x, std, *weights = coefficients[k]
            known = [(coef_x, x)]
            if self.is_stochastic:
                known.append((std, normal_like(x, generator)))
            x = linear_combination(*known, *zip(weights[:n], history, strict=False))
            if self.num_corrector_points and sigma_over_alpha[k + 1] > 0:
                prediction = denoiser(x, s, cond)
                x = linear_combination(*known, *zip(weights[n:], [prediction.x0, *history], strict=False))
            yield Step(s, x, prediction)

    def _coefficients(self, at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, ...]:
        """Compute the coefficients of x_t and noise, and those of x_0 at all points of predictor and corrector."""
        h = (at_s.log_snr - at_t.log_snr) / 2
        n, m = self.num_predictor_points, self.num_corrector_points
        usable = num_usable_points(h, max(n, m, 2))
        coef_x, coef_x0, std, start, end, *polynomial = self._integral(at_t, at_s, h)
        linear = self.linear_integral(h)
        previous = with_previous(start, max(n, m - 1))

        num_points = usable.clamp(max=n)
        weights = coef_x0 * interpolation_weights(num_points, previous[:n], *polynomial)
        if linear is not None and n > 1:
            slope = linear * (end - start) / (start - previous[1])
            two = F.pad(torch.stack([coef_x0 + at_s.alpha * slope, -at_s.alpha * slope]), (0, 0, 0, n - 2))
            weights = torch.where(num_points == 2, two, weights)
        if not m:
            return coef_x, std, *weights

        # A step that restarts from one point needs no correction, unless it is the first and starts from some signal.
        first = (torch.arange(len(h), device=h.device) == 0) & (at_t.log_snr >= NO_SIGNAL)
        num_points = torch.where((usable > 1) | first, usable + 1, 1).clamp(max=m)
        nodes = torch.cat([end[None], previous[: m - 1]])
        corrected = coef_x0 * interpolation_weights(num_points, nodes, *polynomial)
        if linear is not None:
            change = at_s.alpha * linear
            two = F.pad(torch.stack([change, coef_x0 - change]), (0, 0, 0, m - 2))
            corrected = torch.where(num_points == 2, two, corrected)
        uncorrected = F.pad(coef_x0[None], (0, 0, 1, m - 2))
        corrected = torch.where(num_points == 1, uncorrected, corrected)
        return coef_x, std, *weights, *corrected

    def _integral(self, at_t: ScheduleValues, at_s: ScheduleValues, h: Tensor) -> Integral:
        eta = self.noise
        fractions, weights = fractions_like(h)
        start, end = at_t.log_snr / 2, at_s.log_snr / 2
        return Integral(
            coef_x=at_s.sigma / at_t.sigma * (torch.exp(-eta * h) if eta else 1.0),
            coef_x0=-at_s.alpha * torch.expm1(-(1 + eta) * h),
            std=at_s.sigma * torch.sqrt(-torch.expm1(-2 * eta * h)),
            start=start,
            end=end,
            points=start + h * fractions,
            measure=weights * torch.exp(-(1 + eta) * h * (1 - fractions)),
        )


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(_DataMultistep):
    r"""DPM-Solver++(2M), a second-order multistep solver with one denoiser call per step, and 2M-SDE with noise.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t
            + \alpha_s (1 - e^{-(1 + \eta) h}) \left(x_0 + \frac{h}{2 h'} (x_0 - x_0')\right)
            + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z, \qquad h = (\lambda_s - \lambda_t) / 2,

    where primes mark the previous step. The first step is of first order. (In the paper lambda is half the log-SNR.) Lu
    et al. (2022), "DPM-Solver++: Fast Solver for Guided Sampling", algorithm 2 and, for :math:`\eta = 1`,
    SDE-DPM-Solver++(2M), https://arxiv.org/abs/2211.01095.

    Args:
        eta: :math:`\eta`, the noise: 0 solves the probability-flow ODE and 1 the reverse SDE.
    """

    order = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_noise("eta", self.eta)

    @property
    def num_predictor_points(self) -> int:
        return 2

    @property
    def noise(self) -> float:
        return self.eta

    def linear_integral(self, h: Tensor) -> Tensor:
        return -torch.expm1(-(1 + self.eta) * h) / 2


@dataclass(frozen=True, kw_only=True)
class UniPC(_DataMultistep):
    r"""UniPC-p with data prediction: a predictor of order p and a corrector of order p + 1, one denoiser call per step.

    The predictor interpolates x_0 in :math:`\lambda` through t and the p - 1 times before it; the corrector also
    through the prediction at s. The first steps use fewer points. Zhao et al. (2023), "UniPC: A Unified
    Predictor-Corrector Framework for Fast Sampling of Diffusion Models", theorem 3.1, https://arxiv.org/abs/2302.04867.

    Args:
        solver_order: p, from 1 to 4.
        variant: the function B(h), which matters where there are two points: "bh1" is :math:`h`, "bh2" is
            :math:`e^h - 1` (:math:`1 - e^{-h}` in data prediction).
    """

    VARIANTS: ClassVar[tuple[str, ...]] = ("bh1", "bh2")
    solver_order: int = 2
    variant: str = "bh2"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order("solver_order", self.solver_order, 1, 4)
        if self.variant not in self.VARIANTS:
            raise UserError(f"sampler.variant={self.variant}: choose from {', '.join(self.VARIANTS)}.")

    @property
    def order(self) -> int:
        return self.solver_order + 1

    @property
    def num_predictor_points(self) -> int:
        return self.solver_order

    @property
    def num_corrector_points(self) -> int:
        return self.solver_order + 1

    def linear_integral(self, h: Tensor) -> Tensor:
        return (-torch.expm1(-h) if self.variant == "bh2" else h) / 2


@dataclass(frozen=True, kw_only=True)
class SASolver(_DataMultistep):
    r"""SA-Solver: a stochastic Adams predictor and corrector for the reverse SDE, one denoiser call per step.

    The equation is that of the module with :math:`\eta = \tau^2`, and predictor and corrector share the noise z. Xue et
    al. (2023), "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", SA-Predictor and
    SA-Corrector, https://arxiv.org/abs/2309.05019. The default orders are those of the published code,
    https://github.com/scxue/SA-Solver. Integrals are exact. (For few steps, appendix D replaces that of the slope by
    :math:`(1 + \tau^2) h / 2` if there are two points, as diffusers does for any number of steps; it is too large for
    long steps. The code sets :math:`\tau` to 0 at the lowest and highest noise.)

    A predictor of order 3 alone, with :math:`\tau = 1`, is DPM-Solver++(3M) SDE. (k-diffusion and the published code of
    DPM-Solver++ take half of the second derivative there, which leaves second order.)

    Args:
        predictor_order: number of points of the predictor, from 1 to 4.
        corrector_order: number of points of the corrector, including the one at s, from 2 to 5; 0 for no corrector.
        tau: :math:`\tau`, the noise: 0 solves the probability-flow ODE and 1 the reverse SDE.
    """

    predictor_order: int = 3
    corrector_order: int = 4
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order("predictor_order", self.predictor_order, 1, 4)
        if self.corrector_order != 0:
            check_order("corrector_order", self.corrector_order, 2, 5)
        check_noise("tau", self.tau)

    @property
    def order(self) -> int:
        order = min(self.predictor_order + 1, self.corrector_order) if self.corrector_order else self.predictor_order
        return min(order, 2) if self.tau else order

    @property
    def num_predictor_points(self) -> int:
        return self.predictor_order

    @property
    def num_corrector_points(self) -> int:
        return self.corrector_order

    @property
    def noise(self) -> float:
        return self.tau**2


@dataclass(frozen=True, kw_only=True)
class ERSDE(_DataMultistep):
    r"""ER-SDE-Solver: the extended reverse-time SDE with the noise scale function of the published code.

    .. math::
        \frac{x_s}{\alpha_s} = \frac{\phi_s}{\phi_t} \frac{x_t}{\alpha_t}
            + \int_{\rho_s}^{\rho_t} \frac{\phi_s\, \phi'(\rho)}{\phi(\rho)^2} x_0(\rho)\, d\rho
            + \sqrt{\rho_s^2 - \rho_t^2 \frac{\phi_s^2}{\phi_t^2}}\, z, \qquad
        \phi(\rho) = \rho\, (e^{\rho^{0.3}} + 10), \qquad \rho = \sigma / \alpha,

    where :math:`x_0` is a polynomial in :math:`\rho`. (:math:`\phi = \rho^{1 + \eta}` gives the equation of the
    module.) Cui et al. (2023), "Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models",
    https://arxiv.org/abs/2309.06169, where this :math:`\phi` is "ER SDE 5". For ``solver_order=3``, their code
    (https://github.com/QinpengCui/ER-SDE-Solver) expands :math:`x_0` at t with a first derivative of lower order; here
    the polynomial passes through all points. Integrals are computed by Gauss-Legendre quadrature, there by sums of 100
    terms.

    Args:
        solver_order: the number of points of the polynomial, from 1 to 3.
    """

    EXPONENT: ClassVar[float] = 0.3
    OFFSET: ClassVar[float] = 10.0
    solver_order: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order("solver_order", self.solver_order, 1, 3)

    @property
    def order(self) -> int:
        return min(self.solver_order, 2)

    @property
    def num_predictor_points(self) -> int:
        return self.solver_order

    @property
    def is_stochastic(self) -> bool:
        return True

    def _integral(self, at_t: ScheduleValues, at_s: ScheduleValues, h: Tensor) -> Integral:
        fractions, weights = fractions_like(h)
        rho_t, rho_s = at_t.sigma / at_t.alpha, at_s.sigma / at_s.alpha
        rho = rho_t * torch.exp(-h * fractions)
        log_ratio = self._log_noise(rho_s) - self._log_noise(rho_t)
        slope = self.EXPONENT * rho**self.EXPONENT * torch.sigmoid(rho**self.EXPONENT - math.log(self.OFFSET))
        decay = torch.exp(-h * (1 - fractions) + self._log_noise(rho_s) - self._log_noise(rho))
        return Integral(
            coef_x=at_s.alpha / at_t.alpha * torch.exp(log_ratio - h),
            coef_x0=-at_s.alpha * torch.expm1(log_ratio - h),
            std=at_s.sigma * torch.sqrt(-torch.expm1(2 * log_ratio)),
            start=rho_t,
            end=rho_s,
            points=rho,
            measure=weights * decay * (1 + slope),  # proportional to d (phi_s / phi)
        )

    def _log_noise(self, rho: Tensor) -> Tensor:
        r"""Compute :math:`\log(\phi / \rho)`."""
        return torch.logaddexp(rho**self.EXPONENT, torch.full_like(rho, math.log(self.OFFSET)))


def check_order(name: str, order: int, low: int, high: int) -> None:
    if isinstance(order, bool) or not isinstance(order, int) or not low <= order <= high:
        raise UserError(f"sampler.{name}={order} must be an integer from {low} to {high}.")
