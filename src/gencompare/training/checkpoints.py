"""Checkpoints that appear whole or not at all, and are read without unpickling code."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO

from gencompare.errors import TrainingStopped, UserError
from gencompare.files import atomic
from gencompare.generative_model import TrainedModel
from gencompare.migrations import migrate_checkpoint
from gencompare.training.clock import clock_of
from gencompare.training.evaluation_callback import EvaluationCallback
from gencompare.training.loggers import check_weights


class Checkpoints(Callback):
    """Keeps ``last.ckpt`` (at least every ``every_minutes``, at every look and at the end) and ``best.ckpt``.

    ``best`` is the look with the lowest preview distance, which is measured on validation images only.
    It stands last among the callbacks, so that what it saves is a finished step. A model that is `doubtful` is saved at
    the end of the budget alone, or where training is stopped before anything else was.
    """

    CHECK_STEPS = 20
    """The time is looked at once in so many steps, since the processes must agree on it."""

    def __init__(self, folder: Path, every_minutes: float = 2.0) -> None:
        if every_minutes < 0:
            raise UserError(f"callbacks.checkpoints.every_minutes={every_minutes} cannot be negative.")
        self.folder, self.every_minutes = folder, every_minutes
        self._since = time.monotonic()
        self._looks_done = 0
        self.saved: int | None = None
        """The step that ``last.ckpt`` is of."""

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.folder / "best.ckpt"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()
        looks = _callback(trainer)
        self._looks_done = looks.done if looks else 0
        self.saved = clock_of(trainer).step or None  # of a run that is resumed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        looks = _callback(trainer)
        looked = looks is not None and looks.done > self._looks_done
        due = looked or trainer.should_stop or self._time_is_up(trainer)
        if due and not self._waits(trainer, pl_module):
            if looks is not None and looked and looks.improved:
                self._save(trainer, pl_module, self.best)
            self._save(trainer, pl_module, self.last)
            self._since, self.saved = time.monotonic(), clock_of(trainer).step
            clock_of(trainer).pause()
        if looks is not None:
            self._looks_done = looks.done

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, TrainingStopped):
            exception.kept = self.last.exists()

    def _waits(self, trainer: pl.Trainer, model: pl.LightningModule) -> bool:
        assert isinstance(model, TrainedModel)
        only = trainer.should_stop and self.saved is None
        return model.doubtful and not only and clock_of(trainer).progress < 1

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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints under a temporary name first, synced and renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # Through memory: torch hides a full disk behind an error of its own.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic(path) as file:
            file.write(buffer.getbuffer())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return migrate_checkpoint(super().load_checkpoint(path, *args, **kwargs))


def _callback(trainer: pl.Trainer) -> EvaluationCallback | None:
    return next((c for c in trainer.callbacks if isinstance(c, EvaluationCallback)), None)  # type: ignore[attr-defined]
