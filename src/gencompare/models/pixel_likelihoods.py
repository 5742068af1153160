r"""Distributions of pixels given a decoder's output: p(x | h), with the places of an image independent.

Images are in [-1, 1]. With ``num_levels`` = L they take the values -1 + k Delta, Delta = 2 / (L - 1), and a likelihood
is the probability of exactly that value: at most 1, so that bits/dim are those of a lossless code. With ``num_levels``
None the data are continuous and it is a density. (`Bernoulli` on grey levels is the exception, and says so.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.diffusion.objectives import log_normal, log_normal_level
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.rng import normal_like


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
    def gives_bits(self) -> bool:
        """Whether ``log_prob`` is the probability, or the density, of the very values that the data take. Only then are
        its bits/dim those of the data, and fit to be held against other models'."""
        return True

    def picture(self, x: Tensor) -> Tensor:
        """Images, black where there are no real pixels: nothing was learned there."""
        return torch.where(self.mask > 0, x, -1.0)

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


def grey_levels(spec: DataSpec, option: str) -> int:
    """``spec.num_levels``. Raises `UserError` for continuous data, which ``model/likelihood=<option>`` cannot score."""
    if spec.num_levels is None:
        raise UserError(
            f"model/likelihood={option} needs pixels with levels, and data '{spec.name}' is continuous: use"
            " model/likelihood=gaussian."
        )
    return spec.num_levels


