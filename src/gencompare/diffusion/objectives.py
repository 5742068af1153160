r"""What training minimises: per-sample losses of a denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.times import TimeDistribution, UniformTimes
from gencompare.diffusion.weightings import Simple, Weighting
from gencompare.seeds import Draws


class Objective(ABC):
    """A training loss."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        """Figures of each image, (n,), of which ``loss`` is minimised."""


@dataclass(frozen=True)
class WeightedMSE(Objective):
    r"""E w(lambda) ||eps - eps_theta(x_t)||^2 per value, with x_t = alpha x_0 + sigma eps and eps ~ N(0, I).

    The error is taken where it is well conditioned, in what the network predicts, and w is carried over to there.

    Args:
        weighting: w.
        times: distribution of t.
    """

    weighting: Weighting = field(default_factory=Simple)
    times: TimeDistribution = field(default_factory=UniformTimes)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        t = self.times(denoiser.schedule, draws)
        eps = draws.normal(x0.shape[1:]).to(x0.dtype)
        at = denoiser.schedule.at(t, x0)
        x_t = at.alpha * x0 + at.sigma * eps
        out = denoiser.output(x_t, t, at, cond)
        error = (out - denoiser.parameterization.target(x0, eps, at)).square().flatten(1).mean(1)
        eps_mse = error * denoiser.parameterization.eps_gain(at).flatten() ** 2
        return {"loss": self.weighting(at).flatten() * eps_mse, "eps_mse": eps_mse.detach()}
