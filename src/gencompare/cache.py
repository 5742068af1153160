"""Arrays cached on disk (decoded images, features of real images) under a name that identifies their inputs.

A cache file is a ``.npy`` array followed by the 32 bytes of its SHA-256. The checksum is verified before an array is
used, and arrays are memory-mapped, so that several processes share one copy. An array that does not fit in memory is
stored in several files.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.files import atomic_write, file_lock, remove_orphans, write_error

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
    stored = _load(folder, name, "c")
    return None if stored is None else torch.from_numpy(stored)


def store_cached(folder: Path, name: str, tensor: Tensor) -> None:
    """Store a tensor atomically. Log a warning if the folder is not writable."""
    try:
        _store(folder, name, tensor)
    except (OSError, UserError) as error:
        _warn(folder, name, error)


def cached_shards(folder: Path, name: str, compute: Sequence[Callable[[], Tensor]]) -> list[np.ndarray]:
    """Memory-map an array that is stored in several files, or compute and store those that are missing or corrupted.

    One computed shard at a time is in memory. After an interruption, the next call computes the remaining shards. If
    several processes start together, one computes the shards and the others wait.

    Args:
        folder: cache folder.
        name: identifies everything that ``compute`` depends on, except the number of shards.
        compute: one function for each shard, which returns it.

    Returns:
        The shards, read-only.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    names = [f"{name}-{k:05d}-of-{len(compute):05d}" for k in range(len(compute))]
    with ThreadPoolExecutor() as pool:  # checksums are computed in parallel
        stored = list(pool.map(partial(_load, folder, mode="r"), names))
    shards = [shard for shard in stored if shard is not None]
    if len(shards) == len(names):
        return shards
    try:
        with file_lock(folder / f"{name}.lock"):
            remove_orphans(folder)
            return [
                _load_or_store(folder, shard_name, function) if shard is None else shard
                for shard, shard_name, function in zip(stored, names, compute, strict=True)
            ]
    except OSError as error:
        raise write_error(folder, error) or error from error


def _load_or_store(folder: Path, name: str, compute: Callable[[], Tensor]) -> np.ndarray:
    stored = _load(folder, name, "r")  # another process may have stored it while this one waited
    if stored is None:
        _store(folder, name, compute())
        stored = _load(folder, name, "r")
    if stored is None:
        raise UserError(f"{folder / name}.npy cannot be read after it was written: set paths.cache=DIR.")
    return stored


def _load(folder: Path, name: str, mode: Literal["r", "c"]) -> np.ndarray | None:
    path = folder / f"{name}.npy"
    with suppress(OSError, ValueError, EOFError):
        if not _is_intact(path):
            log.warning("%s is corrupted and will be computed again.", path)
            return None
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    return None


def _store(folder: Path, name: str, tensor: Tensor) -> None:
    with atomic_write(folder / f"{name}.npy") as file:
        writer = _HashingWriter(file)
        np.lib.format.write_array(writer, tensor.numpy(), allow_pickle=False)  # type: ignore[arg-type]
        file.write(writer.digest.digest())


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
