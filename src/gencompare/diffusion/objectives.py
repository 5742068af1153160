r"""What training minimises: per-sample losses of a denoiser, their weightings over noise levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.times import TimeDistribution, UniformTimes
from gencompare.errors import UserError
from gencompare.seeds import Draws


class Objective(ABC):
    """A training loss."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        """Figures of each image, (n,), of which ``loss`` is minimised."""


# Weightings: w(log-SNR) >= 0 on the squared error in eps


class Weighting(ABC):
    """The weight of the squared error *in eps* at a log-SNR, whatever the network predicts.

    As SNR ||x_0 error||^2 = ||eps error||^2, a weight on the error of x_0 is w SNR, and, for alpha^2 + sigma^2 = 1,
    one on the error of v is w SNR / (1 + SNR). So a change of parameterisation alone never changes the loss.
    """

    @abstractmethod
    def __call__(self, log_snr: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Simple(Weighting):
    """w = 1: L_simple (Ho et al. 2020, eq. 14)."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)


@dataclass(frozen=True)
class UniformV(Weighting):
    """w = 1 + 1 / SNR: the plain squared error in v ("SNR + 1" on x_0; Salimans and Ho 2022, section 4)."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return 1 + torch.exp(-log_snr)


@dataclass(frozen=True)
class MinSNR(Weighting):
    """w = min(1, gamma / SNR): the error of x_0 weighed by the SNR, up to gamma.

    Hang et al. (2023), "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise UserError(f"weighting.gamma={self.gamma}: give a positive number.")

    def __call__(self, log_snr: Tensor) -> Tensor:
        return (self.gamma * torch.exp(-log_snr)).clamp(max=1.0)


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
        return {"loss": self.weighting(at.log_snr.flatten()) * eps_mse, "eps_mse": eps_mse.detach()}
