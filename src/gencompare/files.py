"""Files that appear whole or not at all, their check sums, and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gencompare.errors import UserError


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file handle whose content replaces ``path`` when the block ends well, and vanishes when it does not.

    The bytes go to a temporary file in the same folder, are synced to disk and renamed, so that a reader sees the old
    file or the new one and never a part. Raises `UserError` for a full disk or a folder that cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) or error from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


FULL = (errno.ENOSPC, errno.EDQUOT)
ELSEWHERE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG
)  # fmt: skip


def cannot_write(path: str | os.PathLike[str], error: OSError) -> UserError | None:
    """What to tell the user of an error in writing ``path``; None where it is none of theirs."""
    if error.errno in FULL:
        return UserError(f"No room left on the disk for {path}: free some space, then start again.")
    if error.errno in ELSEWHERE:
        return UserError(f"Cannot write {path}: {error.strerror}. Choose another folder.")
    return None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file ``path`` (made where missing, left behind); others wait. The system frees it if we die.

    Raises OSError where the folder cannot be written or its file system knows no locks, and BlockingIOError where
    another process holds the file and we shall not ``wait``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
