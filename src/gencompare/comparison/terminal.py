"""Tables for the terminal. All names are printed as plain text, so brackets in names are not parsed as markup."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gencompare.comparison import formatting
from gencompare.comparison.forecast import Check, Forecasts
from gencompare.comparison.load_runs import LoadedRuns, RunFolder, load_runs
from gencompare.comparison.planning import Plan, power_note
from gencompare.comparison.ranking import (
    RankingTable,
    TableRow,
    explain_separate_tables,
    metric_disagreements,
    rank_results,
    ranking_tables,
    runs_without_results,
)
from gencompare.comparison.sampler_description import describe_weights
from gencompare.comparison.suggestions import suggested_commands
from gencompare.comparison.tables import Column, columns, metric_heading, real_data, table_title
from gencompare.records import RunRecord

MAX_RESULTS = 4
"""Maximum number of results in the summary of a run. The latest results are shown."""

MAX_CELL_WIDTH = 32
"""Largest width of a cell. Longer text wraps."""


def print_tables(runs: LoadedRuns | Iterable[str | os.PathLike[str]], console: Console | None = None) -> None:
    """Print the comparison of ``runs`` (loaded runs or run folders), with a table per protocol."""
    console = console or Console()
    loaded = runs if isinstance(runs, LoadedRuns) else load_runs(runs)
    tables = ranking_tables(loaded)
    for table in tables:
        console.print(_ranking(table, console.width))
    if len(tables) > 1:
        console.print(
            Text(
                f"{len(tables)} protocols: metrics are comparable only within a table."
                f" {explain_separate_tables(tables)}\n"
            )
        )
        for sentence in metric_disagreements(tables, beyond_intervals=True):
            console.print(Text(f"{sentence}\n", style="yellow"))
        for number, command in enumerate(suggested_commands(tables)):
            heading = "" if number else "To evaluate the runs under one protocol:\n"
            console.print(Text(f"{heading}  {command}"), soft_wrap=True)
    for run in runs_without_results(loaded.runs):
        console.print(Text(f"no results: {run.label} ({run.record.state})", style="dim"))
    for skip in loaded.skipped:
        console.print(Text(f"skipped: {skip}", style="yellow"))


def _ranking(ranking: RankingTable, width: int) -> RenderableType:
    all_columns = [column for column in columns(ranking) if not _repeats_run(column, ranking)]
    baselines = [real_data(ranking, column) for column in all_columns]
    shown, used = [], 3
    for column, baseline in zip(all_columns, baselines, strict=True):
        lines = [column.title, baseline, *(line for row in ranking.rows for line in _lines(column, row, ranking))]
        used += 3 + max(min(len(line), MAX_CELL_WIDTH) for line in lines)
        # A narrow terminal drops the rightmost columns.
        if used > width and len(shown) > 2:
            break
        shown.append(column)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right")
    for column in shown:
        table.add_column(
            Text(column.title), justify="right" if column.numeric else "left", max_width=MAX_CELL_WIDTH, overflow="fold"
        )
    for _, rows in ranking.sections():
        for row in rows:
            texts = [
                Text("\n").join(Text(line, "dim" if k else "") for k, line in enumerate(_lines(column, row, ranking)))
                for column in shown
            ]
            table.add_row(str(row.rank or formatting.MISSING), *texts)
        table.add_section()
    if any(baselines[1:]):
        table.add_row("", *(Text(text, "dim") for text in baselines[: len(shown)]))
    num_hidden = len(all_columns) - len(shown)
    notes = [f"{num_hidden} more columns are in compare.html and compare.csv."] if num_hidden else []
    texts = [Text(note, style="dim") for note in [*notes, *ranking.notes(), power_note(ranking)] if note]
    summary = [Text(ranking.summary())] if ranking.summary() else []
    return Group(*_heading(ranking), table, *summary, *_warnings(ranking), *texts, "")


def _repeats_run(column: Column, ranking: RankingTable) -> bool:
    """Return whether the column is the family and every run is named after its family."""
    return column.title == "family" and all(row.run.record.family in row.run.label for row in ranking.rows)


def _lines(column: Column, row: TableRow, ranking: RankingTable) -> list[str]:
    """Return the lines of a cell: for a metric, its value and interval, and otherwise its text and annotations."""
    cell = column.cell(row)
    metric = row.result.metrics.get(column.metric_name or "")
    if metric is not None:
        warning = [formatting.WARNING] if column.metric_name == ranking.primary_metric and row.warnings else []
        return [formatting.join_values(cell.text, formatting.format_interval(metric)), *warning]
    return [cell.text, *cell.annotation.split(" · ")] if cell.annotation else [cell.text]


def _heading(ranking: RankingTable) -> tuple[Text, Text]:
    protocol = formatting.describe_protocol(ranking.measurement)
    return Text(table_title(ranking), style="bold"), Text(protocol, style="dim")


def _warnings(ranking: RankingTable) -> list[Text]:
    return [Text(f"Warning: {warning}", style="bold yellow") for warning in ranking.warnings()]


MAX_PLANS = 6
"""Maximum number of plans in a table. The cheapest are shown."""


def print_plans(plans: list[Plan], console: Console | None = None) -> None:
    """Print the numbers of seeds and images, the mean and the lowest power, and the cost of the cheapest plans."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("seeds a row", "images a seed", "power", "device time", "lowest power of a pair"):
        table.add_column(title, justify="right")
    for plan in plans[:MAX_PLANS]:
        cost = formatting.format_duration(plan.cost)
        power, (lowest, *pair) = formatting.format_percent(plan.power), min(plan.powers)
        weakest = Text(f"{formatting.format_percent(lowest)}: {formatting.join_names(pair)}")
        table.add_row(str(plan.num_seeds), f"{plan.num_images:,}", power, cost, weakest)
    (console or Console()).print(table)


