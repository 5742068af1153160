"""The charts of a comparison: learning curves, noise schedules, and quality against cost."""

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

from gencompare.comparison import formatting
from gencompare.comparison.bits_per_dim import likelihood_charts
from gencompare.comparison.load_runs import LoadedRuns, RunFolder
from gencompare.comparison.ranking import RankingTable, TableRow, ranking_tables
from gencompare.comparison.run_costs import ParetoChart, pareto_charts
from gencompare.comparison.sampler_description import without_steps
from gencompare.comparison.svg_plots import COLORS, DASHES, Chart, IntervalChart, PlotLine, Style, save, styles

MAX_LINES = 75
"""Maximum number of lines in a chart (fifteen families with five seeds each). If there are more runs, the best-ranked
ones are drawn."""

MAX_INTERVALS = 40
"""Maximum number of rows in a chart of intervals."""

MAX_POINTS = 300
"""Maximum number of points in a learning curve. Longer curves are averaged over segments."""

DISTANCES = ("val/mmd_", "val/fid", "val/fd_", "val/coverage")
"""Prefixes of the logged metrics that compare samples with validation images."""

PLOTS_FOLDER = "plots"


@dataclass(frozen=True)
class Charts:
    """All charts of a comparison."""

    intervals: dict[int, IntervalChart]
    """By the number of the table, from 1."""
    pareto: list[ParetoChart]
    nfe: list[Chart]
    likelihoods: list[Chart]
    distances: list[Chart]
    losses: list[Chart]
    schedules: list[Chart]

    @classmethod
    def of(cls, tables: list[RankingTable], runs: list[RunFolder], style: Mapping[str, Style]) -> Charts:
        return cls(
            intervals=interval_charts(tables, style),
            pareto=pareto_charts(tables, style) if len(runs) > 1 else [],
            nfe=nfe_curves(tables, style),
            likelihoods=likelihood_charts(tables, style) if len(runs) > 1 else [],
            distances=distance_curves(runs, style),
            losses=loss_curves(runs, style),
            schedules=noise_schedules(runs, style),
        )

    @property
    def all(self) -> list[Chart | IntervalChart]:
        costs = [each.chart for each in self.pareto]
        others = [*self.nfe, *self.likelihoods, *self.distances, *self.losses, *self.schedules]
        return [*self.intervals.values(), *costs, *others]


def by_rank(tables: list[RankingTable], runs: list[RunFolder]) -> list[RunFolder]:
    """Sort runs by their best rank. Legends, images and settings are listed in this order."""
    ranked = [run for table in tables for run, _ in table.results()]
    return list({run.label: run for run in [*ranked, *runs]}.values())


def save_all(loaded: LoadedRuns, out: Path) -> list[Path]:
    """Save each chart as PNG and SVG in the folder `PLOTS_FOLDER` of ``out``, and return the PNG files."""
    tables = ranking_tables(loaded)
    runs = by_rank(tables, loaded.runs)
    charts = Charts.of(tables, runs, styles(tables, runs)).all
    names = file_names([chart.title for chart in charts])
    for chart, name in zip(charts, names, strict=True):
        save(chart, out / PLOTS_FOLDER, name)
    return [out / PLOTS_FOLDER / f"{name}.png" for name in names]


def file_names(titles: list[str]) -> list[str]:
    """Convert titles to unique file names of lower-case letters, digits and underscores."""
    names: list[str] = []
    for title in titles:
        stem = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:80] or "chart"
        name, k = stem, 1
        while name in names:
            k += 1
            name = f"{stem}_{k}"
        names.append(name)
    return names


# The primary metric


def interval_charts(tables: Iterable[RankingTable], style: Mapping[str, Style]) -> dict[int, IntervalChart]:
    """Create a chart of the primary metric with its intervals for each table with at least two finite values."""
    charts = {}
    for number, table in enumerate(tables, 1):
        rows = [row for row in table.rows if formatting.is_finite(row.metric.value)]
        shown = rows[:MAX_INTERVALS]
        if len(shown) > 1:
            title = f"{formatting.title(table.primary_metric)} on {table.measurement.data}, 95 % intervals"
            baseline = next((row.metric.baseline for row in shown if formatting.is_finite(row.metric.baseline)), None)
            points = [_point(row, style[row.title]) for row in shown]
            label = formatting.title(table.primary_metric)
            if baseline is not None:
                label += f" (dashed: real data, {formatting.format_metric(baseline)})"
            charts[number] = IntervalChart(title, points, label, baseline, len(rows) - len(shown))
    return charts


