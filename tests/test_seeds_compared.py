"""Runs that differ only in their seeds are one row: the mean over training seeds, with a valid confidence interval."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from composing import compose
from gencompare.comparison import page
from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.page import report
from gencompare.comparison.ranking import RankingTable, rank_results
from gencompare.comparison.statistics import mean_over_seeds
from gencompare.records import Metric
from synthetic import result, write_run


def ranked(folders: list[Path]) -> RankingTable:
    (table,) = rank_results(load_runs(folders).runs)
    return table


def seeds(tmp_path: Path, name: str, values: list[float], **fields: object) -> list[Path]:
    return [
        write_run(tmp_path / f"{name}{k}", [result(value, generation={"seed": k})], seed=k, **fields)
        for k, value in enumerate(values)
    ]


def test_three_seeds_are_one_row_with_their_mean(tmp_path: Path) -> None:
    (row,) = ranked(seeds(tmp_path, "a", [1.0, 2.0, 3.0])).rows
    assert row.group.seeds == [0, 1, 2]
    # 2 +- t(0.975, 2) * 1 / sqrt(3), with Student's quantile from a table.
    assert row.metric.value == pytest.approx(2.0)
    assert row.metric.interval == pytest.approx((0, 2 + 4.302653 / 3**0.5), rel=1e-6), "no distance is negative"
    assert "mean of 3 seeds" in row.run.label


def test_the_page_shows_samples_of_the_first_seed(tmp_path: Path) -> None:
    """Also if a folder of another seed comes first by name."""
    for name, seed in (("0", 2), ("1", 0), ("2", 1)):
        write_run(tmp_path / name, [result(1.0 + seed, generation={"seed": seed})], seed=seed)
    (row,) = ranked(sorted(tmp_path.iterdir())).rows
    assert [run.record.seed for run, _ in row.group.members] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "values", "interval"),
    [
        ("recall", [0.9, 0.95, 1.0], (0.95 - 4.302653 * 0.05 / 3**0.5, 1.0)),
        ("coverage", [0.0, 0.1, 0.2], (0.0, 0.1 + 4.302653 * 0.1 / 3**0.5)),
        ("precision_db", [12.9, 13.0, 13.1], (13 - 4.302653 * 0.1 / 3**0.5, 13 + 4.302653 * 0.1 / 3**0.5)),
        ("kd_digits", [0.0, 0.1, 0.2], (0.1 - 4.302653 * 0.1 / 3**0.5, 0.1 + 4.302653 * 0.1 / 3**0.5)),  # unbiased
    ],
)
def test_an_interval_over_seeds_stays_in_the_possible_range(
    name: str, values: list[float], interval: tuple[float, float], tmp_path: Path
) -> None:
    for seed, value in enumerate(values):
        metric = Metric(value, higher_is_better=True)
        write_run(tmp_path / str(seed), [result(1.0, metrics={name: metric})], seed=seed, with_grid=False)
    (row,) = ranked(sorted(tmp_path.iterdir())).rows
    assert row.result.metrics[name].interval == pytest.approx(interval, rel=1e-6)


def test_seeds_are_distinguished_from_settings(tmp_path: Path) -> None:
    """A real config contains the seed several times, including for the order of images and for the samples."""

    def run(k: int, *words: str) -> Path:
        config = OmegaConf.to_container(compose(f"seed={k}", *words))
        return write_run(
            tmp_path / f"{k}{len(words)}", [result(float(k), generation={"seed": k})], seed=k, config=config
        )

    (row,) = ranked([run(0), run(1), run(2)]).rows
    assert row.group.seeds == [0, 1, 2]
    assert len(ranked([run(0), run(1, "model.optimizer.lr=1e-4")]).rows) == 2
    assert len(ranked([run(0), run(1, "data.random_flip=true")]).rows) == 2


@pytest.mark.parametrize("further", [0, 5], ids=["the same seeds", "other seeds"])
def test_another_ema_decay_is_another_model(tmp_path: Path, further: int) -> None:
    config = OmegaConf.to_container(compose("model=flow"))
    assert isinstance(config, dict)
    folders = []
    for first, decay, base in ((0, 0.995, 1.0), (further, 0.0, 3.0)):
        config["callbacks"]["ema"]["decay"] = decay
        for seed in range(first, first + 5):
            made = result(base + 0.01 * seed, generation={"seed": seed})
            own = json.loads(json.dumps(config | {"seed": seed}))
            folders.append(
                write_run(tmp_path / f"{decay}_{seed}", [made], seed=seed, config=own, family="flow", with_grid=False)
            )
    better, worse = ranked(folders).rows
    assert (better.metric.value, worse.metric.value) == pytest.approx((1.02, 3.02 + 0.01 * further))
    assert len(better.group.seeds) == len(worse.group.seeds) == 5
    assert worse.comparison is not None and worse.comparison.significant, "a badly chosen EMA decay is worse"


@pytest.mark.parametrize(
    "name, value, rows",
    [
        ("callbacks.evaluation.patience", 3, 2),
        ("callbacks.evaluation.num_evaluations", 9, 2),
        ("callbacks.evaluation.num_samples", 100, 2),
        ("callbacks.evaluation.num_grid_images", 4, 1),
        ("callbacks.evaluation.num_val_images", 10, 1),
        ("callbacks.metric_logger.log_every_n_steps", 7, 1),
        ("callbacks.checkpoints.every_minutes", 9, 1),
        ("callbacks.progress_bar", None, 1),
        ("trainer.devices", 2, 1),
    ],
)
def test_callbacks_that_affect_metrics_make_another_model(tmp_path: Path, name: str, value: Any, rows: int) -> None:
    plain, changed = compose(), compose()
    assert OmegaConf.select(plain, name, default="none") not in ("none", value), "the config has this setting"
    OmegaConf.update(changed, name, value)
    folders = [
        write_run(
            tmp_path / f"{seed}", [result(1.0, generation={"seed": seed})], seed=seed, with_grid=False,
            config=OmegaConf.to_container(config),
        )
        for seed, config in enumerate([plain, changed])
    ]  # fmt: skip
    assert len(ranked(folders).rows) == rows


def test_rows_are_ranked_by_their_mean_and_not_the_best_seed(tmp_path: Path) -> None:
    lucky = seeds(tmp_path, "a", [0.9, 3.0, 3.0])
    steady = seeds(tmp_path, "b", [1.5, 1.5, 1.6], family="vae")
    assert [row.run.record.family for row in ranked(lucky + steady).rows] == ["vae", "ddpm"]


def test_sampling_seeds_are_nested_in_training_seeds(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", [result(v, generation={"seed": k}) for k, v in enumerate([1.0, 1.2])], seed=0)
    two = write_run(tmp_path / "b", [result(v, generation={"seed": k}) for k, v in enumerate([3.0, 3.2])], seed=1)
    (row,) = ranked([one, two]).rows
    # These are two independent training runs with means 1.1 and 3.1, not four independent values.
    half = 12.7062047 * (2.0 / 2**0.5) / 2**0.5
    assert row.metric.value == pytest.approx(2.1)
    assert row.metric.interval == pytest.approx((0, 2.1 + half), rel=1e-6)


def test_runs_that_differ_in_more_than_seeds_have_separate_rows(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [result(1.0)], seed=0)
    for k, fields in enumerate(
        [
            {"config": {"family": "ddpm", "model": {"optimizer": {"lr": 2e-3}}}},
            {"family": "vae"},
            {"config": {}},
            {"data": {"name": "digits", "hash": "other"}},
        ]
    ):
        b = write_run(tmp_path / f"b{k}", [result(1.5)], seed=1, **fields)
        assert len(ranked([a, b]).rows) == 2, fields
    other = write_run(tmp_path / "c", [result(1.5, generation={"sampler": "ddim, 10 steps", "seed": 1})], seed=1)
    assert len(ranked([a, other]).rows) == 2


def test_an_integer_and_an_equal_float_are_the_same_setting(tmp_path: Path) -> None:
    """Hydra keeps what the user types: model.network.dropout=0 is an integer, and the default a float."""
    folders = [
        write_run(tmp_path / str(seed), [result(1.0, generation={"seed": seed})], seed=seed, config=config)
        for seed, config in enumerate({"model": {"dropout": x, "betas": [x, 0.5]}} for x in (0, 0.0))
    ]
    (row,) = ranked(folders).rows
    assert row.group.seeds == [0, 1]


def test_a_repeated_seed_is_not_a_replicate(tmp_path: Path) -> None:
    again = [write_run(tmp_path / name, [result(1.0)], seed=0) for name in "ab"]
    assert [row.group.seeds for row in ranked(again).rows] == [[0], [0]]


def test_a_missing_value_of_one_seed_is_missing_in_the_row(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"a{k}", [result(v)], seed=k) for k, v in enumerate([1.0, None, 2.0])]
    (row,) = ranked(folders).rows
    assert row.metric.value is None and row.rank is None


def test_the_interval_covers_the_mean_of_all_trainings() -> None:
    random = np.random.default_rng(0)
    values = random.normal(2.0, 0.5, (2000, 3))
    found = [mean_over_seeds([[Metric(float(v))] for v in row]).interval for row in values]
    covered = np.mean([low <= 2.0 <= high for low, high in found if low is not None])
    assert 0.935 < covered < 0.965


def test_the_csv_keeps_every_run_and_the_page_shows_the_mean(tmp_path: Path) -> None:
    folders = seeds(tmp_path, "a", [1.0, 2.0, 3.0]) + seeds(tmp_path, "b", [4.0], family="vae")
    report(folders, tmp_path / "out")
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["rank"], row["fd_digits"], row["mean"]) for row in rows] == [
        ("a0", "1", "1.0", "2.0"), ("a1", "1", "2.0", "2.0"), ("a2", "1", "3.0", "2.0"), ("b0", "2", "4.0", ""),
    ]  # fmt: skip
    html = page.render(load_runs(folders))
    assert "mean of 3 seeds" in html and "the mean and its 95 % confidence interval over training seeds" in html


def test_a_run_shows_the_overrides_that_others_lack(tmp_path: Path) -> None:
    folders = [
        write_run(
            tmp_path / name, [result(1.0)], seed=seed,
            overrides=["model=ddpm", f"model/schedule={name}", "data=digits", f"seed={seed}"],
        )
        for seed, name in enumerate(["linear", "cosine"])
    ]  # fmt: skip
    assert sorted(run.settings for run in load_runs(folders).runs) == ["schedule=cosine", "schedule=linear"]
