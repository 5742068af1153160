"""Columns and cells of the ranking tables, and their output as CSV, Markdown and LaTeX files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gencompare.comparison import formatting
from gencompare.comparison.bits_per_dim import BPD_PREFIX, best_likelihood, likelihood_rows
from gencompare.comparison.load_runs import LoadedRuns, RunFolder
from gencompare.comparison.ranking import RankingTable, TableRow, ranking_tables, runs_without_results
from gencompare.comparison.run_costs import autoencoder_cost, describe_dependencies, own_cost, total_cost
from gencompare.comparison.sampler_description import describe_sampling, describe_weights
from gencompare.comparison.statistics import warnings_of
from gencompare.errors import printable
from gencompare.files import write_text


@dataclass(frozen=True)
class Cell:
    text: str
    annotation: str = ""
    """Additional text that is shown below ``text`` in smaller type."""
    sort_key: float | str | None = None
    """Value to sort the column by. Cells with None come last."""


@dataclass(frozen=True)
class Column:
    title: str
    cell: Callable[[TableRow], Cell]
    numeric: bool = True
    metric_name: str | None = None
    """The metric that the column shows."""


def columns(table: RankingTable) -> list[Column]:
    """Return the columns of a table, except those that are empty in every row."""
    names = table.metrics()
    metrics = [
        Column(metric_heading(table, name), _metric(name), metric_name=name)
        for name in names
        if not name.startswith(BPD_PREFIX)
    ]
    if len(metrics) < len(names):
        bpd_position = formatting.column_position(BPD_PREFIX)
        index = sum(formatting.column_position(column.metric_name or "") < bpd_position for column in metrics)
        metrics.insert(index, Column("bits/dim\u00a0↓", _bits_per_dim(table)))
    all_columns = [
        Column("run", lambda row: _text(row.run.label, _run_annotation(row)), numeric=False),
        Column("family", lambda row: _text(row.run.record.family), numeric=False),
        *metrics[:1],
        Column("vs. best", _comparison),
        *metrics[1:],
        Column("NFE", _nfe),
        Column("FLOPs/sample", _number(lambda row: row.result.details.get("flops_per_sample"))),
        Column("parameters", _number(lambda row: row.run.record.model.get("parameters"))),
        Column("images seen", _images_seen),
        Column("device time", _device_time),
        Column(
            "train images/s",
            _number(lambda row: row.run.record.training.get("images_per_second"), formatting.format_rate),
        ),
        Column("MFU", _number(lambda row: row.run.record.training.get("mfu"), formatting.format_percent)),
        Column("samples/s", _number(_samples_per_second, formatting.format_rate)),
        Column("weights", lambda row: _text(describe_weights(row.result.generation)), numeric=False),
        Column("sampler", lambda row: _known_text(row.result.generation.sampler), numeric=False),
        Column("guidance", lambda row: _known_text(row.result.generation.guidance), numeric=False),
        Column("seed", lambda row: Cell(", ".join(map(str, row.group.seeds)), sort_key=row.group.seeds[0])),
    ]
    return [column for column in all_columns if any(column.cell(row).sort_key not in (None, "") for row in table.rows)]


def real_data(table: RankingTable, column: Column) -> str:
    """Return the cell of a column in the row of the real-data baseline, which is below the other rows."""
    if column.title == "run":
        return "real data"
    metrics = [row.result.metrics.get(column.metric_name or "") for row in table.rows]
    baseline = next((m.baseline for m in metrics if m is not None and formatting.is_finite(m.baseline)), None)
    return "" if baseline is None else formatting.format_metric(baseline)


def metric_heading(table: RankingTable, name: str) -> str:
    """Return the title of a metric, without the table's extractor, with an arrow towards better values."""
    return _with_arrow(table, name, formatting.title(name.replace(f"_{table.measurement.extractor}", "")))


def table_title(table: RankingTable) -> str:
    """Return the data set and primary metric of a table as its title."""
    name = table.primary_metric
    return f"{table.measurement.data}: {_with_arrow(table, name, formatting.title(name))}"


