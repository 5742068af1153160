"""Find run folders, read what can be read, and keep a list of what cannot."""

from __future__ import annotations

import csv
import glob
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gencompare.errors import UserError
from gencompare.records import RECORD_FILE, RunRecord

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class RunFolder:
    """A run folder that could be read."""

    folder: Path
    record: RunRecord
    label: str
    """The run's name; made longer where two runs of a comparison share a name."""
    told: str = ""
    """What its command line says that those of the other runs do not; seeds left out."""

    @property
    def title(self) -> str:
        """The label with what is told of the run: what a legend calls it."""
        return f"{self.label} ({self.told})" if self.told else self.label

    @cached_property
    def curve(self) -> dict[str, np.ndarray]:
        """Columns of the curve file, (rows,) float64 each, NaN where a figure was not logged; empty without a file."""
        path = self.inside(self.record.curve)
        return read_curve(path) if path else {}

    def picture(self, relative: str) -> bytes | None:
        """The PNG at ``relative``, or None where it is missing, is no PNG, or lies outside the run folder."""
        path = self.inside(relative)
        try:
            content = path.read_bytes() if path else b""
        except OSError:
            return None
        return content if content.startswith(PNG) else None

    def inside(self, relative: str) -> Path | None:
        """A file of the run folder. A record may come from anybody: what it names elsewhere is not read."""
        folder = self.folder.resolve()
        try:
            path = (folder / relative).resolve()
            return path if path.is_relative_to(folder) and path.is_file() else None
        except (OSError, ValueError):
            return None


@dataclass(frozen=True)
class SkippedFolder:
    """A run folder that is left out, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class ResultView:
    """What a comparison was asked to show."""

    by: tuple[str, ...] = ()
    """Config keys: one row for each combination of their values (`seeds.lines`); none of them: one row a config."""
    metric: str | None = None
    """The figure that ranks; None for the primary_metric of each protocol."""


@dataclass
class LoadedRuns:
    runs: list[RunFolder] = field(default_factory=list)
    skipped: list[SkippedFolder] = field(default_factory=list)
    view: ResultView = ResultView()
    groups: list[Any] | None = field(default=None, repr=False, compare=False)
    """The tables, once `rank.ranked` has made them."""


def find_run_folders(pattern: str) -> list[Path]:
    """Run folders that a glob names, sorted; ``**`` goes any number of folders down.

    A folder that is no run itself but holds runs (a sweep) stands for these. Raises `UserError` when there is none.
    """
    folders: set[Path] = set()
    for name in glob.glob(os.path.expanduser(pattern), recursive=True):
        path = Path(name)
        if path.name == RECORD_FILE:
            folders.add(path.parent)
        elif (path / RECORD_FILE).is_file():
            folders.add(path)
        elif path.is_dir():
            folders.update(record.parent for record in path.glob(f"*/{RECORD_FILE}"))
    if not folders:
        raise UserError(f"runs='{pattern}' names no run folder (one that holds {RECORD_FILE}): try runs='runs/*'.")
    return sorted(folders)


def load_runs(folders: Iterable[str | os.PathLike[str]], view: ResultView = ResultView()) -> LoadedRuns:
    """Read the records of ``folders``. Damaged ones, and a run that comes twice, are listed in ``skipped``."""
    gathered = LoadedRuns(view=view)
    places: set[Path] = set()
    read: list[tuple[Path, RunRecord]] = []
    for folder in map(_from_here, folders):
        if folder.resolve() in places:
            continue
        places.add(folder.resolve())
        try:
            read.append((folder, RunRecord.load(folder)))
        except UserError as error:
            gathered.skipped.append(SkippedFolder(folder, str(error)))
    kept: dict[str, Path] = {}
    unique = []
    for folder, record in read:
        run_id = record.environment.get("run_id")
        if isinstance(run_id, str) and run_id in kept:
            reason = f"a copy of the run in {kept[run_id]}, which is shown"
            gathered.skipped.append(SkippedFolder(folder, reason))
            continue
        if isinstance(run_id, str):
            kept[run_id] = folder
        unique.append((folder, record))
    told = _told([record for _, record in unique])
    gathered.runs = [
        RunFolder(folder, record, label, words)
        for (folder, record), label, words in zip(unique, _labels(unique), told, strict=True)
    ]
    return gathered


def _from_here(folder: str | os.PathLike[str]) -> Path:
    """Relative to the working directory where it lies below: a comparison that is passed on names no home folder."""
    path = Path(folder).absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _labels(runs: list[tuple[Path, RunRecord]]) -> list[str]:
    """The shortest of name, parent/name and folder that no other run has."""
    choices = [(record.name, f"{folder.parent.name}/{record.name}", str(folder)) for folder, record in runs]
    seen = Counter(label for choice in choices for label in set(choice))
    return [next((label for label in choice if seen[label] == 1), choice[-1]) for choice in choices]


RELABELLED = ("seed=", "model=", "sweep=", "hydra", "logger", "run=", "resume=", "callbacks.progress_bar")
"""Beginnings of words of a command line that say nothing of the model, or what has a column of its own."""


def _told(records: list[RunRecord]) -> list[str]:
    said = [[word.lstrip("+") for word in r.overrides if not word.lstrip("+").startswith(RELABELLED)] for r in records]
    common = set(said[0]).intersection(*said[1:]) if len(said) > 1 else {word for words in said for word in words}
    return [
        " ".join(word.removeprefix("model.").removeprefix("model/") for word in words if word not in common)
        for words in said
    ]


def read_curve(path: Path) -> dict[str, np.ndarray]:
    """Columns of a curve file. Values that are no numbers, and a last line that was cut short, count as not logged."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))
    except (OSError, csv.Error):
        return {}
    if not rows:
        return {}
    names, body = rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]
    columns = zip(*body, strict=True) if body else ((),) * len(names)
    return {name: _numbers(texts) for name, texts in zip(names, columns, strict=True)}


def _numbers(texts: tuple[str, ...]) -> np.ndarray:
    try:
        values = np.array([text or "nan" for text in texts], dtype=float)
    except ValueError:
        values = np.array([_number(text) for text in texts], dtype=float)
    values[~np.isfinite(values)] = math.nan
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
