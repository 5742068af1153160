"""Logistic distributions of pixels with levels: the functions that they share, and one logistic a pixel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.contract import DataSpec
from gencompare.models.likelihoods.base import PixelLikelihood, levels_of, uniform_like

NARROWEST = -2.15
"""The least log(s / Delta): PixelCNN++'s -7 at 256 levels. A bin then has up to 0.97 of the mass."""

WIDEST = 4.0
"""The largest log s: all but 1 % of the mass then lies beyond the range [-1, 1], half of it on either side."""

SHARP = 10.0
"""Of the bend at `WIDEST`: smaller scales stay as they are, and above it the gradient fades within a few tenths."""


def log_logistic_level(x: Tensor, location: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    r"""log of the mass of a logistic in the bin of x, value by value; x takes ``levels`` values from -1 to 1.

    S((x + Delta/2 - m) / s) - S((x - Delta/2 - m) / s) with the logistic function S, location m, scale s and
    Delta = 2 / (levels - 1); the lowest bin reaches down to -inf and the highest up to +inf (Salimans et al. 2017,
    "PixelCNN++", section 2.1, one component). Its logarithm is taken in a form without cancellation:
    S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)).
    """
    half, inverse, distance = 1 / (levels - 1), torch.exp(-log_scale), x - location
    # log S(a), log S(-b) and log(1 - exp(b - a)); the outer bins have no lower or no upper edge.
    lowest, highest = x < -1 + half, x > 1 - half
    zero = x.new_zeros(())
    return (
        torch.where(highest, zero, F.logsigmoid((distance + half) * inverse))
        + torch.where(lowest, zero, F.logsigmoid((half - distance) * inverse))
        + torch.where(lowest | highest, zero, torch.log(-torch.expm1(-2 * half * inverse)))
    )


def bounded_log_scale(raw: Tensor, levels: int) -> Tensor:
    """log s, held above log(Delta) + `NARROWEST` (softly, so that the gradient never dies) and below `WIDEST`."""
    lowest = math.log(2 / (levels - 1)) + NARROWEST
    return lowest + F.softplus(WIDEST - F.softplus(WIDEST - raw, beta=SHARP) - lowest)


def clipped_logistic_mean(location: Tensor, log_scale: Tensor) -> Tensor:
    r"""The mean of a logistic clipped to [-1, 1], -1 + \int_{-1}^{1} S((m - t) / s) dt, in closed form.

    The bins' own mean is the midpoint rule for this integral, with L - 1 points: the two differ by less than Delta / 2.
    """
    scale = log_scale.exp()
    integral = scale * (F.softplus((location + 1) / scale) - F.softplus((location - 1) / scale))
    return (integral - 1).clamp(-1, 1)


def draw_logistic(location: Tensor, log_scale: Tensor, generator: torch.Generator) -> Tensor:
    """m + s logit(u): the logistic itself, without levels."""
    return location + log_scale.exp() * torch.logit(uniform_like(location, generator), eps=1e-6)


class DiscretizedLogistic(PixelLikelihood):
    """A logistic distribution a channel and pixel, in bins: `log_logistic_level`, with location and log scale from the
    decoder, the latter by way of `bounded_log_scale`."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.levels = levels_of(spec, "discretized_logistic")

    @property
    def maps(self) -> int:
        return 2 * self.channels

    def _location_scale(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Location and log scale, each (n, C, H, W) in float32."""
        location, raw = h.float().chunk(2, dim=1)
        return location, bounded_log_scale(raw, self.levels)

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        return self._over_pixels(log_logistic_level(x, *self._location_scale(h), self.levels))

    def mean(self, h: Tensor) -> Tensor:
        """E[x | h] to within Delta / 2: `clipped_logistic_mean`."""
        return clipped_logistic_mean(*self._location_scale(h))

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        return self._to_levels(draw_logistic(*self._location_scale(h), generator))
