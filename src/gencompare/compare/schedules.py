"""Noise schedules side by side in one picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gencompare.compare.styles import COLORS, DASHES

MANY = (*COLORS, "#1d2530", "#e0b20a")
"""More colours than runs have on a page: there are more schedules than that."""

Curve = Mapping[str, np.ndarray]
"""``t``, ``log_snr``, ``alpha``, ``sigma`` and ``density``, (points,) each."""


def draw(curves: Mapping[str, Curve]) -> Figure:
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


def _panel(axes: Axes, curves: Mapping[str, Curve], x: str, y: str, label: str, title: str) -> None:
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
