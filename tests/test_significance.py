"""Significance tests have the stated error rate and find real differences."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gencompare.comparison import page
from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.page import report
from gencompare.comparison.ranking import RankingTable, rank_results
from gencompare.comparison.statistics import adjusted_p_values, holm, welch
from gencompare.comparison.tables import columns
from gencompare.records import Metric
from synthetic import result, write_run


def seeds(folder: Path, name: str, values: list[float], **fields: object) -> list[Path]:
    return [
        write_run(folder / f"{name}{k}", [result(value, generation={"seed": k})], seed=k, with_grid=False, **fields)
        for k, value in enumerate(values)
    ]


def ranked(folders: list[Path]) -> RankingTable:
    (table,) = rank_results(load_runs(folders).runs)
    return table


def test_welch_equals_scipy() -> None:
    random = np.random.default_rng(0)
    for n, m in ((5, 5), (5, 9), (12, 6)):
        a, b = random.normal(0, 1, n), random.normal(0.8, 3, m)
        own = welch(a.mean(), a.var(ddof=1) / n, np.array(n), b.mean(), b.var(ddof=1) / m, np.array(m))
        assert float(own) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-12)


def test_holm_matches_a_worked_example() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04; then the running maximum.
    assert holm(np.array([0.03, 0.01, 0.04, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.5, 0.9])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([])).shape == (0,)


def test_without_variance_only_different_means_are_significant() -> None:
    assert adjusted_p_values([[1.0] * 5, [1.0] * 5, [2.0] * 5]) == [None, 1.0, 0.0]


def test_fewer_than_five_seeds_are_not_tested() -> None:
    five, four = [1.0, 1.1, 0.9, 1.0, 1.05], [50.0, 51.0, 50.5, 50.2]
    assert adjusted_p_values([four, five, None, four]) == [None] * 4
    found = adjusted_p_values([four, five, None, [9.0, 9.1, 9.2, 9.0, 9.1]])
    assert found[:3] == [None] * 3 and found[3] is not None and found[3] < 1e-6


def test_the_family_wise_error_rate_is_bounded() -> None:
    """The best of ten equal rows is selected by the same values that are then tested."""
    random = np.random.default_rng(1)
    wrong = naive = 0
    for _ in range(600):
        samples = np.array(sorted(random.normal(3, 0.4, (10, 8)).tolist(), key=np.mean))
        wrong += any(p is not None and p <= 0.05 for p in adjusted_p_values(samples.tolist()))
        with_best = stats.ttest_ind(samples[:1], samples[1:], axis=1, equal_var=False).pvalue
        naive += bool(with_best.min() * 9 <= 0.05)
    assert wrong / 600 < 0.05 + 2 * (0.05 * 0.95 / 600) ** 0.5
    assert naive / 600 > 0.07, "correcting only for the comparisons with the best row is not enough"


def test_unequal_variances_keep_the_error_rate() -> None:
    random = np.random.default_rng(2)
    scatter = np.array([0.1, 0.1, 1.0, 3.0])[:, None]
    wrong = 0
    for _ in range(1000):
        samples = sorted(random.normal(3, scatter, (4, 6)).tolist(), key=np.mean)
        wrong += any(p is not None and p <= 0.05 for p in adjusted_p_values(samples))
    assert wrong / 1000 < 0.05 + 2 * (0.05 * 0.95 / 1000) ** 0.5


def test_large_differences_are_significant_and_small_ones_rarely() -> None:
    random = np.random.default_rng(3)
    found = np.array(
        [adjusted_p_values(random.normal([[1.0], [1.1], [3.0]], 0.3, (3, 5)).tolist())[1:] for _ in range(300)],
        dtype=float,
    )
    assert (found[:, 1] <= 0.05).mean() > 0.98 and (found[:, 0] <= 0.05).mean() < 0.1


def test_twins_are_not_significantly_different_and_a_worse_model_is(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    one, twin, crippled = (random.normal(mean, 0.05, 5).tolist() for mean in (1.0, 1.0, 1.6))
    config = {"family": "vae", "model": {"copy": True}}
    folders = seeds(tmp_path, "one", one) + seeds(tmp_path, "twin", twin, config=config)
    folders += seeds(tmp_path, "crippled", crippled, family="gan") + seeds(tmp_path, "few", [9.0, 9.1], family="nf")
    table = ranked(folders)
    first, second, third, few = table.rows
    assert first.comparison is not None and first.comparison.p_value is None and not first.comparison.significant
    assert second.comparison is not None and not second.comparison.significant and second.comparison.best_rank == 1
    assert third.comparison is not None and third.comparison.significant and third.run.record.family == "gan"
    assert few.comparison is None
    column = next(column for column in columns(table) if column.title == "vs. best")
    assert [column.cell(row).annotation for row in table.rows] == [
        "",
        "not significantly different from #1",
        "significantly worse than #1",
        "",
    ]
    (note,) = [note for note in table.notes() if note.startswith("Significance")]
    assert "every pair of the 3 rows" in note and "The other rows are not tested." in note
    html = page.render(load_runs(folders))
    assert "not significantly different from #1" in html and "Holm" in html
    report(folders, tmp_path / "out")
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    p = float(stats.ttest_ind(sorted([one, twin], key=np.mean)[0], crippled, equal_var=False).pvalue)
    assert rows["crippled0"]["best_rank"] == "1" and p <= float(rows["crippled0"]["p_holm"]) <= 3 * p
    assert rows["few0"]["p_holm"] == ""


def test_with_few_seeds_nothing_is_claimed(tmp_path: Path) -> None:
    folders = seeds(tmp_path, "a", [1.0, 1.1, 1.0, 1.05]) + seeds(tmp_path, "b", [9.0, 9.1, 9.0, 9.05], family="vae")
    table = ranked(folders)
    assert [row.comparison for row in table.rows] == [None, None]
    assert not [column for column in columns(table) if column.title == "vs. best"]
    assert any("No difference is claimed to be significant" in note for note in table.notes())


def test_sampling_seeds_are_not_training_seeds(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 9.0)):
        results = [result(value + 0.01 * k, generation={"seed": k}) for k in range(8)]
        write_run(tmp_path / name, results, family=name, with_grid=False)
    assert all(row.comparison is None for row in ranked([tmp_path / "a", tmp_path / "b"]).rows)


def test_with_a_target_the_distance_from_it_is_tested(tmp_path: Path) -> None:
    for name, mean in (("a", 0.98), ("low", 0.5), ("high", 1.5)):
        for k in range(5):
            metrics = {"fd_digits": Metric(mean + 0.01 * k, target=1.0)}
            write_run(tmp_path / f"{name}{k}", [result(0, metrics=metrics)], family=name, seed=k, with_grid=False)
    table = ranked(sorted(tmp_path.iterdir()))
    assert [row.run.record.family for row in table.rows] == ["a", "low", "high"]
    assert all(row.comparison is not None and row.comparison.significant for row in table.rows[1:])


def test_seeds_that_stopped_at_different_steps_are_one_row(tmp_path: Path) -> None:
    """The best checkpoint, or the last one under a time limit, has a different step for each seed."""
    for k, (best, last) in enumerate([(100, 900), (200, 950)]):
        steps = {"best": best, "last": last}
        results = [
            result(1.0 + k, generation={"seed": k, "checkpoint": name, "step": step, "images_seen": 10 * step})
            for name, step in steps.items()
        ]
        write_run(tmp_path / f"a{k}", results, seed=k, with_grid=False, training={"steps": last})
    rows = ranked(sorted(tmp_path.iterdir())).rows
    assert sorted((row.result.generation.checkpoint, row.result.generation.images_seen) for row in rows) == [
        ("best", 1500), ("last", 9250),
    ]  # fmt: skip
    early = result(9.0, generation={"seed": 2, "step": 300})
    write_run(tmp_path / "a2", [early], seed=2, with_grid=False, training={"steps": 900})
    assert len(ranked(sorted(tmp_path.iterdir())).rows) == 3, "a result from an earlier step has its own row"
