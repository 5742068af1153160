"""Find run folders and read their records. Folders that cannot be read are listed with the reason."""

from __future__ import annotations

import csv
import glob
import io
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gencompare.checksums import GrowingFile
from gencompare.errors import UserError, printable
from gencompare.records import RECORD_FILE, RunRecord

log = logging.getLogger(__name__)
PNG_END = b"IEND\xaeB`\x82"
MAX_FILE_SIZE = 1 << 26
"""Size limit of an image or a learning curve in bytes (64 MiB). Larger files are treated as missing."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder and its record."""

    folder: Path
    record: RunRecord
    label: str
    """Unique name of the run within the comparison."""
    settings: str = ""
    """Command-line overrides, other than seeds, that not all runs of the family share."""

    @property
    def title(self) -> str:
        """Label and settings, as shown in legends."""
        return f"{self.label} ({self.settings})" if self.settings else self.label

    @cached_property
    def curve(self) -> dict[str, np.ndarray]:
        """Columns of the learning curve by name, each float64 (rows,), with NaN where nothing was logged. Empty if
        there is no file, or if it is corrupted."""
        path = self.file(self.record.curve)
        return read_curve(path) if path and GrowingFile(path).is_intact() else {}

    def read_png(self, relative: str) -> bytes | None:
        """Read a PNG file. Return None if it is missing or outside the run folder, or, with a warning, if it is
        corrupted or not a PNG file."""
        path = self.file(relative)
        if path is None or path.stat().st_size > MAX_FILE_SIZE:
            return None
        try:
            content = path.read_bytes()
            Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # checks the CRC of each chunk
            if not content.endswith(PNG_END):
                raise ValueError("there are bytes after the image")
        except Exception as error:  # Pillow raises many kinds
            log.warning("%s is left out: it is corrupted, or not a PNG file (%s).", path, type(error).__name__)
            return None
        return content

    def file(self, relative: str) -> Path | None:
        """Return the path of a file, or None if it is missing or outside the run folder (records are untrusted)."""
        folder = self.folder.resolve()
        try:
            path = (folder / relative).resolve()
            return path if path.is_relative_to(folder) and path.is_file() else None
        except (OSError, ValueError):
            return None


@dataclass(frozen=True)
class SkippedFolder:
    """A run folder that is not compared, or only in part, and the reason."""

    folder: Path
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.folder}: {self.reason}")


@dataclass(frozen=True)
class ComparisonOptions:
    """How to group and rank the runs of a comparison."""

    group_by: tuple[str, ...] = ()
    """Config keys whose values define the table rows (see `gencompare.comparison.statistics.group_by_seed`). If
    empty, runs that differ only in seeds share a row."""
    rank_by: str | None = None
    """The metric to rank by; None uses the primary metric of each result."""


@dataclass
class LoadedRuns:
    """The runs of a comparison."""

    runs: list[RunFolder] = field(default_factory=list)
    skipped: list[SkippedFolder] = field(default_factory=list)
    options: ComparisonOptions = ComparisonOptions()
    tables: list[Any] | None = field(default=None, repr=False, compare=False)
    """Cache of `gencompare.comparison.ranking.ranking_tables`."""


def find_run_folders(pattern: str) -> list[Path]:
    """Return the run folders that match a glob, sorted. ``**`` matches any number of nested folders. The path of an
    existing folder is taken as it is.

    A matching folder that is not a run folder but contains run folders (a sweep folder) is replaced by its run folders.

    Raises:
        UserError: no run folder matches.
    """
    folders: set[Path] = set()
    expanded = os.path.expanduser(pattern)
    # A folder with this name comes first, since its name may contain brackets, which a glob would interpret.
    for name in [expanded] if os.path.lexists(expanded) else glob.glob(expanded, recursive=True):
        path = Path(name)
        if path.name == RECORD_FILE:
            folders.add(path.parent)
        elif (path / RECORD_FILE).is_file():
            folders.add(path)
        elif path.is_dir():
            folders.update(record.parent for record in path.glob(f"*/{RECORD_FILE}"))
    if not folders:
        raise UserError(f"runs='{pattern}' matches no run folder (one with a {RECORD_FILE}): try runs='runs/*'.")
    return sorted(folders)


