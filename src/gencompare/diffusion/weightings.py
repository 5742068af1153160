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
