"""The statistics of the benchmarks; a lap of the Trainer is one training step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from gencompare.command_line import conf_dir
from gencompare.errors import UserError
from gencompare.tasks import bench

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import growth  # type: ignore[import-not-found]
import loading  # type: ignore[import-not-found]
import metric_checks  # type: ignore[import-not-found]
import paired  # type: ignore[import-not-found]
import report  # type: ignore[import-not-found]
import sampling  # type: ignore[import-not-found]
import scaling  # type: ignore[import-not-found]
import train_step  # type: ignore[import-not-found]


@pytest.mark.parametrize(("n", "low", "high"), [(6, 1, 6), (10, 2, 9), (20, 6, 15), (40, 14, 27), (100, 40, 61)])
def test_interval_of_the_median(n: int, low: int, high: int) -> None:
    # Ranks of the two-sided 95 % sign-test interval, as in tables of order statistics.
    values = [float(k) for k in range(n, 0, -1)]
    assert paired.median_interval(values) == ((n + 1) / 2, low, high)


def test_too_few_rounds_have_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        paired.median_interval([1.0] * 5)


def test_ratios_are_taken_round_by_round() -> None:
    drift = [1.0, 2.0, 5.0, 3.0, 1.5, 7.0]  # the ratio stays 1.2 while the machine slows down and recovers
    laps = {"a": paired.Laps(drift, drift), "b": paired.Laps([1.2 * d for d in drift], [0.5 * d for d in drift])}
    rows = paired.compare(laps, base="a")
    assert rows["b"]["wall"]["ratio"] == [1.2, 1.2, 1.2] and rows["b"]["cpu"]["ratio"] == [0.5, 0.5, 0.5]
    assert rows["b"]["wall"]["ms"] == 1.2 * 2500 and rows["a"]["wall"]["added_ms"] == [0, 0, 0]


def test_growth_is_the_exponent_of_a_power_law() -> None:
    sizes = [5e3, 15e3, 50e3]
    assert loading.power_law(sizes, [2 * n**1.3 for n in sizes]) == pytest.approx((2, 1.3))
    assert loading.power_law(sizes, [7.0] * 3) == pytest.approx((7, 0))


def test_variants_take_turns() -> None:
    calls: list[str] = []
    laps = paired.take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=20, warm_up=3)
    assert [len(lap.wall) for lap in laps.values()] == [20, 20]
    assert all({*calls[k : k + 2]} == {"a", "b"} for k in range(0, 46, 2))
    assert len({tuple(calls[k : k + 2]) for k in range(0, 46, 2)}) == 2, "both orders occur"


def test_each_lap_of_the_trainer_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    def record(owner: Any, name: str, event: Any) -> None:
        original = getattr(owner, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            events.append(event(self))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, method)

    data = train_step.Turns((1, 8, 8), 4)
    trainer = data.laps["gencompare trainer"]
    record(paired.Laps, "start", lambda self: "(" if self is trainer else "[")
    record(paired.Laps, "stop", lambda self: ")" if self is trainer else "]")
    record(train_step.PlainLoop, "step", lambda self: "p")
    record(train_step.Diffusion, "training_step", lambda self: "t")
    tiny = ["model.network.channels=8", "model.network.channel_mult=[1]", "model.network.attention_resolutions=[]"]
    rows = train_step.compare_trainer(
        data, ["model=ddpm", *tiny, "callbacks.progress_bar=null"], rounds=6, logger="csv"
    )
    # The first batch is prefetched, so the first lap is empty; the last lap ends after the stream and is not counted.
    assert "".join(events).startswith("[p]()[p](t)[p](t)[p](t)")
    assert [row["rounds"] for row in rows.values()] == [6, 6]
    assert "".join(events).count("(t)") >= 6


def test_a_network_has_the_counted_size_and_the_documented_numbers() -> None:
    counted = scaling.model_part("dit_s", (4, 32, 32))
    stored = json.loads(scaling.RESULT.read_text())
    assert counted == pytest.approx({name: stored["models"]["dit_s"][name] for name in counted}, rel=1e-3)
    # Peebles and Xie (2023), table 1: DiT-S/2 has 33 M parameters and 6.06 G multiply-adds.
    assert counted["training_gflops_per_image"] == pytest.approx(3 * 2 * 6.06, rel=0.03)
    page = (scaling.RESULT.parents[2] / "docs" / "scaling.md").read_text()
    for name, model in stored["models"].items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        numbers = [float(text.replace(",", "").split()[0]) for text in row.strip("| ").split(" | ")[2:]]
        gflops = model["training_gflops_per_image"]
        expected = [model["parameters"] / 1e6, gflops, model["state_mib"] / 1024, 1e5 / gflops]
        assert numbers == pytest.approx(expected, rel=0.01), name
    for count, row in stored["micro_batches"].items():
        slower = row["step_seconds"] / stored["micro_batches"]["1 parts"]["step_seconds"]
        assert f"| {count.split()[0]} | {row['added_mib']:,.0f} | {round(slower, 2):g} |" in page
    for strategy in ("ddp", "fsdp"):
        assert f"{stored['sharding'][strategy]['state_mib'][0]:.1f}" in page
    evaluation = stored["evaluation"]
    one, two = (evaluation[f"{count} processes"]["samples_per_second"] for count in (1, 2))
    assert f"| {one:.1f} | {two:.1f} | {evaluation['speedup']['sampling_seconds']:.2f} |" in page


class Small(nn.Module):
    """A network of one convolution that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.calls = nn.Conv2d(3, 3, 3, padding=1), 0

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.calls += 1
        return self.conv(x).tanh() * (1 + 0.1 * torch.tanh(t.reshape(-1, 1, 1, 1) / 100))


