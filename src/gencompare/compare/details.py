"""All figures of a table, with their floors and notes, and the free values of a record in a few words."""

from __future__ import annotations

from typing import Any

from gencompare.compare import words
from gencompare.compare.rank import Group
from gencompare.compare.table import columns, heading
from gencompare.compare.ways import made


def all_figures(group: Group) -> dict[str, Any]:
    """Every figure with its floor and its notes, a row each, and what else the evaluation kept."""
    lines = []
    for name in group.metrics():
        primary = name == group.headline
        metrics = [row.result.metrics.get(name) for row in group.rows]
        warned = [words.WARNED if primary and row.flags else "" for row in group.rows]
        cells = [
            (words.figure(m.value), words.join(warning, words.beside(m, headline=primary, real=False)))
            if m is not None
            else (words.NONE, warning)
            for m, warning in zip(metrics, warned, strict=True)
        ]
        floor = next((m.floor for m in metrics if m is not None and m.floor is not None), None)
        unit = next((m.unit for m in metrics if m is not None and m.unit), "")
        notes = dict.fromkeys(m.note for m in metrics if m is not None and m.note and m.note != words.label(m))
        lines.append((heading(group, name), unit, cells, words.figure(floor), "; ".join(notes)))
    kept = dict.fromkeys(
        name for row in group.rows for name, value in row.result.details.items() if value not in ([], {})
    )
    for said_elsewhere in ("flags", "images_per_second", "nearest_training"):
        kept.pop(said_elsewhere, None)
    details = [(name, [compact(row.result.details.get(name)) for row in group.rows]) for name in kept]
    costs = [column for column in columns(group) if column.title in ("NFE", "samples/s")]
    details = [(c.title, [c.cell(row).text for row in group.rows]) for c in costs] + details
    heads = [(row.run.label, made(row.result) or "samples") for row in group.rows]
    return {"heads": heads, "lines": lines, "details": details, "noted": any(line[-1] for line in lines)}


def compact(value: Any) -> str:
    """A free value of a record in a few words."""
    if value is None:
        return words.NONE
    if words.number(value) is not None:
        return words.count(value) if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, list):
        text = "  ".join(map(compact, value))
    elif isinstance(value, dict):
        text = "  ".join(f"{key}: {compact(part)}" for key, part in value.items())
    else:
        text = str(value)
    return text if len(text) <= 300 else text[:299] + "…"
