"""Is the difference between two rows more than the luck of training? Welch's t test, with Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

LEVEL = 0.05
"""The chance of calling any two equal rows of a table different is at most this."""

LEAST_SEEDS = 5
"""With fewer training seeds on either side nothing is tested: a t test of three against three misses most
differences of one standard deviation or two, and its level hangs on a normality that nobody can check."""


@dataclass(frozen=True)
class Verdict:
    """What the training seeds say of one row against the best row that was tested."""

    reference: int
    """Rank of the row that this one was tested against."""
    p: float | None
    """Holm's p value, (0, 1); None for that row itself."""

    @property
    def apart(self) -> bool:
        """Whether the two rows are told apart at `LEVEL`."""
        return self.p is not None and self.p <= LEVEL


def verdicts(samples: Sequence[Sequence[float] | None]) -> list[float | None]:
    """Holm's p value of each sample against the first one that can be tested; None where nothing is claimed.

    Args:
        samples: one a row, best row first: its figure for each training seed (the mean over sampling seeds within
            it); None, or fewer than `LEAST_SEEDS`, for a row that takes no part.

    Returns:
        A p value for each sample; None for those that take no part and for the first one that does.

    The best row is known from the same figures that are tested, and the luckiest of many equal rows looks better than
    most. Correcting for the comparisons with it alone would therefore claim too much. So *every* pair of rows is
    tested, and Holm's correction runs over all of them: then no choice of pairs, made before or after looking, has more
    than a chance of `LEVEL` of a wrong claim. What is returned are the pairs that a reader asks about: each row against
    the best.

    Rows are taken to be independent. Rows that share their trainings (two samplers of one checkpoint), or the seeds of
    their noise, rise and fall together; their test is cautious.
    """
    taking_part = [k for k, sample in enumerate(samples) if sample is not None and len(sample) >= LEAST_SEEDS]
    found: list[float | None] = [None] * len(samples)
    if len(taking_part) < 2:
        return found
    chosen = [samples[k] or () for k in taking_part]
    mean = np.array([np.mean(sample) for sample in chosen])
    error = np.array([np.var(sample, ddof=1) / len(sample) for sample in chosen])
    seeds = np.array([len(sample) for sample in chosen])
    one, two = np.triu_indices(len(chosen), k=1)
    p = holm(welch(mean[one], error[one], seeds[one], mean[two], error[two], seeds[two]))
    for k, value in zip(taking_part[1:], p[: len(chosen) - 1], strict=True):  # pairs (0, 1), (0, 2), ... come first
        found[k] = float(value)
    return found


def welch(
    mean_1: np.ndarray, error_1: np.ndarray, n_1: np.ndarray, mean_2: np.ndarray, error_2: np.ndarray, n_2: np.ndarray
) -> np.ndarray:
    r"""Two-sided p values of Welch's t test, any shape: equal means, whatever the two variances are.

        t = (m_1 - m_2) / sqrt(e_1 + e_2),   e_i = s_i^2 / n_i,
        degrees of freedom = (e_1 + e_2)^2 / (e_1^2 / (n_1 - 1) + e_2^2 / (n_2 - 1))

    Welch (1947), "The generalization of Student's problem when several different population variances are involved".
    Figures of families scatter differently from seed to seed, so no common variance is assumed. Without any scatter
    p is 1 for equal means and 0 for others, the limit of the test.

    Args: means, squared standard errors e_i, and numbers n_i of observations, each at least 2.
    """
    total = error_1 + error_2
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(mean_1 - mean_2) / np.sqrt(total)
        freedom = total**2 / (error_1**2 / (n_1 - 1) + error_2**2 / (n_2 - 1))
        p = 2 * stdtr(freedom, -t)
    return np.where(total > 0, p, np.where(mean_1 == mean_2, 1.0, 0.0))


def holm(p: np.ndarray) -> np.ndarray:
    r"""Holm's step-down p values (m,), in the order of ``p``.

    With p_(1) <= ... <= p_(m) the adjusted ones are max over i <= j of min(1, (m - i + 1) p_(i)). Rejecting those at or
    below a level a keeps the chance of any wrong rejection at a or below, whatever the dependence.

    Holm (1979), "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
    """
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted
