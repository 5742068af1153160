"""A reverse variance that the network learns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gencompare.diffusion.parameterization.base import Parameterization, Prediction
from gencompare.diffusion.parameterization.plain import Eps
from gencompare.diffusion.schedules import NoiseSchedule, Scales


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

    def input(self, x_t: Tensor, t: Tensor, at: Scales) -> tuple[Tensor, Tensor]:
        return self.inner.input(x_t, t, at)[0], super().input(x_t, t, at)[1]

    def targeted(self, out: Tensor) -> Tensor:
        return out.chunk(2, dim=1)[0]

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        return self.inner.target(x0, eps, at)

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        out, w = out.chunk(2, dim=1)
        share = (w + 1) / 2
        # Held in [0, 1] with a gradient that does not die outside, so that training can lead it back.
        share = share + (share.clamp(0, 1) - share).detach()
        return self.inner.invert(out, x_t, at)._replace(variance_share=share)

    def eps_gain(self, at: Scales) -> Tensor:
        return self.inner.eps_gain(at)
