"""A result into a run folder: its figures into the record, its samples as pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gencompare.contract import DataSpec
from gencompare.data.base import ImageData
from gencompare.evaluation.quantize import stored_split, to_uint8
from gencompare.pictures import grid, save_png
from gencompare.records import Result, RunRecord

GRID = 100
"""Samples in the picture of a result."""


def put(folder: Path, result: Result, images: Tensor, data: ImageData) -> None:
    """The result into the folder's record, with a picture of the samples (``images`` as `quantize.as_stored` gives
    them), and one of the first samples beside their nearest training images."""
    RunRecord.update(folder, lambda record: record.put(result))
    spec = data.spec
    drawn = {"samples": grid(shown(images[: len(images) if spec.dims == 2 else GRID], spec).numpy())}
    rows = result.details.get("nearest_training")
    if rows:
        near = shown(beside_nearest(images, rows, data), spec)
        drawn["nearest training images"] = grid(near.numpy(), len(rows[0]) + 1)
    paths = {title: folder / "samples" / f"{_stem(title)}_{result.id}.png" for title in drawn}
    for title, picture in drawn.items():
        save_png(picture, paths[title])
    named = {title: str(path.relative_to(folder)) for title, path in paths.items()}
    pictured = replace(result, pictures={**result.pictures, **named})
    RunRecord.update(folder, lambda record: record.put(pictured))


def _stem(title: str) -> str:
    return "result" if title == "samples" else title.split()[0]


def beside_nearest(images: Tensor, rows: list[list[int]], data: ImageData) -> Tensor:
    """(r (k + 1), C, H, W): each of the first r samples, followed by the training images that its ``rows`` (k) name."""
    train = stored_split(data.split("train")[torch.tensor(rows).flatten()].images, data.spec)
    train = train.reshape(len(rows), -1, *train.shape[1:])
    return torch.cat([images[: len(rows), None], train.to(images.dtype)], dim=1).flatten(0, 1)


def shown(images: Tensor, spec: DataSpec) -> Tensor:
    """Stored images as uint8."""
    return images if images.dtype == torch.uint8 else to_uint8(images.clamp(-1, 1), spec)
