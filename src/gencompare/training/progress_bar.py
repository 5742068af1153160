"""A progress bar with loss, throughput and remaining time."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from gencompare.training.clock import clock_of

LINE_SECONDS, BAR_SECONDS = 15, 0.5
"""Seconds between printed lines if there is no terminal, and between updates of the bar."""


class TrainingProgressBar(Callback):
    """Shows the progress of training in a terminal, or prints a line every `LINE_SECONDS` seconds; on rank 0 only.

    Lightning's progress bars count batches of an epoch, whereas here progress is measured by the budget.
    """

    order = 8

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._last_update = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_update = time.monotonic()
        clock = clock_of(trainer)
        self._start = (time.monotonic(), clock.progress, clock.images, clock.seconds, clock.flops)
        if not trainer.is_global_zero or not sys.stdout.isatty():
            return
        self._bar = Progress(
            TextColumn("[bold]training"), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.description}", markup=False), TimeElapsedColumn(),
            console=Console(), refresh_per_second=4,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=1.0)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wait = LINE_SECONDS if self._bar is None else BAR_SECONDS
        if not trainer.is_global_zero or time.monotonic() - self._last_update < wait:
            return
        self._last_update = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=clock_of(trainer).progress, description=self.describe(trainer))
        else:
            print(f"training {clock_of(trainer).progress:4.0%}  {self.describe(trainer)}", flush=True)

    def show_evaluation(self, trainer: pl.Trainer) -> None:
        """Say that training waits for an evaluation."""
        self._last_update = time.monotonic()
        if self._bar is not None:
            description = f"step {clock_of(trainer).step}  evaluating"
            self._bar.update(self._task, completed=clock_of(trainer).progress, description=description)
        elif trainer.is_global_zero:
            print(f"training {clock_of(trainer).progress:4.0%}  step {clock_of(trainer).step}  evaluating", flush=True)

    def describe(self, trainer: pl.Trainer) -> str:
        """Format the step, losses, throughput and remaining time."""
        clock = clock_of(trainer)
        # Reading a metric synchronises host and device, so this is not called at every step.
        losses = [
            f"{name.removeprefix('train/')} {float(value):.4g}"
            for name, value in trainer.callback_metrics.items()
            if name.startswith("train/") and "loss" in name
        ]
        start, progress, images, seconds, flops = self._start
        elapsed = max(clock.seconds - seconds, 1e-9)
        speed, gflops = (clock.images - images) / elapsed, (clock.flops - flops) / elapsed / 1e9
        remaining = (time.monotonic() - start) / max(clock.progress - progress, 1e-9) * (1 - clock.progress)
        parts = [
            f"step {clock.step}",
            *losses,
            f"{speed:,.0f} images/s" if speed else "",
            f"{gflops:,.{0 if gflops >= 10 else 2}f} GFLOP/s" if gflops else "",
            f"{_format_time(remaining)} left",
        ]
        return "  ".join(part for part in parts if part)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
