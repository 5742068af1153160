r"""What a bound on the likelihood must know of the images, and the probability of a pixel under a Gaussian."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pixels:
    """The pixels of images in [-1, 1]."""

    levels: int | None
    """How many values, evenly spaced from -1 to 1, a pixel can take; None for continuous data."""
    mask: Tensor
    """(1, H, W): 1 on real pixels, 0 on padding."""
    dims: int
    """Real values in an image: the divisor of bits/dim."""

    def log_prob(self, x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """log p(x_0) in nats, (n,), summed over real pixels, each N(mean, std^2): the mass of the level that the pixel
        has, or the density where it is continuous."""
        found = log_normal(x0, mean, std) if self.levels is None else log_normal_level(x0, mean, std, self.levels)
        return (found * self.mask.to(x0)).flatten(1).sum(1)

    def bits(self, nats: Tensor) -> Tensor:
        """Nats an image to bits a real value."""
        return nats / (self.dims * math.log(2))


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2), value by value."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def log_normal_level(x: Tensor, mean: Tensor, std: Tensor, levels: int) -> Tensor:
    r"""log of the mass of N(mean, std^2) in the bin of x, value by value; x takes ``levels`` values from -1 to 1.

    Phi((x + Delta/2 - mean) / std) - Phi((x - Delta/2 - mean) / std), Delta = 2 / (levels - 1); the lowest bin reaches
    down to -inf and the highest up to +inf (Ho et al. 2020, eq. 13).
    """
    half, inverse, distance = 1 / (levels - 1), 1 / std, x - mean
    # The mass between two edges is that of its mirror image: on the left of the mean no digits are lost.
    upper = torch.special.log_ndtr(-(distance.abs() - half) * inverse)
    lower = torch.special.log_ndtr(-(distance.abs() + half) * inverse)
    inner = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-7)))
    lowest, highest = x < -1 + half, x > 1 - half
    outer = torch.special.log_ndtr((half + torch.where(lowest, distance, -distance)) * inverse)
    return torch.where(lowest | highest, outer, inner)
