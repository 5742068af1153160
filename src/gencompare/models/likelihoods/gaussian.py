"""A Gaussian with one learned variance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.contract import DataSpec
from gencompare.diffusion.pixels import log_normal, log_normal_level
from gencompare.models.likelihoods.base import PixelLikelihood
from gencompare.seeds import normal_like


class Gaussian(PixelLikelihood):
    r"""N(h, sigma^2) with one learned sigma for all pixels (Rybkin et al. 2021, "sigma-VAE").

    A density for continuous data. With levels it is the mass of the pixel's bin,
    Phi((x + Delta/2 - h) / sigma) - Phi((x - Delta/2 - h) / sigma), the outer bins reaching to -inf and +inf; sigma
    is then held (softly) above 0.015 of a bin.
    """

    GAIN = 10.0
    """log sigma = GAIN w: Adam moves a weight by about its learning rate a step, too slow for a lone log sigma."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.zeros(()))

    @property
    def log_scale(self) -> Tensor:
        """log sigma, a scalar."""
        raw = self.GAIN * self.weight
        if self.num_levels is None:
            return raw
        least = math.log(0.03 / (self.num_levels - 1))
        return least + F.softplus(raw - least, beta=40.0)

    @property
    def maps(self) -> int:
        return self.channels

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        mean, std = h.float(), self.log_scale.exp()
        if self.num_levels is None:
            return self._over_pixels(log_normal(x, mean, std))
        return self._over_pixels(log_normal_level(x, mean, std, self.num_levels))

    def mean(self, h: Tensor) -> Tensor:
        """E[x | h]: with levels, to within Delta / 2, the mean of N(h, sigma^2) clipped to [-1, 1]. Of continuous data
        it is h, held within [-1, 1], where images lie."""
        if self.num_levels is None:
            return h.float().clamp(-1, 1)
        return clipped_normal_mean(h.float(), self.log_scale.exp())

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        x = h.float() + self.log_scale.exp() * normal_like(h.float(), generator)
        return x.clamp(-1, 1) if self.num_levels is None else self._to_levels(x)


def clipped_normal_mean(mean: Tensor, std: Tensor) -> Tensor:
    r"""The mean of N(mean, std^2) clipped to [-1, 1]: -1 + \int_{-1}^{1} Phi((mean - t) / std) dt.

    The integral of Phi is a Phi(a) + phi(a), with phi the standard normal density.
    """

    def integral(a: Tensor) -> Tensor:
        density = torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
        return a * torch.special.ndtr(a) + density

    return (std * (integral((mean + 1) / std) - integral((mean - 1) / std)) - 1).clamp(-1, 1)
