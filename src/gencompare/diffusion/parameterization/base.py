r"""What a network is given and what it is asked for.

All are the same model where the network is perfect: given x_t = alpha x_0 + sigma eps, knowing one of x_0, eps or v is
knowing the others. They differ in what an error of the network does, and so in what training finds easy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from gencompare.diffusion.noise_conditioning import LogSNR, NoiseConditioning
from gencompare.diffusion.schedules import NoiseSchedule, Scales


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

    noise: NoiseConditioning = field(default_factory=LogSNR)

    outputs = 1
    """Values that the network gives for each value of the image."""
    learns_variance = False
    """Whether one of them is the variance of the reverse step."""

    def input(self, x_t: Tensor, t: Tensor, at: Scales) -> tuple[Tensor, Tensor]:
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
    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        """What the network should say when these are the image and the noise."""

    @abstractmethod
    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        """Image and noise, from what the network said of x_t."""

    @abstractmethod
    def eps_gain(self, at: Scales) -> Tensor:
        """|d eps / d out|: the error in eps that an error of 1 in the network's output means."""