@pytest.mark.parametrize(("part", "calls"), [("network", 50), ("dpm_solver", 20), ("edm_heun", 35)])
@torch.no_grad()
def test_samplers_that_are_compared_do_the_same_work(part: str, calls: int) -> None:
    network = Small()
    loops = sampling.NETWORK_PARTS[part][1](network, lambda x, t: network(x, t, {}), torch.randn(2, 3, 32, 32))
    images = {}
    for name, loop in loops.items():
        network.calls = 0
        images[name] = loop()
        assert network.calls == calls, name
    # k-diffusion's DPM-Solver++ also extrapolates over steps more than twice as long as the one before.
    if "k-diffusion" in images and part != "dpm_solver":
        difference = (images["k-diffusion"] - images["gencompare"]).norm() / images["gencompare"].norm()
        assert difference < 1e-2


def test_exponents_of_growth_are_those_of_power_laws() -> None:
    sizes = [10, 100, 1000]
    row = growth.grow(sizes, [(3e-4 * n**1.5, 5 * n) for n in sizes])
    assert (row["time"], row["memory"]) == (
        {"exponent": 1.5, "standard_error": 0},
        {"exponent": 1, "standard_error": 0},
    )
    assert growth.continued(sizes, row["seconds"], 10_000) == pytest.approx(300)
    # log2 of the values is 0, 2, 3, 4: the slope is 6.5 / 5, and the squared residuals sum to 0.3.
    wavy = growth.fit([1, 2, 4, 8], [1, 4, 8, 16])
    assert wavy == {"exponent": 1.3, "standard_error": pytest.approx(0.173, abs=1e-3)}


def test_a_table_without_results_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "STUDIES", tmp_path)
    assert report.tables() == {}
    page = "a\n<!-- models -->\n| old |\n<!-- end -->\nb"
    assert report.fill(page) == "a\n<!-- models -->\n<!-- end -->\nb"


