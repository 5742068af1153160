"""Quality against cost: all that a model needed is counted, and the front holds exactly the rows that nothing beats."""

from __future__ import annotations

import csv
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gencompare.compare import charts, page, svg_plots
from gencompare.compare.load_runs import load_runs
from gencompare.compare.ranking import rank
from gencompare.compare.run_costs import cost_curves, pareto
from gencompare.compare.svg_plots import Chart, PlotLine, styles
from gencompare.compare.tables import columns, write_csv
from gencompare.records import Metric
from synthetic import result, write_run


def drawn(folder: Path) -> Any:
    runs = load_runs(sorted(folder.iterdir())).runs
    groups = rank(runs)
    return {t.chart.x_label: t for t in cost_curves(groups, styles(groups, runs))}


def test_the_front_is_what_no_row_beats() -> None:
    random = np.random.default_rng(0)
    cost, loss = random.integers(0, 12, (2, 60)).tolist()
    beaten = [
        any(a <= c and b <= d and (a < c or b < d) for a, b in zip(cost, loss, strict=True))
        for c, d in zip(cost, loss, strict=True)
    ]
    front = pareto(cost, loss)
    assert sorted(front) == [k for k, is_beaten in enumerate(beaten) if not is_beaten]
    assert all(cost[a] <= cost[b] and loss[a] >= loss[b] for a, b in pairwise(front))
    assert pareto([], []) == []


def test_rows_are_drawn_against_each_cost_with_the_front_named(tmp_path: Path) -> None:
    for name, value, flops, calls in (("cheap", 9.0, 1e12, 5), ("good", 2.0, 9e12, 50), ("beaten", 9.5, 5e12, 50)):
        r = result(value, generation={"nfe": {"net": float(calls)}})
        write_run(tmp_path / name, [r], training={"flops": flops, "seconds": 60.0}, picture=False)
    found = drawn(tmp_path)
    assert set(found) == {"training FLOPs", "network calls a sample"}, "equal seconds make no chart"
    assert [row.run.label for row in found["training FLOPs"].front] == ["cheap", "good"]
    points = {line.name: (line.x.tolist(), line.y.tolist()) for line in found["training FLOPs"].chart.lines}
    assert points[""] == ([1e12, 9e12], [9.0, 2.0]) and points["beaten"] == ([5e12], [9.5])
    html = page.render(load_runs(sorted(tmp_path.iterdir())))
    assert "On the front, cheapest first:" in html and "FD digits on digits against training FLOPs" in html


def test_a_figure_that_should_be_high_has_its_front_above(tmp_path: Path) -> None:
    for name, value, flops in (("a", 0.2, 1e12), ("b", 0.9, 2e12), ("c", 0.5, 3e12)):
        metrics = {"fd_digits": Metric(value, higher_is_better=True)}
        write_run(tmp_path / name, [result(0, metrics=metrics)], training={"flops": flops}, picture=False)
    assert [row.run.label for row in drawn(tmp_path)["training FLOPs"].front] == ["a", "b"]


def test_everything_a_model_needed_is_its_cost(tmp_path: Path) -> None:
    training = {"flops": 1e12, "seconds": 60.0}
    first = {"run": "autoencoder", "flops": 5e12, "seconds": 30.0}
    write_run(tmp_path / "pixels", [result(1.0)], training=training, picture=False)
    write_run(tmp_path / "latent", [result(2.0)], training=training, model={"autoencoder": first}, picture=False)
    unknown = {"autoencoder": {"run": "x", "seconds": 30.0}}
    write_run(tmp_path / "unknown", [result(3.0)], training=training, model=unknown, picture=False)
    found = drawn(tmp_path)
    x = {line.name: line.x.tolist() for line in found["training FLOPs"].chart.lines[1:]}
    assert x == {"pixels": [1e12], "latent": [6e12]}, "half of a cost is none"
    x = {line.name: line.x.tolist() for line in found["device seconds of training"].chart.lines[1:]}
    assert x == {"pixels": [60.0], "latent": [90.0], "unknown": [90.0]}


