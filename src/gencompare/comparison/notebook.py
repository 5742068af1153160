"""A comparison object, which can be printed, displayed in a notebook, and saved as an HTML page."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import escape
from rich.console import Console

from gencompare.comparison import formatting
from gencompare.comparison.load_runs import LoadedRuns
from gencompare.comparison.page import write_report
from gencompare.comparison.ranking import RankingTable, metric_disagreements, ranking_tables, runs_without_results
from gencompare.comparison.tables import columns, csv_rows, real_data, table_title
from gencompare.comparison.terminal import print_tables

MAX_NOTEBOOK_COLUMNS = 8
"""Maximum number of table columns in a notebook. The HTML page and `Comparison.rows` contain all columns."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Results ranked within each evaluation protocol, best first.

    ``print`` shows the tables of ``task=compare``, and a notebook displays them.
    """

    loaded: LoadedRuns

    @property
    def tables(self) -> list[RankingTable]:
        """One table per protocol."""
        return ranking_tables(self.loaded)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per result with its metrics, protocol and costs, for example for ``pandas.DataFrame``."""
        return csv_rows(self.loaded)

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write the page ``compare.html`` and the table files to the folder ``out``. Return the path of the page."""
        return write_report(self.loaded, out)

    def __str__(self) -> str:
        text = io.StringIO()
        print_tables(self.loaded, Console(file=text, width=120, force_jupyter=False))
        return text.getvalue()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [_html(table) for table in self.tables]
        notes = metric_disagreements(self.tables)
        notes += [f"No results: {run.label} ({run.record.state})." for run in runs_without_results(self.loaded.runs)]
        notes += [f"Skipped {skip}" for skip in self.loaded.skipped]
        parts += [f"<p>{escape(note)}</p>" for note in notes]
        return "\n".join(parts)


def _html(table: RankingTable) -> str:
    shown = columns(table)[:MAX_NOTEBOOK_COLUMNS]
    head = "".join(f"<th>{escape(title)}</th>" for title in ["#", *(column.title for column in shown)])
    body = []
    for row in table.rows:
        cells = [column.cell(row) for column in shown]
        texts = [
            f"{escape(cell.text)}<br><small>{escape(cell.annotation)}</small>" if cell.annotation else escape(cell.text)
            for cell in cells
        ]
        body.append("".join(f"<td>{text}</td>" for text in [row.rank or formatting.MISSING, *texts]))
    baselines = [real_data(table, column) for column in shown]
    if any(baselines[1:]):
        body.append("".join(f"<td><i>{escape(text)}</i></td>" for text in ["", *baselines]))
    notes = [*(f"Warning: {warning}" for warning in table.warnings()), *table.notes()]
    return (
        f"<b>{escape(table_title(table))}</b><br><small>{escape(formatting.describe_protocol(table.measurement))}</small>"
        f"<table><tr>{head}</tr>{''.join(f'<tr>{cells}</tr>' for cells in body)}</table>"
        f"<p>{escape(table.summary())}</p>" + "".join(f"<p><small>{escape(note)}</small></p>" for note in notes)
    )
