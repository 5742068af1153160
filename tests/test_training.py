"""Laws of training: a step depends only on the seed and its index, and not on processes, interruptions or
evaluations."""

from __future__ import annotations

import errno
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.generative_model import Cond, GenerativeModel
from gencompare.rng import RandomSource, derive_seed
from gencompare.training.budget import Budget
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from gencompare.training.evaluation_callback import EvaluationCallback
from gencompare.training.learning_rate import LearningRateScheduler, WarmupDecay
from gencompare.training.lightning_plugins import AtomicCheckpointIO
from gencompare.training.loggers import MetricLogger


class Affine(GenerativeModel):
    """A small model, x ~ mean + noise, with dropout, which uses the global generator."""

    def __init__(self, data: Digits, **options: Any) -> None:
        options.setdefault("optimizer", lambda p: torch.optim.SGD(p, lr=0.1))
        super().__init__(data.spec, **options)
        self.mean = nn.Parameter(torch.zeros(data.spec.shape))
        self.dropout = nn.Dropout(0.5)
        self.noises: list[Tensor] = []

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        noise = rng.normal(x.shape[1:])
        if self.training:
            self.noises.append(noise)
        error = self.dropout(x + 0.1 * noise - self.mean)
        return {"loss": error.square().flatten(1).mean(1)}

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        return (self.mean + torch.randn(n, *self.spec.shape, generator=generator)).clamp(-1, 1)


def train(
    folder: Path, *, steps: int, until: int | None = None, resume: bool = False, evaluations: int = 0, **options: Any
) -> tuple[Affine, list[Any]]:
    """Train for a budget of ``steps`` but stop after step ``until``, or ``resume`` from the checkpoint in
    ``folder``."""

    class StopAt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if until is not None and trainer.callbacks[0].step == until:
                trainer.should_stop = True

    torch.manual_seed(0)
    data = Digits(batch_size=32, seed=3)
    model = Affine(data, **options)
    evaluation = EvaluationCallback(
        num_evaluations=evaluations, num_grid_images=4, num_val_images=100, num_samples=0, protocol=None, data=data,
        folder=folder, seed=0,
    )  # fmt: skip
    optional = [evaluation] if evaluations else []
    callbacks = [
        TrainingClock(5, 32, Budget(steps=steps)), LearningRateScheduler(), EMA(0.9), StopAt(), MetricLogger(2),
        *optional,
        Checkpoints(folder),
    ]  # fmt: skip
    trainer = pl.Trainer(
        callbacks=callbacks, plugins=[AtomicCheckpointIO()], logger=False, max_epochs=-1, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=resume or None)
    return model, callbacks


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, whole_callbacks = train(tmp_path / "whole", steps=40)
    train(tmp_path / "resumed", steps=40, until=17)
    resumed, callbacks = train(tmp_path / "resumed", steps=40, resume=True)
    assert callbacks[0].step == 40 and len(resumed.noises) == 23
    assert torch.equal(whole.mean, resumed.mean)
    assert torch.equal(whole_callbacks[2].average["mean"], callbacks[2].average["mean"])


def test_a_resumed_run_uses_a_new_learning_rate(tmp_path: Path) -> None:
    train(tmp_path, steps=10, until=5)
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["mean"]
    resumed, _ = train(tmp_path, steps=10, resume=True, optimizer=lambda p: torch.optim.SGD(p, lr=1e-30))
    assert torch.equal(resumed.mean, before)


def test_a_raised_budget_adds_evaluations(tmp_path: Path) -> None:
    train(tmp_path, steps=10, evaluations=2)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
    train(tmp_path, steps=20, evaluations=2, resume=True)
    assert sorted(p.stem for p in (tmp_path / "samples").glob("*.png")) == [f"step_{k:08d}" for k in (5, 10, 20)]


def test_training_time_counts_every_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock's time excludes only evaluations and checkpoints."""
    original = MetricLogger.on_train_batch_end

    def slow(self: MetricLogger, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.05)
        original(self, *args, **kwargs)

    monkeypatch.setattr(MetricLogger, "on_train_batch_end", slow)
    _, callbacks = train(tmp_path, steps=10)
    assert callbacks[0].seconds > 9 * 0.05


def test_a_full_disk_is_named_when_a_checkpoint_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on the disk"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_evaluations_do_not_change_training(tmp_path: Path) -> None:
    plain, _ = train(tmp_path / "plain", steps=12)
    evaluated, callbacks = train(tmp_path / "evaluated", steps=12, evaluations=4)
    assert torch.equal(plain.mean, evaluated.mean)
    callback = next(c for c in callbacks if isinstance(c, EvaluationCallback))
    assert callback.done == 4 and len(list((tmp_path / "evaluated" / "samples").glob("*.png"))) == 4


