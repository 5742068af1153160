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
    moderated_variances,
    pair_powers,
    plans,
    power_note,
    row_spreads,
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


def known(*variances: float, per_image: float = 0.0) -> list[Spread]:
    """Return rows whose variances at 500 images are known."""
    return [Spread(f"f{k}", variance, inf, per_image, 500) for k, variance in enumerate(variances)]


def test_without_variance_of_training_only_the_number_of_all_images_matters() -> None:
    spreads = known(0.01, 0.01, per_image=0.01 * 500)
    assert spreads[0].variances(2000) == pytest.approx(0.01 / 4)
    z = [expected_power(spreads, 0.03, s, n, 0.05) for s, n in ((100, 400), (200, 200), (400, 100))]
    assert z == pytest.approx([z[0]] * 3, abs=0.01) and 0.2 < z[0] < 0.8
    # Without variance of sampling, more images change nothing.
    only_seeds = known(0.01, 0.01)
    assert expected_power(only_seeds, 0.2, 5, 50, 0.05) == expected_power(only_seeds, 0.2, 5, 5000, 0.05)


def test_three_seeds_that_vary_by_18_percent_detect_little() -> None:
    spreads = known(0.18**2, 0.18**2)
    assert detectable_difference(spreads, 3, 0.05) == pytest.approx(0.553, abs=0.001)
    assert detectable_difference(spreads, 3, 0.05 / 105) == pytest.approx(1.894, abs=0.001)


@pytest.mark.parametrize(
    ("variances", "tolerance"),
    [
        ([0.01] * 5, 0.04),
        # Other pairs with medium power: the number of claims varies, which the expected number neglects.
        ([0.01, 0.01, 0.04, 0.002, 0.02], 0.1),
    ],
)
def test_the_level_of_holms_correction_is_that_of_simulated_tables(variances: list[float], tolerance: float) -> None:
    """Five rows, two of which differ little: most of the other pairs are claimed first, and raise its level."""
    means, v = np.array([1.0, 1.22, 1.7, 2.5, 4.0]), np.array(variances)
    i, j = np.triu_indices(5, 1)
    differences = 2 * np.abs(means[i] - means[j]) / (means[i] + means[j])
    level = holm_level(known(*v), np.array([np.nan, *differences[1:]]), 5, 500)
    assert 0.05 / 10 < level <= 0.05
    promised = float(welch_power(differences[0], v[0], v[1], 5, level))
    random = np.random.default_rng(1)
    claimed = 0
    for _ in range(1500):
        x = random.normal(means[:, None], means[:, None] * v[:, None] ** 0.5, (5, 5))
        m, e, n = x.mean(1), x.var(1, ddof=1) / 5, np.full(5, 5)
        claimed += bool(holm(welch(m[i], e[i], n[i], m[j], e[j], n[j]))[0] <= 0.05)
    assert promised == pytest.approx(claimed / 1500, abs=tolerance)
    assert holm_level(known(*v), np.array([np.nan] + [0.0] * 9), 5, 500) == pytest.approx(0.05 / 10, rel=0.01)
    assert holm_level(known(*v), np.array([np.nan] + [9.0] * 9), 5, 500) == pytest.approx(0.05, rel=0.01), "all others"


def test_each_pair_has_the_power_of_its_own_rows() -> None:
    spreads = known(0.01, 0.01, 0.2)
    powers = {(a, b): power for power, a, b in pair_powers(spreads, 0.3, 6, 500, 0.05)}
    assert powers["f0", "f1"] == pytest.approx(float(welch_power(0.3, 0.01, 0.01, 6, 0.05)))
    assert powers["f0", "f2"] == powers["f1", "f2"] == pytest.approx(float(welch_power(0.3, 0.01, 0.2, 6, 0.05)))
    assert expected_power(spreads, 0.3, 6, 500, 0.05) == pytest.approx(np.mean([*powers.values()]))
    # Variances that are not known exactly: the average over both distributions, by another route.
    random = np.random.default_rng(2)
    rows = [Spread("a", 0.01, 6.0, 2.0, 500), Spread("b", 0.03, 10.0, 8.0, 500)]
    v = [6 * 0.01 / random.chisquare(6, 40_000), 10 * 0.03 / random.chisquare(10, 40_000)]
    v = np.maximum(v, [[2.0 / 500], [8.0 / 500]])
    for level in (0.05, 0.002):
        ((power, *_),) = pair_powers(rows, 0.25, 6, 500, level)
        assert power == pytest.approx(float(welch_power(0.25, v[0], v[1], 6, level).mean()), abs=0.01)
    many = [Spread(str(k), 0.01 * (1 + k % 7), 8.0, 0.0, 500) for k in range(60)]
    assert 250 < len(pair_powers(many, 0.3, 6, 500, 0.05)) <= 500, "not all 1,770 pairs"


