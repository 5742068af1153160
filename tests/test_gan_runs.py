"""GAN runs: a resumed run equals an uninterrupted one, and a diverging run is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from composing import compose
from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.tasks.runs.build import build_callbacks, build_data, build_model, build_trainer


def run(
    folder: Path, *overrides: str, until: int = 30, resume: bool = False, rate: Callable[..., float] | None = None
) -> tuple[pl.Trainer, TrainedModel]:
    """Train a small GAN on digits to the end of its budget or to step ``until``, or ``resume`` it from there."""

    class StopAt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop |= trainer.callbacks[0].step == until

    cfg = compose(
        "model=gan", "data=digits", "trainer=cpu", "trainer.global_batch_size=8", "budget.images=null",
        "budget.steps=30", "callbacks.evaluation.num_evaluations=0", "callbacks.progress_bar=null",
        "callbacks.metric_logger.log_every_n_steps=1",
        "callbacks.checkpoints.every_minutes=0", "model.generator.channels=8", "model.discriminator.channels=8",
        *overrides,
    )  # fmt: skip
    data = build_data(cfg)
    model = build_model(cfg, data)
    model.lr_schedule = rate
    callbacks = build_callbacks(cfg, model, data, None, folder)
    callbacks = {"clock": callbacks.pop("clock"), "stop": StopAt(), **callbacks}
    trainer = build_trainer(cfg, model, callbacks, [], folder)
    path = folder / "checkpoints" / "last.ckpt" if resume else None
    trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True if resume else None)
    return trainer, model


def test_a_resumed_gan_equals_an_uninterrupted_one_exactly(tmp_path: Path) -> None:
    """The run is stopped between two adjustments of the augmentation strength, with a penalty weight on a ramp."""
    overrides = [
        "model.conditional=true", "model.spectral_norm=true", "model.d_steps=2", "model/penalty=[r1,r2]",
        "model/adversarial=relativistic", "model/discriminator_augmentation=ada", "budget.steps=5",
        "model.discriminator_augmentation.adjustment_images=100", "model.discriminator_augmentation.target=-0.9",
        "model.penalty.r2.weight={_target_: gencompare.models.gan_penalties.CosineRamp, start: 1.0, end: 0.1,"
        " num_images: 60}",
    ]  # fmt: skip
    _, whole = run(tmp_path / "whole", *overrides)
    trainer, _ = run(tmp_path / "broken", *overrides, until=3)
    assert trainer.callbacks[0].step == 3  # type: ignore[attr-defined]
    trainer, resumed = run(tmp_path / "broken", *overrides, resume=True)
    assert trainer.callbacks[0].step == 5  # type: ignore[attr-defined]
    state = whole.state_dict()
    assert int(state["seen"]) == 40 and state["augmentation.strength"] > 0 and state["augmentation.steps"] == 2
    for name, value in state.items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    "overrides",
    [[], ["callbacks.metric_logger.log_every_n_steps=100", "callbacks.evaluation.num_evaluations=30"]],
    ids=["loss", "evaluation"],
)
def test_a_diverging_gan_is_stopped_and_keeps_its_checkpoint(overrides: list[str], tmp_path: Path) -> None:
    """The learning rate explodes after the fourth step. Lower ones do not help, and the checkpoint is finite."""
    with pytest.raises(
        UserError,
        match=r"a weight is not finite, after 3 rollbacks.*; the last good checkpoint is kept",
    ):
        run(tmp_path, *overrides, rate=lambda step, progress: 1.0 if step < 4 else 1e30)
    stored: dict[str, Any] = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert 4 <= stored["callbacks"]["TrainingClock"]["step"] < 10
    assert all(value.isfinite().all() for value in stored["state_dict"].values())


def test_divergence_before_the_first_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"at step \d+: a weight is not finite. Training was stopped; no checkpoint had been saved"
    ):
        run(tmp_path, "callbacks.checkpoints.every_minutes=60", rate=lambda step, progress: 1e30)
    assert not (tmp_path / "checkpoints").exists()
