r"""How much an error counts at each noise level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.diffusion.schedules import Scales
from gencompare.errors import UserError


class Weighting(ABC):
    """The weight w >= 0 of the squared error *in eps* at a noise level, whatever the network predicts.

    As SNR ||x_0 error||^2 = ||eps error||^2, a weight on the error of x_0 is w SNR, and, for alpha^2 + sigma^2 = 1,
    one on the error of v is w SNR / (1 + SNR). So a change of parameterisation alone never changes the loss.
    """

    @abstractmethod
    def __call__(self, at: Scales) -> Tensor:
        """w, shaped as what ``at`` gives."""


@dataclass(frozen=True)
class Simple(Weighting):
    """w = 1: L_simple (Ho et al. 2020, eq. 14)."""

    def __call__(self, at: Scales) -> Tensor:
        return torch.ones_like(at.log_snr)


@dataclass(frozen=True)
class UniformV(Weighting):
    """w = 1 + 1 / SNR: the plain squared error in v ("SNR + 1" on x_0; Salimans and Ho 2022, section 4)."""

    def __call__(self, at: Scales) -> Tensor:
        return 1 + torch.exp(-at.log_snr)


@dataclass(frozen=True)
class MinSNR(Weighting):
    """w = min(1, gamma / SNR): the error of x_0 weighed by the SNR, up to gamma.

    Hang et al. (2023), "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise UserError(f"weighting.gamma={self.gamma}: give a positive number.")

    def __call__(self, at: Scales) -> Tensor:
        return (self.gamma * torch.exp(-at.log_snr)).clamp(max=1.0)


@dataclass(frozen=True)
class EDM(Weighting):
    """w = 1 + 1 / (d^2 SNR), d = ``sigma_data``: (sigma^2 + d^2) / (sigma d)^2 on x_0, where alpha = 1.

    Karras et al. (2022), "Elucidating the Design Space", table 1: the plain squared error of a network with their
    preconditioning. With d = 1 it is `UniformV`.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise UserError(f"weighting.sigma_data={self.sigma_data}: give a positive number.")

    def __call__(self, at: Scales) -> Tensor:
        return 1 + torch.exp(-at.log_snr) / self.sigma_data**2


@dataclass(frozen=True)
class P2(Weighting):
    """w = 1 / (k + SNR)^gamma (Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", eq. 8)."""

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.k <= 0:
            raise UserError(f"weighting.gamma={self.gamma}, weighting.k={self.k}: neither may be negative, nor k be 0.")

    def __call__(self, at: Scales) -> Tensor:
        return (self.k + torch.exp(at.log_snr)) ** -self.gamma


@dataclass(frozen=True)
class UniformVelocity(Weighting):
    r"""w = (sigma lambda' / 2)^2: the plain squared error in the velocity alpha' x_0 + sigma' eps.

    Lipman et al. (2023), "Flow Matching", eq. 9; with rectified flow (1 + sigma / alpha)^2.
    """

    def __call__(self, at: Scales) -> Tensor:
        return (0.5 * at.sigma * at.log_snr_slope) ** 2


@dataclass(frozen=True)
class Likelihood(Weighting):
    """w = g^2 / sigma^2 = -lambda': with uniform times, a bound on the likelihood.

    Song et al. (2021), "Maximum Likelihood Training of Score-Based Diffusion Models", eq. 7 and theorem 1: g^2 on the
    squared error of the score. Large near t_min, so the loss scatters more than others'.
    """

    def __call__(self, at: Scales) -> Tensor:
        return -at.log_snr_slope
