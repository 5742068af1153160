"""Stopping on a signal without losing the step in hand."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from gencompare.training.clock import clock_of

CHECK_STEPS = 10
"""Several processes ask each other once in so many steps whether one of them was told to stop."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop(Callback):
    """Ctrl-C and SIGTERM end training after the step in progress, so that a finished step is saved; a second one kills.

    The callback that saves checkpoints acts later in the same step.
    """

    order = 4

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that ended training."""
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not sooner: Lightning sets a handler of its own before this hook, which ends training in the middle of a step.
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            signal.raise_signal(number)
        self.received = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1:
            stop = self.received is not None
        elif clock_of(trainer).step % CHECK_STEPS:
            return
        else:
            # One process was told, so all stop after the same step. Asking makes the host wait for the device.
            stop = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        if stop:
            self.received = self.received or signal.SIGTERM
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
