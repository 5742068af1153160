"""Arrays kept on disk (decoded images, features of real images), under a name that says what they were made from.

A file is a ``.npy`` array followed by the 32 bytes of the SHA-256 of all that stands before them. What is read back is
mapped into memory, so that several processes share one copy, and it is read only after the check sum was verified.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.files import atomic, locked

log = logging.getLogger(__name__)

CHECKSUM_BYTES = 32
BLOCK = 1 << 20


def cached_array(folder: Path | None, name: str, make: Callable[[], Tensor]) -> Tensor:
    """The tensor called ``name`` in ``folder``; made and stored where it is missing or damaged.

    ``name`` must be a function of all that ``make`` depends on. Processes that ask at once make it once. Where the
    folder cannot be written, or is None, the tensor is made and not stored.
    """
    if folder is None:
        return make()
    stored = load(folder, name)
    if stored is not None:
        return stored
    made = None
    try:
        with locked(folder / f"{name}.lock"):
            stored = load(folder, name)  # another process may have made it while this one waited
            if stored is not None:
                return stored
            made = make()
            store(folder, name, made)
    except OSError as error:
        _warn(folder, name, error)
    return make() if made is None else made


def load(folder: Path, name: str) -> Tensor | None:
    """The stored tensor, or None where the file is missing or not what was written."""
    path = folder / f"{name}.npy"
    with suppress(OSError, ValueError, EOFError):
        if not _intact(path):
            log.warning("%s is damaged: it is made anew.", path)
            return None
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    return None


def store(folder: Path, name: str, tensor: Tensor) -> None:
    """Write ``tensor``, whole or not at all; a folder that cannot be written is a warning."""
    try:
        with atomic(folder / f"{name}.npy") as file:
            summed = _Summed(file)
            np.lib.format.write_array(summed, tensor.numpy(), allow_pickle=False)  # type: ignore[arg-type]
            file.write(summed.digest.digest())
    except (OSError, UserError) as error:
        _warn(folder, name, error)


def _warn(folder: Path, name: str, error: Exception) -> None:
    log.warning("%s cannot be kept in %s (%s): set paths.cache=DIR to save time.", name, folder, error)


class _Summed:
    """A file handle that only writes, and sums up what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self.file.write(block)


def _intact(path: Path) -> bool:
    left = path.stat().st_size - CHECKSUM_BYTES
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while left > 0:
            block = file.read(min(BLOCK, left))
            if not block:
                return False
            digest.update(block)
            left -= len(block)
        return left == 0 and file.read() == digest.digest()
