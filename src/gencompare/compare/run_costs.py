"""What training and sampling cost, and quality against cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gencompare.compare import formatting
from gencompare.compare.ranking import TableRow, TableSection, badness
from gencompare.compare.svg_plots import Chart, PlotLine, Style
from gencompare.records import RunRecord

KINDS = ("images_seen", "steps", "flops", "device_seconds")


def own_cost(record: RunRecord) -> dict[str, float | None]:
    """By kind: what this training took. Device seconds are seconds times devices."""
    found = {kind: formatting.format_number(record.training.get(kind)) for kind in KINDS}
    seconds = formatting.format_number(record.training.get("seconds"))
    if found["device_seconds"] is None and seconds is not None:
        found["device_seconds"] = seconds * (formatting.format_number(record.training.get("processes")) or 1)
    return found


def total_cost(record: RunRecord) -> dict[str, float | None]:
    """By kind: the sum that the record holds; of a record without one, this training and the autoencoder's.

    None where a part is not known: half of a cost is none.
    """
    summed = record.training.get("total_cost")
    if isinstance(summed, dict):
        return {kind: formatting.format_number(summed.get(kind)) for kind in KINDS}
    taken = own_cost(record)
    before = autoencoder_cost(record)
    if not before:
        return taken
    further = {kind: formatting.format_number(before.get(kind)) for kind in KINDS}
    if further["device_seconds"] is None:
        further["device_seconds"] = formatting.format_number(before.get("seconds"))
    return {
        kind: a + b if (a := taken[kind]) is not None and (b := further[kind]) is not None else None for kind in KINDS
    }


def dependency_costs(record: RunRecord) -> str:
    """The roles of the further trainings that are counted: ``autoencoder``, ``autoencoder and 3 trials``."""
    listed = record.training.get("dependencies")
    roles = [str(part.get("role")) for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
    roles = roles or (["autoencoder"] if autoencoder_cost(record) else [])
    count = {role: roles.count(role) for role in roles}
    return formatting.listed([role if n == 1 else f"{n} {role}s" for role, n in count.items()]) if count else ""


def autoencoder_cost(record: RunRecord) -> dict[str, Any]:
    """What the autoencoder of a latent model cost; empty for any other."""
    found = record.model.get("autoencoder")
    return found if isinstance(found, dict) else {}


PARETO = ""
"""No colour: the front is drawn in the ink of the page."""


MOST = 60
"""Points of a chart at most: the best-ranked rows, and the front."""


@dataclass(frozen=True)
class CostPoint:
    """A chart of one table's primary_metric against one cost, and the rows that are on its Pareto front."""

    chart: Chart
    front: list[TableRow]
    """Cheapest first, and so from worse to better."""


COSTS: dict[str, Callable[[TableRow], float | None]] = {
    "training FLOPs": lambda row: total_cost(row.run.record)["flops"],
    "device seconds of training": lambda row: total_cost(row.run.record)["device_seconds"],
    "network calls a sample": lambda row: formatting.format_calls(row.result.generation.nfe),
    "FLOPs a sample": lambda row: formatting.format_number(row.result.details.get("flops_per_sample")),
}


def cost_curves(groups: Iterable[TableSection], style: Mapping[str, Style]) -> list[CostPoint]:
    """A chart for each table and each cost in which at least two of its ranked rows differ."""
    found = []
    for group in groups:
        for name, cost in COSTS.items():
            rows = [row for row in group.rows if row.rank is not None and (cost(row) or 0) > 0]
            if len({cost(row) for row in rows}) > 1:
                found.append(_cost_curve(group, name, cost, rows, style))
    return found


def _cost_curve(
    group: TableSection,
    name: str,
    cost: Callable[[TableRow], float | None],
    rows: Sequence[TableRow],
    style: Mapping[str, Style],
) -> CostPoint:
    front = pareto([cost(row) or 0.0 for row in rows], [badness(row) for row in rows])
    kept = sorted({*range(min(MOST, len(rows))), *front})
    left, front = len(rows) - len(kept), [kept.index(k) for k in front]
    rows = [rows[k] for k in kept]
    x = [cost(row) or 0.0 for row in rows]
    y = [row.metric.value or 0.0 for row in rows]
    lines = [PlotLine(np.array([x[k] for k in front]), np.array([y[k] for k in front]), PARETO, pale=True)]
    for row, cost_of_row, value in zip(rows, x, y, strict=True):
        own = style[row.title]
        interval = row.metric.interval
        bounds = None if interval is None or not all(map(formatting.format_finite, interval)) else interval
        lines.append(
            PlotLine(
                np.array([cost_of_row]), np.array([value]), own.color, own.dash, marker=True, name=row.title,
                bounds=bounds,
            )
        )  # fmt: skip
    title = f"{formatting.title(group.primary_metric)} on {group.measurement.data} against {name}"
    return CostPoint(Chart(title, lines, name, x_log=True, left=left), [rows[k] for k in front])


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
