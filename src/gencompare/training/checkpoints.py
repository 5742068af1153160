"""Checkpoints that appear whole or not at all, and are read without unpickling code."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from gencompare.errors import TrainingStopped, UserError
from gencompare.generative_model import TrainedModel
from gencompare.training.clock import clock_of
from gencompare.training.loggers import check_weights


class Checkpoints(Callback):
    """Saves ``last.ckpt`` (every ``every_minutes``, at each evaluation and at the end) and ``best.ckpt``.

    ``best`` is the evaluation with the lowest distance to the validation images. A model that is
    `possibly_collapsed` is saved only at the end of the budget, or when training stops before any checkpoint exists.
    """

    order = 9
    """Saves a step that all other callbacks have finished."""

    CHECK_STEPS = 20
    """Steps between checks of the time, on which all ranks must agree."""

    def __init__(self, folder: Path, every_minutes: float = 2.0) -> None:
        if every_minutes < 0:
            raise UserError(f"callbacks.checkpoints.every_minutes={every_minutes} cannot be negative.")
        self.folder, self.every_minutes = folder, every_minutes
        self._since = time.monotonic()
        self.saved: int | None = None
        """The step of ``last.ckpt``."""

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.folder / "best.ckpt"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()
        self.saved = clock_of(trainer).step or None  # of a run that is resumed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clock = clock_of(trainer)
        due = clock.evaluated_at == clock.step or trainer.should_stop or self._time_is_up(trainer)
        if due and not self._waits(trainer, pl_module):
            if clock.best_at == clock.step:
                self._save(trainer, pl_module, self.best)
            self._save(trainer, pl_module, self.last)
            self._since, self.saved = time.monotonic(), clock.step
            clock.pause()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, TrainingStopped):
            exception.checkpoint_saved = self.last.exists()

    def _waits(self, trainer: pl.Trainer, model: pl.LightningModule) -> bool:
        assert isinstance(model, TrainedModel)
        only = trainer.should_stop and self.saved is None
        return model.possibly_collapsed and not only and clock_of(trainer).progress < 1

    @staticmethod
    def _save(trainer: pl.Trainer, model: pl.LightningModule, path: Path) -> None:
        """Save, unless the weights are no longer finite: the last good checkpoint must stay."""
        check_weights(model, clock_of(trainer).step)
        trainer.save_checkpoint(path)

    def _time_is_up(self, trainer: pl.Trainer) -> bool:
        if self.every_minutes > 0 and clock_of(trainer).step % self.CHECK_STEPS:
            return False
        due = time.monotonic() - self._since >= 60 * self.every_minutes
        return bool(trainer.strategy.broadcast(due, src=0)) if trainer.world_size > 1 else due
