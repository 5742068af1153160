"""A finished run logs its metrics and images to W&B, also offline."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from gencompare.comparison.page import report
from gencompare.records import Metric, RunRecord
from gencompare.training.loggers import finish_loggers, wandb_logger
from synthetic import result, write_run


def test_metrics_and_images_are_logged(tmp_path: Path) -> None:
    metrics = {
        "fd_digits": Metric(1.5, higher_is_better=False, baseline=0.5, interval=(1.0, 2.0)),
        "bad": Metric(None, note="NaN"),
    }
    made = [
        result(1.5, metrics=metrics, images={"nearest training images": "samples/grid.png", "gone": "gone.png"}),
        result(2.5, generation={"checkpoint": "best"}, images={"samples": "other.png"}),
    ]
    folder = write_run(tmp_path / "run", made)
    Image.new("L", (5, 7)).save(folder / "other.png")
    page = report([folder], folder)
    logger = wandb_logger(folder=folder, name="run", id="abc123", project="test", mode="offline")
    finish_loggers([logger], RunRecord.load(folder), folder, page)
    (files,) = folder.glob("wandb/offline-run-*-abc123/files")
    (table,) = files.glob("media/table/metrics_*.table.json")
    content = json.loads(table.read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert len(rows) == len(made[0].metrics) + len(made[1].metrics)
    first = next(row for row in rows if row["metric"] == "fd_digits" and row["checkpoint"] == "last")
    assert [first[name] for name in ("value", "low", "high", "real data", "sampler")] == [
        1.5, 1.0, 2.0, 0.5, "ddim, 50 steps",
    ]  # fmt: skip
    assert next(row for row in rows if row["metric"] == "bad")["value"] is None
    sizes = []
    for path in (files / "media" / "images").rglob("*.png"):
        with Image.open(path) as picture:
            sizes.append(picture.size)
    with Image.open(folder / "samples" / "grid.png") as own:
        assert sorted(sizes) == sorted([own.size, own.size, (5, 7)]), "missing images are skipped"
    assert (files / "record.json").is_file() and (files / "compare.html").is_file()
