"""Training that starts from the weights of another run, the teacher."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gencompare.tasks.main import main

Cli = Callable[..., int]
QUICK = [
    "data=digits", "trainer=cpu", "logger=none", "trainer.global_batch_size=16", "budget.images=null", "budget.steps=2",
    "callbacks.evaluation.num_evaluations=0", "callbacks.progress_bar=null", "evaluation.checkpoints=[]",
    "model/network=mlp", "model.network.width=16", "model.network.depth=1",
]  # fmt: skip
STUDENTS = {"edm": "consistency", "flow": "meanflow"}
SAME_TIME = "model.parameterization.noise_conditioning.factor=999.0"  # as in model=flow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with teachers."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in STUDENTS:
            augmentation = ["model/augmentation=edm"] if name == "edm" else []
            patch.setattr(sys, "argv", ["run.py", f"model={name}", *augmentation, *QUICK, f"hydra.run.dir={name}"])
            main()
    return folder


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


@pytest.mark.parametrize("teacher", STUDENTS)
def test_a_run_starts_from_its_teacher_and_counts_its_cost(
    teacher: str, runs: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(runs)
    student = STUDENTS[teacher]
    words = [f"model={student}", *QUICK, *([SAME_TIME] if student == "meanflow" else [])]
    run = [*words, f"model.teacher.run={teacher}", "model.optimizer.lr=1e-20", f"hydra.run.dir={tmp_path}"]
    assert cli(*run) == 0
    theirs, own = checkpoint(runs / teacher)["ema"], checkpoint(tmp_path)["state_dict"]
    theirs.pop("network.conditions.augment.weight", None)
    assert not own.pop("network.conditions.interval.weight", torch.zeros(1)).abs().max() > 1e-15
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], value) for name, value in theirs.items())
    (entry,) = record(tmp_path)["training"]["dependencies"]
    cost = record(runs / teacher)["training"]
    assert (entry["role"], entry["run"]) == ("teacher", teacher)
    total = record(tmp_path)["training"]["total_cost"]
    for kind in ("images_seen", "steps", "flops"):
        assert total[kind] == record(tmp_path)["training"][kind] + cost[kind]

    # The teacher is not needed again.
    shutil.move(runs / teacher, runs / "elsewhere")
    try:
        assert cli(f"resume={tmp_path}", "budget.steps=3") == 0
        assert cli("task=sample", f"run_dir={tmp_path}", "num_images=2") == 0
        assert cli("task=evaluate", f"run_dir={tmp_path}", "evaluation.num_images=20", "evaluation=quick") == 0
    finally:
        shutil.move(runs / "elsewhere", runs / teacher)
    assert record(tmp_path)["training"]["steps"] == 3
    assert record(tmp_path)["training"]["dependencies"] == [entry]


def test_the_cost_of_the_teacher_counts_against_the_budget(
    runs: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(runs)
    limits = ["budget.steps=null", f"budget.flops={record(runs / 'edm')['training']['flops'] / 2}"]
    assert cli("model=consistency", *QUICK, *limits, "model.teacher.run=edm", "hydra.run.dir=no") == 1
    assert "the teacher (edm)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.teacher.run=nowhere"], "The teacher of this model is not at nowhere"),
        (["model.teacher.run=flow"], "was trained under RectifiedFlow, and this model has EDMSchedule"),
        (["model.teacher.run=edm", "model.schedule.sigma_max=60"], "or other settings of it"),
        (["model.teacher.run=edm", "model.parameterization.sigma_data=0.6"], "has the parameterisation"),
        (["model.teacher.run=edm", "model.network.width=20"], "has another network: 'blocks.0.first.bias' is (16,)"),
        (["model.teacher.run=edm", "model.conditional=true"], "'conditions.label.weight' is missing there"),
        (["model.teacher.run=edm", "data=toy2d"], "was trained on other images ('digits')"),
        (["model.teacher.run=edm", "model.teacher.weights=old"], "weights=old: choose ema, raw"),
    ],
)
def test_other_teachers_are_refused(
    words: list[str], message: str, runs: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(runs)
    assert cli("model=consistency", *QUICK, *words, "hydra.run.dir=refused") == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (runs / "refused" / "record.json").exists()
