"""Charts as SVG text that takes its ink from the page, and as files of their own."""

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

from gencompare.compare.load_runs import RunFolder
from gencompare.compare.ranking import TableSection
from gencompare.files import atomic, write_text

COLORS = ("#3b7dd8", "#d9792b", "#2f9e6e", "#c94a5e", "#8a63d2", "#1a9aa8", "#a8793f", "#c858a0", "#8a951f", "#7c8591")
DASHES = ("", "6 3", "2 2", "9 2 2 2", "14 3")


@dataclass(frozen=True)
class Style:
    color: str
    dash: str
    """An SVG dash array; empty for an unbroken line. A mark goes with it (`plots.MARKS`): a point shows no dash."""
    name: str
    """What a legend calls what is drawn so."""


def styles(groups: Iterable[TableSection], runs: Iterable[RunFolder]) -> dict[str, Style]:
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


INK, FAINT = "#010203", "#040506"
"""Stand-ins that the page's own colours replace."""

LOG_RANGE = 20.0
"""Positive values that span more than this factor are drawn on a logarithmic axis."""

MAX_LABELLED = 24
"""A chart that stands alone has a legend of so many lines at most."""


MARKS = {
    "": ("o", "M6.2 4a2.8 2.8 0 1 0 5.6 0a2.8 2.8 0 1 0-5.6 0z"), "6 3": ("s", "M6.5 1.5h5v5h-5z"),
    "2 2": ("^", "M9 .8l3.3 6h-6.6z"), "9 2 2 2": ("D", "M9 .3l3.5 3.7-3.5 3.7-3.5-3.7z"),
    "14 3": ("v", "M9 7.2l3.3-6h-6.6z"),
}  # fmt: skip
"""The mark that goes with a dash, for matplotlib and as an SVG path around (9, 4): a single point shows no dash."""


@dataclass(frozen=True)
class PlotLine:
    """What one run, or one row, gives: a line, or a single point."""

    x: np.ndarray
    y: np.ndarray
    color: str
    """Empty for the page's own ink."""
    dash: str = ""
    marker: bool = False
    pale: bool = False
    name: str = ""
    """What it is, for the pointer; empty for a line that only joins points of others."""
    entry: str = ""
    """What a legend calls it and all that is drawn alike; empty where that is the name."""
    bounds: tuple[float, float] | None = None
    """An interval, drawn as a bar through a single point."""


@dataclass(frozen=True)
class Chart:
    title: str
    lines: list[PlotLine]
    x_label: str = "training images seen"
    x_log: bool = False
    left: int = 0
    """Further runs that are not drawn."""


def legend(charts: Iterable[Chart]) -> dict[str, PlotLine]:
    """By name, the first line of each that is drawn in any of ``charts``."""
    found: dict[str, PlotLine] = {}
    for line in (line for chart in charts for line in chart.lines if line.name):
        found.setdefault(line.entry or line.name, line)
    return found


def svg(chart: Chart, key: str) -> str:
    """The chart as one ``<svg>`` element. ``key`` is in all of its ids, so that charts of a page do not share any.

    A line is a group with the attribute ``data-name``. ``data-axes`` of the element says how its coordinates stand for
    values: for x and then y ``log`` or ``linear``, two coordinates and their values.
    """
    options: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9, "text.color": INK, "axes.edgecolor": FAINT,
        "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "grid.color": FAINT, "text.parse_math": False,
    }  # fmt: skip
    with mpl.rc_context(options):
        figure = Figure(figsize=(4.6, 2.8))
        # Fixed margins: laying a chart out takes as long as drawing it.
        axes = figure.add_axes((0.115, 0.165, 0.875, 0.81))
        _draw(axes, chart, INK)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        scale = _scale_of(figure, axes)
    return _inline(text.getvalue(), key, scale, [line.name for line in chart.lines])


