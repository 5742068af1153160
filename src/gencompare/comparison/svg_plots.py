"""Charts as image files, and as inline SVG that follows the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

from gencompare.comparison import formatting
from gencompare.comparison.load_runs import RunFolder
from gencompare.comparison.ranking import RankingTable, TableRow
from gencompare.files import atomic_write, write_text

COLORS = ("#3b7dd8", "#d9792b", "#2f9e6e", "#c94a5e", "#8a63d2", "#1a9aa8", "#a8793f", "#c858a0", "#8a951f", "#7c8591")
DASHES = ("", "6 3", "2 2", "9 2 2 2", "14 3")

MARKERS = {
    "": ("o", "M6.2 4a2.8 2.8 0 1 0 5.6 0a2.8 2.8 0 1 0-5.6 0z"), "6 3": ("s", "M6.5 1.5h5v5h-5z"),
    "2 2": ("^", "M9 .8l3.3 6h-6.6z"), "9 2 2 2": ("D", "M9 .3l3.5 3.7-3.5 3.7-3.5-3.7z"),
    "14 3": ("v", "M9 7.2l3.3-6h-6.6z"),
}  # fmt: skip
"""The marker of each dash pattern, as a Matplotlib marker and as an SVG path centred at (9, 4). Markers distinguish the
styles of single points, which show no dashes."""


@dataclass(frozen=True)
class Style:
    """Line style of a table row and of all runs in it."""

    color: str
    dash: str
    """An SVG dash array; empty for a solid line. It also selects the marker (`MARKERS`)."""
    name: str
    """Name in legends."""


def styles(tables: Iterable[RankingTable], runs: Iterable[RunFolder]) -> dict[str, Style]:
    """Assign a style to each row title and each run label.

    The runs (seeds) of a row share its style and name. A run in several rows has the style of the first. Styles repeat
    after fifty rows.
    """
    of_rows: dict[str, Style] = {}
    of_runs: dict[str, Style] = {}
    for row in (row for table in tables for row in table.rows):
        style = of_rows.setdefault(row.title, _style(len(of_rows), row.title))
        for run, _ in row.group.members:
            of_runs.setdefault(run.label, replace(style, name=row.run.title))
    other_runs = (run for run in runs if run.label not in of_runs)
    of_runs |= {run.label: _style(len(of_rows) + k, run.title) for k, run in enumerate(other_runs)}
    return of_runs | of_rows


def _style(k: int, name: str) -> Style:
    return Style(COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)], name)


@dataclass(frozen=True)
class PlotLine:
    """A line, or a single point, for a run or a table row."""

    x: np.ndarray
    y: np.ndarray
    color: str
    """Colour of the line; empty for the text colour of the page."""
    dash: str = ""
    marker: bool = False
    faint: bool = False
    name: str = ""
    """Name in the tooltip; empty for a line that only joins points."""
    legend_name: str = ""
    """Name in the legend, shared by lines of the same style; if empty, ``name``."""
    interval: tuple[float, float] | None = None
    """A confidence interval, drawn as an error bar at a single point."""


def row_point(row: TableRow, x: float, style: Style, name: str = "") -> PlotLine:
    """Return the point of a table row at x, with the interval of its primary metric. ``name`` is that of the row by
    default."""
    interval = row.metric.interval
    if interval is not None and not all(map(formatting.is_finite, interval)):
        interval = None
    return PlotLine(
        np.array([x]), np.array([row.metric.value or 0.0]), style.color, style.dash, marker=True,
        name=name or row.title, interval=interval,
    )  # fmt: skip


@dataclass(frozen=True)
class Chart:
    title: str
    lines: list[PlotLine]
    x_label: str = "training images seen"
    x_log: bool = False
    num_omitted: int = 0
    """Number of lines or points that are not drawn."""


@dataclass(frozen=True)
class IntervalChart:
    """Values of one metric with their intervals, one row below the other."""

    title: str
    points: list[PlotLine]
    """A single point for each row, from top to bottom; ``x`` is the value and ``interval`` its interval."""
    x_label: str
    baseline: float | None = None
    """The real-data baseline, drawn as a vertical line."""
    num_omitted: int = 0


def legend(charts: Iterable[Chart]) -> dict[str, PlotLine]:
    """Return the entries of a shared legend, the first line of each name."""
    entries: dict[str, PlotLine] = {}
    for line in (line for chart in charts for line in chart.lines if line.name):
        entries.setdefault(line.legend_name or line.name, line)
    return entries


INK, FAINT = "#010203", "#040506"
"""Placeholder colours, which are replaced by CSS variables of the page."""

LOG_RANGE = 20.0
"""An axis is logarithmic if its values are positive and the largest exceeds the smallest by more than this factor."""

MAX_LEGEND_ENTRIES = 24
"""Largest number of legend entries in a chart file."""


def svg(chart: Chart | IntervalChart, prefix: str) -> str:
    """Draw the chart as one ``<svg>`` element whose ids start with ``prefix``, so they are unique within a page.

    Each line of a `Chart` is a group with the attribute ``data-name``. The element's attribute ``data-axes`` maps
    coordinates to values. For x and then y, it contains ``log`` or ``linear`` and two pairs of a coordinate and its
    value.
    """
    options: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 9, "text.color": INK, "axes.edgecolor": FAINT,
        "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "grid.color": FAINT, "text.parse_math": False,
    }  # fmt: skip
    with mpl.rc_context(options):
        if isinstance(chart, IntervalChart):
            figure = _interval_figure(chart, INK)
            return _inline(_to_svg(figure, transparent=True), prefix, "", [])
        figure = Figure(figsize=(4.6, 2.8))
        # Use fixed margins, since an automatic layout takes as long as drawing.
        axes = figure.add_axes((0.115, 0.165, 0.845, 0.81))
        _draw(axes, chart, INK)
        text = _to_svg(figure, transparent=True)
        data_axes = _data_axes(figure, axes)
    return _inline(text, prefix, data_axes, [line.name for line in chart.lines])


def save(chart: Chart | IntervalChart, folder: Path, name: str) -> None:
    """Write the chart with its title and a legend to ``name.png`` and ``name.svg`` in ``folder``."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "text.parse_math": False}):
        if isinstance(chart, IntervalChart):
            figure = _interval_figure(chart, "#1b1f24", title=True)
        else:
            figure = _figure_with_legend(chart)
        with atomic_write(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        text = _to_svg(figure)
    write_text(folder / f"{name}.svg", text)


def _to_svg(figure: Figure, *, transparent: bool = False) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _interval_figure(chart: IntervalChart, ink: str, *, title: bool = False) -> Figure:
    """Draw the rows of an `IntervalChart`; margins are in inches."""
    names = [_legend_label(point.name) for point in chart.points]
    left, bottom, top, row, width = 0.12 + 0.068 * max(map(len, names)), 0.45, 0.3 if title else 0.05, 0.2, 7.2
    rows = row * (len(names) + 0.5)
    height = bottom + rows + top
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + 0.15) / width, rows / height))
    for k, point in enumerate(chart.points):
        value, color = float(point.x[0]), point.color or ink
        if point.interval is not None:
            axes.hlines(k, *point.interval, color=color, linewidth=1.6)
        axes.plot(value, k, color=color, marker=MARKERS.get(point.dash, MARKERS[""])[0], markersize=4.5)
    if chart.baseline is not None:
        axes.axvline(chart.baseline, color=ink, linewidth=0.9, linestyle=(0, (4, 3)))
    ends = [end for point in chart.points for end in (float(point.x[0]), *(point.interval or ()))]
    # The baseline does not count: on a logarithmic axis, a baseline near 0 would leave the rows no room.
    if min(ends) > 0 and max(ends) / min(ends) > LOG_RANGE:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=_log_ticks([np.array(ends)])))
        axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.25, -0.75)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(chart.x_label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(chart.title, loc="left", fontsize=10)
    return figure


def _figure_with_legend(chart: Chart) -> Figure:
    """Draw a chart with its title and a legend beside it."""
    entries = legend([chart])
    figure = Figure(figsize=(8.6, 3.6))
    axes = figure.add_axes((0.07, 0.135, 0.54 if len(entries) > 1 else 0.9, 0.78))
    _draw(axes, chart, "#1b1f24")
    axes.set_title(chart.title, loc="left", fontsize=10)
    if len(entries) > 1:
        artist = {id(line): drawn for line, drawn in zip(chart.lines, axes.lines, strict=False)}
        labels = [_legend_label(name) for name in list(entries)[:MAX_LEGEND_ENTRIES]]
        if len(entries) > MAX_LEGEND_ENTRIES:
            labels[-1] += f" … {len(entries) - MAX_LEGEND_ENTRIES} more"
        artists = [artist[id(line)] for line in list(entries.values())[:MAX_LEGEND_ENTRIES]]
        figure.legend(artists, labels, loc="upper left", bbox_to_anchor=(0.625, 0.95), frameon=False, fontsize=7)
    return figure


def _legend_label(name: str) -> str:
    # Matplotlib omits labels that start with an underscore.
    name = name.lstrip("_") or "–"  # noqa: RUF001
    return name if len(name) <= 50 else name[:49] + "…"


def _draw(axes: Axes, chart: Chart, ink: str) -> None:
    for k, line in enumerate(chart.lines):
        axes.plot(
            line.x,
            line.y,
            color=line.color or ink,
            linestyle=(0, tuple(map(float, line.dash.split()))) if line.dash else "-",
            linewidth=1.5,
            alpha=0.55 if line.faint else 1.0,
            marker=MARKERS.get(line.dash, MARKERS[""])[0] if line.marker else "",
            markersize=3 if len(line.x) > 1 else 5,
            gid=f"line{k}",
            zorder=2.5 if line.marker else 2.0,
        )
    bars = [(line.x[0], *line.interval, line.color or ink) for line in chart.lines if line.interval is not None]
    if bars:
        x, low, high, colors = zip(*bars, strict=True)
        axes.vlines(x, low, high, color=colors, linewidth=1.2, alpha=0.7)
    axes.set_xlabel(chart.x_label)
    if chart.x_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=_log_ticks([line.x for line in chart.lines])))
        axes.xaxis.set_minor_formatter(NullFormatter())
    # Use SI prefixes, but not milli for times and bits/dim.
    if chart.x_log or max(float(line.x.max()) for line in chart.lines) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    _set_y_scale(axes, np.concatenate([line.y for line in chart.lines]), crop=not chart.x_log)


