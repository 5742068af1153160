r"""The base class of samplers, and the DDPM and DDIM samplers.

Notation: a step goes from time :math:`t` to the less noisy time :math:`s < t`, where
:math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` and :math:`\lambda_t = \log(\alpha_t^2 / \sigma_t^2)` is the log-SNR.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.schedules import CLEAN, NO_SIGNAL, GridValues, NoiseSchedule, ScheduleValues
from gencompare.diffusion.times import TimeGrid, UniformGrid
from gencompare.errors import UserError, check_number
from gencompare.rng import normal_like


class Step(NamedTuple):
    """The state of a sampler after one step."""

    t: Tensor
    """Time reached, ()."""
    x: Tensor
    """State at time t, (n, C, H, W)."""
    prediction: Prediction
    """The last prediction of the denoiser during the step."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    r"""Base class of samplers, which map :math:`x_t` to :math:`x_s` for each pair of neighbouring times t > s.

    First-order samplers have the form

    .. math:: x_s = a\, x_t + b\, x_0(x_t, t) + c\, z, \qquad z \sim N(0, I),

    with the denoiser's prediction :math:`x_0` and coefficients a, b, c that depend on the schedule. Others call the
    denoiser several times per step or use its earlier predictions. A subclass declares ``order`` and implements
    ``trajectory``.

    Args:
        num_steps: number of steps from noise to image.
        grid: the times at which steps start and end.
    """

    order: ClassVar[int | None]
    """Order of convergence in the step size: strong for deterministic samplers, weak (means and covariances) for
    stochastic ones. None if undefined."""
    needs_interval: ClassVar[bool] = False
    """Whether the sampler passes ``cond["interval"]`` to a network that predicts the average velocity of a step."""

    num_steps: int
    grid: TimeGrid = field(default_factory=UniformGrid)

    def __post_init__(self) -> None:
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise UserError(f"sampler.num_steps={self.num_steps} must be an integer of at least 1.")
        for setting in fields(self):
            if setting.type in ("int", "float"):  # annotations are strings here
                check_number(f"sampler.{setting.name}", getattr(self, setting.name))

    @abstractmethod
    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        """Yield a `Step` for every pair of neighbouring times.

        The caller may change a yielded state in place (inpainting does): the next step must start from that tensor.

        Args:
            denoiser: predicts x_0 and eps.
            x: state at ``times[0]``, (n, C, H, W).
            times: strictly decreasing times, (num_steps + 1,).
            cond: conditions passed to the denoiser.
            generator: source of all random numbers.
        """

    def iterate(
        self,
        denoiser: DenoiserProtocol,
        x: Tensor,
        cond: Cond | None = None,
        *,
        generator: torch.Generator,
        times: Tensor | None = None,
    ) -> Iterator[Step]:
        """Check the times, and iterate over the steps of `trajectory` from noise ``x`` (n, C, H, W) at ``times[0]``.

        Args:
            times: strictly decreasing times; None uses the grid times.
        """
        if times is None:
            times = self.times(denoiser.schedule)
        check_times(times, denoiser.schedule)
        times = times.to(x.device, torch.promote_types(times.dtype, x.dtype))
        return self.trajectory(denoiser, x, times, cond or {}, generator)

    def sample(
        self,
        denoiser: DenoiserProtocol,
        x: Tensor,
        cond: Cond | None = None,
        *,
        generator: torch.Generator,
        times: Tensor | None = None,
    ) -> Tensor:
        """Run all steps and return the final state, (n, C, H, W).

        Raises:
            UserError: if a step gives NaN or infinite values; the message names the first such step.
        """
        sums: list[Tensor] = []
        for step in self.iterate(denoiser, x, cond, generator=generator, times=times):
            x = step.x
            # NaN and infinite values make a sum NaN or infinite. It stays on the device until the end. Clipping can
            # hide an infinite prediction from x.
            sums += [x.sum(), step.prediction.eps.sum()]
        finite = torch.stack(sums).isfinite().view(-1, 2).all(1).tolist()
        if not all(finite):
            raise UserError(
                f"Sampling failed: step {finite.index(False) + 1} of {len(finite)} gave NaN or infinite values. The"
                " weights or outputs of the network are not finite, or it is not trained enough for these settings."
            )
        return x

    def times(self, schedule: NoiseSchedule) -> Tensor:
        """Return the grid times, (num_steps + 1,).

        Raises:
            UserError: if the schedule does not have that many distinct times.
        """
        return self.grid(schedule, self.num_steps)

    def describe(self, learned: Collection[str] = ()) -> str:
        """Return the name and settings, for a table. Settings in ``learned`` are marked as learned by the network."""
        settings = {name: _format(getattr(self, name)) for name in self.settings()}
        described = [f"learned {name}" if name in learned else f"{name} {value}" for name, value in settings.items()]
        grid = self.grid.describe()
        return ", ".join([type(self).__name__, f"{self.num_steps} steps", *([grid] if grid else []), *described])

    def settings(self) -> list[str]:
        """Return the names of the settings that ``describe`` lists after the number of steps and the grid."""
        return [f.name for f in fields(self) if f.name not in ("num_steps", "grid")]


def _format(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def steps_between(
    times: Tensor, schedule: NoiseSchedule, x: Tensor
) -> Iterator[tuple[Tensor, Tensor, ScheduleValues, ScheduleValues]]:
    """Yield (t, s, schedule at t, schedule at s) for each pair of neighbouring times, with values in the dtype of x."""
    return GridValues(schedule, times, x).steps()


def read_on_host(grid: GridValues) -> tuple[list[float], list[bool]]:
    """Return sigma / alpha at all times, and whether x_t contains any signal there, so that no step waits for the
    device to decide what to do."""
    return (grid.sigma / grid.alpha).tolist(), (grid.log_snr >= NO_SIGNAL).tolist()


def select(condition: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Select coefficients of steps, on the device."""
    return tuple(torch.where(condition, x, y) for x, y in zip(a, b, strict=True))


