"""group_by= makes one row of the runs that share a setting; rank_by= ranks by another metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gencompare.comparison import page
from gencompare.comparison.load_runs import ComparisonOptions, load_runs
from gencompare.comparison.page import report
from gencompare.comparison.ranking import NO_VALUE, RankingTable, TableRow, rank_results
from gencompare.errors import UserError
from gencompare.records import Metric
from gencompare.tasks.compare_runs import parse_keys
from synthetic import result, write_run


def run(folder: Path, schedule: str, lr: float, seed: int, value: float, **fields: Any) -> Path:
    config = {
        "family": "ddpm", "seed": seed, "choices": {"model": "ddpm", "model/schedule": schedule},
        "model": {"schedule": {"_target_": schedule, "shift": 0}, "optimizer": {"lr": lr}},
    }  # fmt: skip
    made = result(value, generation={"seed": seed} | fields.pop("generation", {}))
    name = f"{schedule}_{lr:g}_{seed}"
    return write_run(folder / name, [made], seed=seed, config=config, with_grid=False, **fields)


def table_of(folder: Path, *group_by: str, rank_by: str | None = None) -> RankingTable:
    options = ComparisonOptions(group_by, rank_by)
    (table,) = rank_results(load_runs(sorted(folder.iterdir()), options).runs, options)
    return table


def shown(rows: list[TableRow]) -> list[tuple[str, float | None]]:
    return [(row.run.label.split(",")[0], row.metric.value) for row in rows]


def test_one_row_per_value_of_the_key(tmp_path: Path) -> None:
    for schedule, base in (("cosine", 1.0), ("linear", 3.0)):
        for k, lr in enumerate((1e-3, 2e-3)):
            for seed in (0, 1):
                run(tmp_path, schedule, lr, seed, base + k + 0.1 * seed)
    assert len(table_of(tmp_path).rows) == 4, "without group_by, there is one row per config"
    by = table_of(tmp_path, "model.schedule")
    # The values of the cosine row are 1, 1.1, 2 and 2.1.
    assert shown(by.rows) == [
        ("model.schedule=cosine", pytest.approx(1.55)), ("model.schedule=linear", pytest.approx(3.55)),
    ]  # fmt: skip
    assert all(row.metric.interval is None and row.comparison is None for row in by.rows)
    notes = [note for note in by.notes() if "differ in more than seeds (model.optimizer.lr)" in note]
    assert len(notes) == 2 and "mean of 4 runs" in notes[0]
    assert [shown([row])[0][0] for row in table_of(tmp_path, "model/schedule").rows] == [
        "model/schedule=cosine", "model/schedule=linear",
    ]  # fmt: skip
    both = table_of(tmp_path, "model.schedule", "model.optimizer.lr")
    assert both.rows[0].run.label.startswith("model.schedule=cosine, model.optimizer.lr=0.001, mean")
    assert all(row.metric.interval is not None for row in both.rows), "seeds alone give an interval"
    assert len(table_of(tmp_path, "model.schedule.shift").rows) == 1


def test_runs_that_share_the_key_and_differ_in_seeds_are_tested(tmp_path: Path) -> None:
    for schedule, base in (("cosine", 1.0), ("linear", 3.0)):
        for seed in range(5):
            run(tmp_path, schedule, 1e-3, seed, base + 0.01 * seed)
    plain, by = table_of(tmp_path), table_of(tmp_path, "model.schedule")
    assert [(row.metric, row.comparison) for row in plain.rows] == [(row.metric, row.comparison) for row in by.rows]
    assert by.rows[1].comparison is not None and by.rows[1].comparison.significant
    assert by.rows[0].run.label == "model.schedule=cosine, mean of 5 seeds"


def test_samplers_and_runs_without_the_key_have_separate_rows(tmp_path: Path) -> None:
    run(tmp_path, "cosine", 1e-3, 0, 1.0)
    run(tmp_path, "cosine", 2e-3, 1, 2.0)
    run(tmp_path, "cosine", 3e-3, 2, 9.0, generation={"sampler": "ddim, 5 steps"})
    write_run(tmp_path / "vae", [result(5.0)], family="vae", with_grid=False)
    rows = table_of(tmp_path, "model.schedule").rows
    assert shown(rows) == [
        ("model.schedule=cosine", 1.5), ("vae", 5.0), ("model.schedule=cosine (cosine_0.003)", 9.0),
    ]  # fmt: skip


def test_trainings_of_any_length_share_a_row(tmp_path: Path) -> None:
    for seed, step in ((0, 100), (1, 200)):
        run(tmp_path, "cosine", 1e-3, seed, 1.0 + seed, generation={"step": step}, training={"steps": 500})
    assert len(table_of(tmp_path).rows) == 2
    (row,) = table_of(tmp_path, "family").rows
    assert row.metric.value == 1.5 and row.group.differing_settings == ("data or training length",)


def test_an_unknown_key_raises_with_the_settings_that_differ(tmp_path: Path) -> None:
    run(tmp_path, "cosine", 1e-3, 0, 1.0)
    run(tmp_path, "cosine", 2e-3, 0, 2.0)
    with pytest.raises(UserError, match=r"group_by=model.shedule: no run.*Settings that differ: model.optimizer.lr\."):
        table_of(tmp_path, "model.shedule")


def test_rank_by_another_metric(tmp_path: Path) -> None:
    for name, recall in (("a", 0.2), ("b", 0.9)):
        metrics = {"recall": Metric(recall, higher_is_better=True, baseline=0.95)}
        write_run(tmp_path / name, [result(1.0 if name == "a" else 2.0, metrics=metrics)], family=name, with_grid=False)
    other = result(0.1)
    del other.metrics["recall"]
    write_run(tmp_path / "c", [other], family="c", with_grid=False)
    table = table_of(tmp_path, rank_by="recall")
    assert [(row.rank, row.run.label, row.status) for row in table.rows] == [
        (1, "b", ""), (2, "a", ""), (None, "c", NO_VALUE),
    ]  # fmt: skip
    options = ComparisonOptions(rank_by="recall")
    html = page.render(load_runs(sorted(tmp_path.iterdir()), options))
    assert "digits: recall\u00a0↑" in html and "missing or not finite" in html
    with pytest.raises(UserError, match=r"rank_by=fid: no result has this metric. Available: fd_digits, kd_digits, "):
        report(sorted(tmp_path.iterdir()), tmp_path / "out", ComparisonOptions(rank_by="fid"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given, expected",
    [(None, ()), ("model.schedule", ("model.schedule",)), ("a, b/c", ("a", "b/c")), (["a", "b"], ("a", "b"))],
)
def test_keys_from_text_and_lists(given: Any, expected: tuple[str, ...]) -> None:
    from omegaconf import OmegaConf

    assert parse_keys(OmegaConf.create(given) if isinstance(given, list) else given) == expected
