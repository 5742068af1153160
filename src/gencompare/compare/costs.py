"""Quality against cost: what each row of a table needed to be trained or sampled, and which rows nothing beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gencompare.compare import words
from gencompare.compare.plots import Chart, Line
from gencompare.compare.rank import Group, Row, badness
from gencompare.compare.spent import total
from gencompare.compare.styles import Style

FRONT = ""
"""No colour: the front is drawn in the ink of the page."""


MOST = 60
"""Points of a chart at most: the best-ranked rows, and the front."""


@dataclass(frozen=True)
class Trade:
    """A chart of one table's headline against one cost, and the rows that are on its Pareto front."""

    chart: Chart
    front: list[Row]
    """Cheapest first, and so from worse to better."""


COSTS: dict[str, Callable[[Row], float | None]] = {
    "training FLOPs": lambda row: total(row.run.record)["flops"],
    "device seconds of training": lambda row: total(row.run.record)["device_seconds"],
    "network calls a sample": lambda row: words.calls(row.result.generation.nfe),
    "FLOPs a sample": lambda row: words.number(row.result.details.get("flops_per_sample")),
}


def trades(groups: Iterable[Group], style: Mapping[str, Style]) -> list[Trade]:
    """A chart for each table and each cost in which at least two of its ranked rows differ."""
    found = []
    for group in groups:
        for name, cost in COSTS.items():
            rows = [row for row in group.rows if row.rank is not None and (cost(row) or 0) > 0]
            if len({cost(row) for row in rows}) > 1:
                found.append(_trade(group, name, cost, rows, style))
    return found


def _trade(
    group: Group, name: str, cost: Callable[[Row], float | None], rows: Sequence[Row], style: Mapping[str, Style]
) -> Trade:
    front = pareto([cost(row) or 0.0 for row in rows], [badness(row) for row in rows])
    kept = sorted({*range(min(MOST, len(rows))), *front})
    left, front = len(rows) - len(kept), [kept.index(k) for k in front]
    rows = [rows[k] for k in kept]
    x = [cost(row) or 0.0 for row in rows]
    y = [row.headline.value or 0.0 for row in rows]
    lines = [Line(np.array([x[k] for k in front]), np.array([y[k] for k in front]), FRONT, pale=True)]
    for row, cost_of_row, value in zip(rows, x, y, strict=True):
        own = style[row.title]
        interval = row.headline.interval
        bounds = None if interval is None or not all(map(words.finite, interval)) else interval
        lines.append(
            Line(
                np.array([cost_of_row]), np.array([value]), own.color, own.dash, marker=True, name=row.title,
                bounds=bounds,
            )
        )  # fmt: skip
    title = f"{words.title(group.headline)} on {group.measurement.data} against {name}"
    return Trade(Chart(title, lines, name, x_log=True, left=left), [rows[k] for k in front])


def pareto(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
    """Rows that no other row beats: none is as cheap and as good, and better in one of the two. Cheapest first.

    Of rows that are equal in both, all are on the front.
    """
    order = sorted(range(len(cost)), key=lambda k: (cost[k], loss[k]))
    front: list[int] = []
    for k in order:
        last = front[-1] if front else None
        if last is None or loss[k] < loss[last] or (cost[k], loss[k]) == (cost[last], loss[last]):
            front.append(k)
    return front
