"""Copy the record and the learning curve of a run into this folder, without paths of the machine it ran on.

    python docs/results/keep.py RUN_FOLDER FOLDER/NAME [--samples]

writes ``docs/results/FOLDER/NAME/record.json`` and ``curve.csv``, and with ``--samples`` the grids of generated images.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

from gencompare.errors import UserError
from gencompare.records import RunRecord

RESULTS = Path(__file__).parent
MACHINE_SPECIFIC = ("paths.", "hydra.", "logger=", "trainer=")
"""Prefixes of overrides that depend on the machine and do not affect results."""


def keep(run: Path, name: str, *, samples: bool = False) -> None:
    """Copy the record and the learning curve of the run folder ``run`` to ``docs/results/NAME``.

    Raises:
        UserError: the run has no results, or its record contains other paths of the machine.
    """
    record = RunRecord.load(run)
    if not record.results:
        raise UserError(f"{run} has no results: finish or evaluate the run first.")
    record.name = Path(name).name
    record.images, record.checkpoints = {}, {}
    folder = RESULTS / name
    for result in record.results:
        grid = result.images.get("samples") if samples else None
        result.images.clear()
        if grid is not None:
            result.images["samples"] = grid
            (folder / grid).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / grid, folder / grid)
    record.config.pop("out", None)
    kept = (each for each in record.overrides if not each.lstrip("+").startswith(MACHINE_SPECIFIC))
    record.overrides = [re.sub(r"^samples=.*/", "samples=runs/", each) for each in kept]
    if "model" in record.config:  # externally generated images have no config
        record.config["command"] = record.overrides
        record.config = _without_local_paths(record.config, record.config["paths"])
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder)
    if (run / "curve.csv").is_file():  # externally generated images have none
        shutil.copyfile(run / "curve.csv", folder / "curve.csv")
    print(f"Copied to {folder}.")


def _without_local_paths(value: Any, paths: dict[str, str]) -> Any:
    """The config with absolute paths made relative to ``paths.data`` and the other configured paths."""
    if isinstance(value, dict):
        return {key: _without_local_paths(each, paths) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(each, paths) for each in value]
    if isinstance(value, str) and Path(value).is_absolute():
        for name, path in paths.items():
            if Path(value).is_relative_to(path):
                return str(Path(f"paths.{name}") / Path(value).relative_to(path))
        raise UserError(f"The record contains {value}, a path of this machine: run from the repository's root.")
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Copy the record and the learning curve of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--samples", action="store_true", help="also copy the grids of generated images")
    options = parser.parse_args()
    keep(options.run, options.name, samples=options.samples)
