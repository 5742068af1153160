"""Which colour, dash and mark a row has: the same in its table, in all charts and in their legends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gencompare.compare.gather import Run
from gencompare.compare.group import Group

COLORS = ("#3b7dd8", "#d9792b", "#2f9e6e", "#c94a5e", "#8a63d2", "#1a9aa8", "#a8793f", "#c858a0", "#8a951f", "#7c8591")
DASHES = ("", "6 3", "2 2", "9 2 2 2", "14 3")


@dataclass(frozen=True)
class Style:
    color: str
    dash: str
    """An SVG dash array; empty for an unbroken line. A mark goes with it (`plots.MARKS`): a point shows no dash."""
    name: str
    """What a legend calls what is drawn so."""


def styles(groups: Iterable[Group], runs: Iterable[Run]) -> dict[str, Style]:
    """A style for each row by its title, and for each run by its label: a run has that of its best row.

    So the seeds of a row share a style, under one name. Fifty are told apart; after these they begin again.
    """
    found: dict[str, Style] = {}
    of_runs: dict[str, Style] = {}
    for row in (row for group in groups for row in group.rows):
        own = found.setdefault(row.title, _style(len(found), row.title))
        for run, _ in row.line.members:
            of_runs.setdefault(run.label, replace(own, name=row.run.title))
    further = (run for run in runs if run.label not in of_runs)
    of_runs |= {run.label: _style(len(found) + k, run.title) for k, run in enumerate(further)}
    return of_runs | found


def _style(k: int, name: str) -> Style:
    return Style(COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)], name)