def _with_arrow(table: RankingTable, name: str, title: str) -> str:
    metric = next((row.result.metrics[name] for row in table.rows if name in row.result.metrics), None)
    arrow = formatting.direction_arrow(metric) if metric is not None else ""
    return "\u00a0".join(filter(None, [title, arrow]))


def _run_annotation(row: TableRow) -> str:
    """Describe what distinguishes the row from other rows, its status, and the state of an unfinished run."""
    state = row.run.record.state
    parts = [row.run.settings, row.sampling, row.status, state if state not in ("finished", "samples") else ""]
    return " · ".join(part for part in parts if part)


def _text(text: str, annotation: str = "") -> Cell:
    return Cell(text or formatting.MISSING, annotation, text)


def _known_text(text: str) -> Cell:
    return _text("" if text in ("unknown", "none") else text)


def _number(
    value: Callable[[TableRow], Any], to_text: Callable[[float | None], str] = formatting.format_count
) -> Callable[[TableRow], Cell]:
    def cell(row: TableRow) -> Cell:
        number = formatting.as_number(value(row))
        return Cell(to_text(number), sort_key=number)

    return cell


def _metric(name: str) -> Callable[[TableRow], Cell]:
    def cell(row: TableRow) -> Cell:
        metric = row.result.metrics.get(name)
        if metric is None:
            return Cell(formatting.MISSING)
        primary = name == row.result.primary_metric
        warning = formatting.WARNING if primary and row.warnings else ""
        annotation = formatting.join_notes(warning, formatting.annotation(metric, primary=primary, baseline=False))
        return Cell(formatting.format_metric(metric.value), annotation, formatting.as_number(metric.value))

    return cell


def _comparison(row: TableRow) -> Cell:
    """Show the Holm-adjusted p value against the best tested row, and whether the difference is significant.

    The best tested row sorts first, followed by the others with decreasing p value.
    """
    comparison = row.comparison
    if comparison is None:
        return Cell(formatting.MISSING)
    if comparison.p_value is None:
        return Cell("best tested", sort_key=-2.0)
    p = comparison.p_value
    verdict = "significantly worse than" if comparison.significant else "not significantly different from"
    return Cell("p < 0.001" if p < 0.001 else f"p = {p:.2g}", f"{verdict} #{comparison.best_rank}", -p)


def _bits_per_dim(table: RankingTable) -> Callable[[TableRow], Cell]:
    """Show the most reliable bits/dim of a row, with the name of the estimator and its kind.

    A model may have several estimators, and they may differ between models; `likelihood_lines` lists all of them.
    """
    rows = likelihood_rows(table)

    def cell(row: TableRow) -> Cell:
        best = best_likelihood(row, rows)
        if best is None:
            return Cell(formatting.MISSING)
        annotation = ", ".join(filter(None, [best.estimator, best.kind]))
        return Cell(formatting.format_metric(best.metric.value), annotation, best.metric.value)

    return cell


LIKELIHOOD_TITLES = ("run", "bits/dim\u00a0↓", "kind", "pixels", "estimator", "images")


def likelihood_lines(table: RankingTable) -> list[tuple[TableRow, list[str]]]:
    """Return all bits/dim of a table as text, lowest first: the columns of `LIKELIHOOD_TITLES` after the run."""
    return [
        (each.row, [formatting.format_metric(each.metric.value), each.kind, each.pixels, each.estimator, each.images])
        for each in likelihood_rows(table)
    ]


def _images_seen(row: TableRow) -> Cell:
    """Show the training images up to the evaluated checkpoint, including those of all dependencies."""
    return _total(row, "images_seen", formatting.format_count, row.result.generation.images_seen)


def _device_time(row: TableRow) -> Cell:
    """Show the device time of training, including that of all dependencies."""
    return _total(row, "device_seconds", formatting.format_duration)


def _total(row: TableRow, kind: str, to_text: Callable[[float | None], str], own: float | None = None) -> Cell:
    """Show a total training cost, annotated with the cost of the dependencies.

    Args:
        own: cost of the model itself; None takes it from the record.
    """
    record = row.run.record
    recorded, total = own_cost(record)[kind], total_cost(record)[kind]
    if recorded is not None and total is None:  # an incomplete cost is shown as missing
        return Cell(formatting.MISSING)
    own = recorded if own is None else own
    further = 0.0 if recorded is None or total is None else total - recorded
    if own is None or further <= 0:
        return Cell(to_text(own), sort_key=own)
    annotation = f"incl. {to_text(further)}: {describe_dependencies(record)}"
    return Cell(to_text(own + further), annotation, own + further)


