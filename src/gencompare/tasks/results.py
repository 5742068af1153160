"""A result into a run folder: its figures into the record, its samples as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gencompare.contract import DataSpec
from gencompare.evaluation.quantize import to_uint8
from gencompare.pictures import grid, save_png
from gencompare.records import Result, RunRecord

GRID = 100
"""Samples in the picture of a result."""


def put(folder: Path, result: Result, images: Tensor, spec: DataSpec) -> None:
    """The result into the folder's record, with a picture of the samples (``images`` as `quantize.as_stored` gives
    them)."""
    RunRecord.update(folder, lambda record: record.put(result))
    shown = images if images.dtype == torch.uint8 else to_uint8(images.clamp(-1, 1), spec)
    path = folder / "samples" / f"result_{result.id}.png"
    save_png(grid(shown[: len(shown) if spec.dims == 2 else GRID].numpy()), path)
    pictured = replace(result, pictures={**result.pictures, "samples": str(path.relative_to(folder))})
    RunRecord.update(folder, lambda record: record.put(pictured))
