"""What evaluation asks of data and of models: a part of the datamodule, and anything with ``sample``."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gencompare.contract import Cond, DataSpec


class Part(Protocol):
    """One split: images at their own levels, unpadded, and labels (or None)."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor | None: ...

    def __len__(self) -> int: ...


class Data(Protocol):
    """The part of a datamodule that evaluation uses."""

    spec: DataSpec

    def split(self, name: str) -> Any: ...

    def hash(self, name: str) -> str: ...

    def normalize(self, images: Tensor) -> Tensor: ...

    def cond(self, labels: Tensor | None) -> Cond: ...


@runtime_checkable
class Samples(Protocol):
    """Anything that draws images: a `GenerativeModel`, or an object with this one method.

    Also used where they are there: ``conditional``, ``device``, ``counted_networks()``, ``likelihoods()``,
    ``reconstruct()``, ``sampling_description()``.
    """

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor: ...
