"""The committed records are complete and match the presets, and each committed page shows its records."""

from __future__ import annotations

import csv
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from scipy import stats

from composing import compose
from gencompare.command_line import conf_dir
from gencompare.records import RunRecord
from hydra_plugins.gencompare_sweeps.sweepers import families

RESULTS = Path(__file__).parents[1] / "docs" / "results"
sys.path.insert(0, str(RESULTS))

import findings  # type: ignore[import-not-found] # noqa: E402
import studies  # type: ignore[import-not-found] # noqa: E402

FOLDERS = {folder.name: folder for folder in RESULTS.iterdir() if (folder / "compare.csv").is_file()}
"""Folders with records and the page that compares them."""
RECORDS = {f"{path.parent.parent.name}/{path.parent.name}": path.parent for path in RESULTS.glob("*/*/record.json")}
STUDIES = {
    "cifar10",
    "conditional",
    "few_calls",
    "forecast",
    "few_steps",
    "fewer_images",
    "guidance",
    "ncsn",
    "outside",
    "plan_replay",
    "precision",
    "reproduced",
    "samplers",
    "schedules",
    "sde_vp",
}
"""Comparisons of models that are not presets."""
DATA_SETS = {"digits", "fashion_mnist"}
"""Comparisons of all families on one data set."""


def records(folder: str) -> list[RunRecord]:
    return [RunRecord.load(path) for name, path in RECORDS.items() if name.startswith(f"{folder}/")]


def model_and_batch(cfg: DictConfig) -> dict[str, Any]:
    """Return what a preset sets, except the budget, the likelihood method, and a noise bound that not all samplers
    have."""
    model = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(model, dict)
    model.pop("likelihoods", None)
    model.get("sampler", {}).pop("s_max", None)
    model.get("latent", {}).pop("budget", None)
    if "schedule" in model:  # a diffusion model; records that are older than these options have their defaults
        model = defaults_of_new_options("model=ddpm", "pixel_decoder", "dynamic_threshold") | model
    if model.get("objective", {}).get("_target_", "").endswith(".MeanFlow"):
        new = defaults_of_new_options("model=meanflow", "objective")["objective"]
        model["objective"] = {name: new[name] for name in ("guidance_scale", "guidance_mixing")} | model["objective"]
    return {"model": model, "batch": cfg.trainer.global_batch_size}


@cache
def defaults_of_new_options(model: str, *names: str) -> dict[str, Any]:
    default = OmegaConf.to_container(compose(model).model, resolve=True)
    assert isinstance(default, dict)
    return {name: default[name] for name in names}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_finished_and_contains_no_local_paths(name: str) -> None:
    record = RunRecord.load(RECORDS[name])
    assert record.state in ("finished", "samples") and "out" not in record.config
    assert all(result.metrics[result.primary_metric].value is not None for result in record.results)
    text = (RECORDS[name] / "record.json").read_text()
    assert not any(place in text for place in ("/home/", "/root/", "/tmp/"))


@pytest.mark.parametrize("name", [name for name in RECORDS if name.split("/")[0] not in STUDIES])
def test_a_record_matches_its_current_preset(name: str) -> None:
    record = RunRecord.load(RECORDS[name])
    data = record.data["name"]
    experiment = f"{data}_{record.family}"
    known = (conf_dir() / "experiment" / f"{experiment}.yaml").is_file()
    words = [f"experiment={experiment}"] if known else [f"model={record.family}", f"data={data}"]
    assert model_and_batch(OmegaConf.create(record.config)) == model_and_batch(compose(*words))


def test_the_findings_are_those_of_the_records() -> None:
    for page in findings.PAGES:
        text = page.read_text()
        assert "<!-- findings" in text and findings.fill(text) == text


@pytest.mark.parametrize("study", studies.TABLES)
def test_the_table_of_a_study_is_that_of_its_records(study: str) -> None:
    page, _ = studies.TABLES[study]
    assert f"<!-- {study} -->" in page.read_text() and studies.filled(study) == page.read_text()


def test_a_finding_has_the_ratio_and_the_interval_of_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A paired and an unpaired comparison, against the textbook formulas of scipy."""
    rows = {"a": [2.0, 2.2, 2.5], "b": [1.0, 1.3, 1.1]}

    def logarithms(row: Any) -> dict[str, float]:
        return {f"{row.runs if row.study == 'apart' else ''}{k}": math.log(x) for k, x in enumerate(rows[row.runs])}

    monkeypatch.setattr(findings.Row, "logarithms", logarithms)
    a, b = (np.log(values) for values in rows.values())
    for study, test in (("apart", stats.ttest_ind(a, b, equal_var=False)), ("same", stats.ttest_rel(a, b))):
        finding = findings.Finding("{ratio} {interval}", findings.Row(study, "a"), findings.Row(study, "b"))
        ratio, low, high = finding.interval()
        expected = test.confidence_interval(0.95)
        assert ratio == pytest.approx(math.exp(a.mean() - b.mean()))
        assert (low, high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
        assert finding.p_value() == pytest.approx(test.pvalue)
        assert finding.sentence().startswith(f"{ratio:.2f} [{low:.2f}, ")
        power = simulated_power(math.log(finding.detectable()), a, b, paired=study == "same")
        assert power == pytest.approx(0.8, abs=0.03)
    assert findings.holm([0.04, None, 0.01, 0.03]) == pytest.approx([0.06, None, 0.03, 0.06])


def simulated_power(difference: float, a: Any, b: Any, *, paired: bool) -> float:
    """Return how often a test of three seeds finds a difference of logarithms, with the standard deviations of a, b."""
    rng = np.random.default_rng(1)
    if paired:
        x = difference + (a - b).std(ddof=1) * rng.standard_normal((3, 20_000))
        return float((stats.ttest_1samp(x, 0).pvalue < 0.05).mean())
    x, y = (values.std(ddof=1) * rng.standard_normal((3, 20_000)) for values in (a, b))
    return float((stats.ttest_ind(x + difference, y, equal_var=False).pvalue < 0.05).mean())


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_page_shows_the_records_of_its_folder(folder: str) -> None:
    kept = [
        (record.family, str(record.seed), result.primary_metric, f"{result.metrics[result.primary_metric].value:.9g}")
        for record in records(folder)
        for result in record.results
    ]
    with (FOLDERS[folder] / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [
        (row["family"], row["seed"], row["primary_metric"], f"{float(row[row['primary_metric']]):.9g}") for row in rows
    ]
    assert kept and sorted(shown) == sorted(kept)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_default_metric_ranks_every_page(folder: str) -> None:
    assert {record.results[0].primary_metric for record in records(folder)} == {"mmd_efficientnet_lite0"}


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name in DATA_SETS])
def test_a_page_of_families_has_all_families_with_equal_seeds(folder: str) -> None:
    runs = [(each.family, each.seed) for each in records(folder) if "_half_" not in each.name]
    seeds = {seed for _, seed in runs}
    assert seeds and sorted(runs) == sorted((each, seed) for each in families().split(",") for seed in seeds)