def save(chart: Chart, folder: Path, name: str) -> None:
    """``name.png`` and ``name.svg`` in ``folder``: the chart with its title and a legend, for a paper or a slide."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "text.parse_math": False}):
        named = legend([chart])
        figure = Figure(figsize=(8.6, 3.6))
        axes = figure.add_axes((0.07, 0.135, 0.54 if len(named) > 1 else 0.9, 0.78))
        _draw(axes, chart, "#1b1f24")
        axes.set_title(chart.title, loc="left", fontsize=10)
        if len(named) > 1:
            artist = {id(line): drawn for line, drawn in zip(chart.lines, axes.lines, strict=False)}
            labels = [_cut(name) for name in list(named)[:MAX_LABELLED]]
            if len(named) > MAX_LABELLED:
                labels[-1] += f" … {len(named) - MAX_LABELLED} more"
            shown = [artist[id(line)] for line in list(named.values())[:MAX_LABELLED]]
            figure.legend(shown, labels, loc="upper left", bbox_to_anchor=(0.625, 0.95), frameon=False, fontsize=7)
        with atomic(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    write_text(folder / f"{name}.svg", text.getvalue())


def _cut(label: str) -> str:
    # What begins with an underscore has no place in a legend of matplotlib.
    label = label.lstrip("_") or "–"  # noqa: RUF001
    return label if len(label) <= 50 else label[:49] + "…"


def _draw(axes: Axes, chart: Chart, ink: str) -> None:
    for k, line in enumerate(chart.lines):
        color = line.color or ink
        axes.plot(
            line.x,
            line.y,
            color=color,
            linestyle=(0, tuple(map(float, line.dash.split()))) if line.dash else "-",
            linewidth=1.5,
            alpha=0.55 if line.pale else 1.0,
            marker=MARKS.get(line.dash, MARKS[""])[0] if line.marker else "",
            markersize=3 if len(line.x) > 1 else 5,
            gid=f"line{k}",
            zorder=2.5 if line.marker else 2.0,
        )
    bars = [(line.x[0], *line.bounds, line.color or ink) for line in chart.lines if line.bounds is not None]
    if bars:
        x, low, high, colors = zip(*bars, strict=True)
        axes.vlines(x, low, high, color=colors, linewidth=1.2, alpha=0.7)
    axes.set_xlabel(chart.x_label)
    if chart.x_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=_ticks([line.x for line in chart.lines])))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if max(float(line.x.max()) for line in chart.lines) > 1:  # of a time in [0, 1] it would make thousandths
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    _scale(axes, np.concatenate([line.y for line in chart.lines]), cut=not chart.x_log)


def _ticks(values: list[np.ndarray]) -> tuple[float, ...]:
    """Which multiples of a power of ten are marked on a logarithmic axis: the fewer the longer it is."""
    every = np.concatenate(values)
    return (1.0, 2.0, 5.0) if every.max() / every.min() < 100 else (1.0,)


def _scale(axes: Axes, values: np.ndarray, *, cut: bool) -> None:
    """The y axis; ``cut`` says that a few far values of a learning curve may lie outside of it."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > LOG_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    # A few huge values at the start would press the rest of the curve flat: the axis ends above the other 98 %.
    usual = float(np.quantile(values, 0.98))
    if cut and high - low > 4 * (usual - low) > 0:
        axes.set_ylim(low - 0.05 * (usual - low), low + 1.25 * (usual - low))


def _scale_of(figure: Figure, axes: Axes) -> str:
    """Of the drawn chart: kind, coordinate and value at either end, for x and for y, in units of the SVG."""
    width, height = figure.get_size_inches() * 72
    box = axes.get_position()
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    parts = [
        axes.get_xscale(), f"{box.x0 * width:.3f} {left:.6g} {box.x1 * width:.3f} {right:.6g}",
        axes.get_yscale(), f"{(1 - box.y0) * height:.3f} {bottom:.6g} {(1 - box.y1) * height:.3f} {top:.6g}",
    ]  # fmt: skip
    return " ".join(parts)


def _inline(text: str, key: str, scale: str, names: list[str]) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    text = re.sub(
        r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg class="chart" viewBox="\1" role="img" data-axes="{scale}">',
        text,
    )
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)").replace("xlink:href", "href")
    # Names last: nothing above may change them.
    begin = f'<g id="{key}-line'
    return re.sub(
        rf'{begin}(\d+)">', lambda found: f'{found[0][:-1]} data-name="{escape(names[int(found[1])])}">', text
    )
