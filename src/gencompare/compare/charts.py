"""All charts of a comparison: those that stand in its page, and the same as files beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gencompare.compare import costs, curves
from gencompare.compare.costs import Trade
from gencompare.compare.gather import Gathered, Run
from gencompare.compare.plots import Chart, save
from gencompare.compare.rank import Group, ranked
from gencompare.compare.styles import Style, styles

FOLDER = "plots"


@dataclass(frozen=True)
class Charts:
    """The charts of a comparison by what they show."""

    trades: list[Trade]
    against_calls: list[Chart]
    distances: list[Chart]
    losses: list[Chart]
    schedules: list[Chart]

    @classmethod
    def of(cls, groups: list[Group], runs: list[Run], style: Mapping[str, Style]) -> Charts:
        return cls(
            trades=costs.trades(groups, style) if len(runs) > 1 else [],
            against_calls=curves.against_calls(groups, style),
            distances=curves.distances(runs, style),
            losses=curves.losses(runs, style),
            schedules=curves.noise_schedules(runs, style),
        )

    @property
    def all(self) -> list[Chart]:
        of_costs = [trade.chart for trade in self.trades]
        return [*of_costs, *self.against_calls, *self.distances, *self.losses, *self.schedules]


def in_order(groups: list[Group], runs: list[Run]) -> list[Run]:
    """Best rank first, each run once: the order of legends, pictures and settings."""
    ranked = [run for group in groups for row in group.rows for run, _ in row.line.members]
    return list({run.label: run for run in [*ranked, *runs]}.values())


def save_all(gathered: Gathered, out: Path) -> list[Path]:
    """Each chart as PNG and SVG in the folder `FOLDER` of ``out``, named by its title. Returns the PNG files."""
    groups = ranked(gathered)
    runs = in_order(groups, gathered.runs)
    charts = Charts.of(groups, runs, styles(groups, runs)).all
    names = file_names([chart.title for chart in charts])
    for chart, name in zip(charts, names, strict=True):
        save(chart, out / FOLDER, name)
    return [out / FOLDER / f"{name}.png" for name in names]


def file_names(titles: list[str]) -> list[str]:
    """A file name for each title, safe on every system: lower-case letters, digits and underscores, each once."""
    names: list[str] = []
    for title in titles:
        short = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:80] or "chart"
        name, k = short, 1
        while name in names:
            k += 1
            name = f"{short}_{k}"
        names.append(name)
    return names