def _nfe(row: TableRow) -> Cell:
    nfe = {name: n for name, n in (row.result.generation.nfe or {}).items() if formatting.is_finite(n)}
    total = formatting.total_nfe(nfe)
    if total is None:
        return Cell(formatting.MISSING)
    by_network = " + ".join(f"{formatting.format_rate(n)} {name}" for name, n in nfe.items()) if len(nfe) > 1 else ""
    if len(nfe) > 2 and len(set(nfe.values())) == 1:  # the blocks of a flow
        by_network = f"{formatting.format_rate(next(iter(nfe.values())))} in each of {len(nfe)} networks"
    return Cell(formatting.format_rate(total), by_network, total)


def _samples_per_second(row: TableRow) -> float | None:
    seconds = row.result.seconds.get("sampling")
    return row.result.measurement.num_images / seconds if formatting.is_finite(seconds) and seconds else None


def metrics_table(table: RankingTable) -> dict[str, Any]:
    """Tabulate all metrics, with one row per metric and one column per table row, and details of the evaluation."""
    metric_rows = []
    for name in table.metrics():
        primary = name == table.primary_metric
        metrics = [row.result.metrics.get(name) for row in table.rows]
        cells = []
        for row, metric in zip(table.rows, metrics, strict=True):
            warning = formatting.WARNING if primary and row.warnings else ""
            if metric is None:
                cells.append((formatting.MISSING, warning))
                continue
            annotation = formatting.annotation(metric, primary=primary, baseline=False)
            cells.append((formatting.format_metric(metric.value), formatting.join_notes(warning, annotation)))
        known = [metric for metric in metrics if metric is not None]
        baseline = next((m.baseline for m in known if m.baseline is not None), None)
        unit = next((m.unit for m in known if m.unit), "")
        notes = "; ".join(dict.fromkeys(m.note for m in known if m.note and m.note != formatting.note_label(m)))
        metric_rows.append((metric_heading(table, name), unit, cells, formatting.format_metric(baseline), notes))
    names = dict.fromkeys(
        name for row in table.rows for name, value in row.result.details.items() if value not in ([], {})
    )
    for shown_elsewhere in ("warnings", "images_per_second", "nearest_training"):
        names.pop(shown_elsewhere, None)
    speed = [column for column in columns(table) if column.title in ("NFE", "samples/s")]
    details = [(column.title, [column.cell(row).text for row in table.rows]) for column in speed]
    details += [(name, [format_value(row.result.details.get(name)) for row in table.rows]) for name in names]
    headings = [(row.run.label, describe_sampling(row.result) or "samples") for row in table.rows]
    has_notes = any(notes for *_, notes in metric_rows)
    return {"headings": headings, "metrics": metric_rows, "details": details, "has_notes": has_notes}


def format_value(value: Any) -> str:
    """Format an arbitrary value of a record compactly."""
    if value is None:
        return formatting.MISSING
    if formatting.as_number(value) is not None:
        return formatting.format_count(value) if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, list):
        text = "  ".join(map(format_value, value))
    elif isinstance(value, dict):
        text = "  ".join(f"{key}: {format_value(part)}" for key, part in value.items())
    else:
        text = str(value)
    return text if len(text) <= 300 else text[:299] + "…"


# CSV


