"""The planner keeps its promises: its power is that of simulated comparisons, and its limits are the classical ones."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gencompare.comparison.commands import seeds_command
from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.page import render
from gencompare.comparison.planning import (
    Spread,
    detectable_difference,
    expected_power,
    holm_level,
    plans,
    power_note,
    table_spread,
    welch_power,
)
from gencompare.comparison.ranking import RankingTable, rank_results
from gencompare.comparison.statistics import holm, welch
from gencompare.errors import UserError
from gencompare.records import Metric
from synthetic import result, write_run


def simulated_power(v_1: float, v_2: float, difference: float, seeds: int, level: float, trials: int = 20_000) -> float:
    random = np.random.default_rng(0)
    a, b = random.normal(0, v_1**0.5, (trials, seeds)), random.normal(difference, v_2**0.5, (trials, seeds))
    n = np.full(trials, seeds)
    p = welch(a.mean(1), a.var(1, ddof=1) / seeds, n, b.mean(1), b.var(1, ddof=1) / seeds, n)
    return float(np.mean(p <= level))


@pytest.mark.parametrize(
    ("v_1", "v_2", "difference", "seeds", "level"),
    [
        (1, 1, 2.0, 5, 0.05),
        (1, 0.1, 1.6, 5, 0.05),
        (1, 1, 0.9, 20, 0.05),
        (1, 0.3, 3.0, 6, 0.05 / 10),
        (1, 1, 0, 5, 0.05),
    ],
)
def test_power_is_that_of_simulated_tests(v_1: float, v_2: float, difference: float, seeds: int, level: float) -> None:
    power = float(welch_power(difference, v_1, v_2, seeds, level))
    assert power == pytest.approx(simulated_power(v_1, v_2, difference, seeds, level), abs=0.025)


def test_power_has_the_classical_limits() -> None:
    # Two-sample t power by another route: the average over the chi-square distribution of the estimated variance.
    for seeds, difference in ((5, 1.5), (12, 1.0)):
        nu, shift = 2 * seeds - 2, difference / (2 / seeds) ** 0.5
        limit = stats.t.ppf(0.975, nu)
        scale = np.sqrt(stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, nu) / nu)
        exact = np.mean(stats.norm.sf(limit * scale - shift) + stats.norm.cdf(-limit * scale - shift))
        assert float(welch_power(difference, 1, 1, seeds, 0.05)) == pytest.approx(exact, abs=1e-4)
    # Many seeds: the z test.
    assert float(welch_power(0.01, 1, 1, 10**6, 0.05)) == pytest.approx(stats.norm.sf(1.959964 - 7.0710678), abs=1e-3)
    assert float(welch_power(0.1, 0, 0, 5, 0.05)) == 1 and float(welch_power(0.0, 1, 2, 7, 0.05)) < 0.051
    shifts = welch_power(np.geomspace(1e-3, 1e7, 400), 1.0, 0.2, 3, 0.05 / 105)
    assert np.all(np.diff(shifts) > -1e-4) and shifts[-1] == pytest.approx(1), "no gaps where SciPy returns NaN"


def test_without_variance_of_training_only_the_number_of_all_images_matters() -> None:
    spread = Spread(total=0.01, degrees_of_freedom=inf, per_image=0.01 * 500, num_images=500)
    assert spread.variances(2000) == pytest.approx(0.01 / 4)
    z = [expected_power(spread, 0.03, s, n, 0.05) for s, n in ((100, 400), (200, 200), (400, 100))]
    assert z == pytest.approx([z[0]] * 3, abs=0.01) and 0.2 < z[0] < 0.8
    # Without variance of sampling, more images change nothing.
    only_seeds = Spread(0.01, inf, 0.0, 500)
    assert expected_power(only_seeds, 0.2, 5, 50, 0.05) == expected_power(only_seeds, 0.2, 5, 5000, 0.05)


def test_three_seeds_that_vary_by_18_percent_detect_little() -> None:
    spread = Spread(0.18**2, inf, 0.0, 500)
    assert detectable_difference(spread, 3, 0.05) == pytest.approx(0.553, abs=0.001)
    assert detectable_difference(spread, 3, 0.05 / 105) == pytest.approx(1.894, abs=0.001)


def test_the_level_of_holms_correction_is_that_of_simulated_tables() -> None:
    """Five rows, two of which differ little: most of the other pairs are claimed first, and raise its level."""
    means, spread = np.array([1.0, 1.22, 1.7, 2.5, 4.0]), Spread(0.01, inf, 0.0, 500)
    i, j = np.triu_indices(5, 1)
    differences = 2 * np.abs(means[i] - means[j]) / (means[i] + means[j])
    level = holm_level(spread, differences[1:], 5, 500)
    assert 0.05 / 10 < level <= 0.05
    promised = expected_power(spread, differences[0], 5, 500, level)
    random = np.random.default_rng(1)
    claimed = 0
    for _ in range(1500):
        x = random.normal(means[:, None], 0.1 * means[:, None], (5, 5))
        m, e, n = x.mean(1), x.var(1, ddof=1) / 5, np.full(5, 5)
        claimed += bool(holm(welch(m[i], e[i], n[i], m[j], e[j], n[j]))[0] <= 0.05)
    assert promised == pytest.approx(claimed / 1500, abs=0.04)
    assert holm_level(spread, np.zeros(9), 5, 500) == pytest.approx(0.05 / 10, rel=0.01)


def pilot(folder: Path, rows: int, seeds: int, sigma: float, tau: float, n: int = 500, random: int = 0) -> list[Path]:
    """Write runs whose relative variance is sigma^2 + tau^2 / n, with the intervals of sampling alone."""
    generator = np.random.default_rng(random)
    folders = []
    for row in range(rows):
        for seed in range(seeds):
            mean = 1.3**row
            value = mean * (1 + generator.normal(0, (sigma**2 + tau**2 / n) ** 0.5))
            half = 1.959964 * mean * tau / n**0.5
            metric = Metric(value, higher_is_better=False, interval=(value - half, value + half))
            made = result(value, metrics={"fd_digits": metric}, generation={"seed": seed})
            path = folder / f"{row}_{seed}"
            folders.append(write_run(path, [made], seed=seed, family=f"f{row}", with_grid=False))
    return folders


def ranked(folders: list[Path]) -> RankingTable:
    (table,) = rank_results(load_runs(folders).runs)
    return table


def test_the_variances_of_a_pilot_are_recovered(tmp_path: Path) -> None:
    spread = table_spread(ranked(pilot(tmp_path, rows=12, seeds=6, sigma=0.08, tau=1.0)))
    assert spread is not None and spread.num_images == 500
    assert spread.per_image == pytest.approx(1.0, rel=0.05)  # means of rows are estimated
    assert spread.total == pytest.approx(0.08**2 + 1 / 500, rel=0.35)
    assert spread.degrees_of_freedom > 15
    few = table_spread(ranked(pilot(tmp_path / "few", rows=2, seeds=2, sigma=0.08, tau=1.0)))
    assert few is not None and few.degrees_of_freedom < 6, "four runs show little of the variance"


def test_plans_are_the_fewest_images_and_sorted_by_cost(tmp_path: Path) -> None:
    table = ranked(pilot(tmp_path, rows=3, seeds=6, sigma=0.02, tau=2.0))
    found = plans(table, 0.2)
    costs = [plan.cost or 0 for plan in found]
    assert costs == sorted(costs) and all(plan.power >= 0.8 and plan.num_seeds >= 5 for plan in found)
    # Prices of the synthetic records, 171.2 s of training and 4.6 s for 500 images, for three rows.
    first = found[0]
    assert first.cost == pytest.approx(first.num_seeds * 3 * (171.2 + first.num_images * 4.6 / 500))
    assert min(plan.num_images for plan in plans(table, 0.1)) > min(plan.num_images for plan in found)


def test_the_page_says_what_it_could_have_detected(tmp_path: Path) -> None:
    folders = pilot(tmp_path, rows=3, seeds=3, sigma=0.1, tau=1.0)
    note = power_note(ranked(folders))
    assert note.startswith("With 3 seeds and 500 images, a difference of ")
    assert "over all 3 pairs" in note and note in render(load_runs(folders))
    assert power_note(ranked(folders[:3])) == "", "a single row"
    assert power_note(ranked(folders[::3])) == "", "one seed each"


def test_mistakes_are_named(tmp_path: Path) -> None:
    table = ranked(pilot(tmp_path / "a", rows=2, seeds=3, sigma=0.1, tau=1.0))
    for difference, power, text in (
        (0.0, 0.8, "task.difference"), (float("nan"), 0.8, "task.difference"), (0.2, 1.0, "task.power"),
        (0.2, 0.01, "task.power"), (0.001, 0.8, "larger task.difference"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=text):
            plans(table, difference, power)
    with pytest.raises(UserError, match="two training seeds"):
        plans(ranked(pilot(tmp_path / "b", rows=2, seeds=1, sigma=0.1, tau=1.0)), 0.2)
    with pytest.raises(UserError, match="two ranked rows"):
        plans(ranked(pilot(tmp_path / "c", rows=1, seeds=3, sigma=0.1, tau=1.0)), 0.2)


def test_the_command_prints_a_plan_and_how_to_run_it(
    tmp_path: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pilot(tmp_path / "pilot", rows=2, seeds=3, sigma=0.05, tau=1.0)
    assert cli("task=plan", f"runs={tmp_path}/pilot/*", "task.difference=0.2") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "To detect a difference of 20 % between two rows with 80 % power" in output
    assert "python run.py -m model=f0 seed=3,4" in output and "evaluation.num_images=" in output
    assert cli("task=plan") == 1 and "runs='GLOB'" in capsys.readouterr().err
    assert cli("task=plan", f"runs={tmp_path}/pilot/*", "task.power=much") == 1
    assert "task.power=much must be a number" in capsys.readouterr().err


def test_a_command_repeats_no_override_that_calls_code(tmp_path: Path) -> None:
    overrides = ["model=vae", "seed=0", "model._target_=os.system", "hydra.run.dir=/x", "paths.runs=/x", "data=digits"]
    (run,) = load_runs([write_run(tmp_path / "a", [result(1.0)], overrides=overrides)]).runs
    assert (
        seeds_command(run, [1, 2], 600) == "python run.py -m model=vae data=digits seed=1,2 evaluation.num_images=600"
    )
