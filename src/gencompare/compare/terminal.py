"""Tables for the terminal. Names are printed as text: square brackets in them are no markup."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gencompare.compare import formatting
from gencompare.compare.load_runs import LoadedRuns, RunFolder, load_runs
from gencompare.compare.ranking import TableSection as Ranking
from gencompare.compare.ranking import by_primary_metric, disagreements, rank, ranked, without_metrics
from gencompare.compare.sampler_description import weights
from gencompare.compare.suggestions import suggested_commands
from gencompare.compare.tables import Cell, columns, heading
from gencompare.records import RunRecord

RESULTS = 4
"""Results of one run shown side by side at its end, the latest ones."""


NAME = 32
"""Longer text goes on in the next line of its cell."""


def print_tables(runs: LoadedRuns | Iterable[str | os.PathLike[str]], console: Console | None = None) -> None:
    """Print the comparison of ``runs`` (folders, or what was gathered): a table a protocol, and what was left out."""
    console = console or Console()
    gathered = runs if isinstance(runs, LoadedRuns) else load_runs(runs)
    groups = ranked(gathered)
    for group in groups:
        console.print(_ranking(group, console.width))
    if len(groups) > 1:
        console.print(
            Text(f"{len(groups)} protocols: figures are ranked within one table only. {by_primary_metric(groups)}\n")
        )
        for sentence in disagreements(groups):
            console.print(Text(f"{sentence}\n", style="yellow"))
        for number, line in enumerate(suggested_commands(groups)):
            console.print(Text(("" if number else "To measure them alike:\n") + f"  {line}"), soft_wrap=True)
    for run in without_metrics(gathered.runs):
        console.print(Text(f"no figures: {run.label} ({run.record.state})", style="dim"))
    for skip in gathered.skipped:
        console.print(Text(f"left out: {skip.folder}: {skip.reason}", style="yellow"))


def _ranking(group: Ranking, width: int) -> RenderableType:
    every = columns(group)
    shown, used = [], 3
    for column in every:
        cells = [column.cell(row) for row in group.rows]
        used += 3 + max(min(len(line), NAME) for cell in cells for line in [column.title, *_lines(cell)])
        # The rightmost columns go first where the terminal is narrow.
        if used > width and len(shown) > 2:
            break
        shown.append(column)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right")
    for column in shown:
        table.add_column(
            Text(column.title), justify="right" if column.numeric else "left", max_width=NAME, overflow="fold"
        )
    for _, rows in group.sections():
        for row in rows:
            texts = [
                Text("\n").join(Text(line, "dim" if k else "") for k, line in enumerate(_lines(column.cell(row))))
                for column in shown
            ]
            table.add_row(str(row.rank or formatting.NONE), *texts)
        table.add_section()
    left = len(every) - len(shown)
    notes = [f"{left} more columns are in the page and in the CSV: this terminal is narrow."] if left else []
    notes = [Text(note, style="dim") for note in [*notes, *group.notes()]]
    return Group(*_heading(group), table, *_warnings(group), *notes, "")


def _warnings(group: Ranking) -> list[Text]:
    return [Text(f"Warning: {flag}", style="bold yellow") for flag in group.flags()]


def _lines(cell: Cell) -> list[str]:
    return [cell.text, *cell.beside.split(" · ")] if cell.beside else [cell.text]


def _heading(group: Ranking) -> tuple[Text, Text]:
    title = f"{group.measurement.data}: {heading(group, group.primary_metric)}"
    return Text(title, style="bold"), Text(formatting.describe(group.measurement), style="dim")


def cost(record: RunRecord) -> str:
    """What a run is and what it took, in one line."""
    taken = record.training
    seen, seconds = formatting.format_number(taken.get("images_seen")), formatting.format_number(taken.get("seconds"))
    speed, parameters = (
        formatting.format_number(taken.get("images_per_second")),
        formatting.format_number(record.model.get("parameters")),
    )
    parts = [f"{record.family} on {record.data.get('name', 'unknown data')}"]
    parts += [f"{formatting.format_count(parameters)} parameters"] if parameters is not None else []
    if seen is not None:
        parts.append(
            f"{formatting.format_count(seen)} images seen"
            + (f" in {formatting.format_duration(seconds)}" if seconds else "")
        )
    parts += [f"{speed:,.0f} images/s"] if speed is not None else []
    return ", ".join(parts)


def summary(record: RunRecord) -> RenderableType:
    """All figures of one run, for its end: a row a figure, a column a result, with the real-against-real floor."""
    results = record.results[-RESULTS:]
    kept = RunRecord(record.name, record.family, record.data, model=record.model, training=record.training)
    kept.results = results
    parts: list[RenderableType] = [Text(cost(record))]
    for group in rank([RunFolder(Path(), kept, record.name)]):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for row in group.rows:
            g = row.result.generation
            made = ", ".join(part for part in (weights(g), g.sampler if g.sampler != "unknown" else "") if part)
            table.add_column(Text(made or "samples"), justify="right")
        table.add_column("real data", justify="right")
        noted: dict[str, None] = {}
        for name in group.metrics():
            metrics = [row.result.metrics.get(name) for row in group.rows]
            floor = next((m.baseline for m in metrics if m is not None and m.baseline is not None), None)
            texts = []
            for row, metric in zip(group.rows, metrics, strict=True):
                beside = []
                if metric is not None:
                    beside = [
                        formatting.format_interval(metric),
                        formatting.format_seeds(metric) if name == group.primary_metric else "",
                        formatting.label(metric),
                        formatting.WARNED if name == group.primary_metric and row.flags else "",
                    ]
                texts.append(
                    Text.assemble(
                        formatting.format_metric(metric.value if metric else None),
                        *(("  " + part, "dim") for part in beside if part),
                    )
                )
                if metric is not None and metric.note:
                    noted[f"{formatting.title(name)}: {metric.note}"] = None
            table.add_row(Text(heading(group, name)), *texts, Text(formatting.format_metric(floor)))
        parts += [*_heading(group), table, *_warnings(group), *(Text(note, style="dim") for note in noted), ""]
    hidden = len(record.results) - len(results)
    if hidden:
        parts.append(Text(f"{hidden} earlier results are in the record and in the page.", style="dim"))
    return Group(*parts)
