"""Batches from resident tensors: which images step s sees is a function of the seed and s alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gencompare.contract import Cond
from gencompare.errors import UserError
from gencompare.seeds import Draws, derive, generator

if TYPE_CHECKING:
    from gencompare.data.base import ImageData, Split

RESIDENT_SHARE = 0.25
"""A split moves to the device when it takes at most this share of the device's free memory."""


MOST_EPOCHS = 16
"""A batch may go through the training images several times (debug=overfit), but a slip of the finger is refused."""


class TrainStream:
    """An endless stream of training batches, beginning at ``start_step``.

    The images are visited in one random order after another (a permutation an epoch, a function of seed and epoch).
    Step s takes places s B to (s + 1) B of that sequence, B being the global batch; rank r of W holds the r-th of W
    equal parts of it. So what is learned at a step depends on neither the number of processes nor on resuming.
    """

    def __init__(self, data: ImageData, *, start_step: int, rank: int, world: int, device: torch.device) -> None:
        if data.batch_size % world:
            raise UserError(
                f"trainer.global_batch_size={data.batch_size} cannot be shared out over {world} processes:"
                f" choose a multiple of {world}."
            )
        self.data, self.device, self.start_step = data, device, start_step
        self.rank, self.world = rank, world
        self.split = resident(data.training, device)
        if not len(self.split):
            raise UserError(f"Data '{data.spec.name}' has no training images.")
        if data.batch_size > MOST_EPOCHS * len(self.split):
            raise UserError(
                f"trainer.global_batch_size={data.batch_size} is more than {MOST_EPOCHS} times the {len(self.split)}"
                " training images: give a smaller one."
            )

    def rows(self, step: int) -> Tensor:
        """Indices of the global batch of ``step``, (B,)."""
        size, batch = len(self.split), self.data.batch_size
        places = torch.arange(step * batch, (step + 1) * batch)
        rows = torch.empty(batch, dtype=torch.int64)
        for epoch in range(int(places[0]) // size, int(places[-1]) // size + 1):
            inside = places // size == epoch
            rows[inside] = self._order(epoch)[places[inside] % size]
        return rows

    def _order(self, epoch: int) -> Tensor:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = torch.randperm(
                len(self.split), generator=generator("cpu", self.data.seed, "order", epoch)
            )
        return self._permutation

    def __iter__(self) -> Iterator[tuple[Tensor, Cond]]:
        share = self.data.batch_size // self.world
        start, stop = self.rank * share, (self.rank + 1) * share
        source = torch.Generator(self.device)
        step = self.start_step
        while True:
            rows = self.rows(step)[start:stop]
            if self.split.images.is_cuda:
                # From pinned memory the copy does not wait for the work that the device has in hand.
                rows = rows.pin_memory().to(self.split.images.device, non_blocking=True)
            part = self.split[rows].to(self.device)
            images = self.data.normalize(part.images)
            if self.data.flip:
                source.manual_seed(derive(self.data.seed, "flip", step))
                mirrored = Draws(source, start, stop, self.data.batch_size).uniform() < 0.5
                images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            yield images, self.data.cond(images, part)
            step += 1


def resident(split: Split, device: torch.device) -> Split:
    """The split on ``device`` if it fits well, otherwise as it is."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if split.nbytes <= RESIDENT_SHARE * free:
            return split.to(device)
    return split
