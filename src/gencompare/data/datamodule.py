"""The base datamodule: each split is one uint8 tensor in memory, from which batches are indexed."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec
from gencompare.rng import RandomSource, derive_seed, generator

if TYPE_CHECKING:
    pass


def shuffled(split: Split, *purpose: str) -> Split:
    """The same images in an order that depends on ``purpose`` and their number alone.

    Files often come class by class; after this the first n images of a split are a fair sample of it.
    """
    return split[torch.randperm(len(split), generator=generator("cpu", *purpose))]


def hold_out(split: Split, n: int, *purpose: str) -> tuple[Split, Split]:
    """(the rest, ``n`` images held out), both shuffled; each image is in one of the two."""
    mixed = shuffled(split, *purpose)
    return mixed[slice(n, None)], mixed[slice(n)]


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
        self.split = to_device_if_small(data.training, device)
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
                source.manual_seed(derive_seed(self.data.seed, "flip", step))
                mirrored = RandomSource(source, start, stop, self.data.batch_size).uniform() < 0.5
                images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            yield images, self.data.cond(images, part)
            step += 1


def to_device_if_small(split: Split, device: torch.device) -> Split:
    """The split on ``device`` if it fits well, otherwise as it is."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if split.nbytes <= RESIDENT_SHARE * free:
            return split.to(device)
    return split


SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Images of one split, (n, C, H, W): uint8 levels 0 to num_levels - 1, or float32 in [-1, 1] where continuous.

    Padding is not stored. ``labels`` is (n,) int64, or None. ``kept`` has further conditions by name, (n, ...).
    """

    images: Tensor
    labels: Tensor | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Split:
        """The same on ``device``; on a GPU this does not wait for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + sum(rows.nbytes for rows in self.kept.values())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Split:
        return Split(
            change(self.images),
            None if self.labels is None else change(self.labels),
            {name: change(rows) for name, rows in self.kept.items()},
        )


class ImageData(pl.LightningDataModule):
    """Base of every data set.

    A subclass sets ``spec`` in ``__init__`` (reading files only when it must know their shape) and writes
    ``load() -> {"train": Split, "val": Split, "test": Split}``.

    Args:
        batch_size: the global batch, shared out over the processes.
        flip: mirror training images left to right, each with probability 1/2.
        seed: decides the order of the training images and the flips.
        eval_batch_size: rows of a validation batch.
        limit: train on the first ``limit`` images alone; None takes them all.
    """

    spec: DataSpec

    def __init__(
        self,
        *,
        batch_size: int = 128,
        flip: bool = False,
        seed: int = 0,
        eval_batch_size: int = 500,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"The global batch must hold at least 1 image, not {batch_size}.")
        if eval_batch_size < 1:
            raise UserError(f"data.eval_batch_size={eval_batch_size} must be at least 1 image.")
        if limit is not None and limit < 1:
            raise UserError(f"data.limit={limit} leaves nothing to train on: set it to null or at least 1.")
        self.batch_size, self.flip, self.seed, self.eval_batch_size = batch_size, flip, seed, eval_batch_size
        self.limit = limit
        self.start_step = 0
        """First step of the training stream; a resumed run sets it."""

    @abstractmethod
    def load(self) -> dict[str, Split]:
        """Decode the data set. Raises `UserError` with the way out when files are missing or damaged."""

    @cached_property
    def splits(self) -> dict[str, Split]:
        splits = self.load()
        assert set(splits) == set(SPLITS), f"load() gives {sorted(splits)}, not {SPLITS}"
        return splits

    @property
    def training(self) -> Split:
        """What is trained on: the split ``train``, or its first ``limit`` images. (The reference stays whole.)"""
        return self.split("train")[slice(self.limit)]

    def split(self, name: str) -> Split:
        """``train``, ``val``, ``test``, or some of them together (``train+val``), in a fixed order."""
        parts = name.split("+")
        if not set(parts) <= set(SPLITS) or len(set(parts)) < len(parts):
            raise UserError(f"There is no split '{name}': choose one of {', '.join(SPLITS)}, or join some with +.")
        if len(parts) == 1:
            return self.splits[name]
        found = [self.splits[part] for part in parts]
        labels = [split.labels for split in found if split.labels is not None]
        return Split(
            torch.cat([split.images for split in found]),
            torch.cat(labels) if len(labels) == len(found) else None,
            {key: torch.cat([split.kept[key] for split in found]) for key in found[0].kept},
        )

    def hash(self, name: str) -> str:
        """SHA-256 over shape, pixels and labels of a split."""
        if name not in self._hashes:
            split = self.split(name)
            digest = hashlib.sha256(str((tuple(split.images.shape), str(split.images.dtype))).encode())
            for tensor in (split.images, split.labels):
                if tensor is not None:
                    digest.update(tensor.contiguous().cpu().numpy().data)
            self._hashes[name] = digest.hexdigest()
        return self._hashes[name]

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {}

    # Between stored levels and what a model sees

    def normalize(self, images: Tensor) -> Tensor:
        """Stored images to float32 in [-1, 1], padded with -1 to ``spec.shape``."""
        if self.spec.num_levels is not None:
            images = images.float().mul_(2 / (self.spec.num_levels - 1)).sub_(1)
        if self.spec.padding:
            images = torch.nn.functional.pad(images, (self.spec.padding,) * 4, value=-1.0)
        return images

    def cond(self, x: Tensor, part: Split) -> Cond:
        """The conditions of images ``x`` (n, C, H, W), as `normalize` gives them, that are the rows of ``part``."""
        return {} if part.labels is None else {"label": part.labels}

    def batches(self, name: str, size: int | None = None) -> Iterator[tuple[Tensor, Cond]]:
        """One pass over a split (of ``train``: over `training`) in its fixed order, no flips, nothing left out."""
        split = self.training if name == "train" else self.split(name)
        for start in range(0, len(split), size or self.eval_batch_size):
            part = split[slice(start, start + (size or self.eval_batch_size))]
            x = self.normalize(part.images)
            yield x, self.cond(x, part)

    # What Lightning asks for

    def setup(self, stage: str | None = None) -> None:
        _ = self.splits

    def train_dataloader(self) -> TrainStream:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        return TrainStream(self, start_step=self.start_step, rank=rank, world=world, device=device)

    def val_dataloader(self) -> SplitLoader:
        return SplitLoader(self, "val")

    def test_dataloader(self) -> SplitLoader:
        return SplitLoader(self, "test")

    def predict_dataloader(self) -> SplitLoader:
        return SplitLoader(self, "test")


class SplitLoader:
    """One pass over a split in its fixed order, in batches of ``eval_batch_size``; each process gets its own."""

    def __init__(self, data: ImageData, name: str) -> None:
        self.data, self.name = data, name
        trainer = data.trainer
        self.rank, self.world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def __len__(self) -> int:
        batches = -(-len(self.data.split(self.name)) // self.data.eval_batch_size)
        return len(range(self.rank, batches, self.world))

    def __iter__(self) -> Iterator[tuple[Tensor, Cond]]:
        return islice(self.data.batches(self.name), self.rank, None, self.world)
