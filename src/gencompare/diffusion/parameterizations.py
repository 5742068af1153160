"""Parameterisations: how x_t and the noise level enter the network, and how its output becomes image and noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.discrete_schedules import on_step
from gencompare.diffusion.schedules import NoiseSchedule, ScheduleValues
from gencompare.errors import UserError


class NoiseConditioning(ABC):
    """The number, () or (n,), that tells a network how much noise there is at time t."""

    @abstractmethod
    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor: ...

    def check(self, schedule: NoiseSchedule) -> None:  # noqa: B027
        """Raises `UserError` where the number has no meaning under ``schedule``."""

    def levels(self, schedule: NoiseSchedule) -> int | None:
        """L where the number is the index of one of L noise levels, from 0 to L - 1; None where it is another."""
        return None


@dataclass(frozen=True)
class LogSNRConditioning(NoiseConditioning):
    """The log-SNR, clamped to [-limit, limit] and brought to [0, 1000], the range that DDPM's embedding is made for.

    It means the same under every schedule, so a schedule may be changed for another after training.
    """

    limit: float = 20.0

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise UserError(f"noise.limit={self.limit}: give a positive number.")

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        return (at.log_snr.flatten().clamp(-self.limit, self.limit) + self.limit) * (500 / self.limit)


@dataclass(frozen=True)
class LogSigmaConditioning(NoiseConditioning):
    """factor ln(sigma / alpha): EDM's c_noise with 1/4 (Karras et al. 2022, table 1).

    With factor 1 it is what the Fourier features of the VE models are given (Song et al. 2021, appendix C). With factor
    0 the network is told nothing, and has to see in x how much noise there is (Song and Ermon 2020, technique 3).
    """

    factor: float = 0.25

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        return -0.5 * self.factor * at.log_snr.flatten()


@dataclass(frozen=True)
class TimestepConditioning(NoiseConditioning):
    """steps t - 1: the index, counted from 0, of a step in a table of so many; what published DDPMs were trained on."""

    steps: int = 1000

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        return on_step(t * self.steps) - 1


@dataclass(frozen=True)
class TimeConditioning(NoiseConditioning):
    """factor t: what the published VP and sub-VP models of Song et al. (2021) are given, with 999."""

    factor: float = 999.0

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        return self.factor * t


@dataclass(frozen=True)
class LevelIndexConditioning(NoiseConditioning):
    """The index of the noise level, 0 for the noisiest, as NCSN counts them (Song and Ermon 2019, algorithm 1).

    A whole number: of a time between two levels, that of the noisier one.
    """

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.steps()

    def levels(self, schedule: NoiseSchedule) -> int:
        return len(schedule.steps())

    def __call__(self, t: Tensor, at: ScheduleValues) -> Tensor:
        schedule = at.schedule
        return (len(schedule.steps()) - 1 - schedule.step_index(t)).to(t.dtype)


class Prediction(NamedTuple):
    """What a denoiser says of x_t: E[x_0 | x_t] and the noise that goes with it, each like x_t.

    x_t = alpha x0 + sigma eps always holds. The score of p(x_t) is -eps / sigma.
    """

    x0: Tensor
    eps: Tensor
    variance_share: Tensor | None = None
    """Where the variance of the reverse step lies, from 0 (fixed small) to 1 (fixed large), geometric in between: like
    x_t, in [0, 1], and None where the network does not learn it."""


@dataclass(frozen=True)
class Parameterization(ABC):
    """Base of every parameterisation. ``at`` holds alpha, sigma and the log-SNR, shaped to meet the images.

    A subclass writes ``target``, ``invert`` and ``eps_gain``; one that scales the network's input, ``input`` too.

    Args:
        noise: how the network is told the amount of noise.
    """

    noise: NoiseConditioning = field(default_factory=LogSNRConditioning)

    outputs = 1
    """Values that the network gives for each value of the image."""
    learns_variance = False
    """Whether one of them is the variance of the reverse step."""

    def input(self, x_t: Tensor, t: Tensor, at: ScheduleValues) -> tuple[Tensor, Tensor]:
        """What the network sees of x_t, (n, C, H, W), and its noise condition, (n,)."""
        noise = self.noise(t, at).to(x_t.dtype)
        return x_t, noise.expand(len(x_t))

    def check(self, schedule: NoiseSchedule) -> None:
        """Raises `UserError` where the parameterisation has no meaning under ``schedule``."""
        self.noise.check(schedule)

    def targeted(self, out: Tensor) -> Tensor:
        """The part of the network's output that ``target`` is compared with, like x_t: all of it, unless the network
        says more than that."""
        return out

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        """What the network should say when these are the image and the noise."""

    @abstractmethod
    def invert(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        """Image and noise, from what the network said of x_t."""

    @abstractmethod
    def eps_gain(self, at: ScheduleValues) -> Tensor:
        """|d eps / d out|: the error in eps that an error of 1 in the network's output means."""


