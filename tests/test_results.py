"""The committed records are of runs that learned, and name no machine."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from scipy.stats import spearmanr

from composing import compose
from gencompare.paths import conf_dir
from gencompare.records import RunRecord

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "results"))

import table  # type: ignore[import-not-found]

KEPT = {each.record.name: each for each in table.load()}
RISES = {"fashion_mnist_ncsn_sigma_2", "fashion_mnist_ncsn_told"}
"""Kept to show what goes wrong (docs/diffusion.md): their distance rises, and the page of results says so."""
FALLS = [name for name, kept in KEPT.items() if name not in RISES and len(kept.looks) > 1]
WANTED = {f"{data}_{family}" for data in ("fashion_mnist", "cifar10") for family in ("vae", "gan", "ddpm")}
OF_OTHER_USE = {"digits_classifier", "fashion_mnist_classifier", "fashion_mnist_perceptual"}
"""Presets that train what measures, or what latent diffusion is trained against."""


@pytest.mark.parametrize("name", FALLS)
def test_distance_falls_while_training(name: str) -> None:
    distances = [distance for _, distance in KEPT[name].looks]
    least = 5 if name in WANTED else 2
    assert len(distances) >= least, "at half of the budget, and at its end"
    assert distances[-1] < distances[0]
    if not name.startswith("digits"):  # most of digits is learned before the first look
        assert spearmanr(range(len(distances)), distances).statistic < -0.5


def test_each_family_has_its_curve() -> None:
    assert set(FALLS) >= WANTED


def presets(data: str) -> set[str]:
    """The names of a data set's experiments, one a family."""
    return {path.stem for path in conf_dir().glob(f"experiment/{data}_*.yaml")} - OF_OTHER_USE


def test_every_family_of_fashion_mnist_beats_the_gaussian_and_its_half() -> None:
    families = presets("fashion_mnist")
    baselines = [kept.record for kept in KEPT.values() if kept.record.family == "gaussian"]
    assert len(families) > 12 and not {name for name in families if not KEPT[name].learned(baselines)}


def model_and_budget(cfg: DictConfig) -> dict[str, Any]:
    """What a preset sets, but for how bits are counted and two ways to write that a sampler has no bound."""
    model = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(model, dict)
    model.pop("bits", None)
    model.get("sampler", {}).pop("s_max", None)
    return {"model": model, "images": cfg.budget.images, "batch": cfg.trainer.global_batch_size}


@pytest.mark.parametrize("name", sorted(presets("digits") | presets("fashion_mnist")))
def test_a_record_is_of_its_preset_as_it_is_today(name: str) -> None:
    then = OmegaConf.create(KEPT[name].record.config)
    assert model_and_budget(then) == model_and_budget(compose(f"experiment={name}"))


def test_the_bad_schedule_is_last_of_all_under_every_sampling_grid() -> None:
    records = [RunRecord.load(path.parent) for path in (table.RESULTS / "schedules").glob("*_digits_ddpm/record.json")]
    assert len(records) == 4 * 3, "schedules and seeds"
    grids: dict[str, dict[bool, list[float]]] = {}
    for record in records:
        for result in record.results:
            steep = record.config["choices"]["model/schedule"] == "steep"
            grid = grids.setdefault(result.generation.sampler, {True: [], False: []})
            grid[steep].append(result.metrics[result.headline].value)
    assert len(grids) == 3
    assert all(min(grid[True]) > max(grid[False]) for grid in grids.values())


def test_the_families_have_three_seeds_each_and_their_page_shows_these_records() -> None:
    records = [RunRecord.load(path.parent) for path in (table.RESULTS / "families").glob("*/record.json")]
    of_sweep = OmegaConf.load(conf_dir() / "sweep" / "families.yaml").hydra.sweeper.params.model.split(",")
    trained = {(each.family, each.seed, each.config["budget"]["images"]) for each in records}
    assert len(trained) == len(records)
    assert {(family, seed, 40_000) for family in of_sweep for seed in range(3)} <= trained
    results = [(record, result) for record in records for result in record.results]
    assert len(results) == len(records) and len({result.measurement.id for _, result in results}) == 1
    kept = [(record.family, str(record.seed), result.metrics["fd_fashion_mnist"].value) for record, result in results]
    with (table.RESULTS / "families" / "compare.csv").open(newline="") as file:
        shown = [(row["family"], row["seed"], float(row["fd_fashion_mnist"])) for row in csv.DictReader(file)]
    assert sorted(shown) == sorted(kept)


@pytest.mark.parametrize("name", KEPT)
def test_record_is_finished_and_names_no_place(name: str) -> None:
    record = KEPT[name].record
    assert record.state == "finished"
    assert all(result.metrics[result.headline].value is not None for result in record.results)
    assert "/home/" not in (table.RESULTS / name / "record.json").read_text()
    assert "out" not in record.config


def test_the_page_is_what_the_records_say() -> None:
    assert (table.RESULTS / "README.md").read_text() == table.page()
