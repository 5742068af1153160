"""95 % confidence intervals of distances between samples and a fixed reference, from their delete-one values.

An interval covers the expectation of the statistic over fresh sets of n samples from the model; the reference is fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import t as student_t
from torch import Tensor

LEVEL = 0.95
MIN_IMAGES = 10
"""Smallest number of images for an interval."""
PAIR_IMAGES = 500
"""Number of images whose pairs estimate the second-order terms."""
TRIMMED = 0.05
"""Fraction of these images to exclude, namely those with the largest second-order terms."""
TAIL = 0.05
"""Fraction of the images in each tail that the tail estimate uses."""
LIGHT_TAIL, WIDENING = 0.3, 3.0


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % interval."""

    value: float
    interval: tuple[float, float] | None
    """The 95 % interval, or None for fewer than 10 images."""
    standard_error: float = math.nan
    largest_share: float = 0.0
    """Largest fraction of the variance that one image contributes. Above about a quarter, the tails are so heavy that
    the value and its interval depend on a few images."""


@dataclass(frozen=True)
class Margins:
    """How far an interval extends below and above its statistic."""

    below: float
    above: float
    standard_error: float
    largest_share: float

    def around(self, value: float, low: float = -math.inf) -> Estimate:
        """Return ``value`` with its interval, whose lower end is at least ``low``."""
        interval = max(low, value - self.below), value + self.above
        return Estimate(value, interval, self.standard_error, self.largest_share)


def interval_margins(delete_one: Tensor, second_order: Tensor, rows: Tensor, level: float = LEVEL) -> Margins | None:
    r"""Compute the margins of the interval of a statistic :math:`T`. Return None for fewer than 10 images.

    Let :math:`T_{(i)}` be the statistic without image i, :math:`u_i = (n - 1) (\bar{T}_{()} - T_{(i)})` the
    pseudo-values up to a constant, and :math:`T = \text{(a mean)} + \frac{1}{2 n^2} \sum_{ij} q(x_i, x_j)` to second
    order. Then

    .. math::
        V &= \mathrm{var}(u) / n - \mathbb{E}\, q^2 / (2 n^2) \\
        \beta &= 2\, \mathbb{E}[u u' q] / (n\, \mathrm{var}(u)) \\
        (T - \theta)^2 &= z^2 (V + \beta (\theta - T)) \quad \text{solved for } \theta \\
        \text{margin} &\leftarrow \text{margin} \cdot (1 + 3 \max(0, h - 0.3))

    - The first line removes the bias of the delete-one jackknife, which counts the second-order part twice (Efron and
      Stein 1981, "The Jackknife Estimate of Variance", eq. 4.2 f.). :math:`V` is at least half the jackknife estimate.
    - The next two lines give a score interval, like Wilson's for a proportion, for statistics whose variance grows with
      their value, such as squared distances between mixtures.
    - The last line is empirical. On each side, :math:`h` is Hill's estimate for the largest 5 % of the deviations of u
      from its median. With heavy tails, most sets of n images contain no extreme image, so :math:`T` and its error are
      both too small. The two constants come from simulations (see benchmarks/interval_coverage.py): h is below 0.3 for
      Gaussian features and about 1 for a multivariate t with 5 degrees of freedom. With 4 degrees of freedom, where the
      variance of the distance is infinite, no interval of this kind keeps its level.

    Args:
        delete_one: :math:`T_{(i)}`, (n,), float64.
        second_order: :math:`q(x_i, x_j)` up to terms of i or j alone, (p, p); the diagonal is not used.
        rows: (p,) the indices of the images in ``second_order``.
        level: confidence level.
    """
    n = len(delete_one)
    if n < MIN_IMAGES:
        return None
    u = (n - 1) * (delete_one.mean() - delete_one)
    spread = float(u.var())
    if spread == 0:
        return Margins(0.0, 0.0, 0.0, 0.0)
    squares, products = _second_order_moments(second_order, u[rows])
    variance = max(spread / n - squares / (2 * n**2), spread / (2 * n))
    z = float(student_t.isf((1 - level) / 2, n - 1))
    half_slope = z**2 * products / (n * spread)
    reach = math.sqrt(half_slope**2 + z**2 * variance)
    centered = u - u.median()
    largest_share = float((u - u.mean()).square().max()) / (spread * (n - 1))
    return Margins(
        below=(reach - half_slope) * _widening(-centered),
        above=(reach + half_slope) * _widening(centered),
        standard_error=math.sqrt(variance),
        largest_share=largest_share,
    )


def estimate(value: float, delete_one: Tensor, second_order: Tensor, rows: Tensor, level: float = LEVEL) -> Estimate:
    """Return ``value`` with its interval. The other arguments are those of `interval_margins`."""
    margins = interval_margins(delete_one, second_order, rows, level)
    return Estimate(value, None) if margins is None else margins.around(value)


def student_estimate(value: float, standard_error: float, n: int, level: float = LEVEL) -> Estimate:
    """Return ``value`` with Student's interval for ``n`` images; it has none for fewer than 10."""
    reach = float(student_t.isf((1 - level) / 2, n - 1)) * standard_error
    return Estimate(value, (value - reach, value + reach) if n >= MIN_IMAGES else None, standard_error)


def _second_order_moments(q: Tensor, u: Tensor) -> tuple[float, float]:
    """Estimate E q^2 and E[u u' q] over pairs of different images, after centring the rows and columns of q (p, p).

    The images with the largest q^2 are excluded. With heavy tails q^2 has no mean, and the subtracted term must not be
    overestimated.
    """
    q = _u_centered(q)
    size = q.square().sum(1)
    kept = size <= size.quantile(1 - TRIMMED)
    q, u = q[kept][:, kept], u[kept] - u[kept].mean()
    p = len(u)
    return float(q.square().sum()) / (p * (p - 1)), float(u @ q @ u) / (p * (p - 1))


def _u_centered(q: Tensor) -> Tensor:
    """Subtract row and column means over pairs of different images from q (U-centring). The diagonal becomes zero."""
    p = len(q)
    q = q - torch.diag(q.diagonal())
    row, total = q.sum(1) / (p - 2), q.sum() / ((p - 1) * (p - 2))
    q = q - row[:, None] - row + total
    return q - torch.diag(q.diagonal())


def _widening(values: Tensor) -> float:
    """Return 1 + 3 max(0, h - 0.3), with Hill's estimate h = mean log(v_(k) / v_(K+1)) over the K largest values."""
    k = max(2, int(TAIL * len(values)))
    largest = values.topk(k + 1).values
    if largest[-1] <= 0:
        return 1.0
    return 1 + WIDENING * max(0.0, float((largest[:-1] / largest[-1]).log().mean()) - LIGHT_TAIL)
