"""Evaluations that stop by themselves: confidence sequences over chunks of samples, valid at all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import Tensor

from gencompare.evaluation.metrics.intervals import LEVEL, Estimate, student_estimate
from gencompare.evaluation.metrics.kernel import KernelReference, KernelSums, scaled

FIRST_LOOK = 0.25
"""Share of all samples at the first look."""
EARLY_SHARE = 0.95
"""Share of the error probability that a comparison spends at its first look."""
GRID_CELLS = 1000
"""Cells of the grid of the density in `levels`."""


def looks(num_images: int, chunk_size: int) -> list[int]:
    """Return the numbers of samples at which an evaluation of ``num_images`` may stop: after every chunk from a quarter
    of the samples on, the last of which is ``num_images``."""
    ends = [*range(chunk_size, num_images, chunk_size), num_images]
    return [n for n in ends if n >= FIRST_LOOK * num_images]


def early_spending(shares: Sequence[float]) -> tuple[float, ...]:
    """Spend `EARLY_SHARE` of the error at the first look, and the rest in proportion to the samples.

    For a comparison of two models: the first look, at a quarter of the samples, is almost a test of its own, so a clear
    difference costs a quarter of the samples. In exchange, a difference that is not seen there must be larger than in a
    test of all samples. The power of both is in docs/evaluation.md.
    """
    if len(shares) == 1:
        return (1.0,)
    return tuple(EARLY_SHARE + (1 - EARLY_SHARE) * (t - shares[0]) / (shares[-1] - shares[0]) for t in shares)


def even_spending(shares: Sequence[float]) -> tuple[float, ...]:
    """Spend the error in proportion to the samples, as for an interval that may be read at any look (Lan and DeMets
    1983, "Discrete sequential boundaries for clinical trials", Biometrika 70,
    https://doi.org/10.1093/biomet/70.3.659)."""
    return tuple(shares)


@cache
def levels(shares: tuple[float, ...], spent: tuple[float, ...]) -> list[float]:
    r"""Compute the confidence level of each look, such that intervals at all looks cover together with 95 %.

    The standardised error of a mean at the share :math:`t_k` of the samples is :math:`W(t_k) / \sqrt{t_k}` for a Wiener
    process W, if n is large. The critical values :math:`c_k` solve

    .. math:: P\left(\exists\, j \le k:\; |W(t_j)| > c_j \sqrt{t_j}\right) = \alpha f_k, \qquad \alpha = 0.05,

    by integrating the density of :math:`W(t_k)` on the paths that have stayed inside (Armitage, McPherson and Rowe
    1969, "Repeated significance tests on accumulating data", https://doi.org/10.2307/2343787; Lan and DeMets 1983).
    The level is :math:`2 \Phi(c_k) - 1`. The horizon must be known beforehand.

    Args:
        shares: :math:`t_k`, increasing, the last is 1.
        spent: :math:`f_k`, the share of :math:`\alpha` spent up to each look, increasing to 1.
    """
    alpha, found = 1 - LEVEL, []
    grid, mass = np.zeros(1), np.ones(1)  # W(0) = 0
    last_share, last_spent = 0.0, 0.0
    for share, total in zip(shares, spent, strict=True):
        scale = (share - last_share) ** 0.5
        limit = _limit(grid, mass, scale, alpha * (total - last_spent))
        found.append(1 - 2 * float(ndtr(-limit / share**0.5)))
        edges = np.linspace(-limit, limit, GRID_CELLS + 1)
        mass = np.diff(ndtr((edges[:, None] - grid[None, :]) / scale), axis=0) @ mass
        grid = (edges[1:] + edges[:-1]) / 2
        last_share, last_spent = share, total
    return found


def _limit(grid: np.ndarray, mass: np.ndarray, scale: float, probability: float) -> float:
    """Return the limit that a path at ``grid`` with probabilities ``mass`` exceeds, on either side, with
    ``probability`` after a normal step with standard deviation ``scale``."""

    def excess(limit: float) -> float:
        return float(mass @ (ndtr((-limit - grid) / scale) + ndtr((grid - limit) / scale))) - probability

    return brentq(excess, 0, float(np.abs(grid).max()) + 40 * scale, xtol=1e-10)  # type: ignore[return-value]


@dataclass(frozen=True)
class Look:
    """What is known after some of the samples."""

    num_images: int
    estimate: Estimate
    """The value and its interval. The intervals of all looks hold together with 95 %."""

    def half_width(self) -> float:
        """Return half the width of the interval."""
        low, high = self.estimate.interval or (-np.inf, np.inf)
        return (high - low) / 2


Draw = Callable[[int], Tensor]
"""Returns the features of the first n samples, (n, d), or another value of each."""


def distance_looks(draw: Draw, reference: KernelReference, num_images: int, chunk_size: int) -> Iterator[Look]:
    """Yield the kernel distance of one model after each look, with intervals that hold at all looks together.

    Args:
        draw: the features of the model.
        reference: the reference, fixed.
        num_images: number of samples at the last look.
        chunk_size: number of samples between two looks.
    """
    sums, ends = KernelSums(reference), looks(num_images, chunk_size)
    shares = tuple(n / num_images for n in ends)
    for n, level in zip(ends, levels(shares, even_spending(shares)), strict=True):
        sums.add(draw(n)[len(sums) :])
        yield Look(n, scaled(sums.distance(level)))


def difference_looks(
    draw_a: Draw, draw_b: Draw, reference: KernelReference, num_images: int, chunk_size: int
) -> Iterator[Look]:
    """Yield the kernel distance of model a minus that of model b after each look (`KernelSums.difference`).

    A caller that stops when the sign is known claims a wrong sign with a probability of at most 5 %, however often it
    looks. The arguments are those of `distance_looks`.
    """
    a, b, ends = KernelSums(reference), KernelSums(reference), looks(num_images, chunk_size)
    shares = tuple(n / num_images for n in ends)
    for n, level in zip(ends, levels(shares, early_spending(shares)), strict=True):
        a.add(draw_a(n)[len(a) :])
        b.add(draw_b(n)[len(b) :])
        yield Look(n, scaled(a.difference(b, level)))


def mean_looks(draw: Draw, num_images: int, chunk_size: int) -> Iterator[Look]:
    """Yield the mean of paired differences, such as bits/dim of two models on the same images, after each look.

    Args:
        draw: returns the first n differences, (n,), in random order.
        num_images: number of differences at the last look.
        chunk_size: number of differences between two looks.
    """
    ends = looks(num_images, chunk_size)
    shares = tuple(n / num_images for n in ends)
    for n, level in zip(ends, levels(shares, early_spending(shares)), strict=True):
        yield Look(n, mean_estimate(draw(n), level))


def mean_estimate(values: Tensor, level: float = LEVEL) -> Estimate:
    """Return the mean of ``values`` (n,) with its Student interval."""
    values = values.double()
    return student_estimate(float(values.mean()), float(values.std() / len(values) ** 0.5), len(values), level)


def first_look(found: Iterator[Look], is_enough: Callable[[Look], bool]) -> Look:
    """Return the first look that ``is_enough``, or the last."""
    look = next(found)
    while not is_enough(look) and (following := next(found, None)) is not None:
        look = following
    return look


def sign_is_known(look: Look) -> bool:
    """Return whether the interval of a look excludes 0."""
    interval = look.estimate.interval
    return interval is not None and (interval[0] > 0 or interval[1] < 0)
