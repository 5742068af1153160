"""95 % intervals of distances between samples and a fixed reference, from their delete-one values.

The target is the expected value of the statistic at this n over fresh samples from the model. The reference is fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import t as student
from torch import Tensor

LEVEL = 0.95
MIN_SAMPLES = 10
"""Images below which no interval is given."""
PAIR_ROWS = 500
"""Images whose pairs estimate the second-order terms."""
TRIMMED = 0.05
"""Share of these images with the largest second-order terms that is left out."""
TAIL = 0.05
"""Share of the images that the tail estimate uses, on each side."""
LIGHT_TAIL, WIDENING = 0.3, 3.0


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % interval."""

    value: float
    interval: tuple[float, float] | None
    """None for fewer than 10 images."""
    standard_error: float = math.nan
    largest_share: float = 0.0
    """Share of the variance that comes from one image. Above about a quarter, the tails are so heavy that value and
    interval rest on few images."""


@dataclass(frozen=True)
class Margins:
    """How far an interval reaches below and above its statistic."""

    below: float
    above: float
    standard_error: float
    largest_share: float

    def around(self, value: float, low: float = -math.inf) -> Estimate:
        return Estimate(
            value, (max(low, value - self.below), value + self.above), self.standard_error, self.largest_share
        )


def margins(left_out: Tensor, second_order: Tensor, rows: Tensor) -> Margins | None:
    """Margins of the 95 % interval of a statistic T.

    With T = mean-type statistic + (2 n^2)^-1 sum_ij q(x_i, x_j) to second order and pseudo-values
    u_i = (n - 1) (mean T_() - T_(i)), where T_(i) leaves out image i:

        V = var(u) / n - E q^2 / (2 n^2)                  the jackknife counts the second-order part twice
        beta = 2 E[u u' q] / (n var(u))                   how the variance changes along with T
        (T - theta)^2 = z^2 (V + beta (theta - T))        solved for theta: a score interval
        each side times 1 + 3 max(0, h - 0.3)             h: Hill's estimate on that side's largest 5 % of u - median

    The first line is the Efron-Stein bias of the delete-one jackknife (Efron and Stein 1981, "The Jackknife Estimate of
    Variance", eq. 4.2 f.), V is kept at half of the jackknife's at least. The second and third treat statistics whose
    variance grows with their value, such as squared distances between mixtures, as Wilson's interval does for a
    proportion. The last line is empirical: for samples with heavy tails, most sets of n images hold no extreme one, so
    T and its error are too small together. Its two constants come from simulation (benchmarks/interval_coverage.py
    repeats it), h is below 0.3 for Gaussian features and about 1 for multivariate t with 5 degrees of freedom. With 4
    degrees of freedom, where the variance of the distance is infinite, no interval of this kind holds its level.

    Args:
        left_out: T_(i), (n,), float64.
        second_order: q(x_i, x_j) up to terms of i or j alone, (p, p); the diagonal is not used.
        rows: which images these are, (p,).
    """
    n = len(left_out)
    if n < MIN_SAMPLES:
        return None
    u = (n - 1) * (left_out.mean() - left_out)
    spread = float(u.var())
    if spread == 0:
        return Margins(0.0, 0.0, 0.0, 0.0)
    squares, products = second_order_moments(second_order, u[rows])
    variance = max(spread / n - squares / (2 * n**2), spread / (2 * n))
    z = float(student.ppf((1 + LEVEL) / 2, n - 1))
    lean = z**2 * products / (n * spread)
    reach = math.sqrt(lean**2 + z**2 * variance)
    centred = u - u.median()
    share = float((u - u.mean()).square().max()) / (spread * (n - 1))
    return Margins((reach - lean) * widening(-centred), (reach + lean) * widening(centred), math.sqrt(variance), share)


def pair_rows(n: int) -> Tensor:
    """At most 500 row numbers, evenly spaced over n images."""
    p = min(n, PAIR_ROWS)
    return torch.arange(p) * n // p


def second_order_moments(q: Tensor, u: Tensor) -> tuple[float, float]:
    """E q^2 and E[u u' q] over pairs of different images, for q (p, p) after centring its rows and columns.

    The images with the largest E q^2 are left out: with heavy tails, q^2 has no mean, and the subtraction that it is
    used for must err on the small side.
    """
    q = off_diagonal_centred(q)
    size = q.square().sum(1)
    kept = size <= size.quantile(1 - TRIMMED)
    q, u = q[kept][:, kept], u[kept] - u[kept].mean()
    p = len(u)
    return float(q.square().sum()) / (p * (p - 1)), float(u @ q @ u) / (p * (p - 1))


def off_diagonal_centred(q: Tensor) -> Tensor:
    """q minus its row and column means over pairs of different images (U-centring), with a zero diagonal."""
    p = len(q)
    q = q - torch.diag(q.diagonal())
    row, total = q.sum(1) / (p - 2), q.sum() / ((p - 1) * (p - 2))
    q = q - row[:, None] - row + total
    return q - torch.diag(q.diagonal())


def widening(values: Tensor) -> float:
    """1 + 3 max(0, h - 0.3), h = mean log(v_(k) / v_(K)) over the K largest values (Hill 1975)."""
    k = max(2, int(TAIL * len(values)))
    largest = values.topk(k + 1).values
    if largest[-1] <= 0:
        return 1.0
    return 1 + WIDENING * max(0.0, float((largest[:-1] / largest[-1]).log().mean()) - LIGHT_TAIL)


def estimate(value: float, left_out: Tensor, second_order: Tensor, rows: Tensor) -> Estimate:
    """``value`` with the interval of its delete-one values (`margins`)."""
    found = margins(left_out, second_order, rows)
    return Estimate(value, None) if found is None else found.around(value)
