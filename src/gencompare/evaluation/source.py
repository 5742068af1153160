"""What evaluation asks of data and of models: a part of the datamodule, and anything with ``sample``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gencompare.contract import Cond, DataSpec


class Part(Protocol):
    """One split: images at their own levels, unpadded, labels (or None), and further conditions that are kept."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor | None: ...

    @property
    def kept(self) -> Mapping[str, Tensor]: ...

    def __len__(self) -> int: ...


class Data(Protocol):
    """The part of a datamodule that evaluation uses."""

    spec: DataSpec

    def split(self, name: str) -> Any: ...

    def hash(self, name: str) -> str: ...

    def normalize(self, images: Tensor) -> Tensor: ...

    def cond(self, x: Tensor, part: Any) -> Cond: ...


@runtime_checkable
class Samples(Protocol):
    """Anything that draws images: a `GenerativeModel`, or an object with this one method.

    Also used where they are there: ``conditional``, ``uses``, ``device``, ``counted_networks()``, ``likelihoods()``,
    ``reconstruct()``, ``sampling_description()``.
    """

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor: ...


def batch_of(data: Data, split: str, rows: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Cond]:
    """Images of a split as a model sees them, (n, C, H, W), and all that the data tell of them, on ``device``."""
    part = data.split(split)[rows]
    x = data.normalize(part.images.to(device))
    return x, {name: value.to(device) for name, value in data.cond(x, part).items()}
