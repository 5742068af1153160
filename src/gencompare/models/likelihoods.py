r"""Distributions of pixels given a decoder's output: p(x | h), with the pixels independent.

Images are in [-1, 1]. With ``num_levels`` = L they take the values -1 + k Delta, Delta = 2 / (L - 1), and a likelihood
is the probability of exactly that value: at most 1, so that bits/dim are those of a lossless code. With ``num_levels``
None the data are continuous and it is a density.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.contract import DataSpec
from gencompare.diffusion.pixels import log_normal, log_normal_level
from gencompare.errors import UserError


class PixelLikelihood(nn.Module, ABC):
    """p(x | h) for x (n, C, H, W) and a decoder's output h (n, ``maps``, H, W)."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.channels = spec.shape[0]
        self.num_levels = spec.num_levels
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor

    @property
    @abstractmethod
    def maps(self) -> int:
        """Numbers that the decoder gives for each place."""

    @abstractmethod
    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        """log p(x | h) in nats, (n,), summed over real pixels."""

    @abstractmethod
    def mean(self, h: Tensor) -> Tensor:
        """E[x | h], (n, C, H, W)."""

    @abstractmethod
    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from p(x | h), (n, C, H, W)."""

    @property
    def step(self) -> float:
        """Delta, the distance between neighbouring levels."""
        assert self.num_levels is not None
        return 2 / (self.num_levels - 1)

    def _over_pixels(self, log_prob: Tensor) -> Tensor:
        return (log_prob * self.mask).flatten(1).sum(1)

    def _to_levels(self, x: Tensor) -> Tensor:
        """The nearest of the values that a pixel can take."""
        return ((x.clamp(-1, 1) + 1) / self.step).round() * self.step - 1


class DiscretizedLogistic(PixelLikelihood):
    r"""A logistic distribution a channel and pixel, in bins: Salimans et al. 2017, "PixelCNN++", eq. 2, one component.

    With the logistic function S, location m and scale s, both given by the decoder,

        P(x) = S((x + Delta/2 - m) / s) - S((x - Delta/2 - m) / s),

    the lowest bin reaching down to -inf and the highest up to +inf. Its logarithm is taken in a form without
    cancellation: S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)).

    log s is held above log(Delta) - 2.15, which is PixelCNN++'s -7 at 256 levels: a bin then has up to 0.97 of the mass
    (softly, so that the gradient never dies).
    """

    NARROWEST = -2.15
    """The least log(s / Delta)."""

    def __init__(self, spec: DataSpec) -> None:
        if spec.num_levels is None:
            raise UserError(
                f"model/likelihood=discretized_logistic needs pixels with levels, and data '{spec.name}' is continuous:"
                " use model/likelihood=gaussian."
            )
        super().__init__(spec)

    @property
    def maps(self) -> int:
        return 2 * self.channels

    def _location_scale(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Location and log scale, each (n, C, H, W) in float32."""
        location, log_scale = h.float().chunk(2, dim=1)
        lowest = math.log(self.step) + self.NARROWEST
        return location, lowest + F.softplus(log_scale - lowest)

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        location, log_scale = self._location_scale(h)
        inverse = torch.exp(-log_scale)
        above = (x - location + self.step / 2) * inverse
        below = (x - location - self.step / 2) * inverse
        # log S(a), log S(-b) and log(1 - exp(b - a)); the outer bins have no lower or no upper edge.
        lowest, highest = x < -1 + self.step / 2, x > 1 - self.step / 2
        zero = x.new_zeros(())
        log_prob = (
            torch.where(highest, zero, F.logsigmoid(above))
            + torch.where(lowest, zero, F.logsigmoid(-below))
            + torch.where(lowest | highest, zero, torch.log(-torch.expm1(-self.step * inverse)))
        )
        return self._over_pixels(log_prob)

    def mean(self, h: Tensor) -> Tensor:
        r"""The mean of the logistic clipped to [-1, 1], -1 + \int_{-1}^{1} S((m - t) / s) dt, in closed form.

        The bins' own mean is the midpoint rule for this integral, with L - 1 points: the two differ by less than
        Delta / 2.
        """
        location, log_scale = self._location_scale(h)
        scale = log_scale.exp()
        integral = scale * (F.softplus((location + 1) / scale) - F.softplus((location - 1) / scale))
        return (integral - 1).clamp(-1, 1)

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        location, log_scale = self._location_scale(h)
        u = torch.rand(location.shape, generator=generator, device=generator.device).to(location)
        return self._to_levels(location + log_scale.exp() * torch.logit(u, eps=1e-6))


class Gaussian(PixelLikelihood):
    r"""N(h, sigma^2) with one learned sigma for all pixels (Rybkin et al. 2021, "sigma-VAE").

    A density for continuous data. With levels it is the mass of the pixel's bin,
    Phi((x + Delta/2 - h) / sigma) - Phi((x - Delta/2 - h) / sigma), the outer bins being open as above.
    """

    GAIN = 10.0
    """log sigma = GAIN w: Adam moves a weight by about its learning rate a step, too slow for a lone log sigma."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.zeros(()))

    @property
    def log_scale(self) -> Tensor:
        """log sigma, a scalar."""
        return self.GAIN * self.weight

    @property
    def maps(self) -> int:
        return self.channels

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        mean, std = h.float(), self.log_scale.exp()
        if self.num_levels is None:
            return self._over_pixels(log_normal(x, mean, std))
        return self._over_pixels(log_normal_level(x, mean, std, self.num_levels))

    def mean(self, h: Tensor) -> Tensor:
        return h.float().clamp(-1, 1)

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(h.shape, generator=generator, device=generator.device).to(h.device)
        x = h.float() + self.log_scale.exp() * noise
        return x.clamp(-1, 1) if self.num_levels is None else self._to_levels(x)
