"""Acceptance criteria of the digits demonstration, which known faults must fail."""

from __future__ import annotations

from dataclasses import dataclass

from gencompare.records import Metric, Result


@dataclass(frozen=True)
class Criterion:
    """One condition on a result."""

    name: str
    value: float | None
    limit: str
    met: bool


DISTANCE = 29.0
"""MMD on EfficientNet-Lite0: half of what samples of the class-wise Gaussian baseline have (58)."""
CONFIDENT = 0.8
SHARES = (0.05, 0.15)
MEMORIZATION = 0.9


def criteria(result: Result) -> list[Criterion]:
    """The conditions on a result of the default protocol on data with ten classes in about equal parts.

    The primary distance is at most `DISTANCE`; the data's classifier (a result in ``result.also``) is at least .7 sure
    of 80 % of the samples, and assigns 5 to 15 % of them to each class; the memorisation ratio is at least .9. A metric
    that is missing meets no condition.
    """
    metrics = {name: metric for each in (*result.also, result) for name, metric in each.metrics.items()}
    distance, ratio = value(metrics, result.headline), value(metrics, "memorization")
    sure = value(metrics, "confident")
    least, most = value(metrics, "class_share_min"), value(metrics, "class_share_max")
    low, high = SHARES
    return [
        Criterion("distance", distance, f"<= {DISTANCE:g}", distance is not None and distance <= DISTANCE),
        Criterion("confident", sure, f">= {CONFIDENT}", sure is not None and sure >= CONFIDENT),
        Criterion("smallest class share", least, f">= {low}", least is not None and least >= low),
        Criterion("largest class share", most, f"<= {high}", most is not None and most <= high),
        Criterion("memorization", ratio, f">= {MEMORIZATION}", ratio is not None and ratio >= MEMORIZATION),
    ]


def accepted(result: Result) -> bool:
    """Whether ``result`` meets all criteria."""
    return all(criterion.met for criterion in criteria(result))


def value(metrics: dict[str, Metric], name: str) -> float | None:
    return metrics[name].value if name in metrics else None
