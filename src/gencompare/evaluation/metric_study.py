"""Score metrics on faults whose distance from the data is known: order, power and false alarms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import binomtest, kendalltau
from scipy.stats import t as student_t

from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.evaluation.metrics.compute import ExtraMetrics, RealFeatures, compute_metrics, memorization_metrics
from gencompare.evaluation.reference import Reference
from gencompare.records import Metric

LEVEL = 0.05
"""Nominal rate of false alarms."""
NUM_BOOTSTRAP = 1000

Losses = dict[str, list[float]]
"""By metric, a value for each set of images, where lower is better (`loss`)."""


@dataclass(frozen=True)
class Cell:
    """A fault at one strength."""

    family: str
    """The kind of fault."""
    strength: float
    distance: float
    """True distance from the data; it increases with the strength."""
    losses: dict[int, Losses]
    """Losses of sets of images with this fault, by the number n of images in a set."""


@dataclass(frozen=True)
class Study:
    """The losses of all faults of one data set, from the features of one extractor."""

    data: str
    extractor: str
    real: dict[int, Losses]
    """Losses of sets of real images."""
    cells: list[Cell]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Study:
        """Create a study from the JSON of `dataclasses.asdict`, whose keys are strings."""

        def by_number(losses: dict[str, Losses]) -> dict[int, Losses]:
            return {int(n): of_n for n, of_n in losses.items()}

        cells = [Cell(**{**cell, "losses": by_number(cell["losses"])}) for cell in values["cells"]]
        return cls(values["data"], values["extractor"], by_number(values["real"]), cells)

    @property
    def families(self) -> dict[str, list[Cell]]:
        """The cells by kind of fault, from weak to strong."""
        found: dict[str, list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda cell: cell.distance):
            found.setdefault(cell.family, []).append(cell)
        return found


@dataclass(frozen=True)
class Share:
    """A mean with its 95 % interval."""

    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class StudyScore:
    """How well a metric measures known faults with sets of n images."""

    metric: str
    extractor: str
    n: int
    tau: Share
    """Kendall's rank correlation with the true distance within a family, mean over families; the interval is a
    bootstrap over families."""
    power: Share
    """Fraction of sets with a fault that cause an alarm; the interval is a bootstrap over families."""
    false_alarms: Share
    """Fraction of sets of real images that cause an alarm, with Wilson's interval."""
    tau_by_family: dict[str, float]
    power_by_family: dict[str, float]


def loss(metric: Metric) -> float | None:
    """Return the value such that lower is better: the negative value if higher is better, or the absolute difference
    to the target. None if the metric is undefined or has no direction."""
    if metric.value is None or (metric.higher_is_better is None and metric.target is None):
        return None
    if metric.target is not None:
        return abs(metric.value - metric.target)
    return -metric.value if metric.higher_is_better else metric.value


def measure(
    features: Features,
    n: int,
    reference: Reference,
    real: RealFeatures,
    extractor: Extractor,
    extra_metrics: ExtraMetrics | None = None,
) -> Losses:
    """Compute the losses of all metrics on disjoint subsets of ``n`` of the images.

    The name of the extractor is removed from the names of metrics, so that they are the same for all extractors.
    """
    found: Losses = {}
    for rows in disjoint_subsets(len(features), n):
        subset = features[rows]
        metrics = compute_metrics(subset, reference, extractor, extra_metrics=extra_metrics, with_intervals=False)
        metrics |= memorization_metrics(subset.features, real)
        for name, metric in metrics.items():
            value = loss(metric)
            if value is not None:
                found.setdefault(name.replace(f"_{extractor.name}", ""), []).append(value)
    return found


def disjoint_subsets(total: int, n: int) -> Iterator[slice]:
    """Yield as many disjoint strided subsets of n as fit into ``total``."""
    count = total // n
    return (slice(k, count * n, count) for k in range(count))


def has_alarm(value: float, real: Sequence[float]) -> bool:
    r"""Decide whether a loss is above those of R sets of real images, at the level of 5 %.

    The threshold is the upper end of a one-sided prediction interval for one more set,
    :math:`\bar{x} + t_{0.95, R - 1}\, s \sqrt{1 + 1 / R}`.
    """
    quantile = float(student_t.ppf(1 - LEVEL, len(real) - 1))
    return value > fmean(real) + quantile * stdev(real) * math.sqrt(1 + 1 / len(real))


def false_alarms(studies: Sequence[Study], metric: str, n: int) -> Share:
    """Compare each set of real images with the other ones."""
    alarms = [
        has_alarm(value, values[:k] + values[k + 1 :])
        for study in studies
        for values in [study.real[n][metric]]
        for k, value in enumerate(values)
    ]
    interval = binomtest(sum(alarms), len(alarms)).proportion_ci(method="wilson")
    return Share(fmean(alarms), (float(interval.low), float(interval.high)))


def tau(cells: Sequence[Cell], metric: str, n: int) -> float:
    """Compute Kendall's rank correlation of the metric with the true distance, mean over sets; 0 if it is constant."""
    distances = [cell.distance for cell in cells]
    sets = zip(*(cell.losses[n][metric] for cell in cells), strict=False)
    values = [float(kendalltau(distances, losses).statistic) for losses in sets]  # type: ignore[attr-defined]
    return fmean(0.0 if math.isnan(value) else value for value in values)


def power(cells: Sequence[Cell], real: Sequence[float], metric: str, n: int) -> float:
    """Compute the fraction of sets with a fault that cause an alarm."""
    return fmean(has_alarm(value, real) for cell in cells for value in cell.losses[n][metric])


def score(studies: Sequence[Study]) -> list[StudyScore]:
    """Score every metric at every n on all studies of an extractor that have both; the most faithful order first."""
    scores = []
    for extractor in dict.fromkeys(study.extractor for study in studies):
        own = [study for study in studies if study.extractor == extractor]
        for n in sorted({n for study in own for n in study.real}):
            with_n = [study for study in own if n in study.real]
            for metric in set.intersection(*(set(study.real[n]) for study in with_n)):
                scores.append(_score(with_n, extractor, metric, n))
    return sorted(scores, key=lambda s: (s.extractor, s.n, -s.tau.mean, s.metric))


def _score(studies: Sequence[Study], extractor: str, metric: str, n: int) -> StudyScore:
    taus: dict[tuple[str, str], float] = {}
    powers: dict[tuple[str, str], float] = {}
    for study in studies:
        for family, cells in study.families.items():
            taus[study.data, family] = tau(cells, metric, n)
            powers[study.data, family] = power(cells, study.real[n][metric], metric, n)
    return StudyScore(
        metric, extractor, n,
        tau=bootstrap(list(taus.values())), power=bootstrap(list(powers.values())),
        false_alarms=false_alarms(studies, metric, n),
        tau_by_family=_mean_by_family(taus), power_by_family=_mean_by_family(powers),
    )  # fmt: skip


def _mean_by_family(values: dict[tuple[str, str], float]) -> dict[str, float]:
    families = dict.fromkeys(family for _, family in values)
    return {family: fmean(value for (_, own), value in values.items() if own == family) for family in families}


def bootstrap(values: Sequence[float]) -> Share:
    """Compute the mean with a percentile bootstrap interval."""
    rows = np.random.default_rng(0).integers(len(values), size=(NUM_BOOTSTRAP, len(values)))
    low, high = np.quantile(np.asarray(values)[rows].mean(1), (0.025, 0.975))
    return Share(fmean(values), (float(low), float(high)))
