r"""Uniform dequantisation: how densities of continuous variables become probabilities of discrete pixels.

With noise u that is uniform within the bin of a pixel of width :math:`\delta = 2 / (K - 1)`,

.. math:: -\log P(x) \le E_u[-\log p(x + u)] - d \log \delta

for an image of d values with K levels each: the density of noisy images gives, in expectation, an upper bound on the
negative log-likelihood of discrete images (Theis et al. 2016, "A note on the evaluation of generative models", section
3.1, https://arxiv.org/abs/1511.01844). All families with densities follow this rule.
"""

from __future__ import annotations

import math

from torch import Tensor

UNIFORM_DEQUANTIZATION = "uniform dequantisation"
"""How bits/dim of such models are computed, in records and tables."""


def bin_width(num_bins: int | None) -> float:
    r"""Return :math:`\delta`, the distance of neighbouring pixel values in [-1, 1]; 0 for continuous data."""
    return 2 / (num_bins - 1) if num_bins is not None else 0.0


def dequantize(x: Tensor, uniform: Tensor, num_bins: int | None) -> Tensor:
    """Add noise as wide as a bin to images x (n, ...), given uniform random numbers in [0, 1) of the same shape.

    Continuous data stay as they are.
    """
    return x + bin_width(num_bins) * (uniform - 0.5) if num_bins is not None else x


def log_bin_volume(num_bins: int | None, num_values: int) -> float:
    r"""Return :math:`d \log \delta`, the log-volume of the bin of an image of d = ``num_values`` values.

    It is added to a log-density to get a log-probability; 0 for continuous data.
    """
    return num_values * math.log(bin_width(num_bins)) if num_bins is not None else 0.0