def uniform_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1) of the shape and type of x, drawn where the generator lives."""
    return torch.rand(x.shape, generator=generator, device=generator.device).to(x)


class BernoulliLikelihood(PixelLikelihood):
    r"""Pixels that are 1 with probability S(h) and -1 otherwise; S is the logistic function.

    With y = (x + 1) / 2, the log probability is y log S(h) + (1 - y) log S(-h).

    Of images with two levels this is the probability. Grey ones it takes for probabilities: the same expression is then
    the mean, over binary images whose pixels are 1 with probability y, of their log probability (Salakhutdinov and
    Murray 2008, "On the quantitative analysis of deep belief networks", train on such images). It is no probability of
    the grey image: over the levels of a pixel it does not add up to 1 (Loaiza-Ganem and Cunningham 2019, "The
    continuous Bernoulli"). So ``gives_bits`` is false for more than two levels. The mean, 2 S(h) - 1, is a grey image;
    draws are binary ones.
    """

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.levels = grey_levels(spec, "bernoulli")

    @property
    def maps(self) -> int:
        return self.channels

    @property
    def gives_bits(self) -> bool:
        return self.levels == 2

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        return -self._over_pixels(F.binary_cross_entropy_with_logits(h.float(), (x + 1) / 2, reduction="none"))

    def mean(self, h: Tensor) -> Tensor:
        return 2 * torch.sigmoid(h.float()) - 1

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        probability = torch.sigmoid(h.float())
        return 2.0 * (uniform_like(probability, generator) < probability) - 1


class GaussianLikelihood(PixelLikelihood):
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
        self.levels = grey_levels(spec, "discretized_logistic")

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


class MixtureParams(NamedTuple):
    """The parameters of K components at each place; K is 1 once a component is chosen."""

    locations: Tensor
    """m, (n, K, C, H, W)."""
    log_scales: Tensor
    """log s, (n, K, C, H, W)."""
    slopes: Tensor
    """a, (n, K, C (C - 1) / 2, H, W): one for channel 1, two for channel 2, and so on."""

    def location(self, channel: int, earlier: Tensor) -> Tensor:
        """m_c + sum_{d < c} a_cd x_d, (n, K, H, W), from the channels before it, (n, K or 1, c, H, W)."""
        start = channel * (channel - 1) // 2
        shift = (self.slopes[:, :, start : start + channel] * earlier).sum(2)
        return self.locations[:, :, channel] + shift

    def chosen(self, k: Tensor) -> MixtureParams:
        """Component k (n, H, W) of each place."""
        index = k[:, None, None]
        return MixtureParams(*(each.gather(1, index.expand(-1, 1, each.shape[2], -1, -1)) for each in self))


class DiscretizedLogisticMixture(PixelLikelihood):
    r"""K logistics in bins, mixed a pixel: Salimans et al. 2017, "PixelCNN++", sections 2.1 and 2.2; also the output of
    VDVAE (Child 2021, "Very deep VAEs").

        P(x) = sum_k pi_k prod_c P(x_c; m_kc + sum_{d < c} a_kcd x_d, s_kc),

    with the mass of a bin P of `log_logistic_level`. The channels of a pixel share the component, and each has its
    location shifted in proportion to the channels before it: with red, green and blue, m_g + a r and m_b + b r + c g.

    The decoder gives for each place K logits of pi, then for each component C locations, C log scales (by way of
    `bounded_log_scale`) and C (C - 1) / 2 slopes a, held within (-1, 1) by tanh: 100 numbers for 10 components and 3
    channels. Fixed offsets, even over [-1, 1], are added to the locations of the components, so that they start apart:
    those that start alike would stay alike under a decoder whose last layer starts at nought.

    Args:
        components: K.
    """

    def __init__(self, spec: DataSpec, *, components: int = 10) -> None:
        super().__init__(spec)
        self.levels = grey_levels(spec, "discretized_logistic_mixture")
        if components < 1:
            raise UserError(f"model.likelihood.components={components}: a mixture needs at least 1 component.")
        self.components = components
        self.slopes = self.channels * (self.channels - 1) // 2
        offsets = (torch.arange(components) + 0.5) * 2 / components - 1
        self.register_buffer("offsets", offsets[:, None, None, None], persistent=False)
        self.offsets: Tensor

    @property
    def maps(self) -> int:
        return self.components * (1 + 2 * self.channels + self.slopes)

    def _mixture(self, h: Tensor) -> tuple[Tensor, MixtureParams]:
        """log pi, (n, K, H, W), and the components, in float32."""
        logits, rest = h.float().split([self.components, h.shape[1] - self.components], dim=1)
        parts = rest.unflatten(1, (self.components, -1)).split([self.channels, self.channels, self.slopes], dim=2)
        locations, raw, slopes = parts
        mixed = MixtureParams(locations + self.offsets, bounded_log_scale(raw, self.levels), torch.tanh(slopes))
        return F.log_softmax(logits, dim=1), mixed

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        log_weights, mixed = self._mixture(h)
        locations = torch.stack([mixed.location(c, x[:, None, :c]) for c in range(self.channels)], dim=2)
        each = log_logistic_level(x[:, None], locations, mixed.log_scales, self.levels).sum(2)
        return self._over_pixels(torch.logsumexp(log_weights + each, dim=1, keepdim=True))

    def mean(self, h: Tensor) -> Tensor:
        """sum_k pi_k E[x | k], with each channel's location taken at the component's mean of those before it.

        To within Delta / 2 that is E[x | h] for one channel. For several it is, but for components that reach beyond
        [-1, 1]: where values are cut off there, the mean of a later channel is no longer linear in an earlier one.
        """
        log_weights, mixed = self._mixture(h)
        means = mixed.locations[:, :, :0]
        for c in range(self.channels):
            mean = clipped_logistic_mean(mixed.location(c, means), mixed.log_scales[:, :, c])
            means = torch.cat([means, mean[:, :, None]], dim=2)
        return (log_weights.exp()[:, :, None] * means).sum(1)

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        """A component for each place (the largest of log pi + Gumbel noise), then one channel after the other."""
        log_weights, mixed = self._mixture(h)
        gumbel = -torch.log(-torch.log(uniform_like(log_weights, generator).clamp_min(1e-20)))
        mixed = mixed.chosen((log_weights + gumbel).argmax(1))
        x = mixed.locations[:, 0, :0]
        for c in range(self.channels):
            location = mixed.location(c, x[:, None])
            drawn = self._to_levels(draw_logistic(location, mixed.log_scales[:, :, c], generator))
            x = torch.cat([x, drawn], dim=1)
        return x
