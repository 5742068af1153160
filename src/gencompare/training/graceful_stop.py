"""A callback that stops training on a signal, at the end of a step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from gencompare.training.clock import clock_of

CHECK_STEPS = 10
"""Steps between checks for a signal on any rank, if there are several."""
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which SLURM announces the end of a job (``#SBATCH --signal``); submitit uses the second one."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, *REQUEUE_SIGNALS)


class GracefulStop(Callback):
    """Ends training at the end of a step on Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2, so that `Checkpoints` saves that step.

    Training ends after the current step or, with several processes, at the next step divisible by `CHECK_STEPS`. A
    second signal ends the process at once.

    Lightning's own handlers raise an exception in the middle of a step.
    """

    order = 4

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that ended training."""
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning sets its own handlers before this hook.
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
            # All ranks stop after the same step. Not at every step, because this synchronises host and device.
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
