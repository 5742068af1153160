"""What a user sees of a run: config, progress, metrics and where they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from torch import Tensor

from gencompare.compare.page import report
from gencompare.compare.terminal import run_summary
from gencompare.data.datamodule import SPLITS, ImageData
from gencompare.evaluation.reference import quantize_split, to_uint8
from gencompare.generative_model import DataSpec
from gencompare.image_grid import grid, save_png
from gencompare.records import Result, RunRecord
from gencompare.training.progress_bar import LINE_SECONDS


class StageProgress:
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
def stage_progress(shown: bool = True) -> Iterator[StageProgress | None]:
    """A `StageProgress` while the block runs; None on all processes but the first, and where nothing is to be shown."""
    if not shown or rank_zero_only.rank != 0:
        yield None
    elif not sys.stdout.isatty():
        yield StageProgress(None)
    else:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(), transient=True) as bar:
            yield StageProgress(bar)


HIDDEN = (
    "choices", "command", "out", "sweep_name", "run_dir", "resume", "runs", "group_by", "rank_by", "num_images", "checkpoint", "weights",
    "task", "trial",
)  # fmt: skip


def print_config(cfg: DictConfig) -> None:
    """The composed config, once."""
    shown = {key: value for key, value in OmegaConf.to_container(cfg, resolve=True).items() if key not in HIDDEN}  # type: ignore[union-attr]
    text = OmegaConf.to_yaml(OmegaConf.create(shown))
    Console().print(Syntax(text, "yaml", background_color="default", word_wrap=True))


def describe_config(data: ImageData) -> dict[str, Any]:
    """The data set, for a record."""
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


def print_end(record: RunRecord, folder: Path) -> Path:
    """The result table, and where everything lies. Returns the page."""
    page = report([folder], folder)
    console = Console()
    if record.results:
        console.print(run_summary(record))
    places = {
        "page with the pictures": page,
        "record": folder / "record.json",
        "checkpoints": folder / "checkpoints",
        "learning curve": folder / record.curve,
    }
    for title, place in places.items():
        if place.exists():
            console.print(f"{title:>24}  {_short(place)}", highlight=False, soft_wrap=True)
    return page


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


GRID = 100
"""Samples in the picture of a result."""


def store_result(folder: Path, result: Result, images: Tensor, data: ImageData) -> None:
    """The result into the folder's record, with a picture of the samples (``images`` as `quantize_images` gives
    them), and one of the first samples beside their nearest training images."""
    RunRecord.update(folder, lambda record: record.add_result(result))
    spec = data.spec
    drawn = {"samples": grid(show_result(images[: len(images) if spec.num_values == 2 else GRID], spec).numpy())}
    rows = result.details.get("nearest_training")
    if rows:
        near = show_result(with_nearest_neighbors(images, rows, data), spec)
        drawn["nearest training images"] = grid(near.numpy(), len(rows[0]) + 1)
    paths = {title: folder / "samples" / f"{_stem(title)}_{result.id}.png" for title in drawn}
    for title, picture in drawn.items():
        save_png(picture, paths[title])
    named = {title: str(path.relative_to(folder)) for title, path in paths.items()}
    pictured = replace(result, images={**result.images, **named})
    RunRecord.update(folder, lambda record: record.add_result(pictured))


def _stem(title: str) -> str:
    return "result" if title == "samples" else title.split()[0]


def with_nearest_neighbors(images: Tensor, rows: list[list[int]], data: ImageData) -> Tensor:
    """(r (k + 1), C, H, W): each of the first r samples, followed by the training images that its ``rows`` (k) name."""
    train = quantize_split(data.split("train")[torch.tensor(rows).flatten()].images, data.spec)
    train = train.reshape(len(rows), -1, *train.shape[1:])
    return torch.cat([images[: len(rows), None], train.to(images.dtype)], dim=1).flatten(0, 1)


def show_result(images: Tensor, spec: DataSpec) -> Tensor:
    """Stored images as uint8."""
    return images if images.dtype == torch.uint8 else to_uint8(images.clamp(-1, 1), spec)
