"""How far an evaluation is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gencompare.training.progress import LINE_SECONDS


class Stages:
    """Shows the progress of each stage of an evaluation; called as `evaluation.evaluate.Progress`."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._printed = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total)
            self._bar.update(self._tasks[stage], completed=done)
            return
        now = time.monotonic()
        began = self._began.setdefault(stage, now)
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            speed = f"  {done / (now - began):,.1f} images/s" if now > began else ""
            print(f"{stage} {done / total:4.0%}  {done:,} of {total:,}{speed}", flush=True)


@contextmanager
def stages(shown: bool = True) -> Iterator[Stages | None]:
    """A `Stages` while the block runs; None on all processes but the first, and where nothing is to be shown."""
    if not shown or rank_zero_only.rank != 0:
        yield None
    elif not sys.stdout.isatty():
        yield Stages(None)
    else:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(), transient=True) as bar:
            yield Stages(bar)
