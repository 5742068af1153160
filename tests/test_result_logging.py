"""Runs log their config, metrics and images to W&B (also offline), TensorBoard and any other Lightning logger."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

import gencompare
from gencompare.comparison.page import report
from gencompare.records import Metric, RunRecord
from gencompare.tasks.runs.result_logging import log_config, log_results, result_names
from gencompare.training.loggers import tensorboard_logger, wandb_logger
from synthetic import DIGITS, result, write_run

ROOT = Path(__file__).parents[1]
OWN = result(1.5)
OTHER_SAMPLER = result(2.5, generation={"sampler": "Heun, 9 steps, rho 7", "nfe": {"unet": 17.0}})
OTHER_EXTRACTOR = result(3.5, replace(DIGITS, extractor="inception", extractor_hash="1" * 64, resize="bicubic"))
OTHER_CHECKPOINT = result(4.5, generation={"checkpoint": "best"})
RAW, FEWER = result(5.5, generation={"weights": "raw"}), result(6.5, replace(DIGITS, num_images=100))
RESULTS = [OWN, OTHER_SAMPLER, OTHER_EXTRACTOR, OTHER_CHECKPOINT, RAW, FEWER]


def test_each_result_has_its_own_name() -> None:
    assert result_names(RESULTS) == [
        "last", "last/Heun 9 steps rho 7", "last/inception", "best", "last/raw", "last/num images 100",
    ]  # fmt: skip
    similar = result(1, replace(DIGITS, reference_hash="0" * 64))
    names = result_names([OWN, similar])
    assert names[0] == "last" and names[1].startswith("last") and names[1] != "last"
    # After a run was continued, its newest result has the short name.
    steps = [result(1, generation={"step": 100, "images_seen": 800}), result(2, generation={"step": 200})]
    assert result_names(steps) == ["last/step 100", "last"]
    assert all(re.fullmatch(r"[\w ./-]+", name) for name in [*names, *result_names(RESULTS)])


@pytest.fixture
def summaries(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The summaries of the W&B runs that finish during the test, with their ids, tags, entities and config."""
    found: list[dict[str, Any]] = []
    finish = wandb.Run.finish

    def remember(run: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(each["run"] is run for each in found):
            found.append({
                "run": run, "id": run.id, "tags": run.tags, "entity": run.settings.entity,
                "config": run.config.as_dict(), **dict(run.summary),
            })  # fmt: skip
        return finish(run, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "finish", remember)
    return found


def test_several_samplers_do_not_overwrite_each_other(tmp_path: Path, summaries: list[dict[str, Any]]) -> None:
    folder = write_run(tmp_path / "run", RESULTS)
    logger = wandb_logger(folder=folder, name="run", id="abc124", project="test", mode="offline")
    log_results([logger], RunRecord.load(folder), folder, report([folder], folder))
    assert summaries[0]["last/fd_digits"] == 1.5
    assert summaries[0]["last/Heun 9 steps rho 7/fd_digits"] == 2.5
    assert summaries[0]["last/inception/fd_digits"] == 3.5 and summaries[0]["best/fd_digits"] == 4.5


def test_metrics_and_images_are_logged_to_wandb(tmp_path: Path) -> None:
    metrics = {
        "fd_digits": Metric(1.5, higher_is_better=False, baseline=0.5, interval=(1.0, 2.0)),
        "bad": Metric(None, note="NaN"),
    }
    made = [
        result(1.5, metrics=metrics, images={"nearest training images": "samples/grid.png", "gone": "gone.png"}),
        result(2.5, generation={"checkpoint": "best"}, images={"samples": "other.png"}),
    ]
    folder = write_run(tmp_path / "run", made)
    Image.new("L", (5, 7)).save(folder / "other.png")
    page = report([folder], folder)
    logger = wandb_logger(folder=folder, name="run", id="abc123", project="test", mode="offline")
    log_results([logger], RunRecord.load(folder), folder, page)
    (files,) = folder.glob("wandb/offline-run-*-abc123/files")
    (table,) = files.glob("media/table/metrics_*.table.json")
    content = json.loads(table.read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert len(rows) == len(made[0].metrics) + len(made[1].metrics)
    first = next(row for row in rows if row["metric"] == "fd_digits" and row["checkpoint"] == "last")
    assert [first[name] for name in ("value", "low", "high", "real data", "sampler")] == [
        1.5, 1.0, 2.0, 0.5, "ddim, 50 steps",
    ]  # fmt: skip
    assert next(row for row in rows if row["metric"] == "bad")["value"] is None
    sizes = []
    for path in (files / "media" / "images").rglob("*.png"):
        with Image.open(path) as picture:
            sizes.append(picture.size)
    with Image.open(folder / "samples" / "grid.png") as own:
        assert sorted(sizes) == sorted([own.size, own.size, (5, 7)]), "missing images are skipped"
    assert (files / "record.json").is_file() and (files / "compare.html").is_file()


QUICK = [
    "model=gaussian", "trainer=cpu", "evaluation.num_images=100", "evaluation.extractors=[classifier]",
    "evaluation.protocol.num_likelihood_images=20", "callbacks.evaluation.num_evaluations=0", "hydra.run.dir=run",
]  # fmt: skip


def test_a_run_on_wandb_and_its_later_evaluation(
    cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summaries: list[dict[str, Any]]
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    artifacts: list[wandb.Artifact] = []
    monkeypatch.setattr(wandb.Run, "log_artifact", lambda run, artifact: artifacts.append(artifact))
    settings = ["+logger.wandb.tags=[a,b]", "+logger.wandb.entity=me", "logger.wandb.log_model=true"]
    assert cli(*QUICK, *settings, "seed=3") == 0
    record = RunRecord.load("run")
    assert summaries[0]["tags"] == ("a", "b") and summaries[0]["entity"] == "me"
    assert summaries[0]["config"]["seed"] == 3
    assert summaries[0]["last/coverage"] == record.results[0].metrics["coverage"].value
    # Evaluated again with other settings: the run's own result stays under its name.
    assert cli("task=evaluate", "run_dir=run", "evaluation.num_images=50") == 0
    assert [each["id"] for each in summaries] == [record.environment["run_id"]] * 2
    assert summaries[1]["last/coverage"] == summaries[0]["last/coverage"]
    assert "last/num images 50/coverage" in summaries[1]
    # The artifact is a run folder.
    artifact = next(artifact for artifact in artifacts if artifact.type == "model")
    for name, entry in artifact.manifest.entries.items():
        target = tmp_path / "downloaded" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(entry.local_path), target)
    loaded = gencompare.load_run(tmp_path / "downloaded")
    assert len(gencompare.sample(loaded.model, 4).images) == 4
    assert loaded.record.results[0].metrics.keys() == record.results[0].metrics.keys()


def test_the_sweep_file_sets_known_options_and_minimises_a_logged_metric() -> None:
    sweep = yaml.safe_load((ROOT / "docs" / "how_to" / "wandb_sweep.yaml").read_text())
    fixed = [argument for argument in sweep["command"] if "$" not in argument]
    values = {
        name: options.get("values") or [options["min"], options["max"]] for name, options in sweep["parameters"].items()
    }
    for k in range(max(map(len, values.values()))):
        config = gencompare.compose(*fixed, *(f"{name}={each[k % len(each)]}" for name, each in values.items()))
        assert config.callbacks.evaluation.num_samples > 0
    curve = (ROOT / "docs" / "results" / "digits" / "ddpm_0" / "curve.csv").read_text()
    assert sweep["metric"]["name"] in curve.splitlines()[0].split(",")


def test_a_run_of_a_wandb_agent_has_the_id_that_the_agent_chose(
    cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text("wandb_version: 1\nseed: {value: 3}\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    monkeypatch.setenv("WANDB_RUN_ID", "agent1")
    assert cli(*QUICK, "evaluation.checkpoints=[]", "seed=3") == 0
    assert RunRecord.load("run").environment["run_id"] == "agent1"
    assert len(list(Path("run/wandb").glob("offline-run-*-agent1"))) == 1


def test_an_evaluation_adds_nothing_to_a_csv_curve(cli: Callable[..., int]) -> None:
    overrides = [*QUICK[1:], "model=vae", "logger=csv", "budget=steps", "budget.steps=3"]
    assert cli(*overrides, "callbacks.metric_logger.log_every_n_steps=1") == 0
    curve = Path("run/curve.csv").read_text()
    assert cli("task=evaluate", "run_dir=run", "evaluation.num_images=50") == 0
    assert Path("run/curve.csv").read_text() == curve and len(curve.splitlines()) == 4


def test_tensorboard_gets_the_config_and_the_final_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = write_run(tmp_path / "run", RESULTS)
    logger = tensorboard_logger(folder=folder)
    log_results([logger], RunRecord.load(folder), folder, folder / "compare.html")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("last/fd_digits")] == [1.5]
    assert [event.value for event in events.Scalars("best/fd_digits")] == [4.5]
    start = str(events.summary_metadata["_hparams_/session_start_info"])
    assert "model/optimizer/lr" in start and "choices/model" in start


def test_any_lightning_logger_gets_the_config_and_the_final_metrics(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RESULTS)
    logger = CSVLogger(str(tmp_path / "own"))
    record = RunRecord.load(folder)
    log_config([logger], record.config)
    log_results([logger], record, folder, folder / "compare.html")
    logged = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert logged["model"]["optimizer"]["lr"] == 1e-3
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["last/fd_digits"]) == 1.5 and float(row["best/fd_digits"]) == 4.5
    assert int(row["step"]) == record.training["steps"]
