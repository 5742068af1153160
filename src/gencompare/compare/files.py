"""The tables as files: CSV with everything, Markdown and LaTeX ready to paste."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import asdict
from typing import Any

from gencompare.compare import words
from gencompare.compare.gather import Gathered, Run
from gencompare.compare.rank import Group, Row, ranked, without_figures
from gencompare.compare.seeds import flags_of
from gencompare.compare.spent import first_stage, total
from gencompare.compare.table import Column, columns, heading
from gencompare.files import write_text


def write_csv(gathered: Gathered, path: str | os.PathLike[str]) -> None:
    """Every result with every figure, protocol field and cost: one row each, in the order of the tables.

    Results that make one row of a table share its rank and its ``mean`` with ``mean.low`` and ``mean.high``, and
    ``p_holm``, the adjusted p value against the row of rank ``against``. A figure ``m`` has the columns ``m``,
    ``m.floor``, ``m.low`` and ``m.high``. A run without results has a row too.
    """
    entries: list[dict[str, Any]] = []
    for group in ranked(gathered):
        members = [(row, *pair) for row in group.rows for pair in row.line.members]
        names_of_figures = group.metrics()
        for row, run, result in members:
            entry = {"rank": row.rank, "standing": row.standing, **_about(run), "headline": result.headline}
            if len(row.line.members) > 1:
                low, high = row.headline.interval or (None, None)
                entry |= {"mean": row.headline.value, "mean.low": low, "mean.high": high}
            if row.verdict is not None:
                entry |= {"against": row.verdict.reference, "p_holm": row.verdict.p}
            for name in names_of_figures:
                metric = result.metrics.get(name)
                if metric is not None:
                    low, high = metric.interval or (None, None)
                    entry |= {name: metric.value, f"{name}.floor": metric.floor}
                    entry |= {f"{name}.low": low, f"{name}.high": high, f"{name}.note": metric.note or None}
            entry |= {"protocol": result.measurement.id}
            entry |= {f"measurement.{name}": value for name, value in asdict(result.measurement).items()}
            entry |= {f"generation.{name}": value for name, value in asdict(result.generation).items() if name != "nfe"}
            entry |= {"nfe": words.calls(result.generation.nfe)}
            entry |= {f"nfe.{name}": value for name, value in (result.generation.nfe or {}).items()}
            entry |= {"flops_per_sample": words.number(result.details.get("flops_per_sample"))}
            entry |= {f"seconds.{name}": value for name, value in result.seconds.items()}
            entry |= {"warnings": "; ".join(flags_of(result)) or None}
            entries.append(entry)
    entries += [_about(run) for run in without_figures(gathered.runs)]
    names = list(dict.fromkeys(name for entry in entries for name, value in entry.items() if value is not None))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(_plain, names))
    writer.writerows([_plain(entry.get(name)) for name in names] for entry in entries)
    write_text(path, text.getvalue())


def _about(run: Run) -> dict[str, Any]:
    record = run.record
    costs = (
        "steps", "images_seen", "seconds", "device_seconds", "images_per_second", "flops", "peak_memory_bytes"
    )  # fmt: skip
    return {
        "run": run.label, "family": record.family, "data": record.data.get("name"), "seed": record.seed,
        "state": record.state, "folder": str(run.folder), "parameters": words.number(record.model.get("parameters")),
        **{f"training.{name}": words.number(record.training.get(name)) for name in costs},
        **{f"total.{kind}": cost for kind, cost in total(record).items()},
        **{f"autoencoder.{name}": words.number(first_stage(record).get(name)) for name in costs},
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """A CSV value. Text that a spreadsheet would take for a formula gets an apostrophe in front, as they do it."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value


def write_markdown(gathered: Gathered, path: str | os.PathLike[str]) -> None:
    """The tables, one a protocol, ready to paste."""
    parts = []
    for group in ranked(gathered):
        shown = columns(group)
        lines = [f"### {_markdown(group.measurement.data)}: {_markdown(heading(group, group.headline))}", ""]
        lines += [_markdown(words.describe(group.measurement)), ""]
        lines += ["| # | " + " | ".join(_markdown(column.title) for column in shown) + " |"]
        lines += ["| ---: | " + " | ".join("---:" if column.numeric else "---" for column in shown) + " |"]
        for row in group.rows:
            cells = [column.cell(row) for column in shown]
            texts = [_markdown(f"{cell.text} ({cell.beside})" if cell.beside else cell.text) for cell in cells]
            lines.append(f"| {row.rank or words.NONE} | " + " | ".join(texts) + " |")
        warnings = [f"Warning: {flag}" for flag in group.flags()]
        lines += [f"\n{_markdown(note)}" for note in [*warnings, *group.notes()]]
        parts.append("\n".join(lines))
    missing = [f"- {_markdown(run.label)} ({_markdown(run.record.state)})" for run in without_figures(gathered.runs)]
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


def write_latex(gathered: Gathered, path: str | os.PathLike[str]) -> None:
    """The tables for a paper, one a protocol, in booktabs' style: ``\\usepackage{booktabs}`` and ``{textcomp}``."""
    parts = ["% \\usepackage{booktabs,textcomp}"]
    parts += [_latex_table(group) for group in ranked(gathered) if group.rows]
    write_text(path, "\n\n".join(parts) + "\n")


def _latex_table(group: Group) -> str:
    shown = [column for column in columns(group) if column.title != "family"][:LATEX_COLUMNS]
    name = f"{group.measurement.data}: {heading(group, group.headline)}"
    warnings = [f"Warning: {flag}." for flag in group.flags()]
    said = [words.describe(group.measurement), *warnings, *group.notes()]
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


def _latex_row(row: Row, shown: list[Column], group: Group) -> str:
    cells = [str(row.rank) if row.rank is not None else "--"]
    for column in shown:
        cell = column.cell(row)
        headline = column.metric == group.headline
        metric = row.result.metrics.get(group.headline) if headline else None  # a page has no room for more intervals
        beside = words.interval(metric) if metric is not None else cell.beside if column.title == "run" else ""
        best = headline and row.rank == 1
        text = rf"\textbf{{{latex(cell.text)}}}" if best else latex(cell.text)
        cells.append(text + (rf" {{\footnotesize {latex(beside)}}}" if beside else ""))
    return " & ".join(cells) + r" \\"


def latex(text: str) -> str:
    """Text that LaTeX sets as it is: every special character by its command, no control characters."""
    return "".join(sign if sign.isprintable() else " " for sign in text.translate(LATEX))
