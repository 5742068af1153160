"""Read JSON, YAML and numpy files from elsewhere, with limits on what they may cost. This module does not import torch.

A small file can claim gigabytes, in the header of an array or by compression, or nest so deeply that Python gives up.
Sizes and depths are therefore checked before anything is allocated.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from gencompare.errors import UserError

MAX_DEPTH = 64
"""Limit of nested lists and mappings. The config in a record, the deepest part of any file here, has about twelve."""
MAX_CONFIG_SIZE = 1 << 22
"""Size limit of a published config in bytes (4 MiB)."""
SMALL = 1 << 28
"""Size in bytes (256 MiB) that a file may always claim."""
MAX_RATIO = 100
"""Largest compression ratio of anything larger. Images compress by a factor of less than ten, deflate by up to 1032."""
BLOCK = 1 << 24


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Read a file of at most ``limit`` bytes; None reads a file of any size.

    Raises:
        UserError: it is larger, or it is a pipe or a device, which may never end.
        OSError: it cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file.")
    if limit is not None and status.st_size > limit:
        raise UserError(f"{path} has {status.st_size:,} bytes, but no such file has more than {limit:,}.")
    return path.read_bytes()


def read_text(path: Path, limit: int) -> str:
    """Read a UTF-8 file like `read_bytes`. Raise `UnicodeDecodeError` if it is not UTF-8."""
    return read_bytes(path, limit).decode()


def read_json(path: Path, limit: int, **options: Any) -> Any:
    """Parse a JSON file of at most ``limit`` bytes. ``options`` are those of `json.loads`.

    Raises:
        UserError: it is larger, or nested deeper than `MAX_DEPTH`.
        OSError, ValueError: it cannot be read, or it is not JSON.
    """
    return parse_json(path, read_text(path, limit), **options)


def parse_json(path: str | os.PathLike[str], text: str | bytes, **options: Any) -> Any:
    """Parse the content of a JSON file. The errors are those of `read_json`."""
    try:
        value = json.loads(text, **options)
    except RecursionError as error:
        raise _too_deep(path) from error
    if depth_exceeds(value, MAX_DEPTH):
        raise _too_deep(path)
    return value


def read_json_object(path: Path, **options: Any) -> dict[str, Any]:
    """Parse a JSON file that contains an object, such as a published config. The errors are those of `read_json`."""
    value = read_json(path, MAX_CONFIG_SIZE, **options)
    if not isinstance(value, dict):
        raise ValueError("it contains no JSON object")
    return value


def depth_exceeds(value: Any, limit: int) -> bool:
    """Return whether lists and dictionaries are nested deeper than ``limit``."""
    level = [value]
    for _ in range(limit):
        level = [
            part
            for each in level if isinstance(each, dict | list)
            for part in (each.values() if isinstance(each, dict) else each) if isinstance(part, dict | list)
        ]  # fmt: skip
        if not level:
            return False
    return True


def _too_deep(path: str | os.PathLike[str]) -> UserError:
    return UserError(f"{path} is nested more than {MAX_DEPTH} levels deep, which no file of this program is.")


def parse_yaml(path: Path, text: str, loader: type[Any]) -> Any:
    """Parse the content of a YAML file.

    Args:
        path: the file, for error messages.
        text: its content.
        loader: a subclass of `yaml.SafeLoader`.

    Raises:
        UserError: it is nested deeper than `MAX_DEPTH`, or it contains references, of which a few lines can expand to
            gigabytes.
        ValueError, yaml.YAMLError: it is not YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UserError(f"{path} contains a YAML anchor or alias, which this program never writes.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep(path)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return yaml.load(text, Loader=loader)


def check_claim(path: str | os.PathLike[str], claimed: int, stored: int) -> None:
    """Raise `UserError` if a file claims to contain far more bytes than ``stored``, the bytes that are there.

    Args:
        path: the file, for the message.
        claimed: size after decompression, which the file states.
        stored: size in the file.
    """
    if claimed > max(SMALL, MAX_RATIO * stored):
        raise UserError(
            f"{path} claims to contain {claimed / 2**30:,.1f} GiB in {stored:,} bytes, so it is corrupted or made to"
            " exhaust the memory: create it again."
        )


def check_torch_file(path: str | os.PathLike[str]) -> None:
    """Raise `UserError` if a file of `torch.save`, which is a zip file without compression, claims to contain more than
    it does. Other files are left to torch."""
    if not os.path.isfile(path) or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # torch reports it
        return
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(f"{path} is compressed, which no file of torch is: save it again.")
    check_claim(path, sum(member.file_size for member in members), os.path.getsize(path))


# Arrays of numpy


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays in an npz file. Raise `OSError` or `ValueError` if it is not one."""
    with _open_zip(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Read those of the arrays ``names`` that an npz file contains, without executing code in it.

    Raises:
        UserError: an array claims more than the file contains.
        OSError, ValueError: the file cannot be read, or it is not an npz file.
    """
    arrays = {}
    with _open_zip(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in names:
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} is compressed in a way that numpy does not use")
            check_claim(path, member.file_size, min(member.compress_size, path.stat().st_size))
            try:
                with archive.open(member) as file:
                    arrays[name] = _read_array(file, member.file_size, path)
            except (UserError, OSError):
                raise
            except Exception as error:  # zipfile, zlib and numpy raise almost any exception on corrupted files
                raise ValueError(str(error)) from error
    return arrays


def read_npy(path: Path) -> np.ndarray:
    """Read an npy file, without executing code in it. The errors are those of `read_npz`."""
    with open(path, "rb") as file:
        return _read_array(file, path.stat().st_size, path)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # BadZipFile, NotImplementedError, struct.error, ...
        raise ValueError(str(error)) from error


def _read_array(file: IO[bytes], size: int, path: Path) -> np.ndarray:
    """Read an array from a file of ``size`` bytes, but only if its header claims no more than that."""
    version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the npy format is not supported")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = reader(file)  # type: ignore[arg-type]
    if dtype.hasobject or not dtype.itemsize or any(length < 0 for length in shape):
        raise ValueError(f"it contains {dtype}, not numbers")
    needed, present = math.prod(shape) * dtype.itemsize, size - file.tell()
    if needed > present:
        raise UserError(
            f"{path} claims an array of shape {shape}, {needed:,} bytes, but contains {present:,} bytes: it is"
            " truncated or corrupted. Create it again."
        )
    array = np.empty(math.prod(shape), dtype)
    view = array.view(np.uint8)
    for start in range(0, needed, BLOCK):
        block = file.read(min(BLOCK, needed - start))
        view[start : start + len(block)] = np.frombuffer(block, np.uint8)
        if len(block) < min(BLOCK, needed - start):
            raise ValueError("it is truncated")
    return array.reshape(shape, order="F" if fortran_order else "C")
