"""Ranked rows to cells: the columns of every table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gencompare.compare import words
from gencompare.compare.rank import Group, Row
from gencompare.compare.spent import needed, own, total
from gencompare.compare.ways import weights

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
        *figures[:1],
        Column("against the best", _verdict),
        *figures[1:],
        Column("NFE", _nfe),
        Column("FLOPs a sample", _count(lambda row: row.result.details.get("flops_per_sample"))),
        Column("parameters", _count(lambda row: row.run.record.model.get("parameters"))),
        Column("images seen", _images_seen),
        Column("device time", _device_time),
        Column("train images/s", _count(lambda row: row.run.record.training.get("images_per_second"), words.rate)),
        Column("samples/s", _count(_samples_per_second, words.rate)),
        Column("weights", lambda row: _text(weights(row.result.generation)), numeric=False),
        Column("sampler", lambda row: _known(row.result.generation.sampler), numeric=False),
        Column("guidance", lambda row: _known(row.result.generation.guidance), numeric=False),
        Column("seed", lambda row: Cell(", ".join(map(str, row.line.seeds)), key=row.line.seeds[0])),
    ]
    return [column for column in every if any(column.cell(row).key not in (None, "") for row in group.rows)]


def heading(group: Group, name: str) -> str:
    """A figure's title with the arrow of its better direction."""
    better = next((row.result.metrics[name].better for row in group.rows if name in row.result.metrics), None)
    return "\u00a0".join(filter(None, [words.title(name), words.ARROWS.get(better or "")]))


def _remark(row: Row) -> str:
    """What tells the row from its neighbours: of a run that was measured in several ways, how it was sampled."""
    state = row.run.record.state
    parts = [row.run.told, row.way, row.standing, state if state not in ("finished", "samples") else ""]
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
        beside = words.beside(metric, headline=name == row.result.headline)
        if name == row.result.headline and row.flags:
            beside = words.join(words.WARNED, beside)
        return Cell(words.figure(metric.value), beside, words.number(metric.value))

    return cell


def _verdict(row: Row) -> Cell:
    """Holm's p value against the best row that was tested, and what it means.

    Sorted from the best row over those least told apart from it to the one most surely worse.
    """
    verdict = row.verdict
    if verdict is None:
        return Cell(words.NONE)
    if verdict.p is None:
        return Cell("best tested", key=-2.0)
    text = "p < 0.001" if verdict.p < 0.001 else f"p = {verdict.p:.2g}"
    return Cell(text, f"{'worse than' if verdict.apart else 'not told apart from'} #{verdict.reference}", -verdict.p)


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


def _images_seen(row: Row) -> Cell:
    """Up to the checkpoint that was measured, and by all that the model needed."""
    return _whole(row, "images_seen", words.count, row.result.generation.images_seen)


def _device_time(row: Row) -> Cell:
    """Of all that the model needed."""
    return _whole(row, "device_seconds", words.duration)


def _whole(row: Row, kind: str, say: Callable[[float | None], str], taken: float | None = None) -> Cell:
    """A cost with what else the model needed, which stands beside it; ``taken`` is the model's own, or as recorded."""
    record = row.run.record
    alone, whole = own(record)[kind], total(record)[kind]
    if alone is not None and whole is None:  # half of a cost is none
        return Cell(words.NONE)
    taken = alone if taken is None else taken
    further = 0.0 if alone is None or whole is None else whole - alone
    if taken is None or further <= 0:
        return Cell(say(taken), key=taken)
    return Cell(say(taken + further), f"{say(further)} of it: {needed(record)}", taken + further)


def _nfe(row: Row) -> Cell:
    calls = {name: n for name, n in (row.result.generation.nfe or {}).items() if words.finite(n)}
    total = words.calls(calls)
    if total is None:
        return Cell(words.NONE)
    beside = " + ".join(f"{words.rate(n)} {name}" for name, n in calls.items()) if len(calls) > 1 else ""
    return Cell(words.rate(total), beside, total)


def _samples_per_second(row: Row) -> float | None:
    seconds = row.result.seconds.get("sampling")
    return row.result.measurement.n / seconds if words.finite(seconds) and seconds else None
