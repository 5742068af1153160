"""The failures of plain score matching, and their remedies: python docs/figures/score_matching.py

Writes docs/images/score_matching.png and prints the tables of docs/score_matching.md. Takes about two minutes on one
core.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from toy_scores import (
    ANNEALED,
    ExactDenoiser,
    add_noise,
    draw_samples,
    langevin_at_one_level,
    line,
    mean_normal_score,
    minimal_loss,
    mode_std,
    relative_error,
    rms_normal_score,
    small_mode_weight,
    square,
    train_at_many_levels,
    train_at_one_level,
    train_by_score_matching,
    two_gaussians,
)

from gencompare.comparison.charts import COLORS
from gencompare.diffusion.sde_samplers import EulerMaruyama, ReverseDiffusion
from gencompare.rng import generator

IMAGE = Path(__file__).parents[1] / "images" / "score_matching.png"
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SMALL = SIGMAS[0]
"""The noise level of trainings and samplers with a single level."""
SINGLE = (0.02, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Single noise levels for Langevin dynamics with the exact score."""
NOISE, DISTANCE = 0.1, 0.1
N = 4000
BLUE, ORANGE, GREEN, RED = COLORS[:4]
GREY = "#7c8591"


@dataclass(frozen=True)
class SamplerResult:
    name: str
    exact: torch.Tensor
    learned: torch.Tensor


@dataclass(frozen=True)
class Measurements:
    without_noise: list[float]
    with_noise: list[float]
    """Losses of plain score matching."""
    normal_scores: list[tuple[float, float]]
    """Normal component of the score learned on the line, at each of ``SIGMAS``: at `DISTANCE` off the line, and its
    scaled root mean square over the noisy data."""
    many_levels: list[tuple[float, float]]
    """Relative errors at each of ``SIGMAS``: over the noisy data, and over the square."""
    one_level: tuple[float, float]
    """The same at `SMALL`, for a score learned at that level alone."""
    single_level: list[tuple[float, float]]
    """Small-mode weight and mode standard deviation of Langevin dynamics with the exact score, for ``SINGLE``."""
    samplers: list[SamplerResult]


def measure() -> Measurements:
    _, without_noise = train_by_score_matching(0.0)
    _, with_noise = train_by_score_matching(NOISE)
    on_line = train_at_many_levels(line)
    one, many, exact = train_at_one_level(two_gaussians, SMALL), train_at_many_levels(two_gaussians), ExactDenoiser()
    source = generator("cpu", "measure")

    def errors(denoiser, sigma: float) -> tuple[float, float]:
        points = add_noise(two_gaussians, N, sigma, source), square(N, source)
        return tuple(relative_error(denoiser, x, sigma) for x in points)

    single = [langevin_at_one_level(exact, sigma, N, denoise=False) for sigma in SINGLE]
    sde = [EulerMaruyama(num_steps=200), ReverseDiffusion(num_steps=200)]
    return Measurements(
        without_noise,
        with_noise,
        [(mean_normal_score(on_line, N, s, DISTANCE, source), rms_normal_score(on_line, N, s, source)) for s in SIGMAS],
        [errors(many, s) for s in SIGMAS],
        errors(one, SMALL),
        [(small_mode_weight(x), mode_std(x)) for x in single],
        [
            SamplerResult(
                f"Langevin at sigma {SMALL:g}",
                langevin_at_one_level(exact, SMALL, N),
                langevin_at_one_level(one, SMALL, N),
            ),
            *(
                SamplerResult(type(s).__name__, draw_samples(s, exact, N), draw_samples(s, many, N))
                for s in (ANNEALED, *sde)
            ),
        ],
    )


def tables(m: Measurements) -> str:
    steps = (125, 250, 500, 1000)
    parts = [
        _table(
            ["loss of plain score matching at step", *(f"{k:,}" for k in steps)],
            [
                ["points on a line", *(f"{_late(m.without_noise, k):,.0f}" for k in steps)],
                [f"with noise {NOISE:g} (minimum {minimal_loss(NOISE):.1f})"]
                + [f"{_late(m.with_noise, k):.1f}" for k in steps],
            ],
        ),
        _table(
            ["learned on the line, at sigma", *(f"{s:g}" for s in SIGMAS)],
            [
                [f"score {DISTANCE:g} off the line", *(f"{far:.3g}" for far, _ in m.normal_scores)],
                ["exact", *(f"{DISTANCE / s**2:.3g}" for s in SIGMAS)],
                ["sigma x score on noisy data, RMS (exact 1)", *(f"{own:.2f}" for _, own in m.normal_scores)],
            ],
        ),
        _table(
            ["relative error of the score, at sigma", *(f"{s:g}" for s in SIGMAS)],
            [
                ["many levels, noisy data", *(f"{own:.3f}" for own, _ in m.many_levels)],
                ["many levels, uniform points", *(f"{even:.3f}" for _, even in m.many_levels)],
                ["one level, noisy data", f"{m.one_level[0]:.3f}", *[""] * (len(SIGMAS) - 1)],
                ["one level, uniform points", f"{m.one_level[1]:.3f}", *[""] * (len(SIGMAS) - 1)],
            ],
        ),
        _table(
            ["Langevin with the exact score, one level, sigma", *(f"{s:g}" for s in SINGLE)],
            [
                ["weight of the small mode (exact 0.2)", *(f"{part:.3f}" for part, _ in m.single_level)],
                ["standard deviation of a mode (exact 0.1)", *(f"{wide:.3f}" for _, wide in m.single_level)],
            ],
        ),
        _table(
            ["sampler", "weight, exact score", "std", "weight, learned score", "std "],
            [
                [
                    s.name,
                    *(f"{value:.3f}" for x in (s.exact, s.learned) for value in (small_mode_weight(x), mode_std(x))),
                ]
                for s in m.samplers
            ],
        ),
    ]
    return "\n\n".join(parts)


