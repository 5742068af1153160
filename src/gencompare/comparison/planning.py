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
from gencompare.comparison.ranking import RankingTable, TableRow, badness, badness_of_seeds, short_names
from gencompare.comparison.run_costs import total_cost
from gencompare.comparison.statistics import MIN_SEEDS, SIGNIFICANCE_LEVEL, sampling_variance
from gencompare.errors import UserError

POWER = 0.8
MAX_SEEDS = 30
"""Largest number of seeds in a plan."""
MIN_IMAGES, MAX_IMAGES = 50, 50_000
"""Limits of the images of a seed in a plan. With fewer, the variance of a distance does not fall as 1 / n."""
IMAGES_STEP = 10
"""Numbers of images are rounded up to a multiple of this."""
LATTICE = np.arange(13) * 8 % 13
"""Fibonacci lattice: the points (k, LATTICE[k]) cover the square of the quantiles of two variances evenly."""
MAX_PAIRS = 500
"""Largest number of pairs of rows over which power is averaged. Of more, evenly spaced ones are used."""


# Power


@dataclass(frozen=True)
class Spread:
    r"""How a row varies between seeds, relative to its value.

    The mean of S seeds with n images each has the relative variance

    .. math:: \mathrm{Var} = \frac{1}{S} \left( \sigma^2 + \frac{\tau^2}{n} \right), \qquad
        \sigma^2 = \max\left(0,\; v - \frac{\tau^2}{n_0}\right), \qquad v \sim \frac{\nu\, s^2}{\chi^2_\nu},

    where :math:`v` is the variance between seeds at the pilot's number of images :math:`n_0`. Few seeds show little of
    it, so it has a distribution, over which power is averaged.
    """

    name: str
    """Title of the row."""
    total: float
    """:math:`s^2`, the estimated relative variance between seeds with ``num_images`` images each."""
    degrees_of_freedom: float
    r""":math:`\nu`: how well the variance is known. Infinite if it is known exactly."""
    per_image: float
    r""":math:`\tau^2`, n times the relative variance of sampling alone."""
    num_images: int
    """:math:`n_0`, the number of images of the pilot."""

    def variances(self, num_images: float) -> np.ndarray:
        """Return equally likely relative variances of one seed with ``num_images`` images, (len(LATTICE),)."""
        v = np.full(len(LATTICE), self.total)
        if isfinite(self.degrees_of_freedom):
            tail = (np.arange(len(LATTICE)) + 0.5) / len(LATTICE)
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


