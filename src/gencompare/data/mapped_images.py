"""Images that do not fit in memory: arrays on disk, memory-mapped, of which only the requested images are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 1 << 24
"""Size of the parts in which `blocks` reads images (16 MiB)."""


class MappedImages:
    """Read-only images (n, C, H, W), uint8, stored in several memory-mapped arrays.

    Indexing with an integer, a slice or a tensor of indices reads these images into a new tensor. `select` chooses and
    reorders images without reading them.

    Args:
        shards: arrays (n_k, C or 1, H, W), uint8, concatenated. Greyscale arrays are repeated if others have colours.
        rows: indices (n,) into the concatenated arrays, int64; None takes all images in order.
    """

    device = torch.device("cpu")
    dtype = torch.uint8

    def __init__(self, shards: Sequence[np.ndarray], rows: Tensor | None = None) -> None:
        self.shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        self.rows = torch.arange(int(self._ends[-1])) if rows is None else rows
        channels = max(shard.shape[1] for shard in self.shards)
        self.shape = torch.Size((len(self.rows), channels, *self.shards[0].shape[2:]))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return False

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        chosen = self.rows[index]
        rows = chosen.flatten().numpy()
        images = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        shard = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(rows)  # one access for each shard, and neighbouring pages after each other
        for places in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1) if len(rows) else ():
            k = int(shard[places[0]])
            start = self._ends[k] - len(self.shards[k])
            images[places] = self.shards[k][rows[places] - start]
        return torch.from_numpy(images).reshape(*chosen.shape, *self.shape[1:])

    def select(self, index: slice | Tensor) -> MappedImages:
        """Choose or reorder images without reading them."""
        return MappedImages(self.shards, self.rows[index])

    def to(self, device: torch.device | str, **_: Any) -> Tensor:
        """Read all images into a tensor on ``device``, in parts."""
        images = torch.empty(self.shape, dtype=self.dtype, device=device)
        for part, block in zip(images.split(rows_per_block(self)), blocks(self), strict=True):
            part.copy_(block)
        return images


def rows_per_block(images: Tensor | MappedImages) -> int:
    return max(1, BLOCK_BYTES * len(images) // max(1, images.nbytes))


def blocks(images: Tensor | MappedImages) -> Iterator[Tensor]:
    """Yield the images in order, in parts of `BLOCK_BYTES`, so that never all of them are in memory."""
    size = rows_per_block(images)
    for start in range(0, len(images), size):
        yield images[start : start + size]


def concatenate(parts: Sequence[Tensor | MappedImages]) -> Tensor | MappedImages:
    """Concatenate images. The result is memory-mapped if one of the parts is."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    mapped = [MappedImages([part.numpy()]) if isinstance(part, Tensor) else part for part in parts]
    offset, rows = 0, []
    for part in mapped:
        rows.append(part.rows + offset)
        offset += int(part._ends[-1])
    return MappedImages([shard for part in mapped for shard in part.shards], torch.cat(rows))
