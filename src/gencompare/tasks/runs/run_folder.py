"""Claim a run folder for this process, check whether another process uses it, and wait for that process."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from gencompare.command_line import shell_override
from gencompare.errors import UserError, printable
from gencompare.files import file_lock, remove_orphans
from gencompare.records import RECORD_FILE
from gencompare.trust import check_links

LOCK_FILE = ".lock"
"""File that is locked by the process that works in a run folder."""


def run_folder(cfg: DictConfig) -> Path:
    """Return the run folder in ``cfg.run_dir``. Raise `UserError` if it is not set, or if a link leads out of it."""
    if cfg.run_dir is None:
        raise UserError(f"task={cfg.task.label} needs run_dir=DIR, the folder of a trained run.")
    folder = Path(cfg.run_dir)
    if not cfg.get("trust"):
        check_links(folder)
    return folder


def refuse_existing_run(folder: Path) -> None:
    """Raise `UserError` if ``folder`` already contains a run."""
    if (folder / RECORD_FILE).exists() or has_checkpoint(folder):
        raise UserError(
            f"{folder} already contains a run: continue it with {shell_override('resume', folder)}, or choose another"
            " hydra.run.dir."
        )


def checkpoint_names(folder: Path) -> list[str]:
    """Return the names of the checkpoints in a run folder, corrupted or not."""
    names = re.compile(r"(last|best|step_\d+)\.ckpt")
    return sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt") if names.fullmatch(path.name))


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run folder contains a checkpoint, damaged or not."""
    return bool(checkpoint_names(folder))


@contextmanager
def claim_run_folder(folder: Path, *, must_be_new: bool) -> Iterator[None]:
    """Hold the lock of a run folder during the block. Rank 0 holds the lock for all ranks.

    Raises:
        UserError: another process holds the lock, or ``must_be_new`` is set and the folder contains a run.
    """
    from pytorch_lightning.utilities import rank_zero_only  # slow to import, and not needed to start sweeps

    if rank_zero_only.rank != 0:
        yield
        return
    try:
        with file_lock(folder / LOCK_FILE, wait=False):
            if must_be_new:
                refuse_existing_run(folder)
            remove_orphans(folder)
            yield
    except BlockingIOError as error:
        raise UserError(f"Another process is using {folder}: wait for it, or choose another folder.") from error


def is_active(folder: Path) -> bool:
    """Return whether a process on this machine holds the lock of a run folder."""
    if not (folder / LOCK_FILE).exists():
        return False
    try:
        with file_lock(folder / LOCK_FILE, wait=False):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False  # the folder belongs to another user


def wait_until_inactive(folder: Path) -> bool:
    """Wait until no other process uses a run folder, and return whether there was such a process."""
    active = is_active(folder)
    if active:
        print(printable(f"[{folder.name}] waiting for the process that is using it."), flush=True)
        with file_lock(folder / LOCK_FILE):
            pass
    return active


def touch_lock(folder: Path) -> None:
    """Set the modification time of the lock file to now, creating folder and file if necessary."""
    lock = folder / LOCK_FILE
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    now = time.time_ns()
    os.utime(lock, ns=(now, now))


def touched_since(folder: Path, time_ns: int) -> bool:
    """Return whether `touch_lock` was called for ``folder`` at ``time_ns`` or later."""
    lock = folder / LOCK_FILE
    return lock.exists() and lock.stat().st_mtime_ns >= time_ns
