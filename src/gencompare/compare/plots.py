"""Charts as SVG text that takes its ink from the page, so that they read in light and in dark.

No text of a user goes into a chart: titles and legends are the page's own, where they are escaped.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

INK, FAINT = "#010203", "#040506"
"""Stand-ins that the page's own colours replace."""

LOG_RANGE = 20.0
"""Positive values that span more than this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Line:
    x: np.ndarray
    y: np.ndarray
    color: str
    dash: str = ""
    marker: bool = False
    pale: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    lines: list[Line]
    x_label: str = "training images seen"
    x_log: bool = False


def svg(chart: Chart, key: str) -> str:
    """The chart as one ``<svg>`` element. ``key`` is in all of its ids, so that charts of a page do not share any."""
    options: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9, "text.color": INK, "axes.edgecolor": FAINT,
        "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "grid.color": FAINT, "text.parse_math": False,
    }  # fmt: skip
    with mpl.rc_context(options):
        figure = Figure(figsize=(4.6, 2.8), layout="constrained")
        _draw(figure.add_subplot(), chart)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), key)


def _draw(axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        axes.plot(
            line.x,
            line.y,
            color=line.color,
            linestyle=(0, tuple(map(float, line.dash.split()))) if line.dash else "-",
            linewidth=1.5,
            alpha=0.55 if line.pale else 1.0,
            marker="o" if line.marker else "",
            markersize=3,
        )
    axes.set_xlabel(chart.x_label)
    if chart.x_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if max(float(line.x.max()) for line in chart.lines) > 1:  # of a time in [0, 1] it would make thousandths
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    _scale(axes, np.concatenate([line.y for line in chart.lines]))


def _scale(axes: Axes, values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > LOG_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    # A few huge values at the start would press the rest of the curve flat: the axis ends above the other 98 %.
    usual = float(np.quantile(values, 0.98))
    if high - low > 4 * (usual - low) > 0:
        axes.set_ylim(low - 0.05 * (usual - low), low + 1.25 * (usual - low))


def _inline(text: str, key: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    text = re.sub(r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg class="chart" viewBox="\1" role="img">', text)
    return text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)").replace("xlink:href", "href")
