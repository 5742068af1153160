"""Scaling laws of several families, fitted to short runs together, and predictions of longer runs with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit

from gencompare.errors import UserError

LEVEL = 0.9
"""Probability that the interval of a prediction contains the value of one new training run."""
MIN_BUDGETS = 3
"""Budgets that a family needs: two show no bend."""
SAME_BUDGET = 0.05
"""Relative difference of FLOPs up to which two runs have the same budget."""
RATIOS = np.geomspace(0.03, 1e3, 20)
r"""Grid of :math:`\tau` and :math:`\kappa`. Below, a term is invisible in the noise; above, the noise in the term."""


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
    r"""A power law of the error against training FLOPs for each family, with a bend.

    With the error q of a run, C its FLOPs and :math:`C_f` those of the cheapest run of its family f,

    .. math::
        \log q &= a_f + b_f\, t + c_f\, t^2 + \sigma \varepsilon, \qquad t = \frac{\log(C / C_f)}{L}, \qquad
            \varepsilon \sim N(0, 1), \\
        b_f &\sim N(\beta, \sigma^2 \tau^2), \qquad c_f \sim N(\gamma, \sigma^2 \kappa^2), \qquad
            \gamma \sim N(0, \sigma^2 \kappa^2),

    where L is the logarithm of the ratio of the largest to the smallest budget (the median over families). Without the
    bend :math:`c_f` it is the power law of Kaplan et al. (2020), "Scaling laws for neural language models", section
    1.2, https://arxiv.org/abs/2001.08361. A constant is added, :math:`q_\infty + a C^{-b}`, by Henighan et al. (2020),
    "Scaling laws for autoregressive generative modeling", eq. 1.1, https://arxiv.org/abs/2010.14701, and by Hoffmann et
    al. (2022), "Training compute-optimal large language models", eq. 2, https://arxiv.org/abs/2203.15556. Three or four
    budgets within a factor of four do not determine it: the exponent and the constant trade off. Early in training the
    curve also bends the other way, since it steepens as models leave their initial plateau. So the departure from the
    line is its first-order term of either sign, :math:`c_f t^2`, and its size is estimated from the bends of all
    families together, as is the spread of the slopes. A family has its own slope and bend as far as its runs support
    them, and otherwise those of the mean. The interval contains the noise of a new run, the errors of all estimates,
    and a bend that the short runs do not show, which grows with the square of the distance.

    Priors are flat for :math:`a_f`, :math:`\beta` and :math:`\log\sigma`, and half-Cauchy of scale 1 for :math:`\tau`
    and :math:`\kappa`: over the short runs, slopes and bends differ by about as much as seeds, or by much more. Given
    these two, the prediction is Student's t with n - F - 1 degrees of freedom for n runs of F families; it is averaged
    over their posterior on a grid. Units of FLOPs and of the error change nothing but the units of the prediction.

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
        tau, kappa = (ratio.ravel() for ratio in np.meshgrid(RATIOS, RATIOS))
        self._tau, self._kappa = tau[:, None, None] ** 2, kappa[:, None, None] ** 2
        self._fit(-np.log1p(tau**2) - np.log1p(kappa**2) + np.log(tau * kappa))  # the grid is even in the logarithm

    def range(self, family: str) -> tuple[float, float]:
        """Return the smallest and the largest cost of the runs of ``family``."""
        costs = [run.flops for run in self.runs[family]]
        return min(costs), max(costs)

    def _fit(self, log_prior: np.ndarray) -> None:
        """Estimate all parameters at each point of the grid (G,), and the weight of the point."""
        size = len(self.runs) + 2
        information = np.zeros((len(log_prior), size, size))
        information[:, -1, -1] = 1 / self._kappa[:, 0, 0]
        moments = np.zeros((len(log_prior), size))
        log_det = np.log(self._kappa[:, 0, 0])
        squares = np.zeros(len(log_prior))
        cells = {}
        for family in self.runs:
            t, y, count, within = self._cells(family)
            design = self._design(family, t)
            inverse = np.linalg.inv(np.diag(1 / count) + self._covariance(t, t))
            information += design.T @ inverse @ design
            moments += (design.T @ inverse @ y[:, None])[..., 0]
            log_det -= np.linalg.slogdet(inverse)[1]
            squares += within
            cells[family] = design, inverse, y
        self._error = np.linalg.inv(information)
        self._coefficients = (self._error @ moments[..., None])[..., 0]
        squares += self._coefficients[:, -1] ** 2 / self._kappa[:, 0, 0]
        self._weighted: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for family, (design, inverse, y) in cells.items():
            residual = (y - self._coefficients @ design.T)[..., None]
            squares += (residual.mT @ inverse @ residual)[:, 0, 0]
            self._weighted[family] = inverse, inverse @ residual
        self._freedom = sum(map(len, self.runs.values())) - len(self.runs) - 1
        squares = np.maximum(squares, 1e-26)  # the rounding errors of an exact law
        log_weight = log_prior - (log_det - np.linalg.slogdet(self._error)[1] + self._freedom * np.log(squares)) / 2
        weight = np.exp(log_weight - log_weight.max())
        self._weight, self._variance = weight / weight.sum(), squares / self._freedom

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

    def _design(self, family: str, t: np.ndarray) -> np.ndarray:
        """Return the factors of the intercepts of all families, the mean slope and the mean bend, (m, F + 2)."""
        intercepts = np.repeat([[float(name == family) for name in self.runs]], len(t), axis=0)
        return np.column_stack([intercepts, t, t**2])

    def _covariance(self, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Return the covariance of a family's slope and bend at the times (m,) and (n,), over sigma^2, (G, m, n)."""
        product = s[:, None] * t[None, :]
        return self._tau * product + self._kappa * product**2

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
        t = self._cells(family)[0]
        new = np.maximum(0, self._time(family, np.array([flops])))
        inverse, residual = self._weighted[family]
        gain = self._covariance(new, t) @ inverse
        design = self._design(family, new)
        mean = (self._coefficients @ design.T)[:, 0] + (self._covariance(new, t) @ residual)[:, 0, 0]
        left = design - gain @ self._design(family, t)
        factor = 1 + self._covariance(new, new) - gain @ self._covariance(t, new) + left @ self._error @ left.mT
        factor = np.maximum(1, factor[:, 0, 0])  # rounding errors where a term exceeds the noise a thousandfold
        scale = np.sqrt(self._variance * factor + self._extra_variance(family, mean))

        def quantile(share: float) -> float:
            def excess(y: float) -> float:
                return float(self._weight @ stdtr(self._freedom, (y - mean) / scale)) - share

            ends = mean + stdtrit(self._freedom, share) * scale
            low, high = float(ends.min()), float(ends.max())
            if high - low < 1e-12 or excess(low) >= 0 or excess(high) <= 0:
                return float(self._weight @ ends)
            return brentq(excess, low, high)  # type: ignore[return-value]

        low, median, high = (_exp(quantile(share)) for share in ((1 - level) / 2, 0.5, (1 + level) / 2))
        return Prediction(median, low, high)

    def _extra_variance(self, family: str, log_error: np.ndarray) -> np.ndarray:
        """Return how much the relative variance of sampling exceeds that of the short runs at these errors, (G,)."""
        members = self.runs[family]
        scale = np.mean([run.sampling_variance * run.error for run in members])
        usual = np.mean([run.sampling_variance for run in members])
        return np.maximum(0, np.minimum(scale * np.exp(-log_error), 1) - usual)  # more than 100 % has no meaning


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
