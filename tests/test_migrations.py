"""Records and configs from earlier versions open under the current names."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.page import report
from gencompare.errors import UserError
from gencompare.migrations import migrate_config
from gencompare.records import SCHEMA, RunRecord

SCHEMA_1 = Path(__file__).parent / "schema_1"
"""The record and the config of a schema 1 run."""


def test_a_record_of_schema_1_opens_with_the_current_fields() -> None:
    record = RunRecord.load(SCHEMA_1)
    assert record.schema == SCHEMA and record.images == {"samples while training": "samples/step_00001250.png"}
    assert record.data["num_bins"] == 256
    assert "model.parameterization.noise_conditioning.factor=0.25" in record.overrides
    assert [each["role"] for each in record.training["dependencies"]] == ["autoencoder"]
    assert record.training["total_cost"]["images_seen"] == 40_100
    assert record.training["perceptual_networks"] == ["lpips"]
    (result,) = record.results
    assert result.primary_metric == "mmd_fashion_mnist" and result.images == {"samples": "samples/result.png"}
    assert result.secondary_results == []
    assert result.details["warnings"][0].startswith("modes are missing")
    assert result.details["class_shares_of_real_images"] == [0.4, 0.6]
    measurement = result.measurement
    assert (measurement.num_images, measurement.num_reference_images, measurement.chunk_size) == (250, 55_000, 250)


@pytest.mark.parametrize(
    "name, higher_is_better, target, baseline",
    [
        ("mmd_fashion_mnist", False, None, 0.6175113532601584),
        ("precision", True, None, 0.916),
        ("memorization", None, 1.0, None),
        ("extra", None, None, None),
    ],
)
def test_the_direction_of_a_metric_is_migrated(
    name: str, higher_is_better: bool | None, target: float | None, baseline: float | None
) -> None:
    metric = RunRecord.load(SCHEMA_1).results[0].metrics[name]
    assert (metric.higher_is_better, metric.target, metric.baseline) == (higher_is_better, target, baseline)


def test_a_migrated_record_is_saved_in_the_current_schema(tmp_path: Path) -> None:
    record = RunRecord.load(SCHEMA_1)
    record.save(tmp_path)
    assert json.loads((tmp_path / "record.json").read_text())["schema"] == SCHEMA
    assert RunRecord.load(tmp_path) == record


def test_records_of_both_schemas_share_a_row(tmp_path: Path) -> None:
    record = RunRecord.load(SCHEMA_1)
    record.seed, record.environment["run_id"] = 1, "another run"
    record.save(tmp_path / "current")
    loaded = load_runs([shutil.copytree(SCHEMA_1, tmp_path / "earlier"), tmp_path / "current"])
    assert not loaded.skipped
    assert "mean of 2 seeds" in report([run.folder for run in loaded.runs], tmp_path / "out").read_text()


def test_a_record_of_a_newer_schema_is_skipped_with_the_reason(tmp_path: Path) -> None:
    raw = json.loads((SCHEMA_1 / "record.json").read_text())
    (tmp_path / "record.json").write_text(json.dumps(raw | {"schema": SCHEMA + 1}))
    with pytest.raises(UserError, match=rf"has schema {SCHEMA + 1}, .* reads schemas 1 to {SCHEMA}: .* newer version"):
        RunRecord.load(tmp_path)
    (skipped,) = load_runs([tmp_path]).skipped
    assert skipped.folder.resolve() == tmp_path.resolve() and "newer version" in skipped.reason


def test_a_damaged_record_of_schema_1_raises(tmp_path: Path) -> None:
    raw = json.loads((SCHEMA_1 / "record.json").read_text())
    raw["results"][0]["metrics"]["precision"]["better"] = "up"
    (tmp_path / "record.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="is corrupted"):
        RunRecord.load(tmp_path)


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all dicts in nested data."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(each)


@pytest.mark.parametrize("stored", ["config.yml", "record.json"])
def test_classes_and_arguments_of_a_stored_config_exist(stored: str) -> None:
    if stored == "config.yml":
        config = migrate_config(OmegaConf.to_container(OmegaConf.load(SCHEMA_1 / stored)))  # type: ignore[arg-type]
    else:
        config = RunRecord.load(SCHEMA_1).config
    config.pop("task")  # not instantiated
    targets = [node for node in nodes(config) if str(node.get("_target_", "")).startswith("gencompare.")]
    assert len(targets) > 15
    for node in targets:
        known = inspect.signature(get_object(node["_target_"])).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        unknown = {name for name in node if not name.startswith("_")} - known.keys()
        assert takes_any or not unknown, (node["_target_"], unknown)


def test_arguments_of_further_samplers_are_migrated() -> None:
    samplers = {"fast": {"steps": 3, "eta": 0.5}, "ode": {"_target_": "diffusion.Heun", "steps": 9}, "own": None}
    migrated = migrate_config({"evaluation": {"samplers": samplers}})["evaluation"]["samplers"]
    assert migrated == {
        "fast": {"num_steps": 3, "eta": 0.5}, "ode": {"_target_": "diffusion.Heun", "num_steps": 9}, "own": None
    }  # fmt: skip