def _late(losses: Sequence[float], step: int) -> float:
    """Mean of the 50 losses before a step."""
    return float(np.mean(losses[step - 50 : step]))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(m: Measurements) -> Figure:
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    (plain, off, error, single), row = figure.subplots(2, 4)
    _plain(plain, m)
    _off(off, m)
    _error(error, m)
    _single(single, m)
    points = {"Data": two_gaussians(N, generator("cpu", "data"))}
    langevin, annealed, maruyama, _ = m.samplers
    points[f"Langevin, one level, sigma {SMALL:g}"] = langevin.exact
    points["Annealed Langevin, 20 levels"] = annealed.learned
    points["Euler-Maruyama, 200 steps"] = maruyama.learned
    scores = ("", "exact score, ", "learned score, ", "learned score, ")
    for axes, (name, x), kind, bad in zip(row, points.items(), scores, (False, True, False, False), strict=True):
        _points(axes, x, f"{name}\n{kind}small-mode weight {small_mode_weight(x):.2f}", RED if bad else "black")
    for axes in (plain, off, error, single):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.5, alpha=0.4)
    return figure


def _plain(axes: Axes, m: Measurements) -> None:
    axes.plot(m.without_noise, color=RED, label="points on a line: no minimum")
    axes.plot(m.with_noise, color=BLUE, label=f"the same with noise {NOISE:g}")
    axes.axhline(minimal_loss(NOISE), color="black", linestyle="--", linewidth=1, label="its exact minimum")
    axes.set_yscale("symlog", linthresh=100)
    axes.set_yticks([0, -100, -1e3, -1e4, -1e5], ["0", "-100", "-1,000", "-10,000", "-100,000"])
    axes.set_xlabel("training step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set_ylim(-5e5, 5e3)
    axes.minorticks_off()
    _title(axes, "1. Plain score matching has no minimum", "for data on a low-dimensional manifold")


def _off(axes: Axes, m: Measurements) -> None:
    sigma = np.array(SIGMAS)
    far, own = np.array(m.normal_scores).T
    axes.plot(sigma, DISTANCE / sigma**2, color=RED, label=f"score {DISTANCE:g} off the line")
    axes.plot(sigma, np.ones_like(sigma), color=BLUE, label="sigma x score\non noisy data (RMS)")
    axes.plot(sigma, far, "o", color=RED, markersize=5)
    axes.plot(sigma, own, "o", color=BLUE, markersize=5)
    axes.plot([], [], "o", color=GREY, markersize=5, label="learned (lines: exact)")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("noise level sigma")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    _title(axes, "2. Off a manifold the score is unbounded;", "on noisy data it is of size 1 / sigma")


def _error(axes: Axes, m: Measurements) -> None:
    own, even = np.array(m.many_levels).T
    axes.plot(SIGMAS, even, "o-", color=ORANGE, markersize=5, label="many levels: uniform points")
    axes.plot(SIGMAS, own, "o-", color=BLUE, markersize=5, label="many levels: noisy data")
    axes.plot(
        SMALL, m.one_level[1], "x", color=ORANGE, markersize=9, markeredgewidth=2, label="one level: uniform points"
    )
    axes.plot(SMALL, m.one_level[0], "x", color=BLUE, markersize=9, markeredgewidth=2, label="one level: noisy data")
    axes.set_xscale("log")
    axes.set_xlabel("noise level sigma")
    axes.set_ylabel("relative error of the learned score")
    axes.set_ylim(0, 0.85)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    _title(axes, "3. The score is wrong where data are rare;", "with much noise data are nowhere rare")


def _single(axes: Axes, m: Measurements) -> None:
    part, wide = np.array(m.single_level).T
    axes.plot(wide, part, "o-", color=RED, markersize=5, label="one level (labelled by sigma)")
    for k, (sigma, x, y) in enumerate(zip(SINGLE, wide, part, strict=True)):
        offset = (-8, -13) if k == 0 else (3, 5)
        axes.annotate(f"{sigma:g}", (x, y), offset, textcoords="offset points", fontsize=8, color=RED)
    for s, mark, color in zip(m.samplers[1:], "s^v", (BLUE, GREEN, ORANGE), strict=True):
        axes.plot(mode_std(s.exact), small_mode_weight(s.exact), mark, color=color, markersize=7, label=s.name)
    axes.plot(0.1, 0.2, "+", color="black", markersize=16, label="exact")
    axes.set_xlabel("standard deviation of a mode")
    axes.set_ylabel("weight of the small mode")
    axes.set_xlim(0, 0.55)
    axes.set_ylim(0, 0.85)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    _title(axes, "4. Langevin at one level, exact score: low noise", "loses the mode weights, high noise the width")


def _title(axes: Axes, *lines: str) -> None:
    axes.set_title("\n".join(lines), fontsize=10, loc="left")


def _points(axes: Axes, x: torch.Tensor, title: str, color: str) -> None:
    axes.scatter(*x.flatten(1)[:1500].T.numpy(), s=4, alpha=0.4, color=BLUE, linewidths=0)
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(-1.05, 1.05)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10, loc="left", color=color)


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = measure()
    draw(measured).savefig(IMAGE, dpi=110)
    print(tables(measured))
    print(f"\nWrote {IMAGE}.")
