"""Arrays cached on disk (decoded images, features of real images) under a name that identifies their inputs.

A cache file is a ``.npy`` array followed by the 32 bytes of its SHA-256. The checksum is verified before an array is
used, and arrays are memory-mapped, so that several processes share one copy.
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
from gencompare.files import atomic_write, file_lock

log = logging.getLogger(__name__)

CHECKSUM_BYTES = 32
BLOCK_SIZE = 1 << 20


def cached_array(folder: Path | None, name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Load the tensor ``name`` from ``folder``, or compute and store it if the file is missing or corrupted.

    If several processes start together, one computes the tensor and the others wait. If the folder is None or not
    writable, the tensor is computed and not stored.

    Args:
        folder: cache folder; None disables caching.
        name: file name without suffix; must identify everything that ``compute`` depends on.
        compute: returns the tensor.
    """
    if folder is None:
        return compute()
    stored = load_cached(folder, name)
    if stored is not None:
        return stored
    computed = None
    try:
        with file_lock(folder / f"{name}.lock"):
            stored = load_cached(folder, name)  # another process may have stored it while this one waited
            if stored is not None:
                return stored
            computed = compute()
            store_cached(folder, name, computed)
    except OSError as error:
        _warn(folder, name, error)
    return compute() if computed is None else computed


def load_cached(folder: Path, name: str) -> Tensor | None:
    """Load the stored tensor. Return None if the file is missing or corrupted."""
    path = folder / f"{name}.npy"
    with suppress(OSError, ValueError, EOFError):
        if not _is_intact(path):
            log.warning("%s is corrupted and will be computed again.", path)
            return None
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    return None


def store_cached(folder: Path, name: str, tensor: Tensor) -> None:
    """Store a tensor atomically. Log a warning if the folder is not writable."""
    try:
        with atomic_write(folder / f"{name}.npy") as file:
            writer = _HashingWriter(file)
            np.lib.format.write_array(writer, tensor.numpy(), allow_pickle=False)  # type: ignore[arg-type]
            file.write(writer.digest.digest())
    except (OSError, UserError) as error:
        _warn(folder, name, error)


def _warn(folder: Path, name: str, error: Exception) -> None:
    log.warning("%s cannot be stored in %s (%s): set paths.cache=DIR to save time.", name, folder, error)


class _HashingWriter:
    """Forwards writes to a file and computes the SHA-256 of the content."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self.file.write(block)


def _is_intact(path: Path) -> bool:
    remaining = path.stat().st_size - CHECKSUM_BYTES
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while remaining > 0:
            block = file.read(min(BLOCK_SIZE, remaining))
            if not block:
                return False
            digest.update(block)
            remaining -= len(block)
        return remaining == 0 and file.read() == digest.digest()
