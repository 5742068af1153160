"""The progress bar: loss, images a second, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from gencompare.training.clock import clock_of
from gencompare.training.loggers import MetricLogger

LINE_SECONDS = 15
"""Without a terminal, a plain line is printed once in so many seconds."""


class TrainingProgressBar(Callback):
    """A bar on a terminal, plain lines elsewhere; only the first process prints."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._printed = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._printed = time.monotonic()
        self._began = (time.monotonic(), clock_of(trainer).progress)
        if not trainer.is_global_zero or not sys.stdout.isatty():
            return
        self._bar = Progress(
            TextColumn("[bold]training"), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"),
            TimeElapsedColumn(), console=Console(), refresh_per_second=4,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=1.0)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=clock_of(trainer).progress, description=self.text(trainer))
        elif trainer.is_global_zero and time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            print(f"training {clock_of(trainer).progress:4.0%}  {self.text(trainer)}", flush=True)

    def text(self, trainer: pl.Trainer) -> str:
        clock = clock_of(trainer)
        curve = next(c for c in trainer.callbacks if isinstance(c, MetricLogger))  # type: ignore[attr-defined]
        losses = [
            f"{name.removeprefix('train/')} {value:.4g}" for name, value in curve.latest.items() if "loss" in name
        ]
        speed = curve.latest.get("train/images_per_second")
        began, share = self._began
        left = (time.monotonic() - began) / max(clock.progress - share, 1e-9) * (1 - clock.progress)
        parts = [f"step {clock.step}", *losses, f"{speed:,.0f} images/s" if speed else "", f"{_clock(left)} left"]
        return "  ".join(part for part in parts if part)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
