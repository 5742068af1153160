"""Bits/dim of different families in one table, and against the quality of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gencompare.comparison import formatting
from gencompare.comparison.ranking import RankingTable, TableRow
from gencompare.comparison.svg_plots import Chart, Style, row_point
from gencompare.records import Metric

BPD_PREFIX = "bpd_"
"""Prefix of the metrics in bits/dim, one for each estimator."""

KINDS = ("exact", "bound", "estimate")
"""Note labels of metrics in bits/dim, most reliable first."""


@dataclass(frozen=True)
class LikelihoodRow:
    """Bits/dim of a table row by one estimator."""

    row: TableRow
    metric_name: str
    metric: Metric

    @property
    def estimator(self) -> str:
        return self.metric_name.removeprefix(BPD_PREFIX)

    @property
    def kind(self) -> str:
        """One of `KINDS`, or empty if the record names none."""
        label = formatting.note_label(self.metric)
        return label if label in KINDS else ""

    @property
    def pixels(self) -> str:
        """How pixels are treated: `generative_model.LikelihoodEstimate.method`. Old records do not say so."""
        return self.metric.method or formatting.MISSING

    @property
    def images(self) -> str:
        """Which images were scored, as in ``500 test images``."""
        parts = self.metric.note.split(";")[0].split(",", 1)
        return parts[1].strip() if len(parts) == 2 else ""


def likelihood_rows(table: RankingTable) -> list[LikelihoodRow]:
    """Return all finite bits/dim of a table, lowest first."""
    rows = [
        LikelihoodRow(row, name, metric)
        for row in table.rows
        for name, metric in row.result.metrics.items()
        if name.startswith(BPD_PREFIX) and formatting.is_finite(metric.value)
    ]
    return sorted(rows, key=lambda each: each.metric.value or 0.0)


def best_likelihood(row: TableRow, rows: Iterable[LikelihoodRow]) -> LikelihoodRow | None:
    """Return the exact bits/dim of a table row, else its lowest bound, else its lowest estimate."""
    order = (*KINDS, "")
    own = [each for each in rows if each.row is row]
    return min(own, key=lambda each: (order.index(each.kind), each.metric.value), default=None)


def likelihood_charts(tables: Iterable[RankingTable], style: Mapping[str, Style]) -> list[Chart]:
    """Plot the primary metric against bits/dim for each table with both for at least two rows."""
    charts = []
    for table in tables:
        rows, lines = likelihood_rows(table), []
        for row in table.rows:
            best = best_likelihood(row, rows)
            if best is not None and formatting.is_finite(row.metric.value):
                name = f"{row.title} ({best.kind})" if best.kind else row.title
                lines.append(row_point(row, best.metric.value or 0.0, style[row.title], name))
        if len(lines) > 1:
            title = f"{formatting.title(table.primary_metric)} on {table.measurement.data} against bits/dim"
            charts.append(Chart(title, lines, "bits/dim (lower is better)"))
    return charts
