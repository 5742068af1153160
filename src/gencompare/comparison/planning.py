"""Power of a comparison: the differences that it can detect, and the seeds and images that a difference needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, inf, isfinite, log
from statistics import fmean, median

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, digamma, nctdtr, ndtr, polygamma, stdtrit

from gencompare.comparison import formatting
from gencompare.comparison.ranking import RankingTable, TableRow, badness, badness_of_seeds
from gencompare.comparison.run_costs import total_cost
from gencompare.comparison.statistics import CONFIDENCE_LEVEL, MIN_SEEDS, SIGNIFICANCE_LEVEL
from gencompare.errors import UserError
from gencompare.records import Metric

POWER = 0.8
MAX_SEEDS = 30
"""Largest number of seeds in a plan."""
MIN_IMAGES, MAX_IMAGES = 50, 50_000
"""Limits of the images of a seed in a plan. With fewer, the variance of a distance does not fall as 1 / n."""
IMAGES_STEP = 10
"""Numbers of images are rounded up to a multiple of this."""
QUADRATURE_POINTS = 12
"""Quantiles of the distribution of a row's variance over which power is averaged."""


# Power


@dataclass(frozen=True)
class Spread:
    r"""How the rows of a table vary between seeds, relative to their values.

    A row that is the mean of S seeds with n images each has the relative variance

    .. math:: \mathrm{Var} = \frac{1}{S} \left( \sigma^2 + \frac{\tau^2}{n} \right), \qquad
        \sigma^2 = \max\left(0,\; v - \frac{\tau^2}{n_0}\right), \qquad v \sim \frac{\nu\, s^2}{\chi^2_\nu},

    where :math:`v` is the variance between the seeds of one row at the pilot's number of images :math:`n_0`. Rows
    differ in it, and few seeds show little of it, so it has a distribution, over which power is averaged.
    """

    total: float
    """:math:`s^2`, the typical relative variance between seeds with ``num_images`` images each."""
    degrees_of_freedom: float
    r""":math:`\nu`: how well the variance of a row is known. Infinite if all rows have the same known variance."""
    per_image: float
    r""":math:`\tau^2`, n times the relative variance of sampling alone."""
    num_images: int
    """:math:`n_0`, the number of images of the pilot."""

    def variances(self, num_images: float) -> np.ndarray:
        """Return equally likely relative variances of one seed with ``num_images`` images, (QUADRATURE_POINTS,)."""
        v = np.array([self.total])
        if isfinite(self.degrees_of_freedom):
            tail = (np.arange(QUADRATURE_POINTS) + 0.5) / QUADRATURE_POINTS
            v = self.degrees_of_freedom * self.total / chdtri(self.degrees_of_freedom, tail)
        return np.maximum(v - self.per_image / self.num_images, 0) + self.per_image / num_images


