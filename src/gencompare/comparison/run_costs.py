"""Training and sampling costs, and charts of quality against cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gencompare.comparison import formatting
from gencompare.comparison.ranking import RankingTable, TableRow, badness, badness_of_seeds
from gencompare.comparison.statistics import sampling_variance
from gencompare.comparison.svg_plots import Chart, PlotLine, Style, row_point
from gencompare.records import RunRecord

KINDS = ("images_seen", "steps", "flops", "device_seconds", "energy_joules")
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

RESAMPLES = 1000
"""Number of tables that are resampled for the probability to be on a Pareto front."""

MIN_PROBABILITY = 0.01
"""Lowest probability of a row off the front that is listed."""


@dataclass(frozen=True)
class ParetoChart:
    """A chart of the primary metric of one table against one kind of cost."""

    chart: Chart
    front: list[tuple[TableRow, float]]
    """The rows on the Pareto front, cheapest (and therefore worst) first, and how likely each is on it."""
    others: list[tuple[TableRow, float]]
    """Other rows that are on the front with at least `MIN_PROBABILITY`, the most likely first."""


COSTS: dict[str, Callable[[TableRow], float | None]] = {
    "training FLOPs": lambda row: total_cost(row.run.record)["flops"],
    "training device seconds": lambda row: total_cost(row.run.record)["device_seconds"],
    "training energy in joules": lambda row: total_cost(row.run.record)["energy_joules"],
    "NFE per sample": lambda row: formatting.total_nfe(row.result.generation.nfe),
    "FLOPs per sample": lambda row: formatting.as_number(row.result.details.get("flops_per_sample")),
}


def pareto_charts(tables: Iterable[RankingTable], style: Mapping[str, Style]) -> list[ParetoChart]:
    """Create a chart for each table and each cost that differs between its ranked rows."""
    charts = []
    for table in tables:
        ranked = [row for row in table.rows if row.rank is not None]
        losses = dict(zip(map(id, ranked), resampled_losses(ranked), strict=True))
        for name, cost in COSTS.items():
            rows = [row for row in ranked if (cost(row) or 0) > 0]
            if len({cost(row) for row in rows}) > 1:
                probability = front_probabilities(
                    np.array([cost(row) for row in rows]), np.stack([losses[id(row)] for row in rows])
                )
                charts.append(_pareto_chart(table, name, cost, rows, probability, style))
    return charts


def _pareto_chart(
    table: RankingTable,
    name: str,
    cost: Callable[[TableRow], float | None],
    rows: Sequence[TableRow],
    probability: np.ndarray,
    style: Mapping[str, Style],
) -> ParetoChart:
    front = pareto_front([cost(row) or 0.0 for row in rows], [badness(row) for row in rows])
    on_front = [(rows[k], float(probability[k])) for k in front]
    others = [(rows[k], float(p)) for k, p in enumerate(probability) if k not in front and p >= MIN_PROBABILITY]
    others.sort(key=lambda item: -item[1])
    drawn = sorted({*range(min(MAX_POINTS, len(rows))), *front})
    num_omitted, front = len(rows) - len(drawn), [drawn.index(k) for k in front]
    rows = [rows[k] for k in drawn]
    x = [cost(row) or 0.0 for row in rows]
    y = [row.metric.value or 0.0 for row in rows]
    lines = [PlotLine(np.array([x[k] for k in front]), np.array([y[k] for k in front]), TEXT_COLOR, faint=True)]
    lines += [row_point(row, x_row, style[row.title]) for row, x_row in zip(rows, x, strict=True)]
    title = f"{formatting.title(table.primary_metric)} on {table.measurement.data} against {name}"
    return ParetoChart(Chart(title, lines, name, x_log=True, num_omitted=num_omitted), on_front, others)


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


def resampled_losses(rows: Sequence[TableRow]) -> np.ndarray:
    """Resample the primary metric of each row, lower is better, (rows, RESAMPLES).

    A row with several training seeds is the mean of as many values, drawn from them with replacement (Efron 1979,
    "Bootstrap methods: another look at the jackknife", https://doi.org/10.1214/aos/1176344552). With few seeds, this is
    narrower than their interval. A row with one seed has normal errors of the size of its sampling interval. A row
    whose runs differ in more than seeds, or whose single value has no interval, does not vary. Rows are resampled
    independently.
    """
    random = np.random.default_rng(0)
    losses = np.empty((len(rows), RESAMPLES))
    for k, row in enumerate(rows):
        values = row.group.values_by_seed(row.result.primary_metric)
        if values and len(values) > 1:
            seeds = np.array(badness_of_seeds(values, row.metric))
            losses[k] = random.choice(seeds, (RESAMPLES, len(seeds))).mean(1)
        elif values and (variance := sampling_variance(row.metric)):
            losses[k] = badness_of_seeds([*random.normal(values[0], variance**0.5, RESAMPLES)], row.metric)
        else:
            losses[k] = badness(row)
    return losses


def front_probabilities(cost: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Compute the share of tables in which each row is on the Pareto front, as in `pareto_front`.

    Args:
        cost: the cost of each row, (rows,).
        losses: the loss of each row in each table, lower is better, (rows, tables).

    Returns:
        The share of tables in which no other row dominates a row, (rows,).
    """
    on_front = np.empty(losses.shape, dtype=bool)
    cheaper = np.full(losses.shape[1], np.inf)
    for each in np.unique(cost):
        equal = cost == each
        best = losses[equal].min(0)
        on_front[equal] = (losses[equal] == best) & (best < cheaper)
        cheaper = np.minimum(cheaper, best)
    return on_front.mean(1)
