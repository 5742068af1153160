"""The mixture of discretised logistics of PixelCNN++, with the channels of a pixel depending on each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.contract import DataSpec
from gencompare.errors import UserError
from gencompare.models.likelihoods.base import PixelLikelihood, levels_of, uniform_like
from gencompare.models.likelihoods.logistic import (
    bounded_log_scale,
    clipped_logistic_mean,
    draw_logistic,
    log_logistic_level,
)


class Components(NamedTuple):
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

    def chosen(self, k: Tensor) -> Components:
        """Component k (n, H, W) of each place."""
        index = k[:, None, None]
        return Components(*(each.gather(1, index.expand(-1, 1, each.shape[2], -1, -1)) for each in self))


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
        self.levels = levels_of(spec, "discretized_logistic_mixture")
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

    def _mixture(self, h: Tensor) -> tuple[Tensor, Components]:
        """log pi, (n, K, H, W), and the components, in float32."""
        logits, rest = h.float().split([self.components, h.shape[1] - self.components], dim=1)
        parts = rest.unflatten(1, (self.components, -1)).split([self.channels, self.channels, self.slopes], dim=2)
        locations, raw, slopes = parts
        mixed = Components(locations + self.offsets, bounded_log_scale(raw, self.levels), torch.tanh(slopes))
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
