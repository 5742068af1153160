"""FSDP: sharded weights train like whole ones, in checkpoints that any number of processes can resume."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor

from composing import compose
from forking import in_processes, needs_fork
from gencompare.evaluation.sampling import draw_samples
from gencompare.models.diffusion import Diffusion
from gencompare.sharding import gathered_weights, local_tensor, total_norm
from gencompare.tasks.runs.build import build_data, build_model, build_trainer
from gencompare.tensor_files import read_tensors
from gencompare.training.budget import Budget
from gencompare.training.clock import TrainingClock
from gencompare.training.divergence import DivergenceGuard
from gencompare.training.ema import EMA
from gencompare.training.posthoc_ema import PosthocEMA
from parts import slow_if
from test_cli import QUICK, Cli, error_line
from test_same_weights import UNET

MODELS = {
    "unet": ["model=ddpm", "model.grad_clip=1.0", *UNET],
    "dit, a learned schedule and micro-batches": [
        "model=vdm", "model/network=dit", "model.network.depth=2", "model.network.hidden_size=32",
        "model.network.num_heads=2", "model.schedule.num_features=8", "model.grad_clip=0.1",
        "trainer.num_micro_batches=2",
    ],
}  # fmt: skip
"""Adam turns rounding errors in gradients near zero into whole steps, so that a few steps must suffice."""
STEPS = 4
TOLERANCE = 1e-6


def fit(name: str, strategy: str, steps: int, folder: Path, resumed: Path | None = None) -> tuple[Trainer, Diffusion]:
    cfg = compose(
        *MODELS[name], f"trainer={strategy}", "trainer.accelerator=cpu", "data=digits", "trainer.global_batch_size=8",
        "model.lr_schedule.warmup_steps=2",
    )  # fmt: skip
    data = build_data(cfg)
    model = build_model(cfg, data)
    assert isinstance(model, Diffusion)
    callbacks = {
        "clock": TrainingClock(0, 8, Budget(steps=steps)),
        "ema": EMA(0.5),
        "posthoc_ema": PosthocEMA(folder / strategy, lengths=[0.1], num_snapshots=2),
        "guard": DivergenceGuard(folder / "none"),
    }
    trainer = build_trainer(cfg, model, callbacks, [], folder)  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data, ckpt_path=resumed, weights_only=True if resumed else None)
    trainer.save_checkpoint(folder / f"{strategy}_{steps}.ckpt")
    return trainer, model


def train_both(rank: int, world: int, name: str, folder: Path) -> dict[str, Tensor]:
    """Train with DDP, then with FSDP, each resumed from half the steps. Return what this process has in the end."""
    os.environ["LOCAL_RANK"] = str(rank)
    for strategy in ("ddp", "fsdp"):
        fit(name, strategy, STEPS // 2, folder)
        _, model = fit(name, strategy, STEPS, folder, resumed=folder / f"{strategy}_{STEPS // 2}.ckpt")
    assert model.is_sharded
    parts = [local_tensor(parameter).numel() for parameter in model.network.parameters()]
    with gathered_weights(model):
        # 3 chunks for 2 processes: one calls the network twice as often as the other.
        images = draw_samples(model, 5, chunk_size=2).images
    norm = total_norm(model.parameters())
    return {"local": torch.tensor(sum(parts)), "images": images, "norm": norm.detach()}


def states(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    (optimizer,) = content["optimizer_states"]
    moments = {f"{key}.{name}": value for key, state in optimizer["state"].items() for name, value in state.items()}
    averages = {"ema": content["ema"], **content["posthoc_ema"]["averages"]}
    averages = {f"{length}.{key}": value for length, average in averages.items() for key, value in average.items()}
    return {**content["state_dict"], **averages, **moments}


@needs_fork
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", slow_if({"unet"}, MODELS))
def test_sharded_weights_train_like_whole_ones(name: str, tmp_path: Path) -> None:
    first, second = in_processes(2, tmp_path, train_both, name, tmp_path)
    whole, sharded = states(tmp_path / f"ddp_{STEPS}.ckpt"), states(tmp_path / f"fsdp_{STEPS}.ckpt")
    assert whole.keys() == sharded.keys()
    for key, value in whole.items():
        torch.testing.assert_close(sharded[key], value, rtol=TOLERANCE, atol=TOLERANCE, msg=key)
    whole_snapshots, sharded_snapshots = (
        sorted((tmp_path / each / "posthoc_ema").iterdir()) for each in ("ddp", "fsdp")
    )
    assert [path.name for path in whole_snapshots] == [path.name for path in sharded_snapshots]
    for one, two in zip(whole_snapshots, sharded_snapshots, strict=True):
        torch.testing.assert_close(read_tensors(one), read_tensors(two), rtol=1e-3, atol=TOLERANCE)  # float16
    weights = sum(value.numel() for key, value in whole.items() if key.startswith("network."))
    assert int(first["local"] + second["local"]) == weights
    assert abs(int(first["local"]) - int(second["local"])) < 0.2 * weights
    assert torch.equal(first["images"], second["images"])
    content = torch.load(tmp_path / f"fsdp_{STEPS}.ckpt", weights_only=True)["state_dict"]
    expected = torch.linalg.vector_norm(
        torch.stack([value.norm() for key, value in content.items() if key.startswith(("network.", "schedule."))])
    )
    torch.testing.assert_close(first["norm"], expected)


@pytest.mark.parametrize("model", ["vae", "gan", "ebm"])
def test_models_without_blocks_are_refused(cli: Cli, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(*QUICK, f"model={model}", "trainer=fsdp", "budget.steps=2", "hydra.run.dir=run") == 1
    assert "use trainer=ddp" in error_line(capsys)
    assert not Path("run").exists()