def _point(row: TableRow, style: Style) -> PlotLine:
    metric = row.metric
    interval = metric.interval if formatting.format_interval(metric) else None
    return PlotLine(
        np.array([metric.value]), np.empty(1), style.color, style.dash, marker=True, name=row.title, interval=interval
    )


# Learning curves


def distance_curves(runs: Iterable[RunFolder], style: Mapping[str, Style]) -> list[Chart]:
    """Create a chart for each data set and each distance (or coverage) that was logged during training."""
    lines: dict[tuple[str, str], list[PlotLine]] = defaultdict(list)
    for run in runs:
        for name in run.curve:
            if name.startswith(DISTANCES):
                key = (str(run.record.data.get("name", "")), name)
                lines[key] += _curve(run, name, style, marker=True)
    return [
        limit_lines(Chart(f"{formatting.title(name.removeprefix('val/'))} on {data}", drawn))
        for (data, name), drawn in lines.items()
        if any(len(line.x) > 1 for line in drawn)
    ]


def loss_curves(runs: Iterable[RunFolder], style: Mapping[str, Style]) -> list[Chart]:
    """Create a chart for each data set, family and loss, since losses of different families are not comparable.

    The validation loss of the same name, if logged, is a fainter line with markers.
    """
    lines: dict[tuple[str, str, str], list[PlotLine]] = defaultdict(list)
    for run in runs:
        for name in run.curve:
            if name.startswith("train/") and "loss" in name:
                key = (run.record.family, str(run.record.data.get("name", "")), name.removeprefix("train/"))
                validation = _curve(run, name.replace("train/", "val/", 1), style, marker=True, faint=True)
                lines[key] += [*_curve(run, name, style), *validation]
    return [
        limit_lines(Chart(f"{family} on {data}: {formatting.title(name)}", drawn))
        for (family, data, name), drawn in lines.items()
        if drawn
    ]


def _curve(
    run: RunFolder, name: str, style: Mapping[str, Style], *, marker: bool = False, faint: bool = False
) -> list[PlotLine]:
    """Draw a logged metric against training images seen. Return an empty list if nothing was logged."""
    values = run.curve.get(name)
    images = run.curve.get("images", run.curve.get("step"))
    if values is None or images is None:
        return []
    logged = np.isfinite(values) & np.isfinite(images)
    x, y = subsample(images[logged], values[logged])
    own = style[run.label]
    line = PlotLine(x, y, own.color, own.dash, marker=marker, faint=faint, name=run.title, legend_name=own.name)
    return [line] if len(x) else []


