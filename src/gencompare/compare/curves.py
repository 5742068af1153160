"""Which charts a set of runs asks for: what was logged while training, against images seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gencompare.compare import words
from gencompare.compare.gather import Run
from gencompare.compare.plots import Chart, Line

POINTS = 300
"""A longer curve is drawn by the means of so many stretches of it."""

DISTANCES = ("val/fid", "val/fd_")


@dataclass(frozen=True)
class Style:
    color: str
    dash: str
    """An SVG dash array; empty for an unbroken line."""


COLORS = ("#3b7dd8", "#d9792b", "#2f9e6e", "#c94a5e", "#8a63d2", "#1a9aa8", "#a8793f", "#c858a0", "#8a951f", "#7c8591")
DASHES = ("", "6 3", "2 2")


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A colour and dash for each run, the same everywhere on the page."""
    n = len(COLORS)
    return {label: Style(COLORS[k % n], DASHES[k // n % len(DASHES)]) for k, label in enumerate(labels)}


def distances(runs: Iterable[Run], style: Mapping[str, Style]) -> list[Chart]:
    """One chart for each data set and distance that was logged at the looks of a run."""
    lines: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for run in runs:
        for name in run.curve:
            if name.startswith(DISTANCES):
                key = (str(run.record.data.get("name", "")), name)
                lines[key] += _lines(run, name, style, marker=True)
    return [
        Chart(f"{words.title(name.removeprefix('val/'))} on {data}", drawn)
        for (data, name), drawn in lines.items()
        if drawn
    ]


def losses(runs: Iterable[Run], style: Mapping[str, Style]) -> list[Chart]:
    """One chart for each data set, family and loss: losses of two families are not the same quantity.

    The held-out loss of the same name, where it was logged, is the paler line with dots.
    """
    lines: dict[tuple[str, str, str], list[Line]] = defaultdict(list)
    for run in runs:
        for name in run.curve:
            if name.startswith("train/") and "loss" in name:
                key = (run.record.family, str(run.record.data.get("name", "")), name.removeprefix("train/"))
                held_out = _lines(run, name.replace("train/", "val/", 1), style, marker=True, pale=True)
                lines[key] += [*_lines(run, name, style), *held_out]
    return [
        Chart(f"{family} on {data}: {words.title(name)}", drawn)
        for (family, data, name), drawn in lines.items()
        if drawn
    ]


def _lines(run: Run, name: str, style: Mapping[str, Style], *, marker: bool = False, pale: bool = False) -> list[Line]:
    values = run.curve.get(name)
    images = run.curve.get("images", run.curve.get("step"))
    if values is None or images is None:
        return []
    logged = np.isfinite(values) & np.isfinite(images)
    x, y = thin(images[logged], values[logged])
    own = style[run.label]
    return [Line(x, y, own.color, own.dash, marker=marker, pale=pale)] if len(x) else []


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points: means over stretches of equal length."""
    if len(x) <= POINTS:
        return x, y
    edges = np.linspace(0, len(x), POINTS + 1).astype(int)
    widths = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / widths, np.add.reduceat(y, edges[:-1]) / widths
