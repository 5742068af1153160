"""The bars that samples of the digits demonstration must clear, and that the controls must not."""

from __future__ import annotations

from dataclasses import dataclass

from gencompare.records import Metric, Result


@dataclass(frozen=True)
class Bar:
    """One condition on a result."""

    name: str
    value: float | None
    limit: str
    ok: bool


OVER_FLOOR = 3.0
CONFIDENT = 0.8
SHARES = (0.05, 0.15)
MEMORIZATION = 0.9


def bars(result: Result) -> list[Bar]:
    """The four conditions, for a result on data with ten classes in about equal parts.

    The distance is at most three times the floor; the classifier is at least .9 sure of 80 % of the samples; each
    class has 5 to 15 % of them; the memorisation ratio is at least .9. A figure that is missing clears no bar.
    """
    metrics = result.metrics
    distance = metrics[result.headline].over_floor
    sure, ratio = value(metrics, "confident"), value(metrics, "memorization")
    least, most = value(metrics, "class_share_min"), value(metrics, "class_share_max")
    low, high = SHARES
    return [
        Bar("distance over floor", distance, f"<= {OVER_FLOOR}", distance is not None and distance <= OVER_FLOOR),
        Bar("confident", sure, f">= {CONFIDENT}", sure is not None and sure >= CONFIDENT),
        Bar("smallest class share", least, f">= {low}", least is not None and least >= low),
        Bar("largest class share", most, f"<= {high}", most is not None and most <= high),
        Bar("memorization", ratio, f">= {MEMORIZATION}", ratio is not None and ratio >= MEMORIZATION),
    ]


def passes(result: Result) -> bool:
    """Whether ``result`` clears all bars."""
    return all(bar.ok for bar in bars(result))


def value(metrics: dict[str, Metric], name: str) -> float | None:
    return metrics[name].value if name in metrics else None
