"""Safetensors files with a checksum."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gencompare.checksums import check_safetensors, seal_safetensors
from gencompare.errors import CorruptedFileError
from gencompare.files import atomic_write
from gencompare.safe_files import read_bytes


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, atomically and with a checksum."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    payload = seal_safetensors(partial(save, contiguous), metadata)
    with atomic_write(path) as file:
        file.write(payload)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name, and verify its checksum if it has one.

    Raises:
        CorruptedFileError: the file is corrupted.
        OSError: the file cannot be read.
    """
    payload = read_bytes(path)
    check_safetensors(path, payload)
    try:
        return load(payload)
    except SafetensorError as error:
        raise CorruptedFileError(path) from error