def _log_ticks(values: list[np.ndarray]) -> tuple[float, ...]:
    """Return the multiples of powers of ten that get a tick on a logarithmic axis, fewer for a longer axis."""
    flat = np.concatenate(values)
    return (1.0, 2.0, 5.0) if flat.max() / flat.min() < 100 else (1.0,)


def _set_y_scale(axes: Axes, values: np.ndarray, *, crop: bool) -> None:
    """Choose scale and limits of the y axis. ``crop`` excludes outliers of a learning curve from the limits."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > LOG_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    # A few huge values at the start would flatten the rest of the curve, so the axis ends above the 98th percentile.
    usual = float(np.quantile(values, 0.98))
    if crop and high - low > 4 * (usual - low) > 0:
        axes.set_ylim(low - 0.05 * (usual - low), low + 1.25 * (usual - low))


def _data_axes(figure: Figure, axes: Axes) -> str:
    """Return the attribute ``data-axes`` of a drawn chart (see `svg`)."""
    width, height = figure.get_size_inches() * 72
    box = axes.get_position()
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    parts = [
        axes.get_xscale(), f"{box.x0 * width:.3f} {left:.6g} {box.x1 * width:.3f} {right:.6g}",
        axes.get_yscale(), f"{(1 - box.y0) * height:.3f} {bottom:.6g} {(1 - box.y1) * height:.3f} {top:.6g}",
    ]  # fmt: skip
    return " ".join(parts)


def _inline(text: str, prefix: str, data_axes: str, names: list[str]) -> str:
    """Convert Matplotlib's SVG document to an inline ``<svg>`` element."""
    attribute = f' data-axes="{data_axes}"' if data_axes else ""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(
        r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg class="chart" viewBox="\1" role="img"{attribute}>',
        text,
    )
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)").replace("xlink:href", "href")
    # Insert names last, so the replacements above do not change them.
    return re.sub(
        rf'<g id="{prefix}-line(\d+)">', lambda m: f'{m[0][:-1]} data-name="{escape(names[int(m[1])])}">', text
    )