def csv_rows(loaded: LoadedRuns) -> list[dict[str, Any]]:
    """Return all results with all metrics, protocol fields and costs, one row per result, in the order of the tables.

    A metric ``m`` has the columns ``m``, ``m.baseline`` (real data), ``m.low``, ``m.high``, ``m.note`` and
    ``m.method``. Results in
    the same table row have the same rank, ``mean`` (with ``mean.low`` and ``mean.high``) and ``p_holm``, the adjusted
    p-value against the row of rank ``best_rank``. Each run without results also has a row.
    """
    lines: list[dict[str, Any]] = []
    for table in ranking_tables(loaded):
        metric_names = table.metrics()
        members = [(row, run, result) for row in table.rows for run, result in row.group.members]
        for row, run, result in members:
            line = {"rank": row.rank, "status": row.status, **_run_fields(run), "primary_metric": result.primary_metric}
            if len(row.group.members) > 1:
                low, high = row.metric.interval or (None, None)
                line |= {"mean": row.metric.value, "mean.low": low, "mean.high": high}
            if row.comparison is not None:
                line |= {"best_rank": row.comparison.best_rank, "p_holm": row.comparison.p_value}
            for name in metric_names:
                metric = result.metrics.get(name)
                if metric is not None:
                    low, high = metric.interval or (None, None)
                    line |= {name: metric.value, f"{name}.baseline": metric.baseline}
                    line |= {f"{name}.low": low, f"{name}.high": high, f"{name}.note": metric.note or None}
                    line |= {f"{name}.method": metric.method or None}
            line |= {"protocol": result.measurement.id}
            line |= {f"measurement.{name}": value for name, value in asdict(result.measurement).items()}
            line |= {f"generation.{name}": value for name, value in asdict(result.generation).items() if name != "nfe"}
            line |= {"nfe": formatting.total_nfe(result.generation.nfe)}
            line |= {f"nfe.{name}": value for name, value in (result.generation.nfe or {}).items()}
            line |= {"flops_per_sample": formatting.as_number(result.details.get("flops_per_sample"))}
            line |= {f"seconds.{name}": value for name, value in result.seconds.items()}
            line |= {"warnings": "; ".join(warnings_of(result)) or None}
            lines.append(line)
    return lines + [_run_fields(run) for run in runs_without_results(loaded.runs)]


def write_csv(loaded: LoadedRuns, path: str | os.PathLike[str]) -> None:
    """Write `csv_rows` to a CSV file."""
    lines = csv_rows(loaded)
    names = list(dict.fromkeys(name for line in lines for name, value in line.items() if value is not None))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(_csv_value, names))
    writer.writerows([_csv_value(line.get(name)) for name in names] for line in lines)
    write_text(path, text.getvalue())


def _run_fields(run: RunFolder) -> dict[str, Any]:
    record = run.record
    costs = (
        "steps", "images_seen", "seconds", "device_seconds", "images_per_second", "flops", "flops_per_second", "mfu",
        "energy_joules", "peak_memory_bytes",
    )  # fmt: skip
    return {
        "run": run.label, "family": record.family, "data": record.data.get("name"), "seed": record.seed,
        "state": record.state, "folder": printable(run.folder),
        "parameters": formatting.as_number(record.model.get("parameters")),
        **{f"training.{name}": formatting.as_number(record.training.get(name)) for name in costs},
        **{f"total_cost.{kind}": cost for kind, cost in total_cost(record).items()},
        **{f"autoencoder.{name}": formatting.as_number(autoencoder_cost(record).get(name)) for name in costs},
    }  # fmt: skip


