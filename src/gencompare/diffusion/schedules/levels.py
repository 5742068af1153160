"""Noise levels that are added to an image as it is: one amount of noise after another, no process in between."""

from __future__ import annotations

import math

import torch

from gencompare.diffusion.schedules.base import VarianceExploding
from gencompare.diffusion.schedules.sde import check_sigmas
from gencompare.diffusion.schedules.tables import LogSNRTable
from gencompare.errors import UserError


class NCSNLevels(LogSNRTable, VarianceExploding):
    r"""L noise levels in geometric progression, x_t = x_0 + sigma_i eps (Song and Ermon 2019, section 4.1).

    Level i, counted from the smallest, is time i / L, as step i of a table of betas is; in between sigma is geometric.

    Args:
        sigma_min, sigma_max: smallest and largest noise, for data in [-1, 1]. Published figures are for data in [0, 1]:
            0.01 and 1 there are 0.02 and 2 here.
        levels: L; the paper has 10, Song and Ermon (2020) 232 for CIFAR-10.
    """

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 2.0, levels: int = 10) -> None:
        check_sigmas(type(self).__name__, sigma_min, sigma_max)
        if levels < 2:
            raise UserError(f"NCSNLevels: levels={levels}: give at least 2.")
        super().__init__(-2 * torch.linspace(math.log(sigma_min), math.log(sigma_max), levels, dtype=torch.float64))