def pair_powers(
    spreads: Sequence[Spread], difference: float, num_seeds: int, num_images: float, level: float
) -> list[tuple[float, str, str]]:
    """Compute the power for pairs of rows with the relative ``difference``, averaged over the variances of both rows.

    Args:
        spreads: the variances of at least two rows.
        difference: the difference of the rows of a pair.
        num_seeds, num_images: seeds of each row, and images of each seed.
        level: the p value at which a difference is claimed.

    Returns:
        The power of each pair, and the names of its rows. Of more than `MAX_PAIRS` pairs, evenly spaced ones are used.
    """
    i, j = np.triu_indices(len(spreads), 1)
    i, j = (index[:: 1 + (len(index) - 1) // MAX_PAIRS] for index in (i, j))
    v = np.stack([spread.variances(num_images) for spread in spreads])
    powers = welch_power(difference, v[i], v[j][:, LATTICE], num_seeds, level).mean(1)
    return [(float(power), spreads[a].name, spreads[b].name) for power, a, b in zip(powers, i, j, strict=True)]


def expected_power(
    spreads: Sequence[Spread], difference: float, num_seeds: int, num_images: float, level: float
) -> float:
    """Compute the mean of `pair_powers`, the power for a random pair of rows."""
    return fmean(power for power, *_ in pair_powers(spreads, difference, num_seeds, num_images, level))


def holm_level(
    spreads: Sequence[Spread],
    differences: np.ndarray,
    num_seeds: int,
    num_images: float,
    alpha: float = SIGNIFICANCE_LEVEL,
) -> float:
    r"""Compute the p value at which Holm's correction claims one more difference.

    Of m pairs, Holm's correction claims a pair if its p value is at most :math:`\alpha / (m - r)`, where r pairs have
    smaller ones. The expected r is the smallest solution of

    .. math:: r = \sum_k \mathrm{power}_k\left(\frac{\alpha}{m - r}\right).

    It neglects that r varies. Where many other pairs have medium power, the true power is lower, by 0.08 in one
    simulation of ``tests/test_planning.py``.

    Args:
        spreads: the variances of the rows.
        differences: relative differences of all m pairs, in the order of ``numpy.triu_indices``; NaN for the pair whose
            level is computed, which does not count as claimed.
        num_seeds, num_images: seeds of each row, and images of each seed.
        alpha: the bound on the family-wise error rate.
    """
    m = len(differences)
    i, j = np.triu_indices(len(spreads), 1)
    v = np.array([np.median(spread.variances(num_images)) for spread in spreads])
    claimed = 0.0
    for _ in range(100):
        power = welch_power(differences, v[i], v[j], num_seeds, alpha / (m - claimed))
        last, claimed = claimed, float(np.nansum(power))
        if claimed - last < 0.01:
            break
    return alpha / (m - claimed)


def detectable_difference(spreads: Sequence[Spread], num_seeds: int, level: float, power: float = POWER) -> float:
    """Return the relative difference between two rows that is detected with ``power`` at the pilot's number of images.

    Args:
        spreads: the variances of the rows.
        num_seeds: seeds of each row, at least 2.
        level: the p value at which the difference is claimed, such as alpha / m for one of m pairs.
        power: the expected power.
    """

    def missing(log_difference: float) -> float:
        return expected_power(spreads, exp(log_difference), num_seeds, spreads[0].num_images, level) - power

    low, high = log(1e-6), log(1e6)
    return 0.0 if missing(low) > 0 else inf if missing(high) < 0 else exp(_root(missing, low, high))


# Pilots


def row_spreads(table: RankingTable) -> list[Spread]:
    r"""Estimate how each ranked row of a table varies between seeds. Return [] if no row has two seeds that differ.

    The variance between seeds is that of `moderated_variances`. The variance of sampling is that of the intervals of
    the row's records (`sampling_variance`), and of a typical row if it has none. Without any intervals, all variance
    counts as that of training.
    """
    n = table.measurement.num_images
    tested = [(row, values) for row in table.rows if (values := _values(row)) and fmean(values)]
    rows = [row for row, _ in tested]
    mean = np.array([fmean(values) for _, values in tested])
    squared = np.array([np.var(values, ddof=1) if len(values) > 1 else 0.0 for _, values in tested]) / mean**2
    freedom = np.array([len(values) - 1 for _, values in tested]) * (squared > 0)
    if not freedom.any():
        return []
    sampling = np.array([_sampling_variance(row) for row in rows]) / mean**2
    known = sampling > 0
    sampling[~known] = exp(np.log(sampling[known]).mean()) if known.any() else 0.0
    total, freedom = moderated_variances(squared, freedom, sampling)
    return [Spread(*each, n) for each in zip(short_names(rows), total, freedom, sampling * n, strict=True)]


def moderated_variances(
    squared: np.ndarray, freedom: np.ndarray, sampling: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Estimate the variance of each row from its few seeds and from the other rows.

    The variance :math:`s_i^2` over the seeds of row i has :math:`d_i` degrees of freedom. It is shrunk towards that of
    a row with its variance of sampling :math:`u_i` and the typical variance of training :math:`\sigma_0^2`:

    .. math::
        \tilde s_i^2 &= \frac{\nu_0 (\sigma_0^2 + u_i) + d_i s_i^2}{\nu_0 + d_i} \\
        e_i &= \log \frac{s_i^2}{\sigma_0^2 + u_i} - f(d_i / 2) + f(\nu_0 / 2), \qquad f(x) = \psi(x) - \log x \\
        \psi'(\nu_0 / 2) &= \max\left(0, \mathrm{var}(e) - \overline{\psi'(d / 2)}\right)
            + \max\left(\mathrm{var}(e), \overline{\psi'(d / 2)}\right) / R

    for R rows with :math:`d_i > 0`, with :math:`\sigma_0^2 \ge 0` such that :math:`\bar e = 0`, or 0 if
    :math:`\bar e < 0` for all. The first term of :math:`\psi'(\nu_0 / 2)` is how much rows differ, and the second the
    error of :math:`\bar e`, which matters for few rows. These are the moderated variances of Smyth (2004), "Linear
    models and empirical Bayes methods", sections 3 and 6.2, https://doi.org/10.2202/1544-6115.1027, whose prior has no
    :math:`u_i` and no error of the mean.

    Args:
        squared: :math:`s_i^2`, (rows,).
        freedom: :math:`d_i`, (rows,). Rows with 0 have the variance of the prior; at least one is positive.
        sampling: :math:`u_i`, (rows,).

    Returns:
        :math:`\tilde s_i^2` and :math:`\nu_0 + d_i`, each (rows,).
    """
    used = freedom > 0
    half = freedom[used] / 2
    noise = float(polygamma(1, half).mean())

    def prior(training: float) -> tuple[float, float]:
        """Return the mean of e, and nu_0."""
        e = np.log(squared[used] / (training + sampling[used])) - digamma(half) + np.log(half)
        scatter = float(np.var(e, ddof=1)) if len(e) > 1 else 0.0
        nu = 2 * _inverse_trigamma(max(0.0, scatter - noise) + max(scatter, noise) / len(e))
        return float(e.mean() + digamma(nu / 2) - log(nu / 2)), nu

    low, high = float(squared[used].min()) * 1e-6, float(squared.max()) * 1e6
    training = exp(_root(lambda x: prior(exp(x))[0], log(low), log(high))) if prior(low)[0] > 0 else 0.0
    nu = prior(training or low)[1]
    return (nu * (training + sampling) + freedom * squared) / (nu + freedom), nu + freedom


def _values(row: TableRow) -> list[float] | None:
    """Return the primary metric of each training seed, lower is better, or None for a row that is not tested."""
    values = row.group.values_by_seed(row.result.primary_metric) if row.rank is not None else None
    return values and badness_of_seeds(values, row.metric)


def _sampling_variance(row: TableRow) -> float:
    """Return the mean squared standard error in the intervals of a row's evaluations, or 0 if there are none."""
    metrics = (result.metrics[row.result.primary_metric] for _, result in row.group.members)
    known = [variance for metric in metrics if (variance := sampling_variance(metric)) is not None]
    return fmean(known) if known else 0.0


def _inverse_trigamma(y: float) -> float:
    """Solve the equation psi'(x) = y for x > 0."""
    return exp(_root(lambda log_x: float(polygamma(1, exp(log_x))) - y, -20, 40))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the zero of a function that changes its sign between ``low`` and ``high``."""
    return brentq(function, low, high)  # type: ignore[return-value]


def power_note(table: RankingTable) -> str:
    """Say which difference between two rows the table could have detected. Empty if no row has several seeds."""
    spreads = row_spreads(table)
    if len(spreads) < 2:
        return ""
    tested = [row.group.seeds for row in table.rows if _values(row) is not None]
    seeds = int(median(len(each) for each in tested if len(each) > 1))
    pairs = len(spreads) * (len(spreads) - 1) // 2
    one, any_pair = (
        formatting.format_percent(detectable_difference(spreads, seeds, SIGNIFICANCE_LEVEL / m)) for m in (1, pairs)
    )
    over_all = f" chosen beforehand, or {any_pair} over all {pairs} pairs," if pairs > 1 else ""
    return (
        f"With {seeds} seeds and {spreads[0].num_images:,} images, a difference of {one} between two rows{over_all}"
        f" would be detected with {formatting.format_percent(POWER)} power on average over pairs."
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
    powers: list[tuple[float, str, str]]
    """The expected power of each pair of rows, and their names (`pair_powers`)."""
    cost: float | None
    """Device seconds of all rows, or None if a price is unknown."""

    @property
    def power(self) -> float:
        """Expected power, the mean over pairs of rows."""
        return fmean(power for power, *_ in self.powers)


def plans(table: RankingTable, difference: float, power: float = POWER) -> list[Plan]:
    """Return the numbers of seeds and images with which the test of the page detects a difference, cheapest first.

    The test is Welch's with Holm's correction over all pairs of ranked rows (`adjusted_p_values`), with at least
    `MIN_SEEDS` seeds a row. The other pairs are assumed to differ as in the pilot. For each number of seeds, the plan
    has the fewest images with at least the expected ``power``. Plans with more seeds than another are left out if they
    have no fewer images, or cost more than the cheapest for any number of images.

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
    tested = [row for row in table.rows if _values(row) is not None]
    if len(tested) < 2:
        raise UserError("A plan needs a pilot of at least two ranked rows: train another family, or widen runs=.")
    spreads = row_spreads(table)
    if len(spreads) < 2:
        raise UserError(
            "The pilot does not show how training runs differ: a plan needs at least one row with two training seeds"
            " whose values differ. Train one with seed=1, or widen runs=."
        )
    others = _other_differences([badness(row) for row in tested if badness(row)], difference)

    def reached(num_seeds: int, num_images: int) -> float:
        level = holm_level(spreads, others, num_seeds, num_images)
        return expected_power(spreads, difference, num_seeds, num_images, level)

    prices, found, most = Prices.of(table), [], MAX_IMAGES
    for num_seeds in range(MIN_SEEDS, MAX_SEEDS + 1):
        if (least := prices.cost(num_seeds, MIN_IMAGES)) and any(plan.cost and plan.cost < least for plan in found):
            break
        num_images = _fewest_images(lambda n, s=num_seeds: reached(s, n) >= power, most)
        if num_images is None:
            continue
        most = num_images - IMAGES_STEP
        level = holm_level(spreads, others, num_seeds, num_images)
        powers = pair_powers(spreads, difference, num_seeds, num_images, level)
        found.append(Plan(num_seeds, num_images, powers, prices.cost(num_seeds, num_images)))
        if most < MIN_IMAGES:
            break
    if not found:
        raise UserError(
            f"No plan of at most {MAX_SEEDS} seeds and {MAX_IMAGES:,} images detects a difference of"
            f" {formatting.format_percent(difference)} with {formatting.format_percent(power)} power; the largest has"
            f" {formatting.format_percent(reached(MAX_SEEDS, MAX_IMAGES))}. Plan for a larger task.difference."
        )
    return sorted(found, key=lambda plan: (plan.cost or 0.0, plan.num_seeds))


def _other_differences(values: Sequence[float], difference: float) -> np.ndarray:
    """Return the relative differences of all pairs of rows, NaN for the one that is closest to ``difference``,
    which stands for the pair to detect."""
    pairs = combinations(values, 2)
    differences = np.array([2 * abs(a - b) / abs(a + b) if a + b else 0.0 for a, b in pairs])
    differences[np.abs(differences - difference).argmin()] = np.nan
    return differences


def _fewest_images(is_enough: Callable[[int], bool], most: int) -> int | None:
    """Return the fewest images, a multiple of `IMAGES_STEP`, that are enough; None if ``most`` are too few."""
    low, high = MIN_IMAGES // IMAGES_STEP, most // IMAGES_STEP
    if not is_enough(high * IMAGES_STEP):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle * IMAGES_STEP) else (middle + 1, high)
    return low * IMAGES_STEP
