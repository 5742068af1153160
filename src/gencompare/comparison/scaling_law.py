"""Scaling laws of several families, fitted to short runs together, and predictions of longer runs with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from gencompare.errors import UserError

LEVEL = 0.9
"""Probability that the interval of a prediction contains the value of one new training run."""
MIN_BUDGETS = 3
"""Budgets that a family needs: two show no drift of the exponent."""
SAME_BUDGET = 0.05
"""Relative difference of FLOPs up to which two runs have the same budget."""
RATIOS = np.geomspace(0.03, 1e3, 16)
r"""Grid of :math:`\tau`, :math:`\kappa_f` and their scale s. Below, a term is invisible in the noise; above, the noise
in the term."""
DRIFT = 5.0
"""Scale of the prior of s."""
MIN_NOISE = 1e-3
"""Smallest estimate of the noise: runs that agree better are copies."""
NUM_SIGMAS = 25
"""Points of the grid of the noise."""


@dataclass(frozen=True)
class ShortRun:
    """What a scaling law uses of one run."""

    name: str
    family: str
    seed: int
    flops: float
    """Training FLOPs, including those of the runs that its model depends on."""
    error: float
    """The metric, lower is better, with 0 as its limit. Positive."""
    sampling_variance: float = 0.0
    """Variance of sampling alone, relative to the square of ``error``."""


@dataclass(frozen=True)
class Prediction:
    """The median and the central interval of the error of one new run."""

    median: float
    low: float
    high: float


class ScalingLaw:
    r"""A power law of the error against training FLOPs for each family, with an exponent that drifts.

    With the error q of a run, C its FLOPs and :math:`C_f` those of the cheapest run of its family f,

    .. math::
        \log q &= a_f + b_f\, t + \sigma \kappa_f \int_0^t W_f(u)\, du + \sigma \varepsilon, \qquad
            t = \frac{\log(C / C_f)}{L}, \qquad \varepsilon \sim N(0, 1), \\
        b_f &\sim N(\beta, \sigma^2 \tau^2),

    where :math:`W_f` is a Wiener process and L the logarithm of the ratio of the largest to the smallest budget (the
    median over families). Without the drift it is the power law of Kaplan et al. (2020), "Scaling laws for neural
    language models", section 1.2, https://arxiv.org/abs/2001.08361. A constant is added,
    :math:`q_\infty + a C^{-b}`, by Henighan et al. (2020), "Scaling laws for autoregressive generative modeling",
    eq. 1.1, https://arxiv.org/abs/2010.14701, and by Hoffmann et al. (2022), "Training compute-optimal large language
    models", eq. 2, https://arxiv.org/abs/2203.15556. Three or four budgets within a factor of four do not determine it:
    the exponent and the constant trade off. Early in training the exponent also changes the other way, since curves
    steepen as models leave their initial plateau. A parabola describes that and extrapolates it without end. The
    integrated Wiener process, the prior of cubic smoothing splines (Wahba 1978, "Improper priors, spline smoothing and
    the problem of guarding against model errors in regression", https://doi.org/10.1111/j.2517-6161.1978.tb01050.x),
    continues with the last exponent, and the variance of its error grows with the third power of the distance.

    A family has its own exponents as far as its runs support them, and otherwise the mean of the others: :math:`\beta`
    is estimated for each family by the mean of the slopes of the F - 1 others, whose variance
    :math:`\sigma^2 \tau^2 / (F - 1)` is added. A single family has a flat prior. Each family drifts as much as its
    runs show and the other families suggest, so one whose curve breaks gets a wide interval, and the others do not.

    Priors are flat for :math:`a_f` and :math:`\log\sigma`; half-Cauchy of scale 1 for :math:`\tau`, of scale s for
    :math:`\kappa_f`, and of scale 5 for s. Everything is averaged over the posterior on a grid of :math:`\sigma`,
    :math:`\tau`, s and :math:`\kappa_f`. Units of FLOPs and of the error change nothing but the units of the
    prediction.

    A better run is measured less precisely. To first order, the variance of an estimated squared distance is
    proportional to the distance, so the relative variance of sampling is taken as proportional to 1 / q, and its excess
    over that of the short runs is added to the variance of the prediction.

    Args:
        runs: runs with at least `MIN_BUDGETS` budgets of each family.

    Raises:
        UserError: a family has too few budgets, or an error or a cost is not positive.
    """

    def __init__(self, runs: Sequence[ShortRun]) -> None:
        self.runs: dict[str, list[ShortRun]] = {}
        for run in runs:
            self.runs.setdefault(run.family, []).append(run)
        for family, members in self.runs.items():
            _check(family, members)
        self._start = {family: log(min(run.flops for run in members)) for family, members in self.runs.items()}
        spans = [log(self.range(family)[1]) - self._start[family] for family in self.runs]
        self._unit = float(np.median(spans))
        self._fit()

    def range(self, family: str) -> tuple[float, float]:
        """Return the smallest and the largest cost of the runs of ``family``."""
        costs = [run.flops for run in self.runs[family]]
        return min(costs), max(costs)

    def _fit(self) -> None:
        """Compute the posterior of the grid: sigma (R,), tau (T,), s (S,), and kappa (K,) of each family."""
        cells = {family: self._cells(family) for family in self.runs}
        self._sigma = _noise_grid(self.runs, cells)
        self._fits = {family: self._family_fit(family, cells) for family in self.runs}
        # p(kappa | s), p(tau) and p(s) on grids that are even in the logarithm
        drift = RATIOS[:, None] / (1 + (RATIOS[:, None] / RATIOS) ** 2)
        self._log_drift = np.log(drift / drift.sum(0))  # (K, S)
        log_prior = np.log(RATIOS / (1 + RATIOS**2))[:, None] + np.log(RATIOS / (1 + (RATIOS / DRIFT) ** 2))
        df = sum(map(len, self.runs.values())) - sum(len(count) for _, _, count, _ in cells.values())
        squares = sum(within for *_, within in cells.values())
        within = -df * np.log(self._sigma) - squares / (2 * self._sigma**2)
        marginal = {
            family: np.logaddexp.reduce(fit.log_likelihood[:, :, None, :] + self._log_drift[:, :, None], 1)
            for family, fit in self._fits.items()
        }  # (T, S, R)
        self._log_shared = log_prior[..., None] + within + sum(marginal.values())
        self._marginal = marginal

    def _family_fit(self, family: str, cells: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]]) -> _Fit:
        """Fit a family's intercept, and its slope if there is no other family, at each tau and kappa."""
        t, y, count, _ = cells[family]
        others = [np.polyfit(*cells[other][:2], 1)[0] for other in self.runs if other != family]
        prior = (1 + 1 / len(others)) if others else 0.0
        tau, kappa = (grid[..., None, None] ** 2 for grid in np.meshgrid(RATIOS, RATIOS, indexing="ij"))
        design = np.column_stack([np.ones_like(t), *([] if others else [t])])
        y = y - (np.mean(others) * t if others else 0.0)
        inverse = np.linalg.inv(np.diag(1 / count) + _covariance(tau * prior, kappa, t, t))
        error = np.linalg.inv(design.T @ inverse @ design)
        coefficients = error @ design.T @ inverse @ y[:, None]
        residual = y[:, None] - design @ coefficients
        quadratic = (residual.mT @ inverse @ residual)[..., 0, 0]
        log_det = np.linalg.slogdet(error)[1] + np.linalg.slogdet(inverse)[1]
        freedom = len(t) - design.shape[1]
        log_likelihood = (
            log_det[..., None] / 2 - freedom * np.log(self._sigma) - quadratic[..., None] / (2 * self._sigma**2)
        )
        slope = float(np.mean(others)) if others else 0.0
        return _Fit(
            t, slope, tau * prior, kappa, design.shape[1], inverse, error, coefficients, residual, log_likelihood
        )

    def _cells(self, family: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Return the times and mean log errors of the budgets of a family and their numbers of runs, each (m,), and the
        sum of squares within budgets."""
        runs = self.runs[family]
        y = np.log([run.error for run in runs])
        flops, index, count = np.unique([run.flops for run in runs], return_inverse=True, return_counts=True)
        mean = np.bincount(index, y) / count
        return self._time(family, flops), mean, count, float(np.sum((y - mean[index]) ** 2))

    def _time(self, family: str, flops: np.ndarray) -> np.ndarray:
        return (np.log(flops) - self._start[family]) / self._unit

    def predict(self, family: str, flops: float, level: float = LEVEL) -> Prediction:
        """Predict the error of one new run of ``family``.

        Args:
            family: one of the fitted families.
            flops: its cost, at least that of the cheapest run of the family.
            level: the probability of the interval.
        """
        cheapest, _ = self.range(family)
        if not cheapest * (1 - SAME_BUDGET) <= flops < inf:
            raise UserError(
                f"task.flops={flops:g} is below the cheapest run of {family} ({cheapest:.3g}): a forecast goes up only."
            )
        fit = self._fits[family]
        new = np.maximum(0, self._time(family, np.array([flops])))
        gain = _covariance(fit.tau, fit.kappa, new, fit.t) @ fit.inverse
        design, new_design = (np.column_stack([np.ones_like(t), t])[:, : fit.size] for t in (fit.t, new))
        mean = fit.slope * new[0] + (new_design @ fit.coefficients + gain @ fit.residual)[..., 0, 0]
        left = new_design - gain @ design
        known = gain @ _covariance(fit.tau, fit.kappa, fit.t, new)
        factor = 1 + _covariance(fit.tau, fit.kappa, new, new) - known + left @ fit.error @ left.mT
        factor = np.maximum(1, factor[..., 0, 0])  # rounding errors where a term exceeds the noise a thousandfold
        scale = np.sqrt(self._sigma**2 * factor[..., None] + self._extra_variance(family, mean)[..., None])
        log_weight = fit.log_likelihood + np.logaddexp.reduce(
            (self._log_shared - self._marginal[family])[:, None] + self._log_drift[:, :, None], 2
        )
        weight = np.exp(log_weight - log_weight.max())
        used = weight > 1e-7 * weight.max()
        mean, scale, weight = np.broadcast_to(mean[..., None], weight.shape)[used], scale[used], weight[used]
        weight = weight / weight.sum()

        def quantile(share: float) -> float:
            def excess(y: float) -> float:
                return float(weight @ ndtr((y - mean) / scale)) - share

            ends = mean + ndtri(share) * scale
            low, high = float(ends.min()), float(ends.max())
            if high - low < 1e-12 or excess(low) >= 0 or excess(high) <= 0:
                return float(weight @ ends)
            return brentq(excess, low, high)  # type: ignore[return-value]

        low, median, high = (_exp(quantile(share)) for share in ((1 - level) / 2, 0.5, (1 + level) / 2))
        return Prediction(median, low, high)

    def _extra_variance(self, family: str, log_error: np.ndarray) -> np.ndarray:
        """Return how much the relative variance of sampling exceeds that of the short runs at these errors."""
        members = self.runs[family]
        scale = np.mean([run.sampling_variance * run.error for run in members])
        usual = np.mean([run.sampling_variance for run in members])
        return np.maximum(0, np.minimum(scale * np.exp(-log_error), 1) - usual)  # more than 100 % has no meaning


@dataclass(frozen=True)
class _Fit:
    """The fit of one family at each tau and kappa, (T, K, ...)."""

    t: np.ndarray
    """Times of the budgets, (m,)."""
    slope: float
    """Mean slope of the other families, which the coefficients add to; 0 without others."""
    tau: np.ndarray
    """Variance of the slope over that of the noise."""
    kappa: np.ndarray
    """Variance of the drift over that of the noise."""
    size: int
    """Number of coefficients."""
    inverse: np.ndarray
    """Inverse covariance of the means of the budgets over the variance of the noise, (T, K, m, m)."""
    error: np.ndarray
    coefficients: np.ndarray
    residual: np.ndarray
    log_likelihood: np.ndarray
    """Up to a constant, (T, K, R)."""


def _covariance(tau: np.ndarray, kappa: np.ndarray, s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return the covariance of slope and drift at the times (m,) and (n,) over the variance of the noise, (T, K, m, n).

    Args:
        tau, kappa: variances of both, (T, K, 1, 1).
    """
    first, last = np.minimum(s[:, None], t[None, :]), np.maximum(s[:, None], t[None, :])
    return tau * first * last + kappa * first**2 * (3 * last - first) / 6


def _noise_grid(
    runs: Mapping[str, Sequence[ShortRun]], cells: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]]
) -> np.ndarray:
    """Return standard deviations of the noise around that within budgets, (R,), even in the logarithm."""
    members = [run for family in runs.values() for run in family]
    df = len(members) - sum(len(count) for _, _, count, _ in cells.values())
    variance = sum(within for *_, within in cells.values()) / df if df else 0.0
    if not df:  # one run per budget
        variance = float(np.mean([run.sampling_variance for run in members])) or 0.01
    width = 5 / np.sqrt(2 * max(df, 2))
    return np.sqrt(max(variance, MIN_NOISE**2)) * np.exp(np.linspace(-width, width, NUM_SIGMAS))


def _exp(value: float) -> float:
    return exp(min(value, 700.0))


def _check(family: str, runs: Sequence[ShortRun]) -> None:
    for run in runs:
        if not 0 < run.flops < inf:
            raise UserError(f"{run.name} has no training FLOPs in its record: train it again, or narrow runs=.")
        if not 0 < run.error < inf:
            raise UserError(
                f"{run.name}: its metric is {run.error:.3g} from its best value, and a power law needs a positive"
                " distance. Leave the run out of runs=, or choose rank_by=METRIC."
            )
    costs = sorted(run.flops for run in runs)
    budgets = costs[:1]
    for cost in costs:
        budgets += [cost] if cost > budgets[-1] * (1 + SAME_BUDGET) else []
    if len(budgets) < MIN_BUDGETS:
        count = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {len(budgets)}"
        raise UserError(
            f"{family} has {count} {'budget' if len(budgets) == 1 else 'budgets'}, and a scaling law needs"
            f" {MIN_BUDGETS}: train it with budget.images=5000,10000,20000, or leave it out of runs=."
        )