def test_moderated_variances_have_exact_limits() -> None:
    # Equal rows without sampling: the prior has the variance of all, and nothing changes.
    total, freedom = moderated_variances(np.full(9, 0.04), np.full(9, 400), np.zeros(9))
    assert total == pytest.approx(np.full(9, 0.04), rel=5e-3) and np.all(freedom > 400)
    # One row: its own variance. Rows without seeds get the variance of training of the others, and their own sampling.
    total, freedom = moderated_variances(np.array([0.05, 0.0]), np.array([20, 0]), np.array([0.01, 0.03]))
    assert total == pytest.approx([0.05, 0.07], rel=1e-6) and freedom[1] == pytest.approx(20)
    # A table whose seeds vary less than sampling alone has no variance of training.
    total, freedom = moderated_variances(np.full(5, 0.01), np.full(5, 10), np.full(5, 0.02))
    assert np.all(total > 0.01) and np.all(total < 0.02)
    # A distance in another unit: variances scale with its square.
    squared, sampling = np.array([0.02, 0.004, 0.1]), np.array([0.01, 0.001, 0.08])
    total, freedom = moderated_variances(squared, np.full(3, 4), sampling)
    scaled, same = moderated_variances(9 * squared, np.full(3, 4), 9 * sampling)
    assert scaled == pytest.approx(9 * total) and same == pytest.approx(freedom)


def test_moderated_variances_know_their_error() -> None:
    """In simulated tables with rows that differ in both variances, half of the true variances lie below the median of
    their distribution, and 80 % in its middle 80 %."""
    random = np.random.default_rng(3)
    cases = {"equal rows": (0.0, 0.3), "other training": (0.8, 0.3), "other sampling": (0.3, 1.5)}
    for name, (spread_of_training, spread_of_sampling) in cases.items():
        tails = []
        for _ in range(150):
            sampling = 0.002 * np.exp(spread_of_sampling * random.normal(size=8))
            true = sampling + 0.003 * np.exp(spread_of_training * random.normal(size=8))
            squared = true * random.chisquare(3, 8) / 3
            total, freedom = moderated_variances(squared, np.full(8, 3), sampling)
            tails += list(stats.chi2.sf(freedom * total / true, freedom))
        inside = np.mean([0.1 < tail < 0.9 for tail in tails])
        assert np.median(tails) == pytest.approx(0.5, abs=0.1), name
        assert inside == pytest.approx(0.8, abs=0.12), name


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
    spreads = row_spreads(ranked(pilot(tmp_path, rows=12, seeds=6, sigma=0.08, tau=1.0)))
    assert len({spread.name for spread in spreads}) == 12
    assert [spread.per_image for spread in spreads] == pytest.approx([1.0] * 12, rel=0.25)  # means are estimated
    assert np.mean([spread.total for spread in spreads]) == pytest.approx(0.08**2 + 1 / 500, rel=0.35)
    assert all(spread.num_images == 500 and spread.degrees_of_freedom > 15 for spread in spreads)
    few = row_spreads(ranked(pilot(tmp_path / "few", rows=2, seeds=2, sigma=0.08, tau=1.0)))
    assert all(spread.degrees_of_freedom < 6 for spread in few), "four runs show little of the variance"


def test_plans_are_the_fewest_images_and_sorted_by_cost(tmp_path: Path) -> None:
    table = ranked(pilot(tmp_path, rows=3, seeds=6, sigma=0.02, tau=2.0))
    found = plans(table, 0.2)
    costs = [plan.cost or 0 for plan in found]
    assert costs == sorted(costs) and all(plan.power >= 0.8 and plan.num_seeds >= 5 for plan in found)
    assert all(0.8 <= np.mean([power for power, *_ in plan.powers]) == pytest.approx(plan.power) for plan in found)
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
    assert "lowest power of a pair" in output
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