def test_ema_follows_its_equation_and_replaces_the_weights_temporarily(tmp_path: Path) -> None:
    weights: list[Tensor] = []

    class Record(Affine):
        def on_train_batch_end(self, *_: Any) -> None:
            weights.append(self.mean.detach().clone())

    data = Digits(batch_size=32)
    model = Record(data)
    ema = EMA(0.7)
    trainer = pl.Trainer(
        callbacks=[TrainingClock(0, 32, Budget(steps=9)), ema], logger=False, max_epochs=-1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    expected = torch.zeros(data.spec.shape)
    for s, w in enumerate(weights, start=1):
        d = min(0.7, (1 + s) / (10 + s))
        expected = d * expected + (1 - d) * w
    assert torch.allclose(ema.average["mean"], expected, atol=1e-6)
    raw = model.mean.detach().clone()
    with ema.averaged(model):
        assert torch.allclose(model.mean, expected, atol=1e-6) and not torch.allclose(model.mean, raw)
    assert torch.equal(model.mean, raw)


def test_a_non_finite_loss_ends_training_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    class Explodes(Affine):
        def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
            scale = math.nan if self.trainer.callbacks[0].step >= 6 else 1.0  # type: ignore[attr-defined]
            return {"loss": super().losses(x, cond, rng)["loss"] * scale}

    data = Digits(batch_size=32)
    trainer = pl.Trainer(
        callbacks=[TrainingClock(0, 32, Budget(steps=20)), EMA(0.5), MetricLogger(2), Checkpoints(tmp_path,
        every_minutes=0)],
        plugins=[AtomicCheckpointIO()], logger=False, max_epochs=-1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    with pytest.raises(UserError, match="is not finite at step 7"):
        trainer.fit(Explodes(data), datamodule=data)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["callbacks"]["TrainingClock"]["step"] <= 7
    assert torch.isfinite(stored["state_dict"]["mean"]).all()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_noise_does_not_depend_on_the_number_of_processes(world: int) -> None:
    whole = RandomSource.for_batch(torch.Generator().manual_seed(1), 8)
    expected = [whole.normal((3,)), whole.uniform(), whole.integers(100, (2,)), whole.stratified()]
    parts = []
    for rank in range(world):
        part = RandomSource(torch.Generator().manual_seed(1), rank * 8 // world, (rank + 1) * 8 // world, 8)
        parts.append([part.normal((3,)), part.uniform(), part.integers(100, (2,)), part.stratified()])
    for k, values in enumerate(expected):
        assert torch.equal(torch.cat([part[k] for part in parts]), values)


def test_stratified_numbers_have_one_in_each_stratum() -> None:
    u = RandomSource(torch.Generator().manual_seed(0), 0, 64, 64, torch.float64).stratified()
    assert sorted((u * 64).floor().long().tolist()) == list(range(64))


def test_derived_seeds_separate_their_parts() -> None:
    parts = [(1, 23), (12, 3), ("1", 23), (1, "23"), (123,)]
    assert len({derive_seed(*each) for each in parts}) == 5


@pytest.mark.parametrize(
    ("budget", "progress"),
    [
        (Budget(images=100), 0.5),
        (Budget(steps=20), 0.25),
        (Budget(minutes=2), 0.5),
        (Budget(images=60, steps=20), 50 / 60),
    ],
)
def test_progress_is_that_of_the_first_limit(budget: Budget, progress: float) -> None:
    assert budget.progress(images=50, step=5, seconds=60) == pytest.approx(progress)
    assert budget.progress(images=10**9, step=10**9, seconds=10**9) == 1


@pytest.mark.parametrize("options", [{}, {"images": 0}, {"steps": -1}])
def test_a_budget_without_training_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"budget"):
        Budget(**options)


def test_learning_rate_warms_up_and_decays() -> None:
    rate = WarmupDecay(warmup_steps=10, decay="cosine")
    assert rate(0, 0.0) == pytest.approx(0.1) and rate(9, 0.0) == pytest.approx(1.0)
    assert rate(500, 0.5) == pytest.approx(0.5) and rate(1000, 1.0) == pytest.approx(0.0)
    # A decay to 1/4 over 40 steps, whatever the budget: (1 + 1/4) / 2 after 20.
    rate = WarmupDecay(decay="cosine", last=0.25, decay_steps=40)
    assert [rate(step, 0.9) for step in (0, 20, 40, 900)] == pytest.approx([1.0, 0.625, 0.25, 0.25])
    assert WarmupDecay(decay="linear", last=0.2)(7, 0.5) == pytest.approx(0.6)
    with pytest.raises(UserError, match="last=2"):
        WarmupDecay(last=2.0)
    with pytest.raises(UserError, match="constant, cosine, linear or exponential"):
        WarmupDecay(decay="polynomial")
