"""Acceptance criteria of the digits demonstration. Image sets with known faults must fail them."""

from __future__ import annotations

from dataclasses import dataclass

from gencompare.records import Metric, Result

MAX_DISTANCE = 29.0
"""Largest MMD on EfficientNet-Lite0 features: half that of the class-wise Gaussian baseline (58)."""
MIN_CONFIDENT = 0.76
"""Halfway between real test images (0.95) and images blurred by 0.6 pixels (0.58)."""
CLASS_SHARES = (0.05, 0.15)
MIN_MEMORIZATION = 0.9


@dataclass(frozen=True)
class Criterion:
    """A condition that a result must meet."""

    name: str
    value: float | None
    limit: str
    met: bool


def criteria(result: Result) -> list[Criterion]:
    """Check a result of the default protocol on data with ten classes of about equal size.

    The primary distance must be at most `MAX_DISTANCE`. The data set's classifier (in ``result.secondary_results``)
    must predict a class with probability .7 or more for at least 76 % of the samples, and each class for 5 to 15 % of
    them. The memorisation ratio must be at least .9. A missing metric fails its criterion.
    """
    metrics = {name: metric for each in (*result.secondary_results, result) for name, metric in each.metrics.items()}
    low, high = CLASS_SHARES
    return [
        _at_most("distance", _value(metrics, result.primary_metric), MAX_DISTANCE),
        _at_least("confident", _value(metrics, "confident"), MIN_CONFIDENT),
        _at_least("smallest class share", _value(metrics, "class_share_min"), low),
        _at_most("largest class share", _value(metrics, "class_share_max"), high),
        _at_least("memorization", _value(metrics, "memorization"), MIN_MEMORIZATION),
    ]


def accepted(result: Result) -> bool:
    """Return whether ``result`` meets all criteria."""
    return all(criterion.met for criterion in criteria(result))


def _at_most(name: str, value: float | None, limit: float) -> Criterion:
    return Criterion(name, value, f"<= {limit:g}", value is not None and value <= limit)


def _at_least(name: str, value: float | None, limit: float) -> Criterion:
    return Criterion(name, value, f">= {limit:g}", value is not None and value >= limit)


def _value(metrics: dict[str, Metric], name: str) -> float | None:
    return metrics[name].value if name in metrics else None
