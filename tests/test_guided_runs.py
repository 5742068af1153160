"""Guidance of trained runs from the command line, which affects only sampling."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from composing import compose
from gencompare.tasks.main import main
from gencompare.tasks.runs.build import build_data, build_model
from parts import assert_same_state

Cli = Callable[..., int]
QUICK = [
    "data=digits", "trainer=cpu", "logger=none", "trainer.global_batch_size=16", "budget.images=null", "budget.steps=2",
    "callbacks.evaluation.num_evaluations=0", "callbacks.progress_bar=null", "evaluation.num_images=100",
    "evaluation.extractors=[classifier]", "evaluation.protocol.num_likelihood_images=20",
    "evaluation.checkpoints=[]",
]  # fmt: skip
SMALL = ["model/network=mlp", "model.network.width=16", "model/sampler=ddim", "model.sampler.num_steps=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs ``conditional``, ``unconditional`` and ``classifier``."""
    folder = tmp_path_factory.mktemp("runs")
    conditional = ["model.conditional=true", "model.label_dropout=0.1"]
    commands = {"conditional": [*SMALL, *conditional], "unconditional": SMALL, "classifier": ["model=noisy_classifier"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("HYDRA_FULL_ERROR", "GENCOMPARE_FULL_ERROR"):
            patch.setenv(name, "0")
        for name, words in commands.items():
            patch.setattr(sys, "argv", ["run.py", *words, *QUICK, f"hydra.run.dir={name}"])
            main()
    return folder


def weights(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_every_guidance_can_be_chosen_at_evaluation(runs: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    before, config = weights(runs / "conditional"), (runs / "conditional" / "config.yaml").read_text()
    for words, nfe, said in (
        (["model/guidance=classifier_free", "model.guidance.scale=3"], {"network": 8}, "ClassifierFree, scale 3"),
        (
            ["model/guidance=classifier", "model.guidance.classifier.run=classifier"],
            {"network": 4, "classifier": 4},
            "ClassifierGuidance with classifier (last, ema), scale 1",
        ),
        (
            ["model/guidance=auto", "model.guidance.weak.run=unconditional", "model.guidance.weak.weights=raw"],
            {"network": 4, "weak": 4},
            "AutoGuidance with unconditional (last, raw), scale 2",
        ),
    ):
        assert cli("task=evaluate", "run_dir=conditional", *words) == 0
        generation = json.loads((runs / "conditional" / "record.json").read_text())["results"][-1]["generation"]
        assert generation["nfe"] == nfe and said in generation["sampler"]
    after = weights(runs / "conditional")
    assert before["state_dict"].keys() == after["state_dict"].keys()
    assert all(torch.equal(value, after["state_dict"][name]) for name, value in before["state_dict"].items())
    assert (runs / "conditional" / "config.yaml").read_text() == config
    assert len(json.loads((runs / "conditional" / "record.json").read_text())["results"]) == 3


def test_classifier_makes_an_unconditional_run_conditional(
    runs: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    words = [
        "task=evaluate",
        "run_dir=unconditional",
        "model/guidance=classifier",
        "model.guidance.classifier.run=classifier",
    ]
    assert cli(*words) == 0
    (result,) = json.loads((runs / "unconditional" / "record.json").read_text())["results"]
    assert result["measurement"]["conditioning"] == "labels"
    assert result["generation"]["nfe"] == {"network": 4, "classifier": 4}


def test_guide_is_not_part_of_the_trained_model(
    runs: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(runs)
    guided = ["model/guidance=auto", f"model.guidance.weak.run={runs / 'unconditional'}"]
    assert cli(*SMALL, *QUICK, *guided, "hydra.run.dir=guided") == 0
    plain, own = weights(runs / "unconditional"), weights(runs / "guided")
    for part in ("state_dict", "ema"):
        assert plain[part].keys() == own[part].keys()
        # A guide does not change the initial weights or the training noise either.
        assert all(torch.equal(value, own[part][name]) for name, value in plain[part].items())
    assert cli("task=sample", "run_dir=guided", "num_images=2") == 0
    # The stored config names the guide; a missing one is reported.
    shutil.move(runs / "unconditional", runs / "elsewhere")
    try:
        assert cli("task=sample", "run_dir=guided", "num_images=2") == 1
        assert "The run that guides this model is not at" in capsys.readouterr().err
        assert cli("task=sample", "run_dir=guided", "num_images=2", "model.guidance.weak.run=elsewhere") == 0
        assert cli("task=sample", "run_dir=guided", "num_images=2", "~model/guidance") == 0
    finally:
        shutil.move(runs / "elsewhere", runs / "unconditional")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model/guidance=classifier_free"], "Classifier-free guidance needs a conditional model"),
        (["model/guidance=classifier_free", "model.conditional=true"], "label_dropout=0.1"),
        (["model/guidance=classifier"], "needs the folder of another trained run"),
        (["model/guidance=auto", "model.guidance.weak.run=nowhere"], "is not at nowhere"),
        (["model.label_dropout=0.1"], "needs labels"),
        (["model/guidance=classifier_free", "model.guidance.scale=-1"], "must be finite and at least 0"),
        (["model/guidance=classifier_free", "model.guidance.scale=.nan"], "guidance.scale=.nan must be a number"),
        (
            ["model/guidance=classifier_free", "model.guidance.interval=[low,3]"],
            "guidance.interval=['low', 3] must be a list of numbers",
        ),
    ],
)
def test_invalid_guidance_is_reported_before_training(words: list[str], message: str, cli: Cli, capsys: Any) -> None:
    assert cli(*SMALL, *QUICK, *words, "hydra.run.dir=bad") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("bad", "record.json").exists()


def test_guides_of_another_schedule_or_data_are_rejected(
    runs: Path, cli: Cli, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    guided = [*SMALL, *QUICK, "model/guidance=classifier", "model.guidance.classifier.run=classifier"]
    assert cli(*guided, "model/schedule=linear", "hydra.run.dir=bad") == 1
    assert "under a different noise schedule (CosineBetas)" in capsys.readouterr().err
    assert cli(*guided, "data=toy2d", "hydra.run.dir=bad") == 1
    assert "image shape or number of classes differs" in capsys.readouterr().err
    towards = [*SMALL, *QUICK, "model/guidance=auto", "model.guidance.weak.run=conditional"]
    assert cli(*towards, "hydra.run.dir=bad") == 1
    assert "weak needs a class for each image" in capsys.readouterr().err


def test_initial_weights_do_not_depend_on_the_guide(runs: Path) -> None:
    plain, guided = (
        build_model(cfg, build_data(cfg))
        for cfg in (
            compose(*SMALL, *QUICK),
            compose(*SMALL, *QUICK, "model/guidance=auto", f"model.guidance.weak.run={runs / 'unconditional'}"),
        )
    )
    assert_same_state(plain, guided)
