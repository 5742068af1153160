r"""Likelihoods of pixels given a decoder output, p(x | h), independent across positions.

Images are in [-1, 1]. With L = ``num_bins`` they take the values :math:`-1 + k \Delta`, :math:`\Delta = 2 / (L - 1)`,
and a likelihood is the probability of exactly that value, so bits/dim are the code length of a lossless code. If
``num_bins`` is None, data are continuous, and a likelihood is a density. (`BernoulliLikelihood` on greyscale images is
an exception.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.diffusion.data_likelihood import discretized_normal_log_prob, normal_log_prob
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.networks.layers import at_least_float32
from gencompare.rng import draw_categorical, normal_like, uniform_like


class PixelLikelihood(nn.Module, ABC):
    """Base class of p(x | h), for images x (n, C, H, W) and decoder output h (n, ``decoder_channels``, H, W)."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.channels = spec.shape[0]
        self.num_bins = spec.num_bins
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor

    @property
    @abstractmethod
    def decoder_channels(self) -> int:
        """Number of channels of the decoder output."""

    @abstractmethod
    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        r"""Compute :math:`\log p(x | h)` in nats, summed over all pixels except padding, (n,)."""

    @abstractmethod
    def mean(self, h: Tensor) -> Tensor:
        """Compute the mean E[x | h], (n, C, H, W)."""

    @abstractmethod
    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        """Sample from p(x | h), (n, C, H, W)."""

    @property
    def is_data_likelihood(self) -> bool:
        """Whether `log_prob` is a probability or density of the values that the data take. Only then are its bits/dim
        comparable with those of other models."""
        return True

    def mask_padding(self, x: Tensor) -> Tensor:
        """Make padding black, since the decoder output is not trained there."""
        return torch.where(self.mask > 0, x, -1.0)

    @property
    def bin_width(self) -> float:
        r""":math:`\Delta`, the distance between neighbouring values."""
        assert self.num_bins is not None
        return 2 / (self.num_bins - 1)

    def _sum_pixels(self, log_prob: Tensor) -> Tensor:
        return (log_prob * self.mask).flatten(1).sum(1)

    def _round_to_bins(self, x: Tensor) -> Tensor:
        """Round to the nearest value that a pixel can take."""
        return ((x.clamp(-1, 1) + 1) / self.bin_width).round() * self.bin_width - 1


def require_num_bins(spec: DataSpec, option: str) -> int:
    """Return ``spec.num_bins``.

    Raises:
        UserError: if the data are continuous, since ``model/likelihood=<option>`` needs discrete data.
    """
    if spec.num_bins is None:
        raise UserError(
            f"model/likelihood={option} needs discrete pixels, but data set '{spec.name}' is continuous: use"
            " model/likelihood=gaussian."
        )
    return spec.num_bins


class BernoulliLikelihood(PixelLikelihood):
    r"""Binary pixels: 1 with probability S(h) and -1 otherwise, for the logistic function S.

    .. math:: \log p(x | h) = y \log S(h) + (1 - y) \log S(-h), \quad y = (x + 1) / 2.

    This is a probability for images with two values. Values in between are treated as probabilities: the expression is
    then the expected log probability of binary images whose pixels are 1 with probability y, as in Salakhutdinov and
    Murray (2008), "On the quantitative analysis of deep belief networks". It is not normalised over values in between
    (Loaiza-Ganem and Cunningham 2019, "The continuous Bernoulli", https://arxiv.org/abs/1907.06845), so
    `is_data_likelihood` is false for more than two values. The mean :math:`2 S(h) - 1` is a greyscale image; samples
    are binary.
    """

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.num_bins = require_num_bins(spec, "bernoulli")

    @property
    def decoder_channels(self) -> int:
        return self.channels

    @property
    def is_data_likelihood(self) -> bool:
        return self.num_bins == 2

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        return -self._sum_pixels(F.binary_cross_entropy_with_logits(at_least_float32(h), (x + 1) / 2, reduction="none"))

    def mean(self, h: Tensor) -> Tensor:
        return 2 * torch.sigmoid(at_least_float32(h)) - 1

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        probability = torch.sigmoid(at_least_float32(h))
        return 2.0 * (uniform_like(probability, generator) < probability) - 1


