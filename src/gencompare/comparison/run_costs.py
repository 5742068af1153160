"""Training and sampling costs, and charts of quality against cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gencompare.comparison import formatting
from gencompare.comparison.ranking import RankingTable, TableRow, badness
from gencompare.comparison.svg_plots import Chart, PlotLine, Style, row_point
from gencompare.records import RunRecord

KINDS = ("images_seen", "steps", "flops", "device_seconds")
"""Kinds of training cost."""


def own_cost(record: RunRecord) -> dict[str, float | None]:
    """Return the training cost of a run alone, for each of `KINDS`. Device seconds are seconds times the number of
    devices."""
    cost = {kind: formatting.as_number(record.training.get(kind)) for kind in KINDS}
    seconds = formatting.as_number(record.training.get("seconds"))
    if cost["device_seconds"] is None and seconds is not None:
        cost["device_seconds"] = seconds * (formatting.as_number(record.training.get("processes")) or 1)
    return cost


def total_cost(record: RunRecord) -> dict[str, float | None]:
    """Return the training cost of a run and of all runs that its model depends on, for each of `KINDS`.

    If the record has no ``total_cost``, the costs of the run and of its autoencoder are added. The total is None if one
    of them is unknown.
    """
    recorded = record.training.get("total_cost")
    if isinstance(recorded, dict):
        return {kind: formatting.as_number(recorded.get(kind)) for kind in KINDS}
    own = own_cost(record)
    autoencoder = autoencoder_cost(record)
    if not autoencoder:
        return own
    further = {kind: formatting.as_number(autoencoder.get(kind)) for kind in KINDS}
    if further["device_seconds"] is None:
        further["device_seconds"] = formatting.as_number(autoencoder.get("seconds"))
    return {
        kind: a + b if (a := own[kind]) is not None and (b := further[kind]) is not None else None for kind in KINDS
    }


def describe_dependencies(record: RunRecord) -> str:
    """Describe the other training runs in the total cost, such as ``autoencoder`` or ``autoencoder and 3 trials``."""
    listed = record.training.get("dependencies")
    roles = [str(part.get("role")) for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
    roles = roles or (["autoencoder"] if autoencoder_cost(record) else [])
    count = {role: roles.count(role) for role in roles}
    return formatting.join_names([role if n == 1 else f"{n} {role}s" for role, n in count.items()]) if count else ""


def autoencoder_cost(record: RunRecord) -> dict[str, Any]:
    """Return the training cost of a latent model's autoencoder. It is empty for other models."""
    cost = record.model.get("autoencoder")
    return cost if isinstance(cost, dict) else {}


# Charts

TEXT_COLOR = ""

MAX_POINTS = 60
"""Maximum number of rows in a chart. If there are more, the best rows and the whole Pareto front are drawn."""


@dataclass(frozen=True)
class ParetoChart:
    """A chart of the primary metric of one table against one kind of cost."""

    chart: Chart
    front: list[TableRow]
    """The rows on the Pareto front, cheapest (and therefore worst) first."""


COSTS: dict[str, Callable[[TableRow], float | None]] = {
    "training FLOPs": lambda row: total_cost(row.run.record)["flops"],
    "training device seconds": lambda row: total_cost(row.run.record)["device_seconds"],
    "NFE per sample": lambda row: formatting.total_nfe(row.result.generation.nfe),
    "FLOPs per sample": lambda row: formatting.as_number(row.result.details.get("flops_per_sample")),
}


def pareto_charts(tables: Iterable[RankingTable], style: Mapping[str, Style]) -> list[ParetoChart]:
    """Create a chart for each table and each cost that differs between its ranked rows."""
    charts = []
    for table in tables:
        for name, cost in COSTS.items():
            rows = [row for row in table.rows if row.rank is not None and (cost(row) or 0) > 0]
            if len({cost(row) for row in rows}) > 1:
                charts.append(_pareto_chart(table, name, cost, rows, style))
    return charts


def _pareto_chart(
    table: RankingTable,
    name: str,
    cost: Callable[[TableRow], float | None],
    rows: Sequence[TableRow],
    style: Mapping[str, Style],
) -> ParetoChart:
    front = pareto_front([cost(row) or 0.0 for row in rows], [badness(row) for row in rows])
    drawn = sorted({*range(min(MAX_POINTS, len(rows))), *front})
    num_omitted, front = len(rows) - len(drawn), [drawn.index(k) for k in front]
    rows = [rows[k] for k in drawn]
    x = [cost(row) or 0.0 for row in rows]
    y = [row.metric.value or 0.0 for row in rows]
    lines = [PlotLine(np.array([x[k] for k in front]), np.array([y[k] for k in front]), TEXT_COLOR, faint=True)]
    lines += [row_point(row, x_row, style[row.title]) for row, x_row in zip(rows, x, strict=True)]
    title = f"{formatting.title(table.primary_metric)} on {table.measurement.data} against {name}"
    return ParetoChart(Chart(title, lines, name, x_log=True, num_omitted=num_omitted), [rows[k] for k in front])


def pareto_front(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
    """Return the indices of the points that no other point dominates, cheapest first.

    A point dominates another if it is no worse in both cost and loss and better in at least one. Equal points do not
    dominate each other, so they are on the front together.
    """
    order = sorted(range(len(cost)), key=lambda k: (cost[k], loss[k]))
    front: list[int] = []
    for k in order:
        last = front[-1] if front else None
        if last is None or loss[k] < loss[last] or (cost[k], loss[k]) == (cost[last], loss[last]):
            front.append(k)
    return front
