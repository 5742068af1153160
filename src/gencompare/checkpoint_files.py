"""The checkpoint files of a run: ``last.ckpt``, ``best.ckpt``, and earlier ones for when ``last.ckpt`` is corrupted."""

from __future__ import annotations

import io
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gencompare.checksums import check_zip, write_zip
from gencompare.errors import CorruptedFileError, UserError
from gencompare.files import atomic_write
from gencompare.migrations import migrate_checkpoint

LAST, BEST = "last.ckpt", "best.ckpt"
EMA_KEY = "ema"
"""Key of the EMA weights in a checkpoint."""
POSTHOC_EMA_KEY = "posthoc_ema"
"""Key of the power-function averages in a checkpoint."""


def write_checkpoint(path: str | os.PathLike[str], checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically, with a checksum."""
    # Serialised in memory first, because torch hides disk-full errors.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_zip(path, buffer.getbuffer())


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Verify and load a checkpoint, which may contain only tensors and plain containers.

    Raises:
        CorruptedFileError: the file is corrupted.
        UserError: the file is missing, or not a checkpoint of this package.
    """
    if not os.path.isfile(path):  # opening a pipe would wait
        raise UserError(f"There is no checkpoint {path}.")
    try:
        with open(path, "rb") as file:
            check_zip(path, file)
            return migrate_checkpoint(torch.load(file, map_location=map_location, weights_only=True))
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        raise CorruptedFileError(path, f"Or it is not a gencompare checkpoint ({type(error).__name__}).") from error


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint that training resumes from."""

    path: Path
    content: dict[str, Any]
    corrupted: list[Path]
    """Checkpoints that are corrupted."""

    @property
    def step(self) -> int:
        return self.content.get("callbacks", {}).get("TrainingClock", {}).get("step", 0)

    def restore(self) -> None:
        """Make it ``last.ckpt``, and add ``.corrupted`` to the names of the corrupted ones."""
        for path in self.corrupted:
            path.replace(path.with_name(f"{path.name}.corrupted"))
        if self.path.name != LAST:
            with atomic_write(self.path.with_name(LAST)) as file:
                file.write(self.path.read_bytes())


def find_checkpoint(folder: Path, before: int | None = None) -> FoundCheckpoint | None:
    """Return the newest checkpoint of ``folder`` that is intact, or None if there is none.

    Args:
        folder: folder of the checkpoints.
        before: consider only checkpoints of earlier steps.

    Raises:
        UserError: all checkpoints are corrupted.
        OSError: a checkpoint cannot be read for another reason.
    """
    corrupted: list[Path] = []
    message = ""
    found: FoundCheckpoint | None = None
    for path in checkpoint_paths(folder):
        try:
            candidate = FoundCheckpoint(path, read_checkpoint(path), corrupted)
        except CorruptedFileError as error:
            corrupted, message = [*corrupted, path], message or str(error)
            continue
        if (before is None or candidate.step < before) and (found is None or candidate.step > found.step):
            found = candidate
        if path.name == LAST and before is None:  # the newest, if it is intact
            break
    if found is not None:
        return replace(found, corrupted=corrupted)
    if corrupted and before is None:
        raise UserError(f"No checkpoint in {folder} can be read, so this run cannot be continued: {message}")
    return None


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints of ``folder``, corrupted or not, beginning with ``last.ckpt``."""
    paths = (folder / LAST, *reversed(earlier_checkpoints(folder)), folder / BEST)
    return [path for path in paths if path.exists()]


def earlier_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints ``step_<number>.ckpt`` of ``folder``, by ascending step."""
    steps = {path: match for path in folder.glob("step_*.ckpt") if (match := re.fullmatch(r"step_(\d+)", path.stem))}
    return sorted(steps, key=lambda path: int(steps[path][1]))


def keep_earlier(folder: Path, step: int) -> None:
    """Keep the ``last.ckpt`` of step ``step`` under the name ``step_<number>.ckpt``, before a new one replaces it."""
    last, kept = folder / LAST, folder / f"step_{step:08d}.ckpt"
    if last.exists():
        kept.unlink(missing_ok=True)
        try:
            os.link(last, kept)  # so that there is a last.ckpt at any time
        except OSError:  # a file system without hard links
            os.replace(last, kept)


def remove_earlier(folder: Path, number: int) -> None:
    """Remove all but the newest ``number`` earlier checkpoints."""
    for path in earlier_checkpoints(folder)[: -number or None]:
        with suppress(OSError):
            path.unlink()