def _csv_value(value: Any) -> Any:
    """Prefix strings such as ``=A1`` with an apostrophe, so spreadsheets do not evaluate them."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value


# Markdown


def write_markdown(loaded: LoadedRuns, path: str | os.PathLike[str]) -> None:
    """Write the ranking tables as Markdown."""
    parts = []
    for table in ranking_tables(loaded):
        shown = columns(table)
        lines = [f"### {_markdown(table_title(table))}", ""]
        lines += [_markdown(formatting.describe_protocol(table.measurement)), ""]
        lines += ["| # | " + " | ".join(_markdown(column.title) for column in shown) + " |"]
        lines += ["| ---: | " + " | ".join("---:" if column.numeric else "---" for column in shown) + " |"]
        for row in table.rows:
            cells = [column.cell(row) for column in shown]
            texts = [_markdown(f"{cell.text} ({cell.annotation})" if cell.annotation else cell.text) for cell in cells]
            lines.append(f"| {row.rank or formatting.MISSING} | " + " | ".join(texts) + " |")
        baselines = [real_data(table, column) for column in shown]
        lines += ["| | " + " | ".join(map(_markdown, baselines)) + " |"] if any(baselines[1:]) else []
        lines += [f"\n{_markdown(table.summary())}"] if table.summary() else []
        warnings = [f"Warning: {warning}" for warning in table.warnings()]
        lines += [f"\n{_markdown(note)}" for note in [*warnings, *table.notes()]]
        lines += _likelihood_markdown(table)
        parts.append("\n".join(lines))
    missing = [f"- {_markdown(run.label)} ({_markdown(run.record.state)})" for run in runs_without_results(loaded.runs)]
    if missing:
        parts.append("Runs without results:\n\n" + "\n".join(missing))
    skipped = [f"- {_markdown(str(skip))}" for skip in loaded.skipped]
    if skipped:
        parts.append("Skipped folders:\n\n" + "\n".join(skipped))
    write_text(path, "\n\n".join(parts) + "\n")


def _likelihood_markdown(table: RankingTable) -> list[str]:
    rows = [[row.title, *texts] for row, texts in likelihood_lines(table)]
    if not rows:
        return []
    heading = f"\n#### {_markdown(table.measurement.data)}: bits/dim of test images\n"
    lines = [LIKELIHOOD_TITLES, ("---", "---:", "---", "---", "---", "---"), *(map(_markdown, texts) for texts in rows)]
    return [heading, *(f"| {' | '.join(texts)} |" for texts in lines)]


def _markdown(text: str) -> str:
    """Escape the special characters of Markdown and HTML."""
    for character in "\\`*[]|#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


# LaTeX

LATEX_COLUMNS = 8
"""Maximum number of columns of a LaTeX table, not counting the rank. More would not fit on a page."""

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
        "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", '"': r"\char34{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
        "↓": r"$\downarrow$", "↑": r"$\uparrow$", "→": r"$\rightarrow$", "×": r"$\times$", "–": "--", "…": r"\dots{}",  # noqa: RUF001
        "\u00a0": "~", "·": r"$\cdot$",
    }
)  # fmt: skip


def write_latex(loaded: LoadedRuns, path: str | os.PathLike[str]) -> None:
    """Write the ranking tables as LaTeX, which needs ``\\usepackage{booktabs}`` and ``\\usepackage{textcomp}``."""
    parts = ["% \\usepackage{booktabs,textcomp}"]
    parts += [_latex_table(table) for table in ranking_tables(loaded) if table.rows]
    write_text(path, "\n\n".join(parts) + "\n")


def _latex_table(table: RankingTable) -> str:
    shown = [column for column in columns(table) if column.title != "family"][:LATEX_COLUMNS]
    warnings = [f"Warning: {warning}." for warning in table.warnings()]
    caption = " ".join([formatting.describe_protocol(table.measurement), *warnings, *table.notes()])
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{latex(table_title(table))}. {latex(caption)}}}",
        rf"\begin{{tabular}}{{r{''.join('r' if column.numeric else 'l' for column in shown)}}}",
        r"\toprule",
        " & ".join([r"\#", *(latex(column.title) for column in shown)]) + r" \\",
    ]
    for _, rows in table.sections():
        lines += [r"\midrule", *(_latex_row(row, shown, table.primary_metric) for row in rows)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _latex_row(row: TableRow, shown: list[Column], primary_metric: str) -> str:
    """Format a row. Its only annotations are those of the run and the interval of the primary metric, to save space."""
    cells = [str(row.rank) if row.rank is not None else "--"]
    for column in shown:
        cell, annotation = column.cell(row), ""
        if column.title == "run":
            annotation = cell.annotation
        if column.metric_name == primary_metric and primary_metric in row.result.metrics:
            annotation = formatting.format_interval(row.metric)
        best = column.metric_name == primary_metric and row.rank == 1
        text = rf"\textbf{{{latex(cell.text)}}}" if best else latex(cell.text)
        cells.append(text + (rf" {{\footnotesize {latex(annotation)}}}" if annotation else ""))
    return " & ".join(cells) + r" \\"


def latex(text: str) -> str:
    """Escape the special characters of LaTeX, and replace control characters by spaces."""
    return "".join(character if character.isprintable() else " " for character in text.translate(LATEX))
