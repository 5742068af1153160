"""The weighted squared error: denoising score matching and flow matching alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gencompare.diffusion.couplings import Coupling, Independent
from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.objectives.base import Noised, Objective
from gencompare.diffusion.times import TimeDistribution, UniformTimes
from gencompare.diffusion.weightings import Simple, Weighting
from gencompare.seeds import Draws


@dataclass(frozen=True)
class WeightedMSE(Objective):
    r"""E w(lambda) ||eps - eps_theta(x_t)||^2 per value, with x_t = alpha x_0 + sigma eps and eps ~ N(0, I).

    The error is taken where it is well conditioned, in what the network predicts, and w is carried over to there.

    Args:
        weighting: w.
        times: distribution of t.
        coupling: which noise goes with which image.
    """

    weighting: Weighting = field(default_factory=Simple)
    times: TimeDistribution = field(default_factory=UniformTimes)
    coupling: Coupling = field(default_factory=Independent)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        t = self.times(denoiser.schedule, draws)
        eps = self.coupling(x0, draws.normal(x0.shape[1:]).to(x0.dtype))
        noised = Noised.make(x0, eps, t, denoiser.schedule.at(t, x0))
        out = denoiser.output(noised.x_t, t, noised.at, cond)
        eps_mse = noised.eps_error(denoiser, out).flatten(1).mean(1)
        return {"loss": self.weighting(noised.at).flatten() * eps_mse, "eps_mse": eps_mse.detach()}
