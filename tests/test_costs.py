"""Quality against cost: the total cost includes all dependencies, and the Pareto front is exact."""

from __future__ import annotations

import csv
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gencompare.comparison import charts, formatting, page, svg_plots
from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.ranking import rank_results
from gencompare.comparison.run_costs import front_probabilities, pareto_charts, pareto_front
from gencompare.comparison.svg_plots import Chart, PlotLine, styles
from gencompare.comparison.tables import columns, write_csv
from gencompare.records import Metric
from synthetic import result, write_run


def drawn(folder: Path) -> Any:
    runs = load_runs(sorted(folder.iterdir())).runs
    tables = rank_results(runs)
    return {t.chart.x_label: t for t in pareto_charts(tables, styles(tables, runs))}


def test_the_pareto_front_is_what_no_row_dominates() -> None:
    random = np.random.default_rng(0)
    cost, loss = random.integers(0, 12, (2, 60)).tolist()
    dominated = [
        any(a <= c and b <= d and (a < c or b < d) for a, b in zip(cost, loss, strict=True))
        for c, d in zip(cost, loss, strict=True)
    ]
    front = pareto_front(cost, loss)
    assert sorted(front) == [k for k, is_dominated in enumerate(dominated) if not is_dominated]
    assert all(cost[a] <= cost[b] and loss[a] >= loss[b] for a, b in pairwise(front))
    assert pareto_front([], []) == []


def test_rows_are_drawn_against_each_cost_with_the_pareto_front(tmp_path: Path) -> None:
    for name, value, flops, calls in (("cheap", 9.0, 1e12, 5), ("good", 2.0, 9e12, 50), ("dominated", 9.5, 5e12, 50)):
        r = result(value, generation={"nfe": {"net": float(calls)}})
        write_run(tmp_path / name, [r], training={"flops": flops, "seconds": 60.0}, with_grid=False)
    found = drawn(tmp_path)
    assert set(found) == {"training FLOPs", "NFE per sample"}, "there is no chart if all runs take equally long"
    assert [row.run.label for row, _ in found["training FLOPs"].front] == ["cheap", "good"]
    points = {line.name: (line.x.tolist(), line.y.tolist()) for line in found["training FLOPs"].chart.lines}
    assert points[""] == ([1e12, 9e12], [9.0, 2.0]) and points["dominated"] == ([5e12], [9.5])
    html = page.render(load_runs(sorted(tmp_path.iterdir())))
    assert "Pareto front, cheapest first:" in html and "FD digits on digits against training FLOPs" in html


def test_the_front_follows_the_direction_of_the_metric(tmp_path: Path) -> None:
    for name, value, flops in (("a", 0.2, 1e12), ("b", 0.9, 2e12), ("c", 0.5, 3e12)):
        metrics = {"fd_digits": Metric(value, higher_is_better=True)}
        write_run(tmp_path / name, [result(0, metrics=metrics)], training={"flops": flops}, with_grid=False)
    assert [row.run.label for row, _ in drawn(tmp_path)["training FLOPs"].front] == ["a", "b"]


def test_the_probability_of_the_front_is_exact() -> None:
    cost, losses = np.random.default_rng(0).integers(0, 6, (2, 40, 300))
    cost = cost[:, 0]
    on_front = [pareto_front(cost.tolist(), table) for table in losses.T.tolist()]
    share = [np.mean([row in front for front in on_front]) for row in range(40)]
    assert front_probabilities(cost, losses) == pytest.approx(share)


