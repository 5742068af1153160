"""Synthetic run folders, for tests of code that only reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gencompare.image_grid import grid, save_png
from gencompare.records import Measurement, Metric, Result, RunRecord, SampleSettings

DIGITS = Measurement(
    data="digits", num_images=500, reference="test", num_reference_images=500, reference_hash="f00d" * 16,
    extractor="digits", extractor_hash="beef" * 16, chunk_size=250,
)  # fmt: skip
"""The protocol of runs that are ranked together."""


def result(value: float | None, measurement: Measurement = DIGITS, **changes: Any) -> Result:
    """Return a result whose primary metric ``fd_digits`` is ``value``, with a real-data baseline of 0.5."""
    generation = {"weights": "ema", "checkpoint": "last", "sampler": "ddim, 50 steps", "nfe": {"unet": 50.0}, "seed": 0}
    generation |= changes.pop("generation", {})
    metrics = {
        "fd_digits": Metric(
            value, higher_is_better=False, baseline=0.5, note="" if value is not None else "samples hold NaN"
        ),
        "kd_digits": Metric(0.0021, higher_is_better=False, baseline=0.0003, interval=(0.001, 0.0032)),
        "precision": Metric(0.81, higher_is_better=True, baseline=0.83),
        "recall": Metric(0.64, higher_is_better=True, baseline=0.82),
        "bpd_vlb": Metric(2.31, higher_is_better=False, unit="bits/dim", note="bound, 500 test images"),
        "confident": Metric(0.84, higher_is_better=True, baseline=0.97),
        "memorization": Metric(0.99, target=1.0, note="distance to training images over that to held-out ones"),
    } | changes.pop("metrics", {})
    fields: dict[str, Any] = {
        "primary_metric": "fd_digits", "seconds": {"sampling": 4.0, "metrics": 0.6},
        "details": {"class_shares": [0.1] * 10},
    }  # fmt: skip
    return Result(measurement, SampleSettings(**generation), metrics, **(fields | changes))


def write_run(
    folder: Path,
    results: Iterable[Result] = (),
    *,
    family: str = "ddpm",
    curve: dict[str, np.ndarray] | None = None,
    with_grid: bool = True,
    shape: tuple[int, int, int] = (1, 8, 8),
    **fields: Any,
) -> Path:
    """Write a finished run with a sample grid and a learning curve; ``fields`` set fields of the record."""
    folder.mkdir(parents=True, exist_ok=True)
    seed = sum(folder.name.encode())
    results = list(results)
    if with_grid:
        noise = np.random.default_rng(seed).integers(0, 256, (36, *shape), dtype=np.uint8)
        save_png(grid(noise), folder / "samples" / "grid.png")
        for r in results:
            r.images.setdefault("samples", "samples/grid.png")
    config = {
        "seed": fields.get("seed", 0), "family": family, "out": str(folder), "budget": {"images": 200_000},
        "choices": {"data": "digits", "model": family, "evaluation": "default"},
        "model": {"_target_": f"gencompare.models.{family}", "optimizer": {"lr": 1e-3}},
    }  # fmt: skip
    record = RunRecord(
        **{
            "name": folder.name, "family": family, "state": "finished", "config": config,
            "created": "2026-01-02T03:04:05",
            "data": {"name": "digits", "shape": list(shape), "splits": {"train": 1147, "val": 150, "test": 500}},
            "overrides": [f"model={family}"],
            "environment": {"run_id": str(folder), "git": {"commit": "0123456789abcdef", "dirty": True}},
            "model": {"parameters": 412_345},
            "training": {
                "steps": 1563, "images_seen": 200_064, "seconds": 171.2, "images_per_second": 1168.6, "flops": 3.2e13,
                "peak_memory_bytes": 512 * 2**20, "processes": 1, "perceptual_networks": [],
            },
            "results": results,
        }
        | fields
    )  # fmt: skip
    record.save(folder)
    write_curve(folder / "curve.csv", curve if curve is not None else synthetic_curve(seed))
    return folder


def synthetic_curve(seed: int, rows: int = 60) -> dict[str, np.ndarray]:
    """Return a learning curve with training losses in every row, and a distance and a validation loss in every
    tenth row."""
    random = np.random.default_rng(seed)
    images = np.linspace(0, 200_000, rows + 1)[1:]
    loss = 0.2 + np.exp(-images / 20_000) + 0.01 * random.standard_normal(rows)
    is_evaluated = np.arange(1, rows + 1) % 10 == 0
    return {
        "step": images / 128, "images": images, "seconds": images / 1168, "train/loss": loss,
        "val/loss": np.where(is_evaluated, loss + 0.05, math.nan),
        "val/fd_digits": np.where(is_evaluated, 3 + 40 * np.exp(-images / 40_000), math.nan),
    }  # fmt: skip


def write_curve(path: Path, columns: dict[str, np.ndarray]) -> None:
    rows = zip(*columns.values(), strict=True)
    lines = [",".join("" if math.isnan(value) else f"{value:.6g}" for value in row) for row in rows]
    path.write_text("\n".join([",".join(f'"{name}"' for name in columns), *lines]) + "\n")
