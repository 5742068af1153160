"""The pickles of CIFAR's Python release, read without running anything that they name.

A pickle may call any function by name. Here the only names that are admitted are the few that those files need to
describe a NumPy array, and each stands for a harmless record of its arguments.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompare.errors import UserError


class _Type:
    """``numpy.dtype("u1")``, recorded."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and fields: nothing that bytes need


class _Array:
    """``numpy.ndarray``: what fills it is (version, shape, dtype, column-major, content)."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Tensor:
        _, shape, kind, column_major, content = self.state
        content = content.encode("latin1") if isinstance(content, str) else content  # str: written by Python 2
        if not isinstance(kind, _Type) or kind.code not in ("u1", "|u1") or column_major:
            raise ValueError("its array is not one of bytes")
        if not content or len(content) != math.prod(shape):
            raise ValueError("its array is incomplete")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, _: str = "latin1") -> bytes:
    return text.encode("latin1")


ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return ADMITTED[module, name]


def read_batch(path: Path) -> dict[str, Any]:
    """The dictionary in a CIFAR batch file, arrays as uint8 tensors. Raises `UserError` for anything else."""
    try:
        with open(path, "rb") as file:
            batch = _Reader(file, encoding="latin1").load()
        if not isinstance(batch, dict):
            raise ValueError("it holds no dictionary")
        return {str(key): value.tensor() if isinstance(value, _Array) else value for key, value in batch.items()}
    except Exception as error:  # damaged pickles raise almost anything
        raise UserError(f"{path} is no CIFAR batch file ({error}): fetch it again.") from error
