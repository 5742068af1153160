"""The idx format of MNIST and its kin: one array of bytes with its shape in front.

Layout (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"): two zero bytes, one byte for the type
of number (8: unsigned byte, the only one read here), one byte for the number of dimensions d, then d sizes as
big-endian 32-bit whole numbers, then the values, last dimension fastest.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from gencompare.errors import UserError

UNSIGNED_BYTE = 8


def unpacked(path: Path) -> bytes:
    """The bytes of an idx file, which may be packed by gzip (``.gz``)."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and fetch it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def parse(content: bytes, path: Path) -> Tensor:
    """The array in the bytes of an idx file, uint8 in the shape that it states; ``path`` is named in errors."""
    dimensions = content[3] if content[:3] == bytes((0, 0, UNSIGNED_BYTE)) and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if not dimensions or len(content) < start:
        raise UserError(f"{path} is no idx file of bytes: fetch it again.")
    shape = [int.from_bytes(content[k : k + 4], "big") for k in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path} is damaged: it states {'x'.join(map(str, shape))} values and holds {len(content) - start}."
            " Remove it and fetch it again."
        )
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)
