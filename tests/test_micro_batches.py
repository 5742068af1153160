"""Micro-batches save memory in training, and train the same weights as whole batches."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from pytorch_lightning import seed_everything
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import test_same_weights
from composing import compose
from gencompare.batch_splitting import micro_batches
from gencompare.models.diffusion import Diffusion
from gencompare.tasks.runs.build import build_data, build_model
from test_cli import QUICK, Cli, error_line

STEPS = 3


def trained_weights(name: str, parts: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Train a family of test_same_weights in float64, with batches of 8 in ``parts`` parts."""
    config = test_same_weights.config(name, 1).copy()
    config.trainer.num_micro_batches = parts
    monkeypatch.setattr(test_same_weights, "config", lambda name, world: config)
    seed_everything(0)
    return test_same_weights.fit(name, 1, STEPS, folder, {}).state_dict()


@pytest.mark.parametrize("name", ["vae", "tarflow", "ddpm", "vdm", "edm", "flow with optimal transport"])
def test_micro_batches_train_the_same_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (trained_weights(name, parts, tmp_path, monkeypatch) for parts in (1, 3))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-9, atol=1e-12, msg=key)


class Layers(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())))


def saved_rows(network: nn.Module, x: Tensor, parts: int) -> tuple[int, Tensor]:
    """Return the number of rows of activations that the backward pass keeps, and the gradient of the first weight."""
    kept = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal kept
        kept += len(value) if value.shape[-1:] == (16,) and len(value) != 16 else 0
        return value

    network.zero_grad()
    with saved_tensors_hooks(pack, lambda value: value), micro_batches([network], parts):
        loss = network(x).square().sum()
    loss.backward()
    (gradient, *_) = (parameter.grad for parameter in network.parameters())
    assert gradient is not None
    return kept, gradient.clone()


def test_only_the_last_part_keeps_its_activations() -> None:
    torch.manual_seed(0)
    network, x = Layers().double(), torch.randn(120, 16, dtype=torch.float64)
    whole, expected = saved_rows(network, x, 1)
    parts, gradient = saved_rows(network, x, 4)
    assert 0 < parts < 0.5 * whole, (parts, whole)
    torch.testing.assert_close(gradient, expected)
    assert "forward" not in network.__dict__


def test_the_network_of_a_step_gets_parts_and_the_record_the_same_loss(cli: Cli, tmp_path: Path) -> None:
    rows: list[int] = []
    cfg = compose("model=ddpm", "data=digits", "model/network=mlp", "trainer.num_micro_batches=3")
    model = build_model(cfg, build_data(cfg))
    assert isinstance(model, Diffusion)
    model.num_micro_batches = 3
    model.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    inner = model.network.forward
    model.network.forward = lambda *args, **kwargs: rows.append(len(args[0])) or inner(*args, **kwargs)  # type: ignore
    model.training_step(torch.zeros(10, *model.spec.shape), 0)["loss"].backward()
    assert rows == [10, 4, 4, 2, 4, 4], "the whole batch, its parts, and the parts computed again"
    quick = [*QUICK, "model=vae", "budget.steps=2", "evaluation.checkpoints=[]"]
    for parts in (1, 2):
        assert cli(*quick, f"trainer.num_micro_batches={parts}", f"hydra.run.dir={parts}") == 0
    one, two = (next(csv.DictReader((tmp_path / folder / "curve.csv").open())) for folder in "12")
    assert float(one["train/loss"]) == pytest.approx(float(two["train/loss"]), rel=1e-5)


@pytest.mark.parametrize("model", ["gan", "ebm", "hvae", "glow", "vqvae"])
def test_models_that_cannot_split_a_batch_are_refused(cli: Cli, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(*QUICK, f"model={model}", "budget.steps=2", "trainer.num_micro_batches=2", "hydra.run.dir=run") == 1
    assert "Lower trainer.global_batch_size instead" in error_line(capsys)
    assert not Path("run").exists()


def test_the_number_of_parts_is_checked(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(*QUICK, "model=vae", "budget.steps=2", "trainer.num_micro_batches=0", "hydra.run.dir=run") == 1
    assert "trainer.num_micro_batches=0 must be at least 1" in error_line(capsys)
