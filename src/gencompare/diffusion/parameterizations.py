r"""Parameterisations: what the network receives for :math:`x_t` and t, and how its output becomes x_0 and eps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.discrete_schedules import snap_to_integer
from gencompare.diffusion.schedules import NoiseSchedule, ScheduleValues
from gencompare.errors import UserError, check_non_negative, check_positive


class NoiseConditioning(ABC):
    """Base class of noise conditioning, which maps a time to the number that tells the network the noise level."""

    @abstractmethod
    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        """Compute the noise condition at times ``t``.

        Args:
            t: times, () or (n,).
            at: the schedule values at these times.

        Returns:
            One number per time, () or (n,).
        """

    def check(self, schedule: NoiseSchedule) -> None:  # noqa: B027
        """Raise `UserError` if the noise condition is undefined under ``schedule``."""

    def num_levels(self, schedule: NoiseSchedule) -> int | None:
        """Return L if the noise condition is the index of one of L noise levels, from 0 to L - 1; otherwise None."""
        return None


@dataclass(frozen=True)
class LogSNRConditioning(NoiseConditioning):
    """The log-SNR, clamped to [-limit, limit] and scaled to [0, 1000], the input range of DDPM's embedding.

    It has the same meaning under every schedule, so the schedule can be changed after training.

    Args:
        limit: bound on the absolute value of the log-SNR.
    """

    limit: float = 20.0

    def __post_init__(self) -> None:
        check_positive("noise_conditioning.limit", self.limit)

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        return (at.log_snr.flatten().clamp(-self.limit, self.limit) + self.limit) * (500 / self.limit)


@dataclass(frozen=True)
class LogSigmaConditioning(NoiseConditioning):
    r""":math:`factor \cdot \ln(\sigma / \alpha)`.

    Factor 1/4 is c_noise of EDM (Karras et al. 2022, table 1, https://arxiv.org/abs/2206.00364). Factor 1 is the input
    to the Fourier features in the VE models (Song et al. 2021, appendix C, https://arxiv.org/abs/2011.13456). With
    factor 0 the network has to infer the noise level from x (Song and Ermon 2020, technique 3,
    https://arxiv.org/abs/2006.09011).

    Args:
        factor: multiplies the logarithm.
    """

    factor: float = 0.25

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        return -0.5 * self.factor * at.log_snr.flatten()


@dataclass(frozen=True)
class TimestepConditioning(NoiseConditioning):
    """The step index ``T * t - 1``, counted from 0, as in published DDPMs.

    Args:
        num_train_timesteps: T, the number of steps of the schedule.
    """

    num_train_timesteps: int = 1000

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        return snap_to_integer(t * self.num_train_timesteps) - 1


@dataclass(frozen=True)
class TimeConditioning(NoiseConditioning):
    r""":math:`factor \cdot t`, as in the VP and sub-VP models of Song et al. (2021), https://arxiv.org/abs/2011.13456.

    Args:
        factor: multiplies the time; 999 in the published models.
    """

    factor: float = 999.0

    def __post_init__(self) -> None:
        check_non_negative("noise_conditioning.factor", self.factor)

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        return self.factor * t


@dataclass(frozen=True)
class LevelIndexConditioning(NoiseConditioning):
    """The index of the noise level, 0 for the noisiest, as in NCSN.

    The index is an integer: a time between two levels gets the index of the noisier level. Song and Ermon (2019),
    algorithm 1, https://arxiv.org/abs/1907.05600.
    """

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.require_discrete_times()

    def num_levels(self, schedule: NoiseSchedule) -> int:
        return len(schedule.require_discrete_times())

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        schedule = at.schedule
        return (len(schedule.require_discrete_times()) - 1 - schedule.discrete_index(t)).to(t.dtype)


class Prediction(NamedTuple):
    r"""The prediction of a denoiser: :math:`x_0 = E[x_0 | x_t]` and the matching noise, each shaped like x_t.

    :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` always holds, and the score of p(x_t) is :math:`-\epsilon /
    \sigma_t`.
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None
    """Geometric interpolation of the reverse variance between 0 (fixed small) and 1 (fixed large), shaped like x_t;
    None if the network does not learn the variance."""


@dataclass(frozen=True)
class Parameterization(ABC):
    """Base class of parameterisations.

    A subclass implements ``target``, ``to_prediction`` and ``eps_jacobian``; a subclass that scales the network input
    also overrides ``network_input``. The argument ``at`` contains alpha, sigma and the log-SNR, shaped to broadcast
    with the images.

    Args:
        noise_conditioning: how the noise level is passed to the network.
    """

    noise_conditioning: NoiseConditioning = field(default_factory=LogSNRConditioning)

    output_multiplier = 1
    """Number of network output channels per image channel."""
    learns_variance = False
    """Whether the network also predicts the variance of the reverse step."""
    predicts_x0_of_noise = False
    """Whether the network output determines x_0 also where x_t is pure noise (alpha = 0)."""

    def network_input(self, x_t: Tensor, t: Tensor, at: ScheduleValues) -> tuple[Tensor, Tensor]:
        """Compute the inputs of the network.

        Args:
            x_t: noisy images, (n, C, H, W).
            t: times, () or (n,).
            at: the schedule values at these times.

        Returns:
            x_t, (n, C, H, W), which some parameterisations scale, and the noise condition, (n,).
        """
        noise_cond = at.derive(self._noise_condition).to(x_t.dtype)
        return x_t, noise_cond.expand(len(x_t))

    def _noise_condition(self, at: ScheduleValues) -> Tensor:
        return self.noise_conditioning(at.t, at)

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise `UserError` if the parameterisation is undefined under ``schedule``."""
        self.noise_conditioning.check(schedule)
        if schedule.ends_in_pure_noise and not self.predicts_x0_of_noise:
            raise UserError(
                f"{type(schedule).__name__} ends in pure noise (zero terminal SNR), where {type(self).__name__} does"
                " not determine the image: use model/parameterization=v or x0, or a last beta below 1."
            )

    def target_channels(self, out: Tensor) -> Tensor:
        """Select the channels of the network output to compare with ``target``, shaped like x_t."""
        return out

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        """Compute the regression target of the network.

        Args:
            x0: images, (n, C, H, W).
            eps: noise, (n, C, H, W).
            at: the schedule values at the time of each image.

        Returns:
            The target, (n, C, H, W).
        """

    @abstractmethod
    def to_prediction(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        """Convert the network output to x_0 and eps.

        Args:
            out: network output, (n, output_multiplier C, H, W).
            x_t: noisy images, (n, C, H, W).
            at: the schedule values at the time of each image.

        Returns:
            The prediction, with tensors shaped like ``x_t``.
        """

    @abstractmethod
    def eps_jacobian(self, at: ScheduleValues) -> Tensor:
        r"""Compute :math:`|d\epsilon / d\,out|`, which converts an error in the network output to an error in eps.

        Args:
            at: the schedule values at the time of each image.

        Returns:
            The derivative, which broadcasts with x_t.
        """


class Eps(Parameterization):
    r"""The network predicts :math:`\epsilon` (Ho et al. 2020, section 3.2, https://arxiv.org/abs/2006.11239)."""

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return eps

    def to_prediction(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        return Prediction(x0=torch.addcmul(x_t, at.sigma, out, value=-1) / at.alpha, eps=out)

    def eps_jacobian(self, at: ScheduleValues) -> Tensor:
        return at.alpha.new_ones(at.alpha.shape)


class X0(Parameterization):
    r"""The network predicts the image :math:`x_0`."""

    predicts_x0_of_noise = True

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return x0

    def to_prediction(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        return Prediction(x0=out, eps=(x_t - at.alpha * out) / at.sigma)

    def eps_jacobian(self, at: ScheduleValues) -> Tensor:
        return at.alpha / at.sigma


class V(Parameterization):
    r"""The network predicts :math:`v = (\alpha \epsilon - \sigma x_0) / \sqrt{\alpha^2 + \sigma^2}`.

    v has the same scale at every noise level. Salimans and Ho (2022), "Progressive Distillation", appendix D,
    https://arxiv.org/abs/2202.00512, for alpha^2 + sigma^2 = 1; the square root extends v to other schedules.
    """

    predicts_x0_of_noise = True

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return (at.alpha * eps - at.sigma * x0) / _scale(at)

    def to_prediction(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        # (x_t, r v) is (x_0, eps) rotated and scaled by r: rotate back.
        r, cos, sin = at.derive(_rotation)
        x = x_t / r
        return Prediction(x0=torch.addcmul(cos * x, sin, out, value=-1), eps=torch.addcmul(sin * x, cos, out))

    def eps_jacobian(self, at: ScheduleValues) -> Tensor:
        return at.alpha / _scale(at)


class Score(Parameterization):
    r"""The network predicts the score :math:`\nabla \log p(x_t) = -E[\epsilon | x_t] / \sigma`.

    For networks that are the gradient of an energy, and for the first NCSN (Song and Ermon 2019, section 3.1,
    https://arxiv.org/abs/1907.05600). The target scales as 1 / sigma, which the network must match. Later models by
    Song et al. divide the network output by sigma, which is `Eps` up to the sign.
    """

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return -eps / at.sigma

    def to_prediction(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        eps = -at.sigma * out
        return Prediction(x0=(x_t - at.sigma * eps) / at.alpha, eps=eps)

    def eps_jacobian(self, at: ScheduleValues) -> Tensor:
        return at.sigma


class Velocity(Parameterization):
    r"""The network predicts the velocity :math:`u = \alpha' x_0 + \sigma' \epsilon` of x_t.

    For rectified flow, :math:`u = \epsilon - x_0` (Liu et al. 2023, https://arxiv.org/abs/2209.03003). In general
    :math:`u = f x_t + h \epsilon` with :math:`f = d \log \alpha / dt` and :math:`h = -\sigma \lambda' / 2`, which gives
    eps without a division by alpha. Lipman et al. (2023), "Flow Matching", theorem 3, https://arxiv.org/abs/2210.02747.
    """

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return at.dlog_alpha_dt * (at.alpha * x0 + at.sigma * eps) + _eps_velocity(at) * eps

    def to_prediction(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        eps = torch.addcmul(out, at.dlog_alpha_dt, x_t, value=-1) / at.derive(_eps_velocity)
        return Prediction(x0=torch.addcmul(x_t, at.sigma, eps, value=-1) / at.alpha, eps=eps)

    def eps_jacobian(self, at: ScheduleValues) -> Tensor:
        return 1 / _eps_velocity(at)


def _scale(at: ScheduleValues) -> Tensor:
    return (at.alpha**2 + at.sigma**2).sqrt()


def _rotation(at: ScheduleValues) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the length r of (alpha, sigma), and its cosine and sine."""
    r = _scale(at)
    return r, at.alpha / r, at.sigma / r


def _eps_velocity(at: ScheduleValues) -> Tensor:
    """Compute h, the coefficient of eps in the velocity (see `Velocity`)."""
    return -0.5 * at.sigma * at.dlog_snr_dt


@dataclass(frozen=True)
class EDMPreconditioning(Parameterization):
    r"""EDM's preconditioning: :math:`x_0 = c_{skip}\, y + c_{out}\, F(c_{in}\, y; c_{noise})`.

    :math:`y = x_t / \alpha`. Inputs and targets of the network F have unit variance. With :math:`s = \sigma / \alpha`
    and d = ``sigma_data``,

    .. math::
        c_{skip} = \frac{d^2}{s^2 + d^2}, \quad c_{out} = \frac{s d}{\sqrt{s^2 + d^2}}, \quad
        c_{in} = \frac{1}{\sqrt{s^2 + d^2}}, \quad c_{noise} = \tfrac{1}{4} \ln s.

    The code uses :math:`r = \sqrt{\sigma^2 + \alpha^2 d^2}`, which avoids dividing by a small alpha. Karras et al.
    (2022), "Elucidating the Design Space", table 1 and appendix B.6 (there alpha = 1),
    https://arxiv.org/abs/2206.00364.

    Args:
        noise_conditioning: c_noise.
        sigma_data: d, the standard deviation of the data.
    """

    predicts_x0_of_noise = True

    noise_conditioning: NoiseConditioning = field(default_factory=LogSigmaConditioning)
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_positive("parameterization.sigma_data", self.sigma_data)

    def network_input(self, x_t: Tensor, t: Tensor, at: ScheduleValues) -> tuple[Tensor, Tensor]:
        x_t, noise_cond = super().network_input(x_t, t, at)
        return x_t / at.derive(self._r), noise_cond

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        # (x_0 - c_skip y) / c_out
        return (at.sigma / self.sigma_data * x0 - at.alpha * self.sigma_data * eps) / self._r(at)

    def to_prediction(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        skip_x0, out_x0, skip_eps, out_eps = at.derive(self._coefficients)
        x = x_t / at.derive(self._r)
        x0 = torch.addcmul(skip_x0 * x, out_x0, out)
        return Prediction(x0=x0, eps=torch.addcmul(skip_eps * x, out_eps, out))

    def _coefficients(self, at: ScheduleValues) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the coefficients of x_t / r and of the output in x_0, and in eps."""
        r, d = self._r(at), self.sigma_data
        return at.alpha * d * d / r, at.sigma * d / r, at.sigma / r, -at.alpha * d / r

    def eps_jacobian(self, at: ScheduleValues) -> Tensor:
        return at.alpha * self.sigma_data / self._r(at)

    def _r(self, at: ScheduleValues) -> Tensor:
        return (at.sigma**2 + (at.alpha * self.sigma_data) ** 2).sqrt()


class PosteriorMean(Parameterization):
    r"""The network predicts the mean of :math:`q(x_s | x_t, x_0)`, with s the discrete step before t.

    .. math::
        \tilde\mu = \frac{\alpha_t \sigma_s^2}{\alpha_s \sigma_t^2} x_t + \alpha_s c\, x_0, \qquad
        c = 1 - SNR_t / SNR_s

    At the first step, x_s is clean data. This parameterisation needs a discrete schedule. A step changes x_t little, so
    a small error in the network output is a large error in eps; train with the variational bound. Ho et al. (2020),
    "Denoising Diffusion Probabilistic Models", eq. 7 and table 2, https://arxiv.org/abs/2006.11239.
    """

    predicts_x0_of_noise = True

    def check(self, schedule: NoiseSchedule) -> None:
        super().check(schedule)
        schedule.require_discrete_times()

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        coef_x_t, coef_x0 = _posterior_mean_coefficients(at)
        return coef_x_t * (at.alpha * x0 + at.sigma * eps) + coef_x0 * x0

    def to_prediction(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        coef_x_t, coef_x0 = at.derive(_posterior_mean_coefficients)
        x0 = (out - coef_x_t * x_t) / coef_x0
        return Prediction(x0=x0, eps=(x_t - at.alpha * x0) / at.sigma)

    def eps_jacobian(self, at: ScheduleValues) -> Tensor:
        return at.alpha / at.sigma / _posterior_mean_coefficients(at)[1]


def _posterior_mean_coefficients(at_t: ScheduleValues) -> tuple[Tensor, Tensor]:
    """Compute the coefficients of x_t and x_0 in the posterior mean (see `PosteriorMean`)."""
    at_s = at_t.previous_step
    c = -torch.expm1(at_t.log_snr - at_s.log_snr)
    return torch.exp(at_t.log_snr - at_s.log_snr) * at_s.alpha / at_t.alpha, at_s.alpha * c


@dataclass(frozen=True)
class LearnedVariance(Parameterization):
    r"""A wrapper that adds a learned variance of the reverse step, for every value of the image, to a parameterisation.

    The additional output w in [-1, 1] interpolates the variance as :math:`\beta^v \tilde\beta^{1 - v}` with
    :math:`v = (w + 1) / 2`, the ``variance_fraction``; :math:`\beta` is the variance of the forward step, and
    :math:`\tilde\beta` is the variance of q(x_s | x_t, x_0). The network has two output channels per image channel:
    first the output for ``inner``, then w. Train it with an objective that contains the variational bound. Nichol and
    Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models", eq. 15, https://arxiv.org/abs/2102.09672.

    Args:
        noise_conditioning: how the noise level is passed to the network; the noise conditioning of ``inner`` is
            ignored.
        inner: the parameterisation of x_0 and eps.
    """

    inner: Parameterization = field(default_factory=Eps)

    output_multiplier = 2
    learns_variance = True

    def check(self, schedule: NoiseSchedule) -> None:
        self.noise_conditioning.check(schedule)
        self.inner.check(schedule)

    def network_input(self, x_t: Tensor, t: Tensor, at: ScheduleValues) -> tuple[Tensor, Tensor]:
        return self.inner.network_input(x_t, t, at)[0], super().network_input(x_t, t, at)[1]

    def target_channels(self, out: Tensor) -> Tensor:
        return out.chunk(2, dim=1)[0]

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return self.inner.target(x0, eps, at)

    def to_prediction(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        out, w = out.chunk(2, dim=1)
        v = (w + 1) / 2
        # Clamped to [0, 1] with a straight-through gradient, so that training can bring v back into range.
        v = v + (v.clamp(0, 1) - v).detach()
        return self.inner.to_prediction(out, x_t, at)._replace(variance_fraction=v)

    def eps_jacobian(self, at: ScheduleValues) -> Tensor:
        return self.inner.eps_jacobian(at)
