"""What is logged while a model trains: running means of the losses, speed, learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor
from torchmetrics import MeanMetric

from gencompare.errors import TrainingStopped, UserError
from gencompare.training.clock import clock_of


class Curve(Callback):
    """Logs the mean of every figure that ``training_step`` returned over the last ``every`` steps.

    The means stay on the device and are read (and averaged over processes) once in ``every`` steps, so that the
    training step never waits for the host. A mean that is not finite ends the run: the weights can no longer be right.
    A model that may leave a step out, which it waits for the device to decide, says so by a figure ``skipped`` of 1:
    that is all that such a step tells.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise UserError(f"callbacks.curve.every={every}: give at least 1 step.")
        self.every = every
        self.latest: dict[str, float] = {}
        """The last figures logged, for the progress bar."""
        self._means: dict[str, MeanMetric] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._means = {}
        clock = clock_of(trainer)
        self._mark = (clock.seconds, clock.images)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        figures = {name: value.detach() for name, value in (outputs or {}).items() if isinstance(value, Tensor)}
        if figures.get("skipped", 0) > 0:
            figures = {"skipped": figures["skipped"]}
        for name, value in figures.items():
            if name not in self._means:
                # A NaN must show, so it is neither skipped nor warned of (a check would wait for the device).
                self._means[name] = MeanMetric(nan_strategy="disable").to(pl_module.device)
            self._means[name].update(value)
        clock = clock_of(trainer)
        if clock.step % self.every == 0 or trainer.should_stop:
            self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        clock = clock_of(trainer)
        # A step that was undone or left out tells less than others, alike in all processes.
        told = {name: mean for name, mean in self._means.items() if mean.update_called}
        figures = {f"train/{name}": float(mean.compute()) for name, mean in told.items()}
        for mean in self._means.values():
            mean.reset()
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise not_finite(bad[0], clock.step)
        seconds, images = self._mark
        if clock.seconds > seconds:
            figures["train/images_per_second"] = (clock.images - images) / (clock.seconds - seconds)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if groups:
            figures["train/lr"] = groups[0]["lr"]
        self._mark = (clock.seconds, clock.images)
        self.latest = figures
        log_figures(trainer, figures)


def not_finite(name: str, step: int) -> TrainingStopped:
    """The error that ends a run whose figures or weights can no longer be right."""
    return TrainingStopped(
        f"{name} is not finite at step {step}", "Try a lower learning rate (model.optimizer.lr) or model.grad_clip."
    )


def check_weights(model: pl.LightningModule, step: int) -> None:
    """Raises `TrainingStopped` where a weight is no longer finite."""
    norms = torch._foreach_norm([p.detach() for p in model.parameters()])  # type: ignore[attr-defined]
    if not torch.isfinite(torch.stack(norms)).all():
        raise not_finite("a weight", step)


def log_figures(trainer: pl.Trainer, figures: dict[str, float]) -> None:
    """Send figures to every logger, with the clock's step, images and seconds."""
    clock = clock_of(trainer)
    row = {**figures, "images": clock.images, "seconds": round(clock.seconds, 3)}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=clock.step)
