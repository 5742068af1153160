"""The schedule of EDM."""

from __future__ import annotations

import torch
from torch import Tensor

from gencompare.diffusion.schedules.base import VarianceExploding
from gencompare.diffusion.schedules.sde import check_sigmas
from gencompare.errors import UserError


class Karras(VarianceExploding):
    r"""sigma(t) = (a + t (b - a))^rho, a = sigma_min^(1 / rho), b = sigma_max^(1 / rho), alpha = 1.

    Karras et al. (2022), "Elucidating the Design Space", eq. 5, turned round: evenly spaced times of this schedule are
    the noise levels of their grid. Their sigmas are for data in [-1, 1] and are not rescaled here.

    Args:
        sigma_min, sigma_max: noise at time 0 and 1.
        rho: how much time is spent where the noise is small: at 1 sigma rises evenly, for large rho geometrically.
    """

    t_min = 0.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__()
        check_sigmas(type(self).__name__, sigma_min, sigma_max)
        if rho <= 0:
            raise UserError(f"Karras: rho={rho}: give a positive number.")
        self.rho = rho
        self.start = sigma_min ** (1 / rho)
        self.rise = sigma_max ** (1 / rho) - self.start

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * self.rho * torch.log(self.start + self.rise * t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        root = torch.exp(-0.5 / self.rho * log_snr)  # sigma^(1 / rho)
        return ((root - self.start) / self.rise).clamp(self.t_min, self.t_max)