def load_runs(
    folders: Iterable[str | os.PathLike[str]], options: ComparisonOptions = ComparisonOptions()
) -> LoadedRuns:
    """Read the records of ``folders``. Unreadable records and copies of a run are listed in ``skipped``."""
    loaded = LoadedRuns(options=options)
    resolved: set[Path] = set()
    records: list[tuple[Path, RunRecord]] = []
    for folder in map(_relative_to_cwd, folders):
        if folder.resolve() in resolved:
            continue
        resolved.add(folder.resolve())
        try:
            records.append((folder, RunRecord.load(folder)))
        except UserError as error:
            loaded.skipped.append(SkippedFolder(folder, str(error)))
    for folder, record in records:
        curve = RunFolder(folder, record, "").file(record.curve)
        if curve is not None and not GrowingFile(curve).is_intact():
            reason = "corrupted; the run is compared without its learning curve"
            loaded.skipped.append(SkippedFolder(folder / record.curve, reason))
    folder_of_run: dict[str, Path] = {}
    unique = []
    for folder, record in records:
        run_id = record.environment.get("run_id")
        if isinstance(run_id, str) and run_id in folder_of_run:
            reason = f"a copy of the run in {folder_of_run[run_id]}"
            loaded.skipped.append(SkippedFolder(folder, reason))
            continue
        if isinstance(run_id, str):
            folder_of_run[run_id] = folder
        unique.append((folder, record))
    settings = _distinguishing_overrides([record for _, record in unique])
    loaded.runs = [
        RunFolder(folder, record, label, overrides)
        for (folder, record), label, overrides in zip(unique, _labels(unique), settings, strict=True)
    ]
    return loaded


def _relative_to_cwd(folder: str | os.PathLike[str]) -> Path:
    """Make a path relative if it is below the working directory, so that a shared page does not show a home folder."""
    path = Path(folder).absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _labels(runs: list[tuple[Path, RunRecord]]) -> list[str]:
    """Label each run by the first of these that is unique: `base_name`, that with seed, name, parent/name, path."""
    choices = [
        (
            base_name(record), f"{base_name(record)}, seed {record.seed}", record.name,
            printable(f"{folder.parent.name}/{record.name}"), printable(folder),
        )
        for folder, record in runs
    ]  # fmt: skip
    count = Counter(label for choice in choices for label in set(choice))
    return [next((label for label in choice if count[label] == 1), choice[-1]) for choice in choices]


def base_name(record: RunRecord) -> str:
    """Return the name of a run without job number, time and seed, and without the data set if only the family is left.

    A job number looks like a seed, and a table contains a single data set: ``2_digits_ddpm`` is ``ddpm``.
    """
    if record.state == "samples":  # named by the user
        return record.name
    name = re.sub(r"^(\d+|\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)_(?=.)", "", record.name)
    name = name.removesuffix(f"_{record.seed}")
    return record.family if name == f"{record.data.get('name')}_{record.family}" else name or record.name


NON_DISTINGUISHING = (
    "seed=", "model=", "sweep=", "hydra", "logger", "paths.", "run=", "run_dir=", "resume=", "ckpt_path=",
    "trust=", "callbacks.progress",
)  # fmt: skip
"""Prefixes of overrides that do not describe the model, or that are shown in a separate column."""


def _distinguishing_overrides(records: list[RunRecord]) -> list[str]:
    """Return, for each run, the overrides that not all runs of its family share. For a single run, return none."""
    overrides = [
        [
            each.lstrip("+")
            for each in record.overrides
            if not each.lstrip("+").startswith(NON_DISTINGUISHING)
            and each != f"experiment={record.data.get('name')}_{record.family}"  # says the same as the family
        ]
        for record in records
    ]
    common: dict[str, set[str]] = {}
    for record, own in zip(records, overrides, strict=True):
        common[record.family] = common.get(record.family, set(own)).intersection(own)
    return [
        " ".join(
            each.removeprefix("model.").removeprefix("model/") for each in own if each not in common[record.family]
        )
        for record, own in zip(records, overrides, strict=True)
    ]


def read_curve(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a learning curve. Cells that are not numbers become NaN; truncated lines are dropped."""
    try:
        if path.stat().st_size > MAX_FILE_SIZE:
            return {}
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))
    except (OSError, csv.Error):
        return {}
    if not rows:
        return {}
    names, body = rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]
    columns = zip(*body, strict=True) if body else ((),) * len(names)
    return {printable(name): _parse_floats(cells) for name, cells in zip(names, columns, strict=True)}


def _parse_floats(cells: tuple[str, ...]) -> np.ndarray:
    try:
        values = np.array([cell or "nan" for cell in cells], dtype=float)
    except ValueError:
        values = np.array([_parse_float(cell) for cell in cells], dtype=float)
    values[~np.isfinite(values)] = math.nan
    return values


def _parse_float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