class GaussianLikelihood(PixelLikelihood):
    r"""Gaussian pixels :math:`N(h, \sigma^2)` with one learned :math:`\sigma`.

    Rybkin et al. (2021), "sigma-VAE", https://arxiv.org/abs/2006.13202. For continuous data, `log_prob` is the density;
    for discrete data it is the probability of the bin,
    :math:`\Phi((x + \Delta/2 - h) / \sigma) - \Phi((x - \Delta/2 - h) / \sigma)`, where the outer bins extend to
    infinity; :math:`\sigma` then has a soft lower bound of 0.015 bins.
    """

    GAIN = 10.0
    r""":math:`\log \sigma` is GAIN times the weight, because Adam changes a weight by about the learning rate per step,
    which is too slow for :math:`\log \sigma`."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.zeros(()))

    @property
    def log_scale(self) -> Tensor:
        r""":math:`\log \sigma`, a scalar."""
        raw = self.GAIN * self.weight
        if self.num_bins is None:
            return raw
        minimum = math.log(0.03 / (self.num_bins - 1))
        return minimum + F.softplus(raw - minimum, beta=40.0)

    @property
    def decoder_channels(self) -> int:
        return self.channels

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        mean, std = at_least_float32(h), self.log_scale.exp()
        if self.num_bins is None:
            return self._sum_pixels(normal_log_prob(x, mean, std))
        return self._sum_pixels(discretized_normal_log_prob(x, mean, std, self.num_bins))

    def mean(self, h: Tensor) -> Tensor:
        r"""Compute the mean E[x | h].

        For discrete data, this is the mean of :math:`N(h, \sigma^2)` clipped to [-1, 1], exact to :math:`\Delta / 2`.
        For continuous data, it is h clamped to the range [-1, 1] of images.
        """
        if self.num_bins is None:
            return at_least_float32(h).clamp(-1, 1)
        return clipped_normal_mean(at_least_float32(h), self.log_scale.exp())

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        mean = at_least_float32(h)
        x = mean + self.log_scale.exp() * normal_like(mean, generator)
        return x.clamp(-1, 1) if self.num_bins is None else self._round_to_bins(x)


def clipped_normal_mean(mean: Tensor, std: Tensor) -> Tensor:
    r"""Compute the mean of :math:`N(\mu, \sigma^2)` clipped to [-1, 1].

    The mean is :math:`-1 + \int_{-1}^{1} \Phi((\mu - t) / \sigma) dt`. The code uses
    :math:`\int \Phi = a \Phi(a) + \phi(a)` with the standard normal density :math:`\phi`.
    """

    def integral(a: Tensor) -> Tensor:
        density = torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
        return a * torch.special.ndtr(a) + density

    return (std * (integral((mean + 1) / std) - integral((mean - 1) / std)) - 1).clamp(-1, 1)


MIN_LOG_SCALE_OVER_BIN = -2.15
r"""Lower bound of :math:`\log(s / \Delta)`. For 256 values, it equals the bound -7 on :math:`\log s` in PixelCNN++. At
the bound, one bin has up to 0.97 of the mass."""

MAX_LOG_SCALE = 4.0
r"""Upper bound of :math:`\log s`. At the bound, 99 % of the mass is outside [-1, 1], about half of it on either
side."""

MAX_LOG_SCALE_SHARPNESS = 10.0
"""Sharpness of the softplus at `MAX_LOG_SCALE`: the gradient vanishes within a few tenths above the bound."""


def discretized_logistic_log_prob(x: Tensor, location: Tensor, log_scale: Tensor, num_bins: int) -> Tensor:
    r"""Compute the log probability of the bin of x under a logistic distribution, elementwise.

    .. math:: \log [S((x + \Delta/2 - m) / s) - S((x - \Delta/2 - m) / s)], \quad \Delta = 2 / (L - 1),

    with the logistic function S; the outer bins extend to infinity. Salimans et al. (2017), "PixelCNN++", section 2.1,
    with one component, https://arxiv.org/abs/1701.05517. It is computed without cancellation as
    :math:`S(a) - S(b) = S(a) S(-b) (1 - e^{b - a})`.

    Args:
        x: values on an even grid of ``num_bins`` values from -1 to 1.
        location: m.
        log_scale: :math:`\log s`.
        num_bins: L.
    """
    half, inverse, distance = 1 / (num_bins - 1), torch.exp(-log_scale), x - location
    # log S(a), log S(-b) and log(1 - exp(b - a)); the outer bins have no lower or no upper edge.
    lowest, highest = x < -1 + half, x > 1 - half
    zero = x.new_zeros(())
    return (
        torch.where(highest, zero, F.logsigmoid((distance + half) * inverse))
        + torch.where(lowest, zero, F.logsigmoid((half - distance) * inverse))
        + torch.where(lowest | highest, zero, torch.log(-torch.expm1(-2 * half * inverse)))
    )


def bounded_log_scale(raw: Tensor, num_bins: int) -> Tensor:
    r"""Map decoder output to :math:`\log s` between :math:`\log \Delta` + `MIN_LOG_SCALE_OVER_BIN` and `MAX_LOG_SCALE`.

    The lower bound is soft, so that the gradient never vanishes there.
    """
    minimum = math.log(2 / (num_bins - 1)) + MIN_LOG_SCALE_OVER_BIN
    capped = MAX_LOG_SCALE - F.softplus(MAX_LOG_SCALE - raw, beta=MAX_LOG_SCALE_SHARPNESS)
    return minimum + F.softplus(capped - minimum)


def clipped_logistic_mean(location: Tensor, log_scale: Tensor) -> Tensor:
    r"""Compute the mean of a logistic clipped to [-1, 1], :math:`-1 + \int_{-1}^{1} S((m - t) / s) dt`, in closed form.

    The mean of the discretised logistic is the midpoint rule for this integral with L - 1 points, so the two differ by
    less than :math:`\Delta / 2`.
    """
    scale = log_scale.exp()
    integral = scale * (F.softplus((location + 1) / scale) - F.softplus((location - 1) / scale))
    return (integral - 1).clamp(-1, 1)


def sample_logistic(location: Tensor, log_scale: Tensor, generator: torch.Generator) -> Tensor:
    """Sample m + s logit(u) from the continuous logistic distribution."""
    return location + log_scale.exp() * torch.logit(uniform_like(location, generator), eps=1e-6)


class DiscretizedLogistic(PixelLikelihood):
    """Discretised logistic pixels with location and scale from the decoder, independent across channels.

    See `discretized_logistic_log_prob`; the log scale is bounded by `bounded_log_scale`.
    """

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.num_bins = require_num_bins(spec, "discretized_logistic")

    @property
    def decoder_channels(self) -> int:
        return 2 * self.channels

    def _location_scale(self, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Compute the parameters m and :math:`\log s`, each (n, C, H, W) in full precision."""
        location, raw = at_least_float32(h).chunk(2, dim=1)
        return location, bounded_log_scale(raw, self.num_bins)

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        return self._sum_pixels(discretized_logistic_log_prob(x, *self._location_scale(h), self.num_bins))

    def mean(self, h: Tensor) -> Tensor:
        r"""Compute the mean E[x | h], exact to :math:`\Delta / 2`: `clipped_logistic_mean`."""
        return clipped_logistic_mean(*self._location_scale(h))

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        return self._round_to_bins(sample_logistic(*self._location_scale(h), generator))


