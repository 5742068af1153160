r"""What a network is given and what it is asked for.

All are the same model where the network is perfect: given x_t = alpha x_0 + sigma eps, knowing one of x_0, eps or v is
knowing the others. They differ in what an error of the network does, and so in what training finds easy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from gencompare.diffusion.schedules import Scales
from gencompare.diffusion.schedules.tables import on_step
from gencompare.errors import UserError


class Prediction(NamedTuple):
    """What a denoiser says of x_t: E[x_0 | x_t] and the noise that goes with it, each like x_t.

    x_t = alpha x0 + sigma eps always holds. The score of p(x_t) is -eps / sigma.
    """

    x0: Tensor
    eps: Tensor
    log_var: Tensor | None = None
    """Log variance of the reverse step, like x_t, where the network learns it."""


# How a network is told the amount of noise


class NoiseConditioning(ABC):
    """The number, () or (n,), that tells a network how much noise there is at time t."""

    @abstractmethod
    def __call__(self, t: Tensor, at: Scales) -> Tensor: ...


@dataclass(frozen=True)
class LogSNR(NoiseConditioning):
    """The log-SNR, clamped to [-limit, limit] and brought to [0, 1000], the range that DDPM's embedding is made for.

    It means the same under every schedule, so a schedule may be changed for another after training.
    """

    limit: float = 20.0

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise UserError(f"noise.limit={self.limit}: give a positive number.")

    def __call__(self, t: Tensor, at: Scales) -> Tensor:
        return (at.log_snr.flatten().clamp(-self.limit, self.limit) + self.limit) * (500 / self.limit)


@dataclass(frozen=True)
class Timestep(NoiseConditioning):
    """steps t - 1: the index, counted from 0, of a step in a table of so many; what published DDPMs were trained on."""

    steps: int = 1000

    def __call__(self, t: Tensor, at: Scales) -> Tensor:
        return on_step(t * self.steps) - 1


# What a network is asked for


@dataclass(frozen=True)
class Parameterization(ABC):
    """Base of every parameterisation. ``at`` holds alpha, sigma and the log-SNR, shaped to meet the images.

    A subclass writes ``target``, ``invert`` and ``eps_gain``; one that scales the network's input, ``input`` too.

    Args:
        noise: how the network is told the amount of noise.
    """

    noise: NoiseConditioning = field(default_factory=LogSNR)

    outputs = 1
    """Values that the network gives for each value of the image."""

    def input(self, x_t: Tensor, t: Tensor, at: Scales) -> tuple[Tensor, Tensor]:
        """What the network sees of x_t, (n, C, H, W), and its noise condition, (n,)."""
        noise = self.noise(t, at).to(x_t.dtype)
        return x_t, noise.expand(len(x_t))

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        """What the network should say when these are the image and the noise."""

    @abstractmethod
    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        """Image and noise, from what the network said of x_t."""

    @abstractmethod
    def eps_gain(self, at: Scales) -> Tensor:
        """|d eps / d out|: the error in eps that an error of 1 in the network's output means."""


class Eps(Parameterization):
    """The noise (Ho et al. 2020, section 3.2)."""

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        return eps

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        return Prediction(x0=(x_t - at.sigma * out) / at.alpha, eps=out)

    def eps_gain(self, at: Scales) -> Tensor:
        return at.alpha.new_ones(at.alpha.shape)


class X0(Parameterization):
    """The image."""

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        return x0

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        return Prediction(x0=out, eps=(x_t - at.alpha * out) / at.sigma)

    def eps_gain(self, at: Scales) -> Tensor:
        return at.alpha / at.sigma


class V(Parameterization):
    r"""v = (alpha eps - sigma x_0) / sqrt(alpha^2 + sigma^2), of the same size at every noise level.

    Salimans and Ho (2022), "Progressive Distillation", appendix D, who have alpha^2 + sigma^2 = 1; the root carries v
    over to schedules that have not.
    """

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        return (at.alpha * eps - at.sigma * x0) / _length(at)

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        # (x_t, r v) is (x_0, eps) turned and stretched by r: turn it back.
        r = _length(at)
        cos, sin = at.alpha / r, at.sigma / r
        return Prediction(x0=cos * x_t / r - sin * out, eps=sin * x_t / r + cos * out)

    def eps_gain(self, at: Scales) -> Tensor:
        return at.alpha / _length(at)


def _length(at: Scales) -> Tensor:
    return (at.alpha**2 + at.sigma**2).sqrt()
