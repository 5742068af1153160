"""Which charts a set of runs asks for: what was logged while training, against images seen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate

import numpy as np

from gencompare.compare import words
from gencompare.compare.gather import Run
from gencompare.compare.plots import Chart, Line
from gencompare.compare.rank import Group, Row
from gencompare.compare.styles import Style
from gencompare.compare.ways import but_for_steps

POINTS = 300
"""A longer curve is drawn by the means of so many stretches of it."""

DISTANCES = ("val/fid", "val/fd_", "val/coverage")


MOST = 75
"""Lines of a chart at most, those of the best-ranked runs: fifteen families of five seeds each."""


def distances(runs: Iterable[Run], style: Mapping[str, Style]) -> list[Chart]:
    """One chart for each data set and distance (or coverage) that was logged at the looks of a run."""
    lines: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for run in runs:
        for name in run.curve:
            if name.startswith(DISTANCES):
                key = (str(run.record.data.get("name", "")), name)
                lines[key] += _lines(run, name, style, marker=True)
    return [
        best(Chart(f"{words.title(name.removeprefix('val/'))} on {data}", drawn))
        for (data, name), drawn in lines.items()
        if any(len(line.x) > 1 for line in drawn)
    ]


def best(chart: Chart) -> Chart:
    """The chart with the lines of its first names alone, `MOST` lines at most."""
    count = Counter(line.name for line in chart.lines)  # in the order of the lines
    kept = {name for name, drawn in zip(count, accumulate(count.values()), strict=True) if drawn <= MOST}
    return replace(chart, lines=[line for line in chart.lines if line.name in kept], left=len(count) - len(kept))


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
        best(Chart(f"{family} on {data}: {words.title(name)}", drawn))
        for (family, data, name), drawn in lines.items()
        if drawn
    ]


def noise_schedules(runs: Iterable[Run], style: Mapping[str, Style]) -> list[Chart]:
    """One chart of the log-SNR over time, for the runs whose models add noise by a schedule."""
    lines = []
    for run in runs:
        t, log_snr = (_numbers(run.record.model.get("noise_schedule"), name) for name in ("t", "log_snr"))
        if len(t) and t.shape == log_snr.shape and np.isfinite([t, log_snr]).all():
            own = style[run.label]
            lines.append(Line(t, log_snr, own.color, own.dash, name=run.title, entry=own.name))
    return [best(Chart("Log-SNR", lines, "time: 0 data, 1 noise"))] if lines else []


def _numbers(schedule: object, name: str) -> np.ndarray:
    """A list of a record's free fields as an array (k,); empty where it is none."""
    values = schedule.get(name) if isinstance(schedule, dict) else None
    try:
        return np.asarray(values if isinstance(values, list) else [], dtype=float).ravel()
    except (TypeError, ValueError):
        return np.empty(0)


def against_calls(groups: Iterable[Group], style: Mapping[str, Style]) -> list[Chart]:
    """A chart for each table in which a run was measured at several numbers of network calls.

    A line is what one training, or one set of training seeds, gives when nothing but the number of steps is changed. It
    is drawn as the best of its rows is elsewhere.
    """
    charts = []
    for group in groups:
        points: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
        best_of: dict[tuple[str, ...], Row] = {}
        for row in group.rows:
            calls, figure = words.calls(row.result.generation.nfe), row.headline.value
            if calls and figure is not None:
                made = row.result.generation
                sampled = (but_for_steps(made.sampler), made.guidance, made.checkpoint, made.weights)
                key = (row.line.members[0][0].label, *sampled)
                best_of.setdefault(key, row)
                points[key].append((calls, figure))
        lines = [
            Line(
                *_columns(sorted(found)), style[row.title].color, style[row.title].dash, marker=True,
                name=but_for_steps(row.title),
            )
            for found, row in zip(points.values(), best_of.values(), strict=True)
            if len({x for x, _ in found}) > 1
        ]  # fmt: skip
        if lines:
            title = f"{words.title(group.headline)} on {group.measurement.data}"
            charts.append(best(Chart(title, lines, "network calls a sample", x_log=True)))
    return charts


def _columns(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(points).T
    return x, y


def _lines(run: Run, name: str, style: Mapping[str, Style], *, marker: bool = False, pale: bool = False) -> list[Line]:
    values = run.curve.get(name)
    images = run.curve.get("images", run.curve.get("step"))
    if values is None or images is None:
        return []
    logged = np.isfinite(values) & np.isfinite(images)
    x, y = thin(images[logged], values[logged])
    own = style[run.label]
    line = Line(x, y, own.color, own.dash, marker=marker, pale=pale, name=run.title, entry=own.name)
    return [line] if len(x) else []


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points: means over stretches of equal length."""
    if len(x) <= POINTS:
        return x, y
    edges = np.linspace(0, len(x), POINTS + 1).astype(int)
    widths = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / widths, np.add.reduceat(y, edges[:-1]) / widths