def print_forecasts(forecasts: Forecasts, console: Console | None = None) -> None:
    """Print what one more run of each family will reach."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    interval = f"{formatting.format_percent(forecasts.level)} interval"
    for title in ("family", "FLOPs", formatting.title(forecasts.metric), interval, "runs"):
        table.add_column(title, justify="left" if title == "family" else "right")
    for each in forecasts.forecasts:
        cost = f"{each.flops:.3g}{' (interpolation)' if each.interpolation else ''}"
        cells = (cost, formatting.format_metric(each.value), _ends(each.interval), str(each.num_runs))
        table.add_row(Text(each.family), *cells)
    (console or Console()).print(table)


def print_checks(checks: Iterable[Check], metric: str, console: Console | None = None) -> None:
    """Print longer runs beside their forecasts."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("run", "FLOPs", "forecast", "interval", formatting.title(metric), "holds"):
        table.add_column(title, justify="left" if title in ("run", "holds") else "right")
    for check in checks:
        each = check.forecast
        cells = (f"{each.flops:.3g}", formatting.format_metric(each.value), _ends(each.interval))
        answer = f"{'yes' if check.holds else 'no'}{f' ({check.note})' if check.note else ''}"
        name = check.run.rsplit("/", 1)[-1]  # a sweep's folder takes the width of all numbers
        table.add_row(Text(name), *cells, formatting.format_metric(check.value), answer)
    (console or Console()).print(table)


def _ends(interval: tuple[float, float]) -> Text:
    return Text(f"[{', '.join(map(formatting.format_metric, interval))}]")


def describe_run(record: RunRecord) -> str:
    """Describe the family, data, parameters and training cost of a run in one line."""
    images = formatting.as_number(record.training.get("images_seen"))
    seconds = formatting.as_number(record.training.get("seconds"))
    speed = formatting.as_number(record.training.get("images_per_second"))
    parameters = formatting.as_number(record.model.get("parameters"))
    parts = [f"{record.family} on {record.data.get('name', 'unknown data')}"]
    if parameters is not None:
        parts.append(f"{formatting.format_count(parameters)} parameters")
    if images is not None:
        duration = f" in {formatting.format_duration(seconds)}" if seconds else ""
        evaluations = formatting.as_number(record.training.get("evaluation_seconds"))
        if seconds and evaluations:
            duration += f" (and {formatting.format_duration(evaluations)} of evaluations)"
        parts.append(f"{formatting.format_count(images)} images seen{duration}")
    if speed is not None:
        parts.append(f"{speed:,.0f} images/s")
    return ", ".join(parts)


def run_summary(record: RunRecord) -> RenderableType:
    """Tabulate all metrics of one run, with a row per metric, a column per result, and the real-data baseline."""
    results = sorted(record.results, key=lambda result: result.created)[-MAX_RESULTS:]
    shown = RunRecord(record.name, record.family, record.data, model=record.model, training=record.training)
    shown.results = results
    parts: list[RenderableType] = [Text(describe_run(record))]
    for ranking in rank_results([RunFolder(Path(), shown, record.name)]):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for row in ranking.rows:
            g = row.result.generation
            heading = ", ".join(filter(None, [describe_weights(g), g.sampler if g.sampler != "unknown" else ""]))
            table.add_column(Text(heading or "samples"), justify="right")
        table.add_column("real data", justify="right")
        notes: dict[str, None] = {}
        for name in ranking.metrics():
            primary = name == ranking.primary_metric
            metrics = [row.result.metrics.get(name) for row in ranking.rows]
            baseline = next((m.baseline for m in metrics if m is not None and m.baseline is not None), None)
            texts = []
            for row, metric in zip(ranking.rows, metrics, strict=True):
                annotations = []
                if metric is not None:
                    annotations = [
                        formatting.format_interval(metric),
                        formatting.format_ratio_to_baseline(metric) if primary else "",
                        formatting.note_label(metric),
                        formatting.WARNING if primary and row.warnings else "",
                    ]
                texts.append(
                    Text.assemble(
                        formatting.format_metric(metric.value if metric else None),
                        *(("  " + annotation, "dim") for annotation in annotations if annotation),
                    )
                )
                if metric is not None and metric.note:
                    notes[f"{formatting.title(name)}: {metric.note}"] = None
            table.add_row(Text(metric_heading(ranking, name)), *texts, Text(formatting.format_metric(baseline)))
        parts += [*_heading(ranking), table, *_warnings(ranking), *(Text(note, style="dim") for note in notes), ""]
    num_hidden = len(record.results) - len(results)
    if num_hidden:
        parts.append(Text(f"{num_hidden} earlier results are listed in record.json and compare.html.", style="dim"))
    return Group(*parts)