class MixtureParams(NamedTuple):
    """Parameters of K mixture components at each position; K = 1 after `select`."""

    locations: Tensor
    """Locations m, (n, K, C, H, W)."""
    log_scales: Tensor
    r"""Log scales :math:`\log s`, (n, K, C, H, W)."""
    slopes: Tensor
    """Coefficients a, (n, K, C (C - 1) / 2, H, W): one for channel 1, two for channel 2, and so on."""

    def location(self, channel: int, earlier: Tensor) -> Tensor:
        r"""Compute the location :math:`m_c + \sum_{d < c} a_{cd} x_d` of channel c, (n, K, H, W).

        Args:
            channel: c.
            earlier: values of the channels before c, (n, K or 1, c, H, W).
        """
        start = channel * (channel - 1) // 2
        shift = (self.slopes[:, :, start : start + channel] * earlier).sum(2)
        return self.locations[:, :, channel] + shift

    def select(self, k: Tensor) -> MixtureParams:
        """Select the parameters of component ``k`` (n, H, W) at each position."""
        index = k[:, None, None]
        return MixtureParams(*(p.gather(1, index.expand(-1, 1, p.shape[2], -1, -1)) for p in self))


class DiscretizedLogisticMixture(PixelLikelihood):
    r"""A mixture of K discretised logistics per pixel, with linear dependence between channels.

    .. math:: P(x) = \sum_k \pi_k \prod_c P(x_c; m_{kc} + \sum_{d < c} a_{kcd} x_d, s_{kc}),

    with the probability P of `discretized_logistic_log_prob`. All channels of a pixel share the component, and the
    location of a channel depends on the channels before it: for RGB, :math:`m_g + a r` and :math:`m_b + b r + c g`.
    Salimans et al. (2017), "PixelCNN++", sections 2.1 and 2.2, https://arxiv.org/abs/1701.05517; also used by Child
    (2021), "Very deep VAEs", https://arxiv.org/abs/2011.10650.

    At each position, the decoder output has K logits of :math:`\pi`, then for each component C locations, C raw log
    scales (`bounded_log_scale`) and C (C - 1) / 2 raw coefficients, mapped to (-1, 1) by tanh: 100 channels for K = 10
    and RGB. Fixed offsets, evenly spaced over [-1, 1], are added to the locations, because identical components would
    stay identical if the last decoder layer is initialised to zero.

    Args:
        spec: shape and value range of the data.
        num_components: number of components K.
    """

    def __init__(self, spec: DataSpec, *, num_components: int = 10) -> None:
        super().__init__(spec)
        self.num_bins = require_num_bins(spec, "discretized_logistic_mixture")
        if num_components < 1:
            raise UserError(f"model.likelihood.num_components={num_components} must be at least 1.")
        self.num_components = num_components
        self.num_slopes = self.channels * (self.channels - 1) // 2
        offsets = (torch.arange(num_components) + 0.5) * 2 / num_components - 1
        self.register_buffer("offsets", offsets[:, None, None, None], persistent=False)
        self.offsets: Tensor

    @property
    def decoder_channels(self) -> int:
        return self.num_components * (1 + 2 * self.channels + self.num_slopes)

    def _mixture(self, h: Tensor) -> tuple[Tensor, MixtureParams]:
        r"""Compute :math:`\log \pi`, (n, K, H, W), and the parameters of the components, in full precision."""
        logits, rest = at_least_float32(h).split([self.num_components, h.shape[1] - self.num_components], dim=1)
        locations, raw_scales, raw_slopes = rest.unflatten(1, (self.num_components, -1)).split(
            [self.channels, self.channels, self.num_slopes], dim=2
        )
        log_scales = bounded_log_scale(raw_scales, self.num_bins)
        mixture = MixtureParams(locations + self.offsets, log_scales, torch.tanh(raw_slopes))
        return F.log_softmax(logits, dim=1), mixture

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        log_weights, mixture = self._mixture(h)
        locations = torch.stack([mixture.location(c, x[:, None, :c]) for c in range(self.channels)], dim=2)
        log_components = discretized_logistic_log_prob(x[:, None], locations, mixture.log_scales, self.num_bins).sum(2)
        return self._sum_pixels(torch.logsumexp(log_weights + log_components, dim=1, keepdim=True))

    def mean(self, h: Tensor) -> Tensor:
        r"""Compute :math:`\sum_k \pi_k E[x | k]`, with each channel located at the component means of earlier channels.

        The mean is exact to :math:`\Delta / 2` for one channel. With several channels, it is approximate for components
        that reach beyond [-1, 1], where clipping makes the mean of a channel nonlinear in the earlier ones.
        """
        log_weights, mixture = self._mixture(h)
        means = mixture.locations[:, :, :0]
        for c in range(self.channels):
            mean = clipped_logistic_mean(mixture.location(c, means), mixture.log_scales[:, :, c])
            means = torch.cat([means, mean[:, :, None]], dim=2)
        return (log_weights.exp()[:, :, None] * means).sum(1)

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        """Sample a component per position, then sample one channel after another."""
        log_weights, mixture = self._mixture(h)
        mixture = mixture.select(draw_categorical(log_weights, generator, dim=1))
        x = mixture.locations[:, 0, :0]
        for c in range(self.channels):
            location = mixture.location(c, x[:, None])
            value = self._round_to_bins(sample_logistic(location, mixture.log_scales[:, :, c], generator))
            x = torch.cat([x, value], dim=1)
        return x
