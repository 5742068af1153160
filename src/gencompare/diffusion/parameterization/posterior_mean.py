"""The mean of a reverse step, as the first papers had it."""

from __future__ import annotations

import torch
from torch import Tensor

from gencompare.diffusion.parameterization.base import Parameterization, Prediction
from gencompare.diffusion.schedules import NoiseSchedule, Scales


class PosteriorMean(Parameterization):
    r"""mu = k x_t + a x_0, the mean of q(x_s | x_t, x_0) with s the step before t (Ho et al. 2020, eq. 7).

    a = alpha_s c and k = (alpha_t sigma_s^2) / (alpha_s sigma_t^2), c = 1 - SNR_t / SNR_s; before the first step comes
    the image itself. It needs a schedule with steps. A step moves x_t little, so an error of the network is a large
    one in eps: train it on the variational bound (Ho et al. 2020, table 2).
    """

    def check(self, schedule: NoiseSchedule) -> None:
        super().check(schedule)
        schedule.steps()

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        kept, added = _weights(at)
        return kept * (at.alpha * x0 + at.sigma * eps) + added * x0

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        kept, added = _weights(at)
        x0 = (out - kept * x_t) / added
        return Prediction(x0=x0, eps=(x_t - at.alpha * x0) / at.sigma)

    def eps_gain(self, at: Scales) -> Tensor:
        return at.alpha / at.sigma / _weights(at)[1]


def _weights(at: Scales) -> tuple[Tensor, Tensor]:
    """k and a."""
    before = at.step_before
    c = -torch.expm1(at.log_snr - before.log_snr)
    return torch.exp(at.log_snr - before.log_snr) * before.alpha / at.alpha, before.alpha * c
