"""Ranked rows as tables: their columns and cells, and CSV, Markdown and LaTeX files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gencompare.compare import formatting
from gencompare.compare.load_runs import LoadedRuns, RunFolder
from gencompare.compare.ranking import TableRow, TableSection, ranked, without_metrics
from gencompare.compare.run_costs import autoencoder_cost, dependency_costs, own_cost, total_cost
from gencompare.compare.sampler_description import sampler_description, weights
from gencompare.compare.statistics import flags_of
from gencompare.files import write_text


def all_metrics(group: TableSection) -> dict[str, Any]:
    """Every figure with its floor and its notes, a row each, and what else the evaluation kept."""
    lines = []
    for name in group.metrics():
        primary = name == group.primary_metric
        metrics = [row.result.metrics.get(name) for row in group.rows]
        warned = [formatting.WARNED if primary and row.flags else "" for row in group.rows]
        cells = [
            (
                formatting.format_metric(m.value),
                formatting.join(warning, formatting.beside(m, primary_metric=primary, real=False)),
            )
            if m is not None
            else (formatting.NONE, warning)
            for m, warning in zip(metrics, warned, strict=True)
        ]
        floor = next((m.baseline for m in metrics if m is not None and m.baseline is not None), None)
        unit = next((m.unit for m in metrics if m is not None and m.unit), "")
        notes = dict.fromkeys(m.note for m in metrics if m is not None and m.note and m.note != formatting.label(m))
        lines.append((heading(group, name), unit, cells, formatting.format_metric(floor), "; ".join(notes)))
    kept = dict.fromkeys(
        name for row in group.rows for name, value in row.result.details.items() if value not in ([], {})
    )
    for said_elsewhere in ("warnings", "images_per_second", "nearest_training"):
        kept.pop(said_elsewhere, None)
    details = [(name, [compact_config(row.result.details.get(name)) for row in group.rows]) for name in kept]
    costs = [column for column in columns(group) if column.title in ("NFE", "samples/s")]
    details = [(c.title, [c.cell(row).text for row in group.rows]) for c in costs] + details
    heads = [(row.run.label, sampler_description(row.result) or "samples") for row in group.rows]
    return {"heads": heads, "lines": lines, "details": details, "noted": any(line[-1] for line in lines)}


def compact_config(value: Any) -> str:
    """A free value of a record in a few words."""
    if value is None:
        return formatting.NONE
    if formatting.format_number(value) is not None:
        return formatting.format_count(value) if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, list):
        text = "  ".join(map(compact_config, value))
    elif isinstance(value, dict):
        text = "  ".join(f"{key}: {compact_config(part)}" for key, part in value.items())
    else:
        text = str(value)
    return text if len(text) <= 300 else text[:299] + "…"


LIKELIHOOD = "bpd_"
"""Beginning of the names of figures in bits/dim, one a way of scoring."""

KINDS = ("exact", "bound", "estimate")


@dataclass(frozen=True)
class Cell:
    text: str
    beside: str = ""
    """A second, smaller line."""
    key: float | str | None = None
    """What the column is sorted by; None comes last."""


@dataclass(frozen=True)
class Column:
    title: str
    cell: Callable[[TableRow], Cell]
    numeric: bool = True
    metric: str | None = None
    """Name of the figure that the column shows."""


def columns(group: TableSection) -> list[Column]:
    """The columns of a group's table, without those that would be empty in every row."""
    names = group.metrics()
    figures = [Column(heading(group, n), _metric(n), metric=n) for n in names if not n.startswith(LIKELIHOOD)]
    if len(figures) < len(names):
        known = sum(
            formatting.format_place(column.metric or "") < formatting.format_place(LIKELIHOOD) for column in figures
        )
        figures.insert(known, Column("bits/dim\u00a0↓", _likelihood))
    every = [
        Column("run", lambda row: _text(row.run.label, _remark(row)), numeric=False),
        Column("family", lambda row: _text(row.run.record.family), numeric=False),
        *figures[:1],
        Column("against the best", _verdict),
        *figures[1:],
        Column("NFE", _nfe),
        Column("FLOPs a sample", _count(lambda row: row.result.details.get("flops_per_sample"))),
        Column("parameters", _count(lambda row: row.run.record.model.get("parameters"))),
        Column("images seen", _images_seen),
        Column("device time", _device_time),
        Column(
            "train images/s",
            _count(lambda row: row.run.record.training.get("images_per_second"), formatting.format_rate),
        ),
        Column("samples/s", _count(_samples_per_second, formatting.format_rate)),
        Column("weights", lambda row: _text(weights(row.result.generation)), numeric=False),
        Column("sampler", lambda row: _known(row.result.generation.sampler), numeric=False),
        Column("guidance", lambda row: _known(row.result.generation.guidance), numeric=False),
        Column("seed", lambda row: Cell(", ".join(map(str, row.line.seeds)), key=row.line.seeds[0])),
    ]
    return [column for column in every if any(column.cell(row).key not in (None, "") for row in group.rows)]