def linear_combination(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the sum of coefficient * tensor, with one operation per term."""
    (coefficient, tensor), *others = terms
    total = coefficient * tensor
    for coefficient, tensor in others:
        total = torch.addcmul(total, coefficient, tensor)
    return total


def check_times(times: Tensor, schedule: NoiseSchedule) -> None:
    """Raise `UserError` unless ``times`` strictly decrease within the schedule, apart from a final ``CLEAN``."""
    inside = times[:-1] if len(times) > 1 and times[-1] == CLEAN else times
    if len(times) < 2 or not (times.diff() < 0).all():
        raise UserError(f"Sampling times must be strictly decreasing (from noise to data), not {times.tolist()}.")
    tolerance = 1e-6
    if inside.min() < schedule.t_min - tolerance or inside.max() > schedule.t_max + tolerance:
        raise UserError(
            f"Sampling times range from {float(inside.min()):.4g} to {float(inside.max()):.4g}, but"
            f" {type(schedule).__name__} is defined from {schedule.t_min:.4g} to {schedule.t_max:.4g}."
        )


def check_noise(name: str, noise: float) -> None:
    """Raise `UserError` unless a sampler's setting for the noise of the reverse SDE is valid."""
    if not 0 <= noise < math.inf:
        raise UserError(f"sampler.{name}={noise} must be a finite number of at least 0 (0: the ODE, 1: the SDE).")


@dataclass(frozen=True, kw_only=True)
class Ancestral(Sampler):
    r"""DDPM sampling, where each step draws :math:`x_s \sim N(\mu_q(x_t, x_0), \tilde\sigma^2)`.

    With :math:`SNR = \alpha^2 / \sigma^2` and :math:`c = 1 - SNR_t / SNR_s`,

    .. math::
        \mu_q = \frac{\alpha_t \sigma_s^2}{\alpha_s \sigma_t^2} x_t + \alpha_s c\, x_0, \qquad
        \tilde\sigma = \sqrt{c}\, \sigma_s^{1 - v} \sigma_t^v.

    The last step, into clean data, adds no noise. Ho et al. (2020), "Denoising Diffusion Probabilistic Models",
    algorithm 2 and eq. 7, https://arxiv.org/abs/2006.11239.

    Args:
        variance: the exponent :math:`v`. 0 is "fixed small" (:math:`\tilde\beta`), 1 is "fixed large" (:math:`\beta`),
            and values in between interpolate geometrically (Nichol and Dhariwal 2021, eq. 15,
            https://arxiv.org/abs/2102.09672). A learned variance overrides this value.
    """

    order = 1
    variance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.variance <= 1:
            raise UserError(f"sampler.variance={self.variance} must be in [0, 1] (0: fixed small, 1: fixed large).")

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        fixed = partial(ancestral_step, variance=self.variance)
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(fixed)
        for k, (t, s, at_t, at_s) in enumerate(grid.steps()):
            prediction = denoiser(x, t, cond)
            coef_x_t, coef_x0, std = coefficients[k]
            if prediction.variance_fraction is not None:
                coef_x_t, coef_x0, std = ancestral_step(at_t, at_s, prediction.variance_fraction)
            x = linear_combination((coef_x_t, x), (coef_x0, prediction.x0), (std, normal_like(x, generator)))
            yield Step(s, x, prediction)


def ancestral_step(
    at_t: ScheduleValues, at_s: ScheduleValues, variance: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the `Ancestral` step from t to s: the coefficients of x_t, x_0 and standard normal noise."""
    c = -torch.expm1(at_t.log_snr - at_s.log_snr)
    # alpha_t sigma_s^2 / (alpha_s sigma_t^2), written without 1 - c, which loses precision if c is close to 1.
    coef_x_t = torch.exp(at_t.log_snr - at_s.log_snr) * at_s.alpha / at_t.alpha
    std = c.sqrt() * at_s.sigma ** (1 - variance) * at_t.sigma**variance * (at_s.sigma > 0)
    return coef_x_t, at_s.alpha * c, std


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    r"""DDIM: :math:`x_s = \alpha_s x_0 + \sqrt{\sigma_s^2 - \tau^2}\, \epsilon + \tau z` with :math:`z \sim N(0, I)`.

    :math:`\tau = \eta\, \sigma_s \sqrt{1 - SNR_t / SNR_s}`. With :math:`\eta = 0` the sampler is deterministic: Euler's
    method on the probability-flow ODE of :math:`x / \alpha` over :math:`\sigma / \alpha`. With :math:`\eta = 1` it is
    `Ancestral` with small variance. Song et al. (2021), "Denoising Diffusion Implicit Models", eq. 12 and 16,
    https://arxiv.org/abs/2010.02502.

    Args:
        eta: :math:`\eta`, from 0 (deterministic) to 1 (ancestral).
    """

    order = 1
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise UserError(f"sampler.eta={self.eta} must be in [0, 1] (0: deterministic, 1: ancestral).")

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(self._coefficients)
        for k, (t, s, _, _) in enumerate(grid.steps()):
            prediction = denoiser(x, t, cond)
            coef_x0, coef_eps, std = coefficients[k]
            x = linear_combination((coef_x0, prediction.x0), (coef_eps, prediction.eps))
            if self.eta > 0:
                x = torch.addcmul(x, std, normal_like(x, generator))
            yield Step(s, x, prediction)

    def _coefficients(self, at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, ...]:
        """Compute the coefficients of x_0, eps and z."""
        tau2 = self.eta**2 * -torch.expm1(at_t.log_snr - at_s.log_snr)  # in units of sigma_s^2
        return at_s.alpha, at_s.sigma * (1 - tau2).sqrt(), at_s.sigma * tau2.sqrt()
