"""Keep what a run measured: its record and curve, without the places of the machine that it ran on.

    python docs/results/keep.py RUN_FOLDER NAME

writes ``docs/results/NAME/record.json`` and ``curve.csv``, and the picture of its samples as ``docs/images/NAME.png``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from gencompare.errors import UserError
from gencompare.records import RunRecord

RESULTS = Path(__file__).parent
IMAGES = RESULTS.parent / "images"


def keep(run: Path, name: str) -> None:
    """Copy what is worth keeping of the run folder ``run``. Raises `UserError` where it holds no result."""
    record = RunRecord.load(run)
    if not record.results:
        raise UserError(f"{run} holds no result: finish or evaluate the run first.")
    samples = record.results[-1].pictures.get("samples")
    if samples:
        IMAGES.mkdir(exist_ok=True)
        shutil.copyfile(run / samples, IMAGES / f"{name}.png")
    record.name = name
    record.pictures, record.checkpoints = {}, {}
    for result in record.results:
        result.pictures.clear()
    record.config.pop("out", None)
    if any(word in str(record.config) for word in (str(Path.home()), str(run.resolve()))):
        raise UserError(f"{run}/record.json names folders of this machine: run it from the repository's root.")
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder)
    shutil.copyfile(run / "curve.csv", folder / "curve.csv")
    print(f"Kept in {folder}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Keep the record and the curve of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    keep(options.run, options.name)