def test_new_results_have_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    laps = {"peer": paired.Laps([2.0] * 6, [2.0] * 6), "gencompare": paired.Laps([1.0] * 6, [1.0] * 6)}
    facts = {"parameters": 2_000_000, "gflops_per_image": 1.5}
    variants = {name: row | facts for name, row in paired.compare(laps, base="peer").items()}
    rows = {"samples": growth.grow([10, 100, 1000], [(1.0, 10), (100.0, 100), (10_000.0, 1000)])}
    (tmp_path / "growth.json").write_text(json.dumps({"evaluation": {"rows": rows}}))
    assert (
        "| evaluation | samples | 10: 1 s, 10 MiB | 1,000: 1e+04 s, 1,000 MiB | 2.00 ± 0.00 | 1.00 ± 0.00 | - |"
        in (report.tables()["growth"])
    )
    (tmp_path / "train_step.json").write_text(json.dumps({"ddpm": {"setting": "a DDPM", "variants": variants}}))
    assert (
        "| a DDPM | gencompare | peer | 2.00 / 2.00 | 1.50 / 1.50 | 0.50 [0.50, 0.50] | 2.00 |"
        in (report.tables()["models"])
    )


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    assert report.fill(report.PAGE.read_text()) == report.PAGE.read_text()


def test_the_15_checks_of_metrics_draw_two_sets_for_each_point() -> None:
    found = list(metric_checks.curves())
    assert len({curve.check for curve in found}) == 15
    for curve in found:
        points = list(curve.sets(np.random.default_rng(0)))
        assert len(points) >= 7 and all(real.shape[1] == samples.shape[1] for real, samples in points), curve.check
        assert curve.shape or curve.constant, "distances are checked, too"
    torus = metric_checks.torus(np.random.default_rng(0), 1000)
    assert np.hypot(np.hypot(torus[:, 0], torus[:, 1]) - 1, torus[:, 2]).max() <= 0.1
    radii = np.linalg.norm(metric_checks.ball(np.random.default_rng(0), 3, 0.8, 4000), axis=1)
    assert (radii < 0.4).mean() == pytest.approx(1 / 8, abs=0.03), "uniform in the ball"


def test_criteria_recognise_their_shapes() -> None:
    x = np.linspace(-1, 1, 9)
    shapes = {"bell": 1 - x**2, "falling": (1 - x) / 2, "rising": (1 + x) / 2, "flat": np.full(9, 0.7)}
    criteria = {name: getattr(metric_checks, name) for name in shapes} | {"bell": metric_checks.bell(4)}
    for name, criterion in criteria.items():
        assert [other for other, y in shapes.items() if criterion(y)] == [name]
    line, late = shapes["falling"], np.r_[np.ones(8), 0]
    assert metric_checks.settles(np.r_[line[:4], shapes["flat"][:5]]) and not metric_checks.settles(line)
    assert metric_checks.near(0, 1)(line) and metric_checks.near(-1, 0.2, 0)(line)
    assert not metric_checks.near(0, 0)(line)
    assert metric_checks.falling(late) and not metric_checks.falling_by(7)(late)


def test_dropped_modes_lower_recall_and_coverage_but_not_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_checks, "REPEATS", 1)
    curve = next(curve for curve in metric_checks.curves() if curve.check == "sequential mode dropping")
    found = metric_checks.values(curve)
    assert all(metric_checks.passes(curve, metric, found[metric]) for metric in ("mmd", "coverage"))
    assert found["precision"].min() > 0.9 > 0.2 > found["recall"][-1]


def test_the_task_runs_the_parts_and_then_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(bench, "conf_dir", lambda: tmp_path / "conf")
    cfg = OmegaConf.create({"task": {"parts": ["sampling"]}})
    with pytest.raises(UserError, match="needs a checkout"):
        bench.bench(cfg)
    for name, code in (("sampling", 0), ("report", 0), ("broken", 3)):
        script = f"import sys; open({str(tmp_path / 'order')!r}, 'a').write('{name} '); sys.exit({code})"
        (tmp_path / "benchmarks" / f"{name}.py").write_text(script)
    bench.bench(cfg)
    assert (tmp_path / "order").read_text() == "sampling report "
    for part, message in (("smapling", "choose from broken, report, sampling"), ("broken", "broken failed")):
        with pytest.raises(UserError, match=message):
            bench.bench(OmegaConf.create({"task": {"parts": [part]}}))


def test_the_parts_of_the_task_exist() -> None:
    for part in OmegaConf.load(conf_dir() / "task" / "bench.yaml").parts:
        assert (Path(report.__file__).parent / f"{part}.py").is_file()