def welch_power(
    difference: np.ndarray | float,
    variance_1: np.ndarray | float,
    variance_2: np.ndarray | float,
    num_seeds: int,
    level: float,
) -> np.ndarray:
    r"""Compute the power of Welch's two-sided t test of two rows with S seeds each.

    With :math:`v_i` the variance of one seed of row i, the statistic has approximately a noncentral t distribution
    with

    .. math:: \lambda = \frac{|\delta|}{\sqrt{(v_1 + v_2) / S}}, \qquad
        \nu = (S - 1) \frac{(v_1 + v_2)^2}{v_1^2 + v_2^2}.

    It is exact for equal :math:`v_i` up to the estimate of :math:`\nu`, and tends to the power of the z test as S grows
    (Johnson and Welch 1940, "Applications of the non-central t-distribution", Biometrika 31,
    https://doi.org/10.1093/biomet/31.3-4.362).

    Args:
        difference: :math:`\delta`, the difference of the expected values.
        variance_1, variance_2: variances of one seed, broadcast with ``difference``. If both are 0, every difference is
            detected.
        num_seeds: S, at least 2.
        level: the p value at which a difference is claimed.
    """
    v_1, v_2 = np.broadcast_arrays(np.asarray(variance_1, float), np.asarray(variance_2, float))
    total, delta = v_1 + v_2, np.abs(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        nu = np.where(total > 0, (num_seeds - 1) * total**2 / (v_1**2 + v_2**2), 2.0 * (num_seeds - 1))
        shift = np.where(total > 0, delta / np.sqrt(total / num_seeds), 0.0)
    limit = stdtrit(nu, 1 - level / 2)
    upper = 1 - nctdtr(nu, shift, limit)
    # SciPy returns NaN far from the limit, where the normal approximation of Abramowitz and Stegun, 26.7.10, will do.
    normal = ndtr((shift - limit * (1 - 1 / (4 * nu))) / np.sqrt(1 + limit**2 / (2 * nu)))
    upper = np.where(np.isnan(upper), normal, upper)
    lower = np.nan_to_num(nctdtr(nu, shift, -limit))  # NaN where this tail is negligible
    return np.where((total == 0) & (delta > 0), 1.0, upper + lower)


def expected_power(spread: Spread, difference: float, num_seeds: int, num_images: float, level: float) -> float:
    """Compute the power for two rows with the relative ``difference``, averaged over the variances of both rows."""
    v = spread.variances(num_images)
    return float(np.mean(welch_power(difference, v[:, None], v[None, :], num_seeds, level)))


def holm_level(
    spread: Spread, other_differences: np.ndarray, num_seeds: int, num_images: float, alpha: float = SIGNIFICANCE_LEVEL
) -> float:
    r"""Compute the p value at which Holm's correction claims one more difference.

    Of m pairs, Holm's correction claims a pair if its p value is at most :math:`\alpha / (m - r)`, where r pairs have
    smaller ones. With the power of the other pairs at this level, the expected r is the smallest solution of

    .. math:: r = \sum_k \mathrm{power}_k\left(\frac{\alpha}{m - r}\right).

    Args:
        spread: the variances of all rows.
        other_differences: relative differences of the other m - 1 pairs. Empty for two rows.
        num_seeds, num_images: seeds of each row, and images of each seed.
        alpha: the bound on the family-wise error rate.
    """
    m = len(other_differences) + 1
    v = float(np.median(spread.variances(num_images)))
    claimed = 0.0
    for _ in range(100):
        last, claimed = claimed, float(np.sum(welch_power(other_differences, v, v, num_seeds, alpha / (m - claimed))))
        if claimed - last < 0.01:
            break
    return alpha / (m - claimed)


def detectable_difference(spread: Spread, num_seeds: int, level: float, power: float = POWER) -> float:
    """Return the relative difference between two rows that is detected with ``power`` at the pilot's number of images.

    Args:
        spread: the variances of the rows.
        num_seeds: seeds of each row, at least 2.
        level: the p value at which the difference is claimed, such as alpha / m for one of m pairs.
        power: the expected power.
    """

    def missing(log_difference: float) -> float:
        return expected_power(spread, exp(log_difference), num_seeds, spread.num_images, level) - power

    low, high = log(1e-6), log(1e6)
    return 0.0 if missing(low) > 0 else inf if missing(high) < 0 else exp(_root(missing, low, high))


# Pilots


def table_spread(table: RankingTable) -> Spread | None:
    r"""Estimate how the ranked rows of a table vary between seeds. Return None if no row has two seeds that differ.

    The variance of each row is estimated with few degrees of freedom, so the rows are pooled on the log scale. With
    :math:`s_i^2` the variance of row i over its :math:`d_i + 1` seeds, relative to the square of its value,

    .. math::
        e_i &= \log s_i^2 - \psi(d_i / 2) + \log(d_i / 2) \\
        \psi'(\nu / 2) &= \max\left(0, \mathrm{var}(e) - \overline{\psi'(d / 2)}\right)
            + \max\left(\mathrm{var}(e), \overline{\psi'(d / 2)}\right) / R \\
        \log s^2 &= \bar e + \psi(\nu / 2) - \log(\nu / 2)

    for R rows: the first term is how much rows differ, as in Smyth (2004), "Linear models and empirical Bayes methods",
    section 6.2, https://doi.org/10.2202/1544-6115.1027, and the second the error of the mean of the :math:`e_i`, which
    matters for few rows.

    The variance of sampling is that of the intervals in the records, :math:`(\text{below} \cdot \text{above}) / z^2`
    with both margins of an interval (`gencompare.evaluation.metrics.intervals`), pooled in the same way. Without
    intervals, all variance counts as that of training.
    """
    errors, freedom, per_image = [], [], []
    for row in table.rows:
        values = _values(row)
        if values is None:
            continue
        mean = abs(fmean(values))
        variances = [
            variance
            for _, result in row.group.members
            if (variance := sampling_variance(result.metrics[table.primary_metric])) is not None
        ]
        if variances and mean:
            per_image.append(table.measurement.num_images * fmean(variances) / mean**2)
        if len(values) > 1 and mean and (variance := float(np.var(values, ddof=1))) > 0:
            half = (len(values) - 1) / 2
            errors.append(log(variance / mean**2) - digamma(half) + log(half))
            freedom.append(len(values) - 1)
    if not errors:
        return None
    noise = float(np.mean(polygamma(1, np.array(freedom) / 2)))
    scatter = float(np.var(errors, ddof=1)) if len(errors) > 1 else 0.0
    nu = 2 * _inverse_trigamma(max(0.0, scatter - noise) + max(scatter, noise) / len(errors))
    total = float(np.exp(np.mean(errors) + digamma(nu / 2) - log(nu / 2)))
    tau = float(np.exp(np.mean(np.log(per_image)))) if per_image else 0.0
    return Spread(total, nu, tau, table.measurement.num_images)


def _values(row: TableRow) -> list[float] | None:
    """Return the primary metric of each training seed, lower is better, or None for a row that is not tested."""
    values = row.group.values_by_seed(row.result.primary_metric) if row.rank is not None else None
    return values and badness_of_seeds(values, row.metric)


def sampling_variance(metric: Metric) -> float | None:
    """Return the squared standard error in the interval of one evaluation, or None if there is none."""
    if metric.interval is None or metric.value is None or not all(map(formatting.is_finite, metric.interval)):
        return None
    below, above = metric.value - metric.interval[0], metric.interval[1] - metric.value
    z = float(stdtrit(inf, (1 + CONFIDENCE_LEVEL) / 2))
    return below * above / z**2 if below > 0 and above > 0 else None


def _inverse_trigamma(y: float) -> float:
    """Solve the equation psi'(x) = y for x > 0."""
    return exp(_root(lambda log_x: float(polygamma(1, exp(log_x))) - y, -20, 40))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the zero of a function that changes its sign between ``low`` and ``high``."""
    return brentq(function, low, high)  # type: ignore[return-value]


def power_note(table: RankingTable) -> str:
    """Say which difference between two rows the table could have detected. Empty if no row has several seeds."""
    rows = [row for row in table.rows if _values(row) is not None]
    spread = table_spread(table)
    if len(rows) < 2 or spread is None:
        return ""
    seeds = int(median(len(row.group.seeds) for row in rows if len(row.group.seeds) > 1))
    pairs = len(rows) * (len(rows) - 1) // 2
    one, any_pair = (
        formatting.format_percent(detectable_difference(spread, seeds, SIGNIFICANCE_LEVEL / m)) for m in (1, pairs)
    )
    over_all = f" between two rows chosen beforehand, or {any_pair} over all {pairs} pairs," if pairs > 1 else ""
    return (
        f"With {seeds} seeds and {spread.num_images:,} images, a difference of {one}{over_all or ' between two rows'}"
        f" would be detected with {formatting.format_percent(POWER)} power."
    )


# Plans


@dataclass(frozen=True)
class Prices:
    """What the rows of a table cost in device seconds, summed over rows."""

    seed: float | None
    """Training of one seed of every row; None if it is unknown for a row."""
    image: float | None
    """Sampling and measuring one image of every row; None if it is unknown for a row."""

    @classmethod
    def of(cls, table: RankingTable) -> Prices:
        """Return the prices of the ranked rows, from their records."""
        rows = [row for row in table.rows if row.rank is not None]
        seeds = [total_cost(row.run.record)["device_seconds"] for row in rows]
        images = [_image_price(row) for row in rows]
        return cls(_sum(seeds), _sum(images))

    def cost(self, num_seeds: int, num_images: int) -> float | None:
        """Return the device seconds of all rows with these numbers of seeds and images."""
        if self.seed is None or self.image is None:
            return None
        return num_seeds * (self.seed + num_images * self.image)


def _image_price(row: TableRow) -> float | None:
    """Return the device seconds that sampling and measuring one image takes."""
    parts = [formatting.as_number(row.result.seconds.get(name)) for name in ("sampling", "metrics")]
    processes = formatting.as_number(row.run.record.training.get("processes")) or 1
    total = _sum(parts)
    return None if total is None else total * processes / row.result.measurement.num_images


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Plan:
    """One way to detect a difference."""

    num_seeds: int
    """Training seeds of each row."""
    num_images: int
    """Images of each seed."""
    power: float
    """Expected power."""
    cost: float | None
    """Device seconds of all rows, or None if a price is unknown."""


def plans(table: RankingTable, difference: float, power: float = POWER) -> list[Plan]:
    """Return the numbers of seeds and images with which the test of the page detects a difference, cheapest first.

    The test is Welch's with Holm's correction over all pairs of ranked rows (`adjusted_p_values`), with at least
    `MIN_SEEDS` seeds a row. The other pairs are assumed to differ as in the pilot. For each number of seeds, the plan
    has the fewest images with at least the expected ``power``. A plan with more seeds and no fewer images than another
    is left out.

    Args:
        table: the pilot.
        difference: the difference between two rows worth detecting, relative to the mean of both.
        power: the probability to detect it.

    Raises:
        UserError: ``difference`` or ``power`` is invalid, the pilot has no two seeds of a row that differ or no two
            ranked rows, or no plan is large enough.
    """
    if not (isfinite(difference) and difference > 0):
        raise UserError(f"task.difference={difference} must be positive: 0.2 is a difference of 20 % between two rows.")
    if not SIGNIFICANCE_LEVEL < power < 1:
        raise UserError(f"task.power={power} must lie between {SIGNIFICANCE_LEVEL} and 1, such as {POWER}.")
    spread = table_spread(table)
    values = [badness(row) for row in table.rows if _values(row) is not None]
    if len(values) < 2:
        raise UserError("A plan needs a pilot of at least two ranked rows: train another family, or widen runs=.")
    if spread is None:
        raise UserError(
            "The pilot does not show how training runs differ: a plan needs at least one row with two training seeds"
            " whose values differ. Train one with seed=1, or widen runs=."
        )
    others = _other_differences(values, difference)
    prices, found, most = Prices.of(table), [], MAX_IMAGES
    for num_seeds in range(MIN_SEEDS, MAX_SEEDS + 1):
        num_images = _fewest_images(spread, others, difference, num_seeds, power, most)
        if num_images is None:
            continue
        most = num_images - IMAGES_STEP
        level = holm_level(spread, others, num_seeds, num_images)
        reached = expected_power(spread, difference, num_seeds, num_images, level)
        found.append(Plan(num_seeds, num_images, reached, prices.cost(num_seeds, num_images)))
        if most < MIN_IMAGES:
            break
    if not found:
        level = holm_level(spread, others, MAX_SEEDS, MAX_IMAGES)
        reached = expected_power(spread, difference, MAX_SEEDS, MAX_IMAGES, level)
        raise UserError(
            f"No plan of at most {MAX_SEEDS} seeds and {MAX_IMAGES:,} images detects a difference of"
            f" {formatting.format_percent(difference)} with {formatting.format_percent(power)} power; the largest has"
            f" {formatting.format_percent(reached)}. Plan for a larger task.difference."
        )
    return sorted(found, key=lambda plan: (plan.cost or 0.0, plan.num_seeds))


def _other_differences(values: Sequence[float], difference: float) -> np.ndarray:
    """Return the relative differences of all pairs of rows except the one whose difference is closest to
    ``difference``, which stands for the pair to detect."""
    differences = sorted(
        (2 * abs(a - b) / abs(a + b) if a + b else 0.0 for a, b in combinations(values, 2)),
        key=lambda other: abs(other - difference),
    )
    return np.array(differences[1:])


def _fewest_images(
    spread: Spread, others: np.ndarray, difference: float, num_seeds: int, power: float, most: int
) -> int | None:
    """Return the fewest images, a multiple of `IMAGES_STEP`, with at least ``power``; None if ``most`` are too few."""

    def is_enough(steps: int) -> bool:
        num_images = steps * IMAGES_STEP
        level = holm_level(spread, others, num_seeds, num_images)
        return expected_power(spread, difference, num_seeds, num_images, level) >= power

    low, high = MIN_IMAGES // IMAGES_STEP, most // IMAGES_STEP
    if not is_enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low * IMAGES_STEP