def test_costs_are_those_that_the_records_add_up(tmp_path: Path) -> None:
    """Two seeds whose search had two other trials each; a model of 0.5e12 FLOPs and 10 s that needed nothing."""
    trial = {"role": "trial", "flops": 0.5e12, "device_seconds": 50.0}
    for seed, scale in enumerate((1, 3)):
        taken = {"flops": 1e12 * scale, "seconds": 5.0 * scale, "processes": 2, "device_seconds": 10.0 * scale}
        summed = {"flops": 1e12 + 1e12 * scale, "device_seconds": 100 + 10.0 * scale, "steps": None}
        training = taken | {"dependencies": [trial, trial], "total_cost": summed}
        made = result(1.0 + seed, generation={"seed": seed})
        write_run(tmp_path / f"x{seed}", [made], seed=seed, training=training, picture=False)
    plain = {"flops": 0.5e12, "seconds": 5.0, "processes": 2}
    write_run(tmp_path / "y", [result(9.0)], family="vae", training=plain, picture=False)
    found = drawn(tmp_path)
    for name, mean, other in (("training FLOPs", 3e12, 0.5e12), ("device seconds of training", 120.0, 10.0)):
        x = {line.name: line.x.tolist() for line in found[name].chart.lines[1:]}
        assert x == {"x0, mean of 2 seeds": [mean], "y": [other]}
    (group,) = rank(load_runs(sorted(tmp_path.iterdir())).runs)
    (time,) = (column for column in columns(group) if column.title == "device time")
    assert [(time.cell(row).key, time.cell(row).beside) for row in group.rows] == [
        (120.0, "1:40 min of it: 2 trials"), (10.0, ""),
    ]  # fmt: skip
    write_csv(load_runs(sorted(tmp_path.iterdir())), tmp_path / "compare.csv")
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = [
            (row["run"], row["training.flops"], row["total.flops"], row["total.device_seconds"])
            for row in csv.DictReader(file)
        ]
    assert rows == [
        ("x0", "1000000000000.0", "2000000000000.0", "110.0"), ("x1", "3000000000000.0", "4000000000000.0", "130.0"),
        ("y", "500000000000.0", "500000000000.0", "10.0"),
    ]  # fmt: skip


def test_rows_of_several_seeds_have_their_interval_and_mean_cost(tmp_path: Path) -> None:
    for k, value in enumerate([1.0, 2.0, 3.0]):
        r = result(value, generation={"seed": k}, details={"flops_per_sample": 1e9 + k})
        write_run(tmp_path / f"a{k}", [r], seed=k, training={"flops": 1e12 * (k + 1)}, picture=False)
    other = result(4.0, details={"flops_per_sample": 7e9})
    write_run(tmp_path / "b", [other], family="vae", training={"flops": 9e12}, picture=False)
    found = drawn(tmp_path)
    mean = found["training FLOPs"].chart.lines[1]
    half = 4.302653 / 3**0.5
    assert mean.x.tolist() == [2e12] and mean.bounds == pytest.approx((2 - half, 2 + half), rel=1e-6)
    assert found["FLOPs a sample"].chart.lines[1].x.tolist() == [1e9 + 1]


def test_of_very_many_rows_the_best_and_the_front_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gencompare.compare.run_costs.MOST", 3)
    monkeypatch.setattr("gencompare.compare.charts.MOST", 2)
    for k in range(8):
        training = {"flops": 1e12 * (8 - k)}
        write_run(tmp_path / f"r{k}", [result(1.0 + k)], family=f"f{k}", training=training, picture=False)
    write_run(tmp_path / "z", [result(99.0)], family="z", training={"flops": 9e12}, picture=False)
    chart = drawn(tmp_path)["training FLOPs"].chart
    assert len(chart.lines) == 1 + 8 and chart.left == 1, "all eight are on the front"
    runs = load_runs(sorted(tmp_path.iterdir())).runs
    (distance,) = charts.distance_curves(runs, styles([], runs))
    assert [line.name for line in distance.lines] == ["r0", "r1"] and distance.left == 7
    assert "(without 7 more: the best are drawn)" in page.render(load_runs(sorted(tmp_path.iterdir())))


@pytest.mark.parametrize("log", [False, True])
def test_a_coordinate_of_a_chart_can_be_turned_into_its_value(log: bool) -> None:
    """As the page's script does it, from ``data-axes`` and the vertices of a path."""
    import re

    x, y = np.array([10.0, 20.0, 50.0]), np.array([3.0, 900.0, 40.0])
    text = svg_plots.svg(Chart("t", [PlotLine(x, y, "#3b7dd8", name='<"&>')], x_log=log), "k0")
    assert 'data-name="&lt;&quot;&amp;&gt;"' in text
    kinds = (re.search(r'data-axes="([^"]+)"', text) or [""])[1].split(" ")
    path = (re.search(r'<g id="k0-line0"[^>]*>\s*<path d="([^"]+)"', text) or [""])[1]
    points = np.array(re.findall(r"-?\d+\.?\d*", path), dtype=float).reshape(-1, 2).T
    for kind, ends, at, values in zip((kinds[0], kinds[5]), (kinds[1:5], kinds[6:]), points, (x, y), strict=True):
        start, low, end, high = map(float, ends)
        to, back = (math.log, np.exp) if kind == "log" else (float, np.asarray)
        found = back(to(low) + (at - start) / (end - start) * (to(high) - to(low)))
        assert found == pytest.approx(values, rel=1e-3)
    assert (kinds[0], kinds[5]) == ("log" if log else "linear", "log")