def heading(group: TableSection, name: str) -> str:
    """A figure's title with the arrow of its better direction."""
    metric = next((row.result.metrics[name] for row in group.rows if name in row.result.metrics), None)
    arrow = formatting.direction_arrow(metric) if metric is not None else ""
    return "\u00a0".join(filter(None, [formatting.title(name), arrow]))


def _remark(row: TableRow) -> str:
    """What tells the row from its neighbours: of a run that was measured in several ways, how it was sampled."""
    state = row.run.record.state
    parts = [row.run.told, row.way, row.standing, state if state not in ("finished", "samples") else ""]
    return " · ".join(part for part in parts if part)


def _text(text: str, beside: str = "") -> Cell:
    return Cell(text or formatting.NONE, beside, text)


def _known(text: str) -> Cell:
    return _text("" if text in ("unknown", "none") else text)


def _metric(name: str) -> Callable[[TableRow], Cell]:
    def cell(row: TableRow) -> Cell:
        metric = row.result.metrics.get(name)
        if metric is None:
            return Cell(formatting.NONE)
        beside = formatting.beside(metric, primary_metric=name == row.result.primary_metric)
        if name == row.result.primary_metric and row.flags:
            beside = formatting.join(formatting.WARNED, beside)
        return Cell(formatting.format_metric(metric.value), beside, formatting.format_number(metric.value))

    return cell


def _verdict(row: TableRow) -> Cell:
    """Holm's p value against the best row that was tested, and what it means.

    Sorted from the best row over those least told apart from it to the one most surely worse.
    """
    verdict = row.verdict
    if verdict is None:
        return Cell(formatting.NONE)
    if verdict.p is None:
        return Cell("best tested", key=-2.0)
    text = "p < 0.001" if verdict.p < 0.001 else f"p = {verdict.p:.2g}"
    return Cell(text, f"{'worse than' if verdict.apart else 'not told apart from'} #{verdict.reference}", -verdict.p)


def _likelihood(row: TableRow) -> Cell:
    """One figure in bits/dim, named: the exact one, else the tightest bound, else an estimate.

    A model may be scored in several ways, and two models in different ones; all of them are among all figures.
    """
    scored = [
        (KINDS.index(kind) if (kind := formatting.label(metric)) in KINDS else len(KINDS), metric.value, name)
        for name, metric in row.result.metrics.items()
        if name.startswith(LIKELIHOOD) and metric.value is not None
    ]
    if not scored:
        return Cell(formatting.NONE)
    kind, value, name = min(scored)
    said = [name.removeprefix(LIKELIHOOD), *KINDS[kind : kind + 1]]
    return Cell(formatting.format_metric(value), " · ".join(said), value)


def _count(
    value: Callable[[TableRow], Any], say: Callable[[float | None], str] = formatting.format_count
) -> Callable[[TableRow], Cell]:
    def cell(row: TableRow) -> Cell:
        number = formatting.format_number(value(row))
        return Cell(say(number), key=number)

    return cell


def _images_seen(row: TableRow) -> Cell:
    """Up to the checkpoint that was measured, and by all that the model needed."""
    return _whole(row, "images_seen", formatting.format_count, row.result.generation.images_seen)


def _device_time(row: TableRow) -> Cell:
    """Of all that the model needed."""
    return _whole(row, "device_seconds", formatting.format_duration)


