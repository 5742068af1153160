"""The charts of a comparison."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gencompare.compare import formatting, run_costs
from gencompare.compare.load_runs import LoadedRuns, RunFolder
from gencompare.compare.ranking import TableRow, TableSection, ranked
from gencompare.compare.run_costs import CostPoint
from gencompare.compare.sampler_description import without_steps
from gencompare.compare.svg_plots import COLORS, DASHES, Chart, PlotLine, Style, save, styles

MANY = (*COLORS, "#1d2530", "#e0b20a")
"""More colours than runs have on a page: there are more schedules than that."""

ScheduleCurve = Mapping[str, np.ndarray]
"""``t``, ``log_snr``, ``alpha``, ``sigma`` and ``density``, (points,) each."""


def draw_schedules(curves: Mapping[str, ScheduleCurve]) -> Figure:
    """Log-SNR, alpha and sigma over time, and the density of the log-SNR at uniform times, of each named schedule."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    ((snr, alpha), (density, sigma)) = figure.subplots(2, 2)
    _panel(snr, curves, "t", "log_snr", "log-SNR", "Log-SNR: the noise level itself")
    _panel(alpha, curves, "t", "alpha", "alpha", "alpha: how large the image is")
    _panel(sigma, curves, "t", "sigma", "sigma", "sigma: how large the noise is")
    _panel(density, curves, "log_snr", "density", "density", "Where uniform times put the noise levels")
    for axes in (snr, alpha, sigma):
        axes.set_xlabel("time: 0 data, 1 noise")
    density.set_xlabel("log-SNR: data on the right, as sampling goes")
    sigma.set_yscale("log")
    alpha.set_ylim(-0.03, 1.06)
    # A table may end in a step so long that its density is next to nothing, or start in one so short that it soars.
    density.set_ylim(0, 1.15 * max(float(np.quantile(c["density"], 0.98)) for c in curves.values()))
    figure.legend(*snr.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _panel(axes: Axes, curves: Mapping[str, ScheduleCurve], x: str, y: str, label: str, title: str) -> None:
    for k, (name, curve) in enumerate(curves.items()):
        # Dashes let lines be seen that lie under others: linear and VP are the same curve but for its start.
        dash = DASHES[(k + k // len(MANY)) % len(DASHES)]
        style = (0, tuple(map(float, dash.split()))) if dash else "-"
        color = MANY[k % len(MANY)]
        axes.plot(curve[x], curve[y], label=name, color=color, linestyle=style, linewidth=1.8, alpha=0.9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.5, alpha=0.4)


POINTS = 300
"""A longer curve is drawn by the means of so many stretches of it."""

DISTANCES = ("val/fid", "val/fd_", "val/coverage")


MOST = 75
"""Lines of a chart at most, those of the best-ranked runs: fifteen families of five seeds each."""


def distance_curves(runs: Iterable[RunFolder], style: Mapping[str, Style]) -> list[Chart]:
    """One chart for each data set and distance (or coverage) that was logged at the looks of a run."""
    lines: dict[tuple[str, str], list[PlotLine]] = defaultdict(list)
    for run in runs:
        for name in run.curve:
            if name.startswith(DISTANCES):
                key = (str(run.record.data.get("name", "")), name)
                lines[key] += _lines(run, name, style, marker=True)
    return [
        best_so_far(Chart(f"{formatting.title(name.removeprefix('val/'))} on {data}", drawn))
        for (data, name), drawn in lines.items()
        if any(len(line.x) > 1 for line in drawn)
    ]


def best_so_far(chart: Chart) -> Chart:
    """The chart with the lines of its first names alone, `MOST` lines at most."""
    count = Counter(line.name for line in chart.lines)  # in the order of the lines
    kept = {name for name, drawn in zip(count, accumulate(count.values()), strict=True) if drawn <= MOST}
    return replace(chart, lines=[line for line in chart.lines if line.name in kept], left=len(count) - len(kept))


def loss_curves(runs: Iterable[RunFolder], style: Mapping[str, Style]) -> list[Chart]:
    """One chart for each data set, family and loss: losses of two families are not the same quantity.

    The held-out loss of the same name, where it was logged, is the paler line with dots.
    """
    lines: dict[tuple[str, str, str], list[PlotLine]] = defaultdict(list)
    for run in runs:
        for name in run.curve:
            if name.startswith("train/") and "loss" in name:
                key = (run.record.family, str(run.record.data.get("name", "")), name.removeprefix("train/"))
                held_out = _lines(run, name.replace("train/", "val/", 1), style, marker=True, pale=True)
                lines[key] += [*_lines(run, name, style), *held_out]
    return [
        best_so_far(Chart(f"{family} on {data}: {formatting.title(name)}", drawn))
        for (family, data, name), drawn in lines.items()
        if drawn
    ]


def noise_schedules(runs: Iterable[RunFolder], style: Mapping[str, Style]) -> list[Chart]:
    """One chart of the log-SNR over time, for the runs whose models add noise by a schedule."""
    lines = []
    for run in runs:
        t, log_snr = (_numbers(run.record.model.get("noise_schedule"), name) for name in ("t", "log_snr"))
        if len(t) and t.shape == log_snr.shape and np.isfinite([t, log_snr]).all():
            own = style[run.label]
            lines.append(PlotLine(t, log_snr, own.color, own.dash, name=run.title, entry=own.name))
    return [best_so_far(Chart("Log-SNR", lines, "time: 0 data, 1 noise"))] if lines else []


def _numbers(schedule: object, name: str) -> np.ndarray:
    """A list of a record's free fields as an array (k,); empty where it is none."""
    values = schedule.get(name) if isinstance(schedule, dict) else None
    try:
        return np.asarray(values if isinstance(values, list) else [], dtype=float).ravel()
    except (TypeError, ValueError):
        return np.empty(0)


def against_calls(groups: Iterable[TableSection], style: Mapping[str, Style]) -> list[Chart]:
    """A chart for each table in which a run was measured at several numbers of network calls.

    A line is what one training, or one set of training seeds, gives when nothing but the number of steps is changed. It
    is drawn as the best of its rows is elsewhere.
    """
    charts = []
    for group in groups:
        points: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
        best_of: dict[tuple[str, ...], TableRow] = {}
        for row in group.rows:
            calls, figure = formatting.format_calls(row.result.generation.nfe), row.metric.value
            if calls and figure is not None:
                made = row.result.generation
                sampled = (without_steps(made.sampler), made.guidance, made.checkpoint, made.weights)
                key = (row.line.members[0][0].label, *sampled)
                best_of.setdefault(key, row)
                points[key].append((calls, figure))
        lines = [
            PlotLine(
                *_columns(sorted(found)), style[row.title].color, style[row.title].dash, marker=True,
                name=without_steps(row.title),
            )
            for found, row in zip(points.values(), best_of.values(), strict=True)
            if len({x for x, _ in found}) > 1
        ]  # fmt: skip
        if lines:
            title = f"{formatting.title(group.primary_metric)} on {group.measurement.data}"
            charts.append(best_so_far(Chart(title, lines, "network calls a sample", x_log=True)))
    return charts


def _columns(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(points).T
    return x, y


def _lines(
    run: RunFolder, name: str, style: Mapping[str, Style], *, marker: bool = False, pale: bool = False
) -> list[PlotLine]:
    values = run.curve.get(name)
    images = run.curve.get("images", run.curve.get("step"))
    if values is None or images is None:
        return []
    logged = np.isfinite(values) & np.isfinite(images)
    x, y = subsample(images[logged], values[logged])
    own = style[run.label]
    line = PlotLine(x, y, own.color, own.dash, marker=marker, pale=pale, name=run.title, entry=own.name)
    return [line] if len(x) else []


def subsample(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points: means over stretches of equal length."""
    if len(x) <= POINTS:
        return x, y
    edges = np.linspace(0, len(x), POINTS + 1).astype(int)
    widths = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / widths, np.add.reduceat(y, edges[:-1]) / widths


FOLDER = "plots"


@dataclass(frozen=True)
class Charts:
    """The charts of a comparison by what they show."""

    trades: list[CostPoint]
    against_calls: list[Chart]
    distances: list[Chart]
    losses: list[Chart]
    schedules: list[Chart]

    @classmethod
    def of(cls, groups: list[TableSection], runs: list[RunFolder], style: Mapping[str, Style]) -> Charts:
        return cls(
            trades=run_costs.cost_curves(groups, style) if len(runs) > 1 else [],
            against_calls=against_calls(groups, style),
            distances=distance_curves(runs, style),
            losses=loss_curves(runs, style),
            schedules=noise_schedules(runs, style),
        )

    @property
    def all(self) -> list[Chart]:
        of_costs = [trade.chart for trade in self.trades]
        return [*of_costs, *self.against_calls, *self.distances, *self.losses, *self.schedules]


def in_order(groups: list[TableSection], runs: list[RunFolder]) -> list[RunFolder]:
    """Best rank first, each run once: the order of legends, pictures and settings."""
    ranked = [run for group in groups for row in group.rows for run, _ in row.line.members]
    return list({run.label: run for run in [*ranked, *runs]}.values())


def save_all(gathered: LoadedRuns, out: Path) -> list[Path]:
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
