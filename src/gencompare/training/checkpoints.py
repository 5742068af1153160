"""A callback that saves checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from gencompare.checkpoint_files import BEST, LAST, keep_earlier, remove_earlier
from gencompare.errors import DiskFullError, TrainingStopped, UserError
from gencompare.generative_model import TrainedModel
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.training.clock import clock_of
from gencompare.training.divergence import check_divergence
from gencompare.training.lightning_plugins import AtomicCheckpointIO


class Checkpoints(Callback):
    """Saves ``last.ckpt`` regularly, at evaluations and at the end, and ``best.ckpt`` at the best evaluation.

    The best evaluation has the lowest distance to the validation images. A `possibly_collapsed` model is saved only at
    the end of the budget, or when training stops before any checkpoint exists.

    Before ``last.ckpt`` is replaced, it becomes ``step_<number>.ckpt``, from which training resumes if ``last.ckpt`` is
    corrupted. The run's record, if there is one, lists that there are checkpoints, so that lost ones are noticed.

    If the disk is full, training goes on, and only a checkpoint at the end of training raises an error.

    Lightning's `ModelCheckpoint` is not used because it saves the weights in any state. Here, non-finite weights never
    replace a good checkpoint, and the time spent on saving does not count as training time.

    Args:
        dirpath: where the checkpoints are saved.
        every_minutes: time between checkpoints, in addition to those at evaluations; 0 saves after every step.
        keep_previous: number of earlier checkpoints that are kept.
    """

    order = 9
    """This callback runs after all others (see `TrainingClock.order`)."""

    CHECK_STEPS = 20
    """Steps between checks of the elapsed time, each of which synchronises the ranks."""

    def __init__(self, dirpath: Path, every_minutes: float = 2.0, keep_previous: int = 1) -> None:
        for name, value in (("every_minutes", every_minutes), ("keep_previous", keep_previous)):
            if value < 0:
                raise UserError(f"callbacks.checkpoints.{name}={value} must be at least 0.")
        self.dirpath, self.every_minutes, self.keep_previous = dirpath, every_minutes, keep_previous
        self._last_time = time.monotonic()
        self.saved: int | None = None
        """The step of ``last.ckpt``."""

    @property
    def last(self) -> Path:
        return self.dirpath / LAST

    @property
    def best(self) -> Path:
        return self.dirpath / BEST

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_time = time.monotonic()
        self.saved = clock_of(trainer).step or None  # the step that training resumes from

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clock = clock_of(trainer)
        due = clock.evaluated_at == clock.step or trainer.should_stop or self._interval_has_passed(trainer)
        if due and not self._must_wait(trainer, pl_module):
            check_divergence(trainer, pl_module)
            try:
                if clock.best_at == clock.step:
                    save_checkpoint(trainer, self.best)
                self._save_last(trainer)
            except DiskFullError as error:
                if trainer.should_stop:
                    raise
                if trainer.is_global_zero:
                    print(f"{error} Training continues without this checkpoint.", flush=True)
            self._last_time = time.monotonic()
            clock.exclude_elapsed_time()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, TrainingStopped):
            exception.checkpoint_saved = self.last.exists()

    def _must_wait(self, trainer: pl.Trainer, model: pl.LightningModule) -> bool:
        """Return whether the model may have collapsed and a later step can be saved instead."""
        assert isinstance(model, TrainedModel)
        last_chance = trainer.should_stop and self.saved is None
        return model.possibly_collapsed and not last_chance and clock_of(trainer).progress < 1

    def _save_last(self, trainer: pl.Trainer) -> None:
        step = clock_of(trainer).step
        if trainer.is_global_zero and self.keep_previous and self.saved not in (None, step):
            keep_earlier(self.dirpath, self.saved)
        save_checkpoint(trainer, self.last)
        if trainer.is_global_zero:
            remove_earlier(self.dirpath, self.keep_previous)
        folder = self.dirpath.parent
        if trainer.is_global_zero and self.saved is None and (folder / RECORD_FILE).exists():
            name = str(self.last.relative_to(folder))
            RunRecord.update(folder, lambda record: record.checkpoints.update(last=name))
        self.saved = step

    def _interval_has_passed(self, trainer: pl.Trainer) -> bool:
        if self.every_minutes > 0 and clock_of(trainer).step % self.CHECK_STEPS:
            return False
        due = time.monotonic() - self._last_time >= 60 * self.every_minutes
        return bool(trainer.strategy.broadcast(due, src=0)) if trainer.world_size > 1 else due


def save_checkpoint(trainer: pl.Trainer, path: Path) -> None:
    """Save a checkpoint. If the disk is full, raise `DiskFullError` on all ranks."""
    checkpoint_io = trainer.strategy.checkpoint_io
    if not isinstance(checkpoint_io, AtomicCheckpointIO):
        trainer.save_checkpoint(path)
        return
    with checkpoint_io.errors_deferred():
        trainer.save_checkpoint(path)
    failure = str(checkpoint_io.deferred or "")
    if trainer.world_size > 1:
        failure = trainer.strategy.broadcast(failure, src=0)
    if failure:
        raise DiskFullError(failure)
