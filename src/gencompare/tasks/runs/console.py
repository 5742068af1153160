"""Terminal output of a run: start, progress, results and paths."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from gencompare.comparison.load_runs import RunFolder
from gencompare.comparison.terminal import describe_run, run_summary
from gencompare.data.datamodule import SPLITS, ImageData
from gencompare.errors import printable
from gencompare.evaluation.reference import quantize_split, to_uint8
from gencompare.generative_model import DataSpec
from gencompare.image_grid import grid, save_png
from gencompare.records import Result, RunRecord
from gencompare.training.progress_bar import LINE_SECONDS


class StageProgress:
    """Shows the progress of each evaluation stage. It implements `evaluation.evaluate.Progress`.

    Args:
        bar: the progress bar; None prints a line every `LINE_SECONDS` instead.
    """

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}
        self._starts: dict[str, float] = {}
        self._printed = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total)
            self._bar.update(self._tasks[stage], completed=done)
            return
        now = time.monotonic()
        start = self._starts.setdefault(stage, now)
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            speed = f"  {done / (now - start):,.1f} images/s" if now > start else ""
            print(f"{stage} {done / total:4.0%}  {done:,} of {total:,}{speed}", flush=True)


@contextmanager
def stage_progress(enabled: bool = True) -> Iterator[StageProgress | None]:
    """Provide a `StageProgress` for the block, or None if ``enabled`` is false or the rank is not 0."""
    if not enabled or rank_zero_only.rank != 0:
        yield None
    elif not sys.stdout.isatty():
        yield StageProgress(None)
    else:
        name = TextColumn("{task.description}", style="bold", markup=False)
        columns = (name, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(), transient=True) as bar:
            yield StageProgress(bar)


def print_start(
    record: RunRecord, folder: Path, device: torch.device, budget: dict[str, Any], num_processes: int = 1
) -> None:
    """Print what is trained, on which device, for how long and in which folder. ``--cfg job`` prints the config.

    Args:
        record: the record of the run.
        folder: the run folder.
        device: the device of this process.
        budget: the limits of the budget by name; None for no limit.
        num_processes: the number of processes.
    """
    limits = ", ".join(
        f"{limit:,} {name.replace('_', ' ')}" for name, limit in budget.items() if isinstance(limit, int | float)
    )
    images = record.data["splits"]["train"]
    where = f"{device} ({num_processes} processes)" if num_processes > 1 else str(device)
    print(f"Training {describe_run(record)}, on {where}. Budget: {limits}. Training set: {images:,} images.")
    print(f"Run folder: {_relative(folder)}", flush=True)


def describe_data(data: ImageData) -> dict[str, Any]:
    """Return the description of a data set for a record."""
    spec = data.spec
    return {
        "name": spec.name,
        "shape": list(spec.shape),
        "num_classes": spec.num_classes,
        "num_bins": spec.num_bins,
        "conditions": {name: list(shape) for name, shape in spec.conditions.items()},
        "splits": {name: len(data.split(name)) for name in SPLITS},
        "hash": data.hash("train"),
    }


def print_results(record: RunRecord, folder: Path) -> Path:
    """Write the HTML page of a run, print its results and output paths, and return the path of the page."""
    from gencompare.comparison.page import report  # imports jinja2 and matplotlib, which training does not need

    page = report([folder], folder)
    console = Console()
    if record.results:
        console.print(run_summary(record))
    paths = {
        "page with images": page,
        "record": folder / "record.json",
        "checkpoints": folder / "checkpoints",
        "learning curve": RunFolder(folder, record, "").file(record.curve),  # None if it is outside the folder
    }
    for title, path in paths.items():
        if path is not None and path.exists():
            console.print(Text(f"{title:>24}  {_relative(path)}"), soft_wrap=True)  # not markup: a path may contain [b]
    return page


def _relative(path: Path) -> str:
    return printable(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


NUM_GRID_IMAGES = 100
"""Maximum number of samples in the grid of a result."""


def store_result(folder: Path, result: Result, images: Tensor, data: ImageData) -> None:
    """Add a result to the record of a run, with a grid of samples and a grid of their nearest training images.

    Args:
        images: the samples, as returned by `quantize_images`.
    """
    RunRecord.update(folder, lambda record: record.add_result(result))
    spec = data.spec
    shown = images if spec.num_values == 2 else images[:NUM_GRID_IMAGES]
    grids = {"samples": grid(displayable(shown, spec).numpy())}
    indices = result.details.get("nearest_training")
    if indices:
        pairs = displayable(with_nearest_neighbors(images, indices, data), spec)
        grids["nearest training images"] = grid(pairs.numpy(), len(indices[0]) + 1)
    paths = {title: folder / "samples" / f"{_stem(title)}_{result.id}.png" for title in grids}
    for title, image in grids.items():
        save_png(image, paths[title])
    relative = {title: str(path.relative_to(folder)) for title, path in paths.items()}
    with_images = replace(result, images={**result.images, **relative})
    RunRecord.update(folder, lambda record: record.add_result(with_images))


def _stem(title: str) -> str:
    return "result" if title == "samples" else title.split()[0]


def with_nearest_neighbors(images: Tensor, indices: list[list[int]], data: ImageData) -> Tensor:
    """Interleave each of the first r samples with its k nearest training images, (r (k + 1), C, H, W).

    Args:
        indices: training image indices, r lists of length k.
    """
    train = quantize_split(data.split("train")[torch.tensor(indices).flatten()].images, data.spec)
    train = train.reshape(len(indices), -1, *train.shape[1:])
    return torch.cat([images[: len(indices), None], train.to(images.dtype)], dim=1).flatten(0, 1)


def displayable(images: Tensor, spec: DataSpec) -> Tensor:
    """Convert quantised samples to uint8."""
    return images if images.dtype == torch.uint8 else to_uint8(images.clamp(-1, 1), spec)