class Eps(Parameterization):
    """The noise (Ho et al. 2020, section 3.2)."""

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return eps

    def invert(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        return Prediction(x0=(x_t - at.sigma * out) / at.alpha, eps=out)

    def eps_gain(self, at: ScheduleValues) -> Tensor:
        return at.alpha.new_ones(at.alpha.shape)


class X0(Parameterization):
    """The image."""

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return x0

    def invert(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        return Prediction(x0=out, eps=(x_t - at.alpha * out) / at.sigma)

    def eps_gain(self, at: ScheduleValues) -> Tensor:
        return at.alpha / at.sigma


class V(Parameterization):
    r"""v = (alpha eps - sigma x_0) / sqrt(alpha^2 + sigma^2), of the same size at every noise level.

    Salimans and Ho (2022), "Progressive Distillation", appendix D, who have alpha^2 + sigma^2 = 1; the root carries v
    over to schedules that have not.
    """

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return (at.alpha * eps - at.sigma * x0) / _length(at)

    def invert(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        # (x_t, r v) is (x_0, eps) turned and stretched by r: turn it back.
        r = _length(at)
        cos, sin = at.alpha / r, at.sigma / r
        return Prediction(x0=cos * x_t / r - sin * out, eps=sin * x_t / r + cos * out)

    def eps_gain(self, at: ScheduleValues) -> Tensor:
        return at.alpha / _length(at)


class Score(Parameterization):
    r"""The score of p(x_t) itself, grad log p(x_t) = -E[eps | x_t] / sigma (Song and Ermon 2019, section 3.1).

    For networks that are the gradient of an energy, and for the first NCSN. Its size goes as 1 / sigma, which the
    network must follow. The later models of Song et al. divide the network's output by sigma: but for a sign that is
    `Eps`.
    """

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return -eps / at.sigma

    def invert(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        eps = -at.sigma * out
        return Prediction(x0=(x_t - at.sigma * eps) / at.alpha, eps=eps)

    def eps_gain(self, at: ScheduleValues) -> Tensor:
        return at.sigma


class Velocity(Parameterization):
    r"""u = alpha' x_0 + sigma' eps, the velocity of x_t (Lipman et al. 2023, "Flow Matching", theorem 3).

    With rectified flow it is eps - x_0 (Liu et al. 2023). In general u = f x_t + h eps, f = d log alpha / dt and
    h = -sigma lambda' / 2: nothing is divided by alpha on the way to eps.
    """

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return at.log_alpha_slope * (at.alpha * x0 + at.sigma * eps) + _speed_of_noise(at) * eps

    def invert(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        eps = (out - at.log_alpha_slope * x_t) / _speed_of_noise(at)
        return Prediction(x0=(x_t - at.sigma * eps) / at.alpha, eps=eps)

    def eps_gain(self, at: ScheduleValues) -> Tensor:
        return 1 / _speed_of_noise(at)


def _length(at: ScheduleValues) -> Tensor:
    return (at.alpha**2 + at.sigma**2).sqrt()


def _speed_of_noise(at: ScheduleValues) -> Tensor:
    return -0.5 * at.sigma * at.log_snr_slope


@dataclass(frozen=True)
class EDMPreconditioning(Parameterization):
    r"""x_0 = c_skip y + c_out F(c_in y; c_noise) with y = x_t / alpha: what the network F sees and says has variance 1.

    Karras et al. (2022), "Elucidating the Design Space", table 1 and appendix B.6, who have alpha = 1. With
    s = sigma / alpha and d = ``sigma_data``,

        c_skip = d^2 / (s^2 + d^2),  c_out = s d / sqrt(s^2 + d^2),  c_in = 1 / sqrt(s^2 + d^2),  c_noise = ln(s) / 4.

    It is written with r = sqrt(sigma^2 + alpha^2 d^2), so that nothing is divided by a small alpha.

    Args:
        sigma_data: d, the standard deviation of the data's pixels.
    """

    noise: NoiseConditioning = field(default_factory=LogSigmaConditioning)
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise UserError(f"parameterization.sigma_data={self.sigma_data}: give a positive number.")

    def input(self, x_t: Tensor, t: Tensor, at: ScheduleValues) -> tuple[Tensor, Tensor]:
        x_t, noise = super().input(x_t, t, at)
        return x_t / self._r(at), noise

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        # (x_0 - c_skip y) / c_out
        return (at.sigma / self.sigma_data * x0 - at.alpha * self.sigma_data * eps) / self._r(at)

    def invert(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        r, d = self._r(at), self.sigma_data
        x0 = at.alpha * d * d / r * (x_t / r) + at.sigma * d / r * out
        eps = at.sigma / r * (x_t / r) - at.alpha * d / r * out
        return Prediction(x0=x0, eps=eps)

    def eps_gain(self, at: ScheduleValues) -> Tensor:
        return at.alpha * self.sigma_data / self._r(at)

    def _r(self, at: ScheduleValues) -> Tensor:
        return (at.sigma**2 + (at.alpha * self.sigma_data) ** 2).sqrt()


class PosteriorMean(Parameterization):
    r"""mu = k x_t + a x_0, the mean of q(x_s | x_t, x_0) with s the step before t (Ho et al. 2020, eq. 7).

    a = alpha_s c and k = (alpha_t sigma_s^2) / (alpha_s sigma_t^2), c = 1 - SNR_t / SNR_s; before the first step comes
    the image itself. It needs a schedule with steps. A step moves x_t little, so an error of the network is a large
    one in eps: train it on the variational bound (Ho et al. 2020, table 2).
    """

    def check(self, schedule: NoiseSchedule) -> None:
        super().check(schedule)
        schedule.steps()

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        kept, added = _weights(at)
        return kept * (at.alpha * x0 + at.sigma * eps) + added * x0

    def invert(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        kept, added = _weights(at)
        x0 = (out - kept * x_t) / added
        return Prediction(x0=x0, eps=(x_t - at.alpha * x0) / at.sigma)

    def eps_gain(self, at: ScheduleValues) -> Tensor:
        return at.alpha / at.sigma / _weights(at)[1]


def _weights(at: ScheduleValues) -> tuple[Tensor, Tensor]:
    """k and a."""
    before = at.step_before
    c = -torch.expm1(at.log_snr - before.log_snr)
    return torch.exp(at.log_snr - before.log_snr) * before.alpha / at.alpha, before.alpha * c


@dataclass(frozen=True)
class LearnedVariance(Parameterization):
    r"""Any parameterisation, and beside it w in [-1, 1] for every value of the image.

    The variance of a reverse step is beta^v beta~^(1 - v), v = (w + 1) / 2 being the ``variance_share`` (Nichol and
    Dhariwal 2021, eq. 15), beta the forward step's variance and beta~ that of q(x_s | x_t, x_0). The network gives 2
    channels for 1: first what ``inner`` asks for, then w. Train it with an objective that holds the variational bound.

    Args:
        noise: how the network is told the amount of noise; that of ``inner`` is not used.
        inner: the parameterisation of image and noise.
    """

    inner: Parameterization = field(default_factory=Eps)

    outputs = 2
    learns_variance = True

    def check(self, schedule: NoiseSchedule) -> None:
        super().check(schedule)
        self.inner.check(schedule)

    def input(self, x_t: Tensor, t: Tensor, at: ScheduleValues) -> tuple[Tensor, Tensor]:
        return self.inner.input(x_t, t, at)[0], super().input(x_t, t, at)[1]

    def targeted(self, out: Tensor) -> Tensor:
        return out.chunk(2, dim=1)[0]

    def target(self, x0: Tensor, eps: Tensor, at: ScheduleValues) -> Tensor:
        return self.inner.target(x0, eps, at)

    def invert(self, out: Tensor, x_t: Tensor, at: ScheduleValues) -> Prediction:
        out, w = out.chunk(2, dim=1)
        share = (w + 1) / 2
        # Held in [0, 1] with a gradient that does not die outside, so that training can lead it back.
        share = share + (share.clamp(0, 1) - share).detach()
        return self.inner.invert(out, x_t, at)._replace(variance_share=share)

    def eps_gain(self, at: ScheduleValues) -> Tensor:
        return self.inner.eps_gain(at)
