"""Ranked rows to cells: the columns of every table, and the tables as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gencompare.compare import words
from gencompare.compare.gather import Gathered, Run
from gencompare.compare.rank import Group, Row, rank, without_figures
from gencompare.files import write_text
from gencompare.records import RunRecord

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
    cell: Callable[[Row], Cell]
    numeric: bool = True
    metric: str | None = None
    """Name of the figure that the column shows."""


def columns(group: Group) -> list[Column]:
    """The columns of a group's table, without those that would be empty in every row."""
    names = group.metrics()
    figures = [Column(heading(group, n), _metric(n), metric=n) for n in names if not n.startswith(LIKELIHOOD)]
    if len(figures) < len(names):
        known = sum(words.place(column.metric or "") < words.place(LIKELIHOOD) for column in figures)
        figures.insert(known, Column("bits/dim\u00a0↓", _likelihood))
    every = [
        Column("run", lambda row: _text(row.run.label, _remark(row)), numeric=False),
        Column("family", lambda row: _text(row.run.record.family), numeric=False),
        *figures,
        Column("NFE", _nfe),
        Column("FLOPs a sample", _count(lambda row: row.result.details.get("flops_per_sample"))),
        Column("parameters", _count(lambda row: row.run.record.model.get("parameters"))),
        Column("images seen", _count(_images_seen)),
        Column("training time", _training_time),
        Column("train images/s", _count(lambda row: row.run.record.training.get("images_per_second"), words.rate)),
        Column("samples/s", _count(_samples_per_second, words.rate)),
        Column("weights", lambda row: _text(weights(row)), numeric=False),
        Column("sampler", lambda row: _known(row.result.generation.sampler), numeric=False),
        Column("guidance", lambda row: _known(row.result.generation.guidance), numeric=False),
        Column("seed", lambda row: Cell(", ".join(map(str, row.line.seeds)), key=row.line.seeds[0])),
    ]
    return [column for column in every if any(column.cell(row).key not in (None, "") for row in group.rows)]


def heading(group: Group, name: str) -> str:
    """A figure's title with the arrow of its better direction."""
    better = next((row.result.metrics[name].better for row in group.rows if name in row.result.metrics), None)
    return "\u00a0".join(filter(None, [words.title(name), words.ARROWS.get(better or "")]))


def weights(row: Row) -> str:
    """Which weights of which checkpoint: ``last, EMA``."""
    g = row.result.generation
    kind = {"ema": "EMA", "unknown": ""}.get(g.weights, g.weights)
    checkpoint = "" if g.checkpoint == "unknown" else g.checkpoint
    return ", ".join(part for part in (checkpoint, kind) if part)


def _remark(row: Row) -> str:
    state = row.run.record.state
    parts = [row.run.told, row.standing, state if state not in ("finished", "samples") else ""]
    return " · ".join(part for part in parts if part)


def _text(text: str, beside: str = "") -> Cell:
    return Cell(text or words.NONE, beside, text)


def _known(text: str) -> Cell:
    return _text("" if text in ("unknown", "none") else text)


def _metric(name: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        metric = row.result.metrics.get(name)
        if metric is None:
            return Cell(words.NONE)
        return Cell(
            words.figure(metric.value),
            words.beside(metric, headline=name == row.result.headline),
            words.number(metric.value),
        )

    return cell


def _likelihood(row: Row) -> Cell:
    """One figure in bits/dim, named: the exact one, else the tightest bound, else an estimate.

    A model may be scored in several ways, and two models in different ones; all of them are among all figures.
    """
    scored = [
        (KINDS.index(kind) if (kind := words.label(metric)) in KINDS else len(KINDS), metric.value, name)
        for name, metric in row.result.metrics.items()
        if name.startswith(LIKELIHOOD) and metric.value is not None
    ]
    if not scored:
        return Cell(words.NONE)
    kind, value, name = min(scored)
    said = [name.removeprefix(LIKELIHOOD), *KINDS[kind : kind + 1]]
    return Cell(words.figure(value), " · ".join(said), value)


def _count(value: Callable[[Row], Any], say: Callable[[float | None], str] = words.count) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        number = words.number(value(row))
        return Cell(say(number), key=number)

    return cell


def _training_time(row: Row) -> Cell:
    """Of all that the model needed: with the autoencoder that a latent model works on."""
    seconds = words.number(row.run.record.training.get("seconds"))
    before = words.number(first_stage(row.run.record).get("seconds"))
    if seconds is None or before is None:
        return Cell(words.duration(seconds), key=seconds)
    return Cell(words.duration(seconds + before), f"{words.duration(before)} of it the autoencoder", seconds + before)


def first_stage(record: RunRecord) -> dict[str, Any]:
    """What the autoencoder of a latent model cost; empty for any other."""
    found = record.model.get("autoencoder")
    return found if isinstance(found, dict) else {}


def _nfe(row: Row) -> Cell:
    calls = {name: n for name, n in (row.result.generation.nfe or {}).items() if words.finite(n)}
    total = words.calls(calls)
    if total is None:
        return Cell(words.NONE)
    beside = " + ".join(f"{words.rate(n)} {name}" for name, n in calls.items()) if len(calls) > 1 else ""
    return Cell(words.rate(total), beside, total)


def _images_seen(row: Row) -> float | None:
    own = row.result.generation.images_seen
    return own if own is not None else row.run.record.training.get("images_seen")


def _samples_per_second(row: Row) -> float | None:
    seconds = row.result.seconds.get("sampling")
    return row.result.measurement.n / seconds if words.finite(seconds) and seconds else None


# The same rows as files


def write_csv(gathered: Gathered, path: str | os.PathLike[str]) -> None:
    """Every result with every figure, protocol field and cost: one row each, in the order of the tables.

    Results that make one row of a table share its rank and its ``mean`` with ``mean.low`` and ``mean.high``. A figure
    ``m`` has the columns ``m``, ``m.floor``, ``m.low`` and ``m.high``. A run without results has a row too.
    """
    entries: list[dict[str, Any]] = []
    for group in rank(gathered.runs):
        members = [(row, *pair) for row in group.rows for pair in row.line.members]
        for row, run, result in members:
            entry = {"rank": row.rank, "standing": row.standing, **_about(run), "headline": result.headline}
            if len(row.line.members) > 1:
                low, high = row.headline.interval or (None, None)
                entry |= {"mean": row.headline.value, "mean.low": low, "mean.high": high}
            for name in group.metrics():
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
    costs = ("steps", "images_seen", "seconds", "images_per_second", "flops", "peak_memory_bytes")
    return {
        "run": run.label, "family": record.family, "data": record.data.get("name"), "seed": record.seed,
        "state": record.state, "folder": str(run.folder), "parameters": words.number(record.model.get("parameters")),
        **{f"training.{name}": words.number(record.training.get(name)) for name in costs},
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
    for group in rank(gathered.runs):
        shown = columns(group)
        lines = [f"### {_markdown(group.measurement.data)}: {_markdown(heading(group, group.headline))}", ""]
        lines += [_markdown(words.describe(group.measurement)), ""]
        lines += ["| # | " + " | ".join(_markdown(column.title) for column in shown) + " |"]
        lines += ["| ---: | " + " | ".join("---:" if column.numeric else "---" for column in shown) + " |"]
        for row in group.rows:
            cells = [column.cell(row) for column in shown]
            texts = [_markdown(f"{cell.text} ({cell.beside})" if cell.beside else cell.text) for cell in cells]
            lines.append(f"| {row.rank or words.NONE} | " + " | ".join(texts) + " |")
        lines += [f"\n{_markdown(note)}" for note in [*group.notes(), *group.flags()]]
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