def test_the_page_says_how_likely_a_row_is_on_the_front(tmp_path: Path) -> None:
    """``best`` is cheap and better with every seed; ``a`` and ``b`` cost more and are equal, then one better."""

    def front(**values: tuple[list[float], float, float]) -> dict[str, float]:
        folder = tmp_path / "_".join(values)
        for name, (seeds, flops, half) in values.items():
            for seed, value in enumerate(seeds):
                interval = (value - half, value + half) if half else None
                metric = Metric(value, higher_is_better=False, interval=interval)
                made = result(value, metrics={"fd_digits": metric}, generation={"seed": seed})
                training = {"flops": flops, "seconds": 60.0}
                write_run(folder / f"{name}_{seed}", [made], seed=seed, family=name, training=training, with_grid=False)
        (chart,) = drawn(folder).values()
        html = page.render(load_runs(sorted(folder.iterdir())))
        for row, probability in [*chart.front, *chart.others]:
            assert f"{row.title} ({formatting.format_percent(probability)})" in html
        return {row.run.record.family: p for row, p in [*chart.front, *chart.others]}

    assert front(best=([1, 2, 3], 1e12, 0), worse=([4, 5, 6], 2e12, 0)) == {"best": 1}
    assert front(twin=([2, 2], 1e12, 0), same=([2, 2], 1e12, 0), dear=([3, 3], 2e12, 0)) == {"twin": 1, "same": 1}
    # One seed each, with errors of 1 and a difference of 1: the dearer row is better with probability Phi(1 / sqrt 2).
    found = front(cheap=([2.0], 1e12, 1.96), dearer=([1.0], 2e12, 1.96))
    assert found == {"cheap": 1, "dearer": pytest.approx(0.760, abs=0.04)}
    found = front(first=([1.0], 1e12, 1.96), second=([2.0], 2e12, 1.96))
    assert found == {"first": 1, "second": pytest.approx(0.240, abs=0.04)}, "off the front of the point estimates"
    # Two seeds each: 16 equally likely tables, in which equal means leave the cheaper row alone on the front.
    found = front(low=([1, 3], 1e12, 0), high=([0, 2], 2e12, 0))
    better = sum(c > d for c in (1, 2, 2, 3) for d in (0, 1, 1, 2)) / 16
    assert found == {"low": 1, "high": pytest.approx(better, abs=0.04)}


def test_the_cost_includes_the_autoencoder(tmp_path: Path) -> None:
    training = {"flops": 1e12, "seconds": 60.0}
    first = {"run": "autoencoder", "flops": 5e12, "seconds": 30.0}
    write_run(tmp_path / "pixels", [result(1.0)], training=training, with_grid=False)
    write_run(tmp_path / "latent", [result(2.0)], training=training, model={"autoencoder": first}, with_grid=False)
    unknown = {"autoencoder": {"run": "x", "seconds": 30.0}}
    write_run(tmp_path / "unknown", [result(3.0)], training=training, model=unknown, with_grid=False)
    found = drawn(tmp_path)
    x = {line.name: line.x.tolist() for line in found["training FLOPs"].chart.lines[1:]}
    assert x == {"pixels": [1e12], "latent": [6e12]}, "an incomplete cost is missing"
    x = {line.name: line.x.tolist() for line in found["training device seconds"].chart.lines[1:]}
    assert x == {"pixels": [60.0], "latent": [90.0], "unknown": [90.0]}


def test_total_costs_are_those_of_the_records(tmp_path: Path) -> None:
    """Two seeds have two other trials each, and a model without dependencies takes 0.5e12 FLOPs and 10 s."""
    trial = {"role": "trial", "flops": 0.5e12, "device_seconds": 50.0}
    for seed, scale in enumerate((1, 3)):
        taken = {"flops": 1e12 * scale, "seconds": 5.0 * scale, "processes": 2, "device_seconds": 10.0 * scale}
        summed = {"flops": 1e12 + 1e12 * scale, "device_seconds": 100 + 10.0 * scale, "steps": None}
        training = taken | {"dependencies": [trial, trial], "total_cost": summed}
        made = result(1.0 + seed, generation={"seed": seed})
        write_run(tmp_path / f"x{seed}", [made], seed=seed, training=training, with_grid=False)
    plain = {"flops": 0.5e12, "seconds": 5.0, "processes": 2}
    write_run(tmp_path / "y", [result(9.0)], family="vae", training=plain, with_grid=False)
    found = drawn(tmp_path)
    for name, mean, other in (("training FLOPs", 3e12, 0.5e12), ("training device seconds", 120.0, 10.0)):
        x = {line.name: line.x.tolist() for line in found[name].chart.lines[1:]}
        assert x == {"x0, mean of 2 seeds": [mean], "y": [other]}
    (table,) = rank_results(load_runs(sorted(tmp_path.iterdir())).runs)
    (time,) = (column for column in columns(table) if column.title == "device time")
    assert [(time.cell(row).sort_key, time.cell(row).annotation) for row in table.rows] == [
        (120.0, "incl. 1:40 min: 2 trials"), (10.0, ""),
    ]  # fmt: skip
    write_csv(load_runs(sorted(tmp_path.iterdir())), tmp_path / "compare.csv")
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = [
            (row["run"], row["training.flops"], row["total_cost.flops"], row["total_cost.device_seconds"])
            for row in csv.DictReader(file)
        ]
    assert rows == [
        ("x0", "1000000000000.0", "2000000000000.0", "110.0"), ("x1", "3000000000000.0", "4000000000000.0", "130.0"),
        ("y", "500000000000.0", "500000000000.0", "10.0"),
    ]  # fmt: skip


