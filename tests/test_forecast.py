"""Forecasts: exact for exact laws, independent of units, intervals that hold as often as they promise, honest files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gencompare.comparison.forecast import FORECAST_FILE, Forecasts, check_forecasts, make_forecasts, verdict
from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.ranking import rank_results
from gencompare.comparison.scaling_law import ScalingLaw, ShortRun, _covariance
from gencompare.errors import UserError
from gencompare.records import Metric
from synthetic import DIGITS, result, write_run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from forecast_coverage import POPULATIONS, coverage  # type: ignore[import-not-found]

BUDGETS = (1e12, 2e12, 4e12)


def short_runs(
    errors: Callable[[int, float], float], families: int, seeds: int = 3, noise: float = 0.0, random: int = 0
) -> list[ShortRun]:
    """Return runs of ``BUDGETS`` whose errors are ``errors(family, flops)`` times log-normal noise."""
    generator = np.random.default_rng(random)
    return [
        ShortRun(f"{f}_{c}_{s}", str(f), s, c, errors(f, c) * float(np.exp(noise * generator.standard_normal())))
        for f in range(families)
        for c in BUDGETS
        for s in range(seeds)
    ]


def test_an_exact_power_law_is_extrapolated_exactly() -> None:
    def error(family: int, flops: float) -> float:
        return (3 + family) * (flops / 1e12) ** -(0.3 + 0.4 * family)

    law = ScalingLaw(short_runs(error, families=3))
    for family in range(3):
        found = law.predict(str(family), 4e13)
        assert found.median == pytest.approx(error(family, 4e13), rel=2e-3)
        assert found.high / found.low == pytest.approx(1, abs=0.06)


def test_units_change_nothing_but_the_units() -> None:
    runs = short_runs(lambda f, c: 50 * (c / 1e12) ** (-0.2 - 0.3 * f), families=3, noise=0.1)
    runs = [replace(run, sampling_variance=0.01) for run in runs]
    scaled = [replace(run, flops=run.flops * 1e-9, error=run.error * 7) for run in runs]
    one, other = ScalingLaw(runs).predict("1", 2e13), ScalingLaw(scaled).predict("1", 2e4)
    assert np.array([other.low, other.median, other.high]) / 7 == pytest.approx([one.low, one.median, one.high])


def test_without_a_drift_a_single_family_is_the_classical_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slope that no other family informs is that of least squares, with its textbook prediction interval."""
    monkeypatch.setattr("gencompare.comparison.scaling_law.RATIOS", np.array([1e-4]))
    runs = short_runs(lambda f, c: 5 * (c / 1e12) ** -0.5, families=1, seeds=4, noise=0.2)
    x, y = np.log([run.flops for run in runs]), np.log([run.error for run in runs])
    (slope, intercept), new = np.polyfit(x, y, 1), np.log(4e13)
    residual = y - intercept - slope * x
    s = np.sqrt(residual @ residual / 10 * (1 + 1 / 12 + (new - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()))
    mean = intercept + slope * new
    found = ScalingLaw(runs).predict("0", 4e13)
    expected = [mean + s * stats.t.ppf(share, 10) for share in (0.05, 0.5, 0.95)]
    assert np.log([found.low, found.median, found.high]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["power laws with a constant", "power laws with a bend"])
def test_intervals_hold_as_promised(name: str) -> None:
    """For other laws they promise too little, by as much as benchmarks/forecast_coverage.py measures."""
    assert 0.85 <= coverage(POPULATIONS[name], trials=40)["coverage"] <= 0.95


def test_the_covariance_is_that_of_an_integrated_wiener_process() -> None:
    steps = np.random.default_rng(0).standard_normal((4000, 400)) * np.sqrt(2 / 400)  # of W over [0, 2]
    integral = np.cumsum(np.cumsum(steps, 1), 1) * (2 / 400)
    s, t = np.array([0.5, 2.0]), np.array([1.0])
    expected = [(integral[:, round(200 * a) - 1] * integral[:, 199]).mean() for a in s]
    one = np.ones((1, 1, 1, 1))
    assert _covariance(0 * one, one, s, t)[0, 0, :, 0] == pytest.approx(expected, rel=0.08)


def test_a_curve_that_steepens_continues_with_its_last_slope() -> None:
    """A parabola through the same points would predict an error that is smaller by a factor of 200."""
    slopes = {1e12: 0.0, 2e12: -0.2, 4e12: -0.2 - 1.5}
    runs = short_runs(lambda f, c: 100 * float(np.exp(np.log(2) * slopes[c])), families=4, noise=0.01)
    found = ScalingLaw(runs).predict("0", 4e13)
    last = runs[-1].error * 10**-1.5
    assert 0.3 * last < found.median < 3 * last and found.low < last < found.high


def test_a_family_with_few_runs_borrows_the_slope_of_the_others() -> None:
    def error(family: int, flops: float) -> float:
        return (2.0 + family) * (flops / 1e12) ** -0.7

    runs = short_runs(error, families=6, noise=0.1)
    alone = [run for run in runs if run.family == "0" and run.seed == 0]
    others = [run for run in runs if run.family != "0"]
    together, single = ScalingLaw(alone + others).predict("0", 2e13), ScalingLaw(alone).predict("0", 2e13)
    assert together.high / together.low < 0.5 * single.high / single.low
    assert together.low < error(0, 2e13) < together.high


def test_a_smaller_error_is_measured_less_precisely() -> None:
    runs = short_runs(lambda f, c: 50 * (c / 1e12) ** -1.5, families=2, noise=0.05)
    exact = ScalingLaw(runs).predict("0", 4e13)
    sampled = ScalingLaw([replace(run, sampling_variance=0.0025) for run in runs]).predict("0", 4e13)
    assert sampled.median == pytest.approx(exact.median, rel=0.05)
    assert sampled.high / sampled.low > 1.2 * exact.high / exact.low


# Records


def trained(folder: Path, budgets: tuple[float, ...] = BUDGETS, seeds: int = 2, **fields: object) -> list[Path]:
    """Write runs of two families whose metric falls as the power -0.5 and -1 of FLOPs."""
    generator = np.random.default_rng(0)
    folders = []
    for family, slope in (("f0", -0.5), ("f1", -1.0)):
        for flops in budgets:
            for seed in range(seeds):
                value = 40 * (flops / 1e12) ** slope * (1 + 0.03 * generator.standard_normal())
                metric = Metric(value, higher_is_better=False, interval=(0.9 * value, 1.1 * value))
                name = f"{family}_{flops:g}_{seed}"
                training = {"flops": flops, "total_cost": {"flops": flops}, "steps": 10}
                made = [result(value, metrics={"fd_digits": metric})]
                options = {"family": family, "seed": seed, "training": training, "with_grid": False} | fields
                folders.append(write_run(folder / name, made, **options))  # type: ignore[arg-type]
    return folders


def made(folders: list[Path], **options: object) -> Forecasts:
    loaded = load_runs(folders)
    return make_forecasts(rank_results(loaded.runs)[0], loaded.runs, **({"factors": [5, 10]} | options))  # type: ignore[arg-type]


def test_a_forecast_is_stored_and_checked_with_longer_runs(tmp_path: Path) -> None:
    forecasts = made(trained(tmp_path / "short"))
    assert [(each.family, each.flops) for each in forecasts.forecasts] == [
        ("f0", 2e13), ("f0", 4e13), ("f1", 2e13), ("f1", 4e13)
    ]  # fmt: skip
    assert forecasts.forecasts[3].value == pytest.approx(1.0, rel=0.3) and forecasts.forecasts[3].num_runs == 6
    path = forecasts.save(tmp_path)
    assert Forecasts.load(path) == forecasts
    with pytest.raises(UserError, match="is not replaced"):
        forecasts.save(tmp_path)
    longer = load_runs(trained(tmp_path / "long", (2.01e13, 4e13), seeds=1, created="2999-01-01T00:00:00")).runs
    checks = check_forecasts(Forecasts.load(path), longer)
    assert len(checks) == 4 and all(check.holds for check in checks)
    assert verdict(checks).startswith("4 of 4 intervals")
    shifted = [replace(each, interval=(5.0, 6.0)) for each in forecasts.forecasts]
    assert verdict(check_forecasts(replace(forecasts, forecasts=shifted), longer)).startswith("0 of 4")


def test_older_runs_and_runs_within_the_fitted_range_test_nothing(tmp_path: Path) -> None:
    forecasts = made(trained(tmp_path / "short"), factors=(), flops=[3e12, 2e13])
    assert [each.interpolation for each in forecasts.forecasts] == [True, False] * 2
    runs = load_runs(trained(tmp_path / "a", (3e12,), 1, created="2999-01-01T00:00:00")).runs
    runs += load_runs(trained(tmp_path / "b", (2e13,), 1, created="2020-01-01T00:00:00+00:00")).runs
    checks = check_forecasts(forecasts, runs)
    assert {check.note for check in checks} == {"interpolation", "older than the forecast"}
    assert verdict(checks).startswith("No run tests a forecast")


def test_a_higher_is_better_share_approaches_its_best_value(tmp_path: Path) -> None:
    folders = trained(tmp_path / "short")
    runs = load_runs(folders).runs
    for run in runs:
        (own,) = run.record.results
        share = Metric(1 - (own.metrics["fd_digits"].value or 0) / 100, higher_is_better=True)
        run.record.results = [replace(own, metrics={"coverage": share}, primary_metric="coverage")]
    forecasts = make_forecasts(rank_results(runs)[0], runs, factors=[10])
    last = forecasts.forecasts[1]
    assert last.value == pytest.approx(0.99, abs=0.004) and last.interval[0] < last.value < last.interval[1] < 1


def test_mistakes_are_named(tmp_path: Path) -> None:
    folders = trained(tmp_path / "short")
    for changes, message in (
        ({"folders": trained(tmp_path / "one", (1e12,))}, r"f0 has 2 runs of 1 budget, and a scaling law needs 3"),
        ({"folders": trained(tmp_path / "two", (1e12, 2e12))}, r"4 runs of 2 budgets"),
        ({"folders": trained(tmp_path / "free", training={"steps": 3})}, "no training FLOPs"),
        ({"flops": [1e11], "factors": []}, "below the cheapest run of f0"),
        ({"factors": [-1.0]}, "task.factors=-1.0 must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            made(**({"folders": folders} | changes))  # type: ignore[arg-type]
    other = result(3.0, replace(DIGITS, num_images=1000))
    odd = write_run(tmp_path / "odd", [other], family="f0", with_grid=False)
    with pytest.raises(
        UserError, match=r"another protocol than the other runs: number of images \(1000 instead of 500"
    ):
        made([*folders, odd])
    negative = write_run(tmp_path / "negative", [result(-0.1)], family="f0", with_grid=False)
    with pytest.raises(UserError, match="a power law needs a positive distance"):
        made([*folders, negative])
    with pytest.raises(UserError, match="no results"):
        made([*folders, write_run(tmp_path / "empty", [], family="f0", with_grid=False, state="failed")])
    with pytest.raises(UserError, match="No run has the family and cost of a forecast"):
        check_forecasts(made(folders), load_runs(folders).runs)
    (tmp_path / "x.json").write_text('{"runs": []}')
    for name, message in (("x.json", "not a forecast"), ("y.json", "is no file")):
        with pytest.raises(UserError, match=message):
            Forecasts.load(tmp_path / name)


def test_the_command_writes_a_forecast_and_checks_it(
    tmp_path: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "short")
    write_run(tmp_path / "short" / "gaussian", [result(30.0)], family="gaussian", with_grid=False)  # has no budget
    assert cli("task=forecast", f"runs={tmp_path}/short/*", f"hydra.run.dir={tmp_path}/out") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "90 % interval" in output and "f1 4e+13" in output and "gaussian" not in output
    file = tmp_path / "out" / FORECAST_FILE
    assert f"task.check={file}" in output
    trained(tmp_path / "long", (2e13, 4e13), seeds=1, created="2999-01-01T00:00:00")
    assert cli("task=forecast", f"runs={tmp_path}/long/*", f"task.check={file}") == 0
    assert "4 of 4 intervals of 90 % hold." in capsys.readouterr().out
    file.write_text(file.read_text().replace('"created": "2', '"created": "1', 1))
    with pytest.raises(UserError, match="corrupted"):
        Forecasts.load(file)
    assert cli("task=forecast") == 1 and "runs='GLOB'" in capsys.readouterr().err
