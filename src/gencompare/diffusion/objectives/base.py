"""What an objective is, and what all of them begin with: an image with noise on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.parameterization import Parameterization
from gencompare.diffusion.pixels import Pixels
from gencompare.diffusion.schedules import NoiseSchedule, Scales
from gencompare.seeds import Draws


class Objective(ABC):
    """A training loss."""

    trains_schedule: ClassVar[bool] = False
    """Whether a schedule with weights may follow its gradient. Only a bound on the likelihood may be lowered so: any
    other loss is lowest where there is nothing but noise, or next to none."""
    trains_variance: ClassVar[bool] = False
    """Whether its gradient reaches a reverse variance that the network says. In an error of image or noise there is
    none."""

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:  # noqa: B027
        """Raises `UserError` where the objective cannot train a network of ``parameterization`` under ``schedule``."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        """Figures of each image, (n,), of which ``loss`` is minimised."""

    def bound_to(self, pixels: Pixels) -> Objective:
        """The same objective for images of such pixels, where that makes a difference."""
        return self


@dataclass(frozen=True)
class Noised:
    """x_t = alpha x_0 + sigma eps, and what it was made of."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    at: Scales
    x_t: Tensor

    @classmethod
    def make(cls, x0: Tensor, eps: Tensor, t: Tensor, at: Scales) -> Noised:
        return cls(x0, eps, t, at, at.alpha * x0 + at.sigma * eps)

    def eps_error(self, denoiser: Denoiser, out: Tensor) -> Tensor:
        """(eps - eps_theta)^2 of each value, like x_0, from the network's output.

        It is taken where it is well conditioned, in what the network predicts, and carried over to eps.
        """
        parameterization = denoiser.parameterization
        error = parameterization.targeted(out) - parameterization.target(self.x0, self.eps, self.at)
        return (error * parameterization.eps_gain(self.at)).square()
