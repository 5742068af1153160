"""Atomic writes, checksums and inter-process locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gencompare.errors import DiskFullError, UserError

DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
PATH_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG
)  # fmt: skip
TEMPORARY_SUFFIX = ".part"
ORPHAN_SECONDS = 2.0
"""Minimum age of a temporary file that is removed: a younger one may not be locked yet."""


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` when the block ends, or is discarded if the block raises.

    The bytes go to a temporary file in the same folder, which is then renamed. Readers see the old or the new file,
    never a partial file. The writer holds a lock on the temporary file, so that `remove_orphans` can tell whether its
    process has died.

    Args:
        path: the file.
        sync: whether to sync the temporary file to disk before the renaming, so that it also survives a power failure.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) or error from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def remove_orphans(folder: Path) -> None:
    """Remove the temporary files of `atomic_write` in ``folder`` and below whose process was killed."""
    for temporary in folder.rglob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError), temporary.open("rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > ORPHAN_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()


def write_error(path: str | os.PathLike[str], error: OSError) -> UserError | None:
    """Return the error for a failure to write ``path``, or None if the user cannot fix it."""
    if error.errno in DISK_FULL_ERRORS:
        return DiskFullError(f"No space left on the disk for {path}: free some space.")
    if error.errno in PATH_ERRORS:
        return UserError(f"Cannot write {path}: {error.strerror}. Choose another folder.")
    return None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raise `ValueError` for NaN and infinity (not valid JSON)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path`` during the block.

    The file is created if missing and not removed. The operating system releases the lock if the process dies.

    Raises:
        OSError: if the folder is not writable or its file system does not support locks.
        BlockingIOError: if ``wait`` is false and another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)  # a link could lead to any file
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
