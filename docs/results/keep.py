"""Keep what a run measured: its record and curve, without the places of the machine that it ran on.

    python docs/results/keep.py RUN_FOLDER FOLDER/NAME

writes ``docs/results/FOLDER/NAME/record.json`` and ``curve.csv``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from gencompare.errors import UserError
from gencompare.records import RunRecord

RESULTS = Path(__file__).parent
OF_THE_MACHINE = ("paths.", "hydra.", "logger=")
"""Words of a command line that say where a run lies, and nothing of what it did."""


def keep(run: Path, name: str) -> None:
    """Copy what is worth keeping of the run folder ``run``. Raises `UserError` where it holds no result."""
    record = RunRecord.load(run)
    if not record.results:
        raise UserError(f"{run} holds no result: finish or evaluate the run first.")
    record.name = Path(name).name
    record.images, record.checkpoints = {}, {}
    for result in record.results:
        result.images.clear()
    record.config.pop("out", None)
    record.overrides = [word for word in record.overrides if not word.lstrip("+").startswith(OF_THE_MACHINE)]
    record.config["command"] = record.overrides
    record.config = _without_places(record.config, record.config["paths"])
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder)
    if (run / "curve.csv").is_file():  # nothing was trained for others' images
        shutil.copyfile(run / "curve.csv", folder / "curve.csv")
    print(f"Kept in {folder}.")


def _without_places(value: Any, places: dict[str, str]) -> Any:
    """The config with ``paths.data`` and its like in place of folders of this machine."""
    if isinstance(value, dict):
        return {key: _without_places(each, places) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each, places) for each in value]
    if isinstance(value, str) and Path(value).is_absolute():
        for name, place in places.items():
            if Path(value).is_relative_to(place):
                return str(Path(f"paths.{name}") / Path(value).relative_to(place))
        raise UserError(f"The record names {value}, a folder of this machine: run from the repository's root.")
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Keep the record and the curve of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    keep(options.run, options.name)