def _whole(row: TableRow, kind: str, say: Callable[[float | None], str], taken: float | None = None) -> Cell:
    """A cost with what else the model needed, which stands beside it; ``taken`` is the model's own, or as recorded."""
    record = row.run.record
    alone, whole = own_cost(record)[kind], total_cost(record)[kind]
    if alone is not None and whole is None:  # half of a cost is none
        return Cell(formatting.NONE)
    taken = alone if taken is None else taken
    further = 0.0 if alone is None or whole is None else whole - alone
    if taken is None or further <= 0:
        return Cell(say(taken), key=taken)
    return Cell(say(taken + further), f"{say(further)} of it: {dependency_costs(record)}", taken + further)


def _nfe(row: TableRow) -> Cell:
    calls = {name: n for name, n in (row.result.generation.nfe or {}).items() if formatting.format_finite(n)}
    total = formatting.format_calls(calls)
    if total is None:
        return Cell(formatting.NONE)
    beside = " + ".join(f"{formatting.format_rate(n)} {name}" for name, n in calls.items()) if len(calls) > 1 else ""
    return Cell(formatting.format_rate(total), beside, total)


def _samples_per_second(row: TableRow) -> float | None:
    seconds = row.result.seconds.get("sampling")
    return row.result.measurement.num_images / seconds if formatting.format_finite(seconds) and seconds else None


def write_csv(gathered: LoadedRuns, path: str | os.PathLike[str]) -> None:
    """Every result with every figure, protocol field and cost: one row each, in the order of the tables.

    Results that make one row of a table share its rank and its ``mean`` with ``mean.low`` and ``mean.high``, and
    ``p_holm``, the adjusted p value against the row of rank ``against``. A figure ``m`` has the columns ``m``,
    ``m.baseline``, ``m.low`` and ``m.high``. A run without results has a row too.
    """
    entries: list[dict[str, Any]] = []
    for group in ranked(gathered):
        members = [(row, *pair) for row in group.rows for pair in row.line.members]
        names_of_figures = group.metrics()
        for row, run, result in members:
            entry = {"rank": row.rank, "standing": row.standing, **_about(run), "primary_metric": result.primary_metric}
            if len(row.line.members) > 1:
                low, high = row.metric.interval or (None, None)
                entry |= {"mean": row.metric.value, "mean.low": low, "mean.high": high}
            if row.verdict is not None:
                entry |= {"against": row.verdict.reference, "p_holm": row.verdict.p}
            for name in names_of_figures:
                metric = result.metrics.get(name)
                if metric is not None:
                    low, high = metric.interval or (None, None)
                    entry |= {name: metric.value, f"{name}.baseline": metric.baseline}
                    entry |= {f"{name}.low": low, f"{name}.high": high, f"{name}.note": metric.note or None}
            entry |= {"protocol": result.measurement.id}
            entry |= {f"measurement.{name}": value for name, value in asdict(result.measurement).items()}
            entry |= {f"generation.{name}": value for name, value in asdict(result.generation).items() if name != "nfe"}
            entry |= {"nfe": formatting.format_calls(result.generation.nfe)}
            entry |= {f"nfe.{name}": value for name, value in (result.generation.nfe or {}).items()}
            entry |= {"flops_per_sample": formatting.format_number(result.details.get("flops_per_sample"))}
            entry |= {f"seconds.{name}": value for name, value in result.seconds.items()}
            entry |= {"warnings": "; ".join(flags_of(result)) or None}
            entries.append(entry)
    entries += [_about(run) for run in without_metrics(gathered.runs)]
    names = list(dict.fromkeys(name for entry in entries for name, value in entry.items() if value is not None))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(_plain, names))
    writer.writerows([_plain(entry.get(name)) for name in names] for entry in entries)
    write_text(path, text.getvalue())