def test_mfu_is_a_column_if_a_record_has_it(tmp_path: Path) -> None:
    training = {"images_per_second": 70.0}
    for name, value, more in (("old", 1.0, {}), ("low", 2.0, {"mfu": 0.042}), ("high", 3.0, {"mfu": 0.31})):
        write_run(tmp_path / name, [result(value)], training={**training, **more}, with_grid=False)
    (table,) = rank_results(load_runs([tmp_path / "old"]).runs)
    assert "MFU" not in [column.title for column in columns(table)]
    (table,) = rank_results(load_runs(sorted(tmp_path.iterdir())).runs)
    (mfu,) = (column for column in columns(table) if column.title == "MFU")
    assert [mfu.cell(row).text for row in table.rows] == [formatting.MISSING, "4.2 %", "31 %"]


def test_rows_with_several_seeds_have_an_interval_and_mean_cost(tmp_path: Path) -> None:
    for k, value in enumerate([1.0, 2.0, 3.0]):
        r = result(value, generation={"seed": k}, details={"flops_per_sample": 1e9 + k})
        write_run(tmp_path / f"a{k}", [r], seed=k, training={"flops": 1e12 * (k + 1)}, with_grid=False)
    other = result(4.0, details={"flops_per_sample": 7e9})
    write_run(tmp_path / "b", [other], family="vae", training={"flops": 9e12}, with_grid=False)
    found = drawn(tmp_path)
    mean = found["training FLOPs"].chart.lines[1]
    half = 4.302653 / 3**0.5
    assert mean.x.tolist() == [2e12] and mean.interval == pytest.approx((0, 2 + half), rel=1e-6)
    assert found["FLOPs per sample"].chart.lines[1].x.tolist() == [1e9 + 1]


def test_charts_of_many_rows_show_the_best_and_the_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gencompare.comparison.run_costs.MAX_POINTS", 3)
    monkeypatch.setattr("gencompare.comparison.charts.MAX_LINES", 2)
    for k in range(8):
        training = {"flops": 1e12 * (8 - k)}
        write_run(tmp_path / f"r{k}", [result(1.0 + k)], family=f"f{k}", training=training, with_grid=False)
    write_run(tmp_path / "z", [result(99.0)], family="z", training={"flops": 9e12}, with_grid=False)
    chart = drawn(tmp_path)["training FLOPs"].chart
    assert len(chart.lines) == 1 + 8 and chart.num_omitted == 1, "all eight are on the front"
    runs = load_runs(sorted(tmp_path.iterdir())).runs
    (distance,) = charts.distance_curves(runs, styles([], runs))
    assert [line.name for line in distance.lines] == ["r0", "r1"] and distance.num_omitted == 7
    assert "(the best; 7 more not shown)" in page.render(load_runs(sorted(tmp_path.iterdir())))


@pytest.mark.parametrize("log", [False, True])
def test_data_axes_map_coordinates_to_values(log: bool) -> None:
    """The mapping uses ``data-axes`` and the vertices of a path, like the script on the page."""
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


def test_evaluations_of_many_equal_networks_are_summed_up(tmp_path: Path) -> None:
    evaluations = {"flow": dict.fromkeys(("b1", "b2", "b3"), 48.0), "ldm": {"network": 50.0, "decoder": 1.0}}
    for name, nfe in evaluations.items():
        write_run(tmp_path / name, [result(1.0, generation={"nfe": nfe})], with_grid=False)
    (table,) = rank_results(load_runs(sorted(tmp_path.iterdir())).runs)
    (nfe_column,) = (column for column in columns(table) if column.title == "NFE")
    texts = sorted(nfe_column.cell(row).annotation for row in table.rows)
    assert texts == ["48 in each of 3 networks", "50 network + 1 decoder"]
