"""Training that diverges: bad gradients are masked, and the run returns to its last good state or stops."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gencompare
from checkpoints import assert_same_training, checkpoint
from gencompare.generative_model import TrainedModel
from gencompare.records import RunRecord
from gencompare.tasks import train
from gencompare.training.divergence import DivergenceGuard
from parts import slow_if
from test_cli import QUICK, Cli, error_line

RUN = [
    *QUICK, "logger=csv", "callbacks.evaluation.num_evaluations=0", "evaluation.checkpoints=[]", "budget.steps=12",
    "callbacks.divergence.check_every_n_steps=4", "callbacks.checkpoints.every_minutes=0",
]  # fmt: skip
FAMILIES = {
    "vae": ["model=vae"], "hvae": ["model=hvae", "model.grad_skip=null"], "gan": ["model=gan"], "ebm": ["model=ebm"],
    "ddpm": ["model=ddpm"], "vdm": ["model=vdm"], "sde_ve": ["model=sde_ve"], "edm": ["model=edm"],
    "flow": ["model=flow"], "vqvae": ["model=vqvae"], "autoencoder": ["model=autoencoder"],
    "classifier": ["model=classifier"],
}  # fmt: skip


def spoil(monkeypatch: pytest.MonkeyPatch, value: float, steps: range) -> None:
    """Add ``value`` to one gradient in each of ``steps``, before the callbacks see it."""
    original = DivergenceGuard.on_before_optimizer_step

    def hook(self: DivergenceGuard, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if pl_module.clock.step in steps:
            next(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None).grad += value
        original(self, trainer, pl_module, optimizer)

    monkeypatch.setattr(DivergenceGuard, "on_before_optimizer_step", hook)


@pytest.mark.parametrize("family", slow_if({"vdm", "sde_ve", "edm", "flow", "classifier", "autoencoder"}, FAMILIES))
def test_a_gradient_that_is_not_finite_is_masked(
    family: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, math.nan, range(2, 3))
    assert cli(*FAMILIES[family], *RUN, "budget.steps=8", "hydra.run.dir=run") == 0
    record = RunRecord.load(tmp_path / "run")
    assert record.training["masked_gradients"] >= 1 and record.training["rollbacks"] == []
    assert record.state == "finished" and record.training["end"] == "budget spent"
    assert all(value.isfinite().all() for value in checkpoint(tmp_path / "run")["state_dict"].values())


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow), 0.0])
def test_a_first_gradient_that_is_bad_or_zero_does_not_mask_the_others(
    value: float, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under trainer.precision=16-mixed, the first gradients usually overflow."""
    original = DivergenceGuard.on_before_optimizer_step

    def hook(self: DivergenceGuard, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for p in pl_module.parameters():
            if p.grad is not None and pl_module.clock.step < 2:
                p.grad.fill_(value)
        original(self, trainer, pl_module, optimizer)

    monkeypatch.setattr(DivergenceGuard, "on_before_optimizer_step", hook)
    assert cli("model=ddpm", *RUN, "hydra.run.dir=run") == 0
    training = RunRecord.load(tmp_path / "run").training
    assert training["masked_gradients"] == (0 if value == 0 else 2) and training["rollbacks"] == []


def test_a_running_statistic_that_is_not_finite_is_divergence(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codebook of a VQ-VAE is a running mean, which no gradient reaches."""
    original = DivergenceGuard.on_train_batch_end

    def hook(self: DivergenceGuard, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.clock.step == 7:
            next(b for b in pl_module.buffers() if b.is_floating_point() and b.dim() == 2).view(-1)[0] = math.nan
        original(self, trainer, pl_module, *args)

    monkeypatch.setattr(DivergenceGuard, "on_train_batch_end", hook)
    assert cli("model=vqvae", *RUN, "hydra.run.dir=run") == 0
    (rollback,) = RunRecord.load(tmp_path / "run").training["rollbacks"]
    assert rollback["reason"] == "a weight is not finite" and rollback["to"] == 6
    values = checkpoint(tmp_path / "run")["state_dict"].values()
    assert all(value.isfinite().all() for value in values)


def test_the_guard_does_not_change_training_that_goes_well(cli: Cli, tmp_path: Path) -> None:
    for name, options in {"with": [], "without": ["callbacks.divergence=null"]}.items():
        overrides = [each for each in RUN if not (options and each.startswith("callbacks.divergence."))]
        assert cli("model=ddpm", *overrides, *options, f"hydra.run.dir={name}") == 0
    assert_same_training(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e8])
def test_training_returns_to_the_last_checkpoint_and_goes_on(
    value: float, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    spoil(monkeypatch, value, range(4, 9))
    assert cli("model=ddpm", *RUN, "hydra.run.dir=run") == 0
    record = RunRecord.load(tmp_path / "run")
    (rollback,) = record.training["rollbacks"]
    assert rollback == {"step": 8, "to": 7, "reason": "no gradient of the last 4 steps was usable"}
    assert record.training["masked_gradients"] == 5 and record.training["steps"] == 12
    assert "Step 8: training diverged (no gradient" in capsys.readouterr().out
    last = checkpoint(tmp_path / "run")
    rate = last["optimizer_states"][0]["param_groups"][0]["initial_lr"]
    assert rate == pytest.approx(0.5 * record.config["model"]["optimizer"]["lr"])
    curve = (tmp_path / "run" / "curve.csv").read_text()
    assert "nan" not in curve and "inf" not in curve


@pytest.mark.parametrize("model", ["vqvae", "autoencoder", "vae", "ddpm", "gan"])
def test_a_learning_rate_that_is_far_too_high_ends_training_with_the_reason(
    model: str, cli: Cli, tmp_path: Path, capsys: Any
) -> None:
    """Without the guard, vqvae and autoencoder finish at losses of 1e5 and more."""
    code = cli(f"model={model}", *RUN, "budget.steps=40", "model.optimizer.lr=1e5", "hydra.run.dir=run")
    line = error_line(capsys)
    assert code == 1 and "Training diverged at step" in line and "3 rollbacks" in line and "model.optimizer.lr" in line
    record = RunRecord.load(tmp_path / "run")
    assert record.state == "failed" and len(record.training["rollbacks"]) == 3
    assert record.training["end"].startswith("Training diverged")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if path.exists():
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["state_dict"].values())


def test_a_spike_of_the_learning_rate_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss explodes, the run returns to its start once, and ends with a lower loss than it had there."""
    build = train.build_model

    def with_spike(*args: Any) -> TrainedModel:
        model = build(*args)
        model.lr_schedule = lambda step, progress: 1e7 if step == 13 else 1.0
        return model

    monkeypatch.setattr(train, "build_model", with_spike)
    overrides = [each for each in RUN if not each.startswith("callbacks.checkpoints")]
    gencompare.train(
        gencompare.compose("model=autoencoder", *overrides, "budget.steps=40", f"hydra.run.dir={tmp_path / 'run'}")
    )
    record = RunRecord.load(tmp_path / "run")
    (rollback,) = record.training["rollbacks"]
    assert rollback["step"] == 16 and rollback["to"] == 0 and "the mean loss is" in rollback["reason"]
    losses = _column(tmp_path / "run" / "curve.csv", "train/loss")
    assert max(losses) > 1e3 and losses[-1] < losses[0] and record.state == "finished"


def _column(path: Path, name: str) -> list[float]:
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_a_resumed_run_diverges_and_recovers_like_an_uninterrupted_one(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, math.nan, range(4, 9))
    constant = "model.lr_schedule.decay=constant"  # independent of the budget, with which the parts end
    assert cli("model=ddpm", *RUN, constant, "hydra.run.dir=whole") == 0
    assert cli("model=ddpm", *RUN, constant, "budget.steps=6", "hydra.run.dir=parts") == 0
    assert cli("resume=parts", "budget.steps=10") == 0
    assert cli("resume=parts", "budget.steps=12") == 0
    whole, parts = (RunRecord.load(tmp_path / name) for name in ("whole", "parts"))
    assert whole.training["rollbacks"][0]["step"] == parts.training["rollbacks"][0]["step"] == 8
    assert whole.training["masked_gradients"] == parts.training["masked_gradients"]
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "option", ["check_every_n_steps=0", "max_rollbacks=-1", "lr_factor=1", "max_loss_growth=1", "lr_factor=.nan"]
)
def test_invalid_settings_are_refused(option: str, cli: Cli, capsys: Any) -> None:
    assert cli("model=ddpm", *RUN, f"callbacks.divergence.{option}") == 1
    assert "callbacks.divergence" in error_line(capsys)


def test_the_record_says_why_training_ended(cli: Cli, tmp_path: Path) -> None:
    overrides = [
        "model=vae", *QUICK, "budget.steps=20", "callbacks.evaluation.num_evaluations=10", "evaluation.checkpoints=[]",
        "callbacks.evaluation.num_samples=30", "callbacks.evaluation.patience=1", "model.optimizer.lr=1e-9",
        "callbacks.evaluation.num_grid_images=0",
    ]  # fmt: skip
    assert cli(*overrides, "hydra.run.dir=run") == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["training"]["end"] == "early stopping: no better evaluation" and record["training"]["steps"] < 20