def _about(run: RunFolder) -> dict[str, Any]:
    record = run.record
    costs = (
        "steps", "images_seen", "seconds", "device_seconds", "images_per_second", "flops", "peak_memory_bytes"
    )  # fmt: skip
    return {
        "run": run.label, "family": record.family, "data": record.data.get("name"), "seed": record.seed,
        "state": record.state, "folder": str(run.folder),
        "parameters": formatting.format_number(record.model.get("parameters")),
        **{f"training.{name}": formatting.format_number(record.training.get(name)) for name in costs},
        **{f"total.{kind}": cost for kind, cost in total_cost(record).items()},
        **{f"autoencoder.{name}": formatting.format_number(autoencoder_cost(record).get(name)) for name in costs},
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """A CSV value. Text that a spreadsheet would take for a formula gets an apostrophe in front, as they do it."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value


def write_markdown(gathered: LoadedRuns, path: str | os.PathLike[str]) -> None:
    """The tables, one a protocol, ready to paste."""
    parts = []
    for group in ranked(gathered):
        shown = columns(group)
        lines = [f"### {_markdown(group.measurement.data)}: {_markdown(heading(group, group.primary_metric))}", ""]
        lines += [_markdown(formatting.describe(group.measurement)), ""]
        lines += ["| # | " + " | ".join(_markdown(column.title) for column in shown) + " |"]
        lines += ["| ---: | " + " | ".join("---:" if column.numeric else "---" for column in shown) + " |"]
        for row in group.rows:
            cells = [column.cell(row) for column in shown]
            texts = [_markdown(f"{cell.text} ({cell.beside})" if cell.beside else cell.text) for cell in cells]
            lines.append(f"| {row.rank or formatting.NONE} | " + " | ".join(texts) + " |")
        warnings = [f"Warning: {flag}" for flag in group.flags()]
        lines += [f"\n{_markdown(note)}" for note in [*warnings, *group.notes()]]
        parts.append("\n".join(lines))
    missing = [f"- {_markdown(run.label)} ({_markdown(run.record.state)})" for run in without_metrics(gathered.runs)]
    if missing:
        parts.append("Runs without figures:\n\n" + "\n".join(missing))
    skipped = [f"- {_markdown(str(skip.folder))}: {_markdown(skip.reason)}" for skip in gathered.skipped]
    if skipped:
        parts.append("Left out:\n\n" + "\n".join(skipped))
    write_text(path, "\n\n".join(parts) + "\n")


def _markdown(text: str) -> str:
    """Text that Markdown and HTML leave alone."""
    for sign in "\\`*[]|#":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


LATEX_COLUMNS = 8
"""Columns of a LaTeX table beside the rank: more do not fit a page; the others are in the CSV."""

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
        "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", '"': r"\char34{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
        "↓": r"$\downarrow$", "↑": r"$\uparrow$", "→": r"$\rightarrow$", "×": r"$\times$", "–": "--", "…": r"\dots{}",  # noqa: RUF001
        "\u00a0": "~", "·": r"$\cdot$",
    }
)  # fmt: skip


def write_latex(gathered: LoadedRuns, path: str | os.PathLike[str]) -> None:
    """The tables for a paper, one a protocol, in booktabs' style: ``\\usepackage{booktabs}`` and ``{textcomp}``."""
    parts = ["% \\usepackage{booktabs,textcomp}"]
    parts += [_latex_table(group) for group in ranked(gathered) if group.rows]
    write_text(path, "\n\n".join(parts) + "\n")


def _latex_table(group: TableSection) -> str:
    shown = [column for column in columns(group) if column.title != "family"][:LATEX_COLUMNS]
    name = f"{group.measurement.data}: {heading(group, group.primary_metric)}"
    warnings = [f"Warning: {flag}." for flag in group.flags()]
    said = [formatting.describe(group.measurement), *warnings, *group.notes()]
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{latex(name)}. {latex(' '.join(said))}}}",
        rf"\begin{{tabular}}{{r{''.join('r' if column.numeric else 'l' for column in shown)}}}",
        r"\toprule",
        " & ".join([r"\#", *(latex(column.title) for column in shown)]) + r" \\",
    ]
    for _, rows in group.sections():
        lines += [r"\midrule", *(_latex_row(row, shown, group) for row in rows)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _latex_row(row: TableRow, shown: list[Column], group: TableSection) -> str:
    cells = [str(row.rank) if row.rank is not None else "--"]
    for column in shown:
        cell = column.cell(row)
        primary_metric = column.metric == group.primary_metric
        metric = (
            row.result.metrics.get(group.primary_metric) if primary_metric else None
        )  # a page has no room for more intervals
        beside = (
            formatting.format_interval(metric) if metric is not None else cell.beside if column.title == "run" else ""
        )
        best = primary_metric and row.rank == 1
        text = rf"\textbf{{{latex(cell.text)}}}" if best else latex(cell.text)
        cells.append(text + (rf" {{\footnotesize {latex(beside)}}}" if beside else ""))
    return " & ".join(cells) + r" \\"


def latex(text: str) -> str:
    """Text that LaTeX sets as it is: every special character by its command, no control characters."""
    return "".join(sign if sign.isprintable() else " " for sign in text.translate(LATEX))
