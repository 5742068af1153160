"""task=export format=hub: a folder with weights, config and model card, which is uploaded and loaded again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import gencompare
from gencompare.errors import UserError
from gencompare.records import RunRecord
from gencompare.rng import generator

Cli = Callable[..., int]
QUICK = [
    "data=digits", "trainer=cpu", "logger=none", "budget=steps", "budget.steps=3", "trainer.global_batch_size=8",
    "callbacks.evaluation.num_evaluations=0", "evaluation.num_images=20", "evaluation.extractors=[classifier]",
    "evaluation.protocol.num_likelihood_images=4",
]  # fmt: skip
LDM = ["model=ldm", "model.latent.budget.images=null", "model.latent.budget.steps=3"]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(["model=vae"], marks=pytest.mark.slow), pytest.param(["model=ebm"], marks=pytest.mark.slow),
        ["model=edm", "model.sampler.num_steps=3"], pytest.param(LDM, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_exported_model_draws_the_same_samples(family: list[str], cli: Cli, tmp_path: Path) -> None:
    assert cli(*family, *QUICK, "paths.runs=runs", "hydra.run.dir=run") == 0
    assert cli("task=export", "run_dir=run", "format=hub") == 0
    folder = tmp_path / "run" / "hub"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "samples.png",
    ]  # fmt: skip
    loaded, original = gencompare.from_pretrained(folder), gencompare.load_run("run").model
    drawn = [model.sample(3, generator=generator("cpu", 1)) for model in (loaded, original)]  # type: ignore[operator]
    assert torch.equal(*drawn) and not loaded.training


def test_the_model_card_has_metadata_and_metrics(cli: Cli, tmp_path: Path) -> None:
    assert cli("model=vae", *QUICK, "hydra.run.dir=run", "name=mine") == 0
    assert cli("task=export", "run_dir=run", "format=hub", "task.out=out") == 0
    _, metadata, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(metadata)
    assert card["library_name"] == "gencompare" and card["datasets"] == ["digits"] and "vae" in card["tags"]
    result = RunRecord.load("run").own_result()
    assert result is not None
    (listed,) = card["model-index"][0]["results"]
    assert {each["type"]: each["value"] for each in listed["metrics"]} == {
        name: metric.value for name, metric in result.metrics.items() if metric.value is not None
    }
    assert "![Samples](samples.png)" in body and "20 generated images" in body and "| recall ↑ |" in body
    assert "python run.py model=vae" in body and "hydra.run.dir" not in body and "| weights | last, averaged |" in body
    # Weights that were not evaluated have no results in their card.
    assert cli("task=export", "run_dir=run", "format=hub", "weights=raw", "task.out=raw") == 0
    assert "## Evaluation" not in (tmp_path / "raw" / "README.md").read_text()
    assert not (tmp_path / "raw" / "samples.png").exists()
    huggingface_hub = pytest.importorskip("huggingface_hub")
    parsed = huggingface_hub.ModelCard((tmp_path / "out" / "README.md").read_text())
    assert {each.metric_type for each in parsed.data.eval_results} >= {"recall", "coverage"}


def test_a_folder_is_uploaded(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append((name, options))
            return f"https://hub.invalid/{name}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Hub))
    assert cli("model=vae", *QUICK, "hydra.run.dir=run", "evaluation.checkpoints=[]") == 0
    assert cli("task=export", "run_dir=run", "format=hub", "task.push=me/vae") == 0
    assert calls[0] == ("me/vae", {"exist_ok": True})
    assert set(calls[1][1]["allow_patterns"]) == {"model.safetensors", "config.json", "README.md", "samples.png"}
    assert calls[1][1]["repo_id"] == "me/vae" and Path(calls[1][1]["folder_path"]).name == "hub"
    assert "Uploaded to https://hub.invalid/me/vae" in capsys.readouterr().out

    def fail(self: Hub, name: str, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(Hub, "create_repo", fail)
    assert cli("task=export", "run_dir=run", "format=hub", "task.push=me/vae") == 1
    assert "was written, but not uploaded to me/vae: no network" in capsys.readouterr().err
    assert cli("task=export", "run_dir=run", "task.push=me/vae") == 1
    assert "task.push needs format=hub" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli("task=export", "run_dir=run", "format=hub", "task.push=me/vae") == 1
    assert "pip install 'gencompare[hub]'" in capsys.readouterr().err
    with pytest.raises(UserError, match="There is no folder no/such"):
        gencompare.from_pretrained("no/such")


def test_a_foreign_record_cannot_export_other_files(cli: Cli, tmp_path: Path) -> None:
    assert cli("model=vae", *QUICK, "hydra.run.dir=run") == 0
    Path("secret.png").write_bytes((tmp_path / "run" / RunRecord.load("run").results[0].images["samples"]).read_bytes())

    def point_outside(record: RunRecord) -> None:
        for result in record.results:
            result.images["samples"] = "../secret.png"

    RunRecord.update("run", point_outside)
    assert cli("task=export", "run_dir=run", "format=hub", "task.out=out") == 0
    assert not (tmp_path / "out" / "samples.png").exists()


def test_damaged_and_foreign_folders_are_refused(cli: Cli, tmp_path: Path) -> None:
    assert cli("model=vae", *QUICK, "hydra.run.dir=run", "evaluation.checkpoints=[]") == 0
    assert cli("task=export", "run_dir=run", "format=hub", "task.out=out") == 0
    weights, config = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.json"
    right, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(right[:-100])
    with pytest.raises(UserError, match="corrupted"):
        gencompare.from_pretrained(tmp_path / "out")
    weights.write_bytes(right)
    model = json.loads(text)["model"]
    foreign = [
        "os.system", "torch.nn.Linear", "gencompare.tasks.hub.os.system", "gencompare.models.vae.torch.load",
        "gencompare.files.write_text", "torch.nn.modules.module.functools.partial",
    ]  # fmt: skip
    for target in foreign:
        executed = {"_target_": target, "_args_": [f"touch {tmp_path}/executed"]}
        for change in ({"_target_": target}, {"beta": executed}, {"optimizer": {"x": [executed]}}):
            config.write_text(json.dumps({"model": {**model, **change}}))
            with pytest.raises((UserError, TypeError)):
                gencompare.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    config.write_text("{")
    with pytest.raises(UserError, match="corrupted"):
        gencompare.from_pretrained(tmp_path / "out")