def subsample(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most `MAX_POINTS` points by averaging over segments of about equal length."""
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)
    lengths = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / lengths, np.add.reduceat(y, edges[:-1]) / lengths


def limit_lines(chart: Chart) -> Chart:
    """Keep at most the first `MAX_LINES` lines of a chart. Lines with the same name are kept or dropped together."""
    count = Counter(line.name for line in chart.lines)  # in the order of the lines
    kept = {name for name, total in zip(count, accumulate(count.values()), strict=True) if total <= MAX_LINES}
    lines = [line for line in chart.lines if line.name in kept]
    return replace(chart, lines=lines, num_omitted=len(count) - len(kept))


# Quality against network evaluations


def nfe_curves(tables: Iterable[RankingTable], style: Mapping[str, Style]) -> list[Chart]:
    """Create a chart for each table where a trained model is sampled with several numbers of network evaluations.

    A line joins the rows of one trained model, or of one set of training seeds, that differ only in the number of
    sampling steps. It has the style of the best of these rows. Models that were sampled with one number of evaluations
    only, such as a GAN, are points in the same chart.
    """
    charts = []
    for table in tables:
        points: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
        best: dict[tuple[str, ...], TableRow] = {}
        for row in table.rows:
            nfe, value = formatting.total_nfe(row.result.generation.nfe), row.metric.value
            if nfe and value is not None:
                g = row.result.generation
                sampling = (without_steps(g.sampler), g.guidance, g.checkpoint, g.weights)
                key = (row.group.members[0][0].label, *sampling)
                best.setdefault(key, row)
                points[key].append((nfe, value))
        lines = [
            PlotLine(
                *_columns(sorted(found)), style[row.title].color, style[row.title].dash, marker=True,
                name=without_steps(row.title) if len(found) > 1 else row.title,
            )
            for found, row in zip(points.values(), best.values(), strict=True)
        ]  # fmt: skip
        if any(len(set(line.x)) > 1 for line in lines):
            title = f"{formatting.title(table.primary_metric)} on {table.measurement.data}"
            charts.append(limit_lines(Chart(title, lines, "NFE per sample", x_log=True)))
    return charts


def _columns(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(points).T
    return x, y


# Noise schedules


LOWEST_LOG_SNR = -25.0
"""Lowest log-SNR that charts show. Published schedules end above it, except those without any signal at their end."""


def noise_schedules(runs: Iterable[RunFolder], style: Mapping[str, Style]) -> list[Chart]:
    """Create one chart of the log-SNR over time for all runs with a noise schedule."""
    lines = []
    for run in runs:
        t, log_snr = (_floats(run.record.model.get("noise_schedule"), name) for name in ("t", "log_snr"))
        if len(t) and t.shape == log_snr.shape and np.isfinite([t, log_snr]).all():
            own = style[run.label]
            log_snr = np.maximum(log_snr, LOWEST_LOG_SNR)
            lines.append(PlotLine(t, log_snr, own.color, own.dash, name=run.title, legend_name=own.name))
    return [limit_lines(Chart("Log-SNR", lines, "time (0: data, 1: noise)"))] if lines else []


def _floats(schedule: object, name: str) -> np.ndarray:
    """Convert the list ``name`` in an unvalidated record field to an array, which is empty if the list is invalid."""
    values = schedule.get(name) if isinstance(schedule, dict) else None
    try:
        return np.asarray(values if isinstance(values, list) else [], dtype=float).ravel()
    except (TypeError, ValueError):
        return np.empty(0)


SCHEDULE_COLORS = (*COLORS, "#1d2530", "#e0b20a")
"""Line colours of `draw_schedules`: `COLORS` and two more, since there are more than ten schedules."""

ScheduleCurve = Mapping[str, np.ndarray]
"""Values of a noise schedule at several times: the arrays ``t``, ``log_snr``, ``alpha``, ``sigma`` and ``density``
(of the log-SNR at uniform times), each of shape (points,)."""


def draw_schedules(curves: Mapping[str, ScheduleCurve]) -> Figure:
    """Plot log-SNR, alpha and sigma over time, and the density of log-SNR at uniform times, for each named schedule."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    ((snr, alpha), (density, sigma)) = figure.subplots(2, 2)
    _panel(snr, curves, "t", "log_snr", "log-SNR", "Log-SNR: noise level")
    _panel(alpha, curves, "t", "alpha", "alpha", "alpha: scale of the image")
    _panel(sigma, curves, "t", "sigma", "sigma", "sigma: scale of the noise")
    _panel(density, curves, "log_snr", "density", "density", "Density of the log-SNR at uniform times")
    for axes in (snr, alpha, sigma):
        axes.set_xlabel("time (0: data, 1: noise)")
    density.set_xlabel("log-SNR (noise on the left, data on the right)")
    sigma.set_yscale("log")
    alpha.set_ylim(-0.03, 1.06)
    if min(float(c["log_snr"].min()) for c in curves.values()) < LOWEST_LOG_SNR:
        snr.set_ylim(bottom=LOWEST_LOG_SNR)
        density.set_xlim(left=LOWEST_LOG_SNR)
    # The density may be huge where the first or last step of a discrete schedule is very short.
    density.set_ylim(0, 1.15 * max(float(np.quantile(c["density"], 0.98)) for c in curves.values()))
    figure.legend(*snr.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _panel(axes: Axes, curves: Mapping[str, ScheduleCurve], x: str, y: str, label: str, title: str) -> None:
    for k, (name, curve) in enumerate(curves.items()):
        # Dashes keep overlapping lines visible, as linear and VP differ only at the start.
        dash = DASHES[(k + k // len(SCHEDULE_COLORS)) % len(DASHES)]
        linestyle = (0, tuple(map(float, dash.split()))) if dash else "-"
        color = SCHEDULE_COLORS[k % len(SCHEDULE_COLORS)]
        axes.plot(curve[x], curve[y], label=name, color=color, linestyle=linestyle, linewidth=1.8, alpha=0.9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.5, alpha=0.4)
