"""Base class of all data sets: each split is one tensor or a memory-mapped array, and batches are made by indexing."""

from __future__ import annotations

import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from gencompare.data.mapped_images import MappedImages, blocks, concatenate
from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec
from gencompare.rng import RandomSource, derive_seed, generator

SPLITS = ("train", "val", "test")

MAX_RESIDENT_FRACTION = 0.25
"""A split is moved to the GPU if it takes at most this fraction of the free GPU memory."""

MAX_EPOCHS_PER_BATCH = 16
"""Maximum ratio of the global batch size to the number of training images. Above 1, images repeat within a batch
(``debug=overfit``); a larger ratio is probably a typo."""


Images = TypeVar("Images", bound=Tensor | MappedImages)


@dataclass(frozen=True)
class Split(Generic[Images]):
    """Images of one split, with their labels and other conditions. Padding is not stored.

    Args:
        images: (n, C, H, W), uint8 in 0 to ``spec.num_bins - 1``, or float32 in [-1, 1] for continuous data. Images
            that do not fit in memory are `MappedImages`.
        labels: class indices (n,) int64, or None.
        extra_conditions: stored conditions other than the label, by name, each (n, ...).
    """

    images: Images
    labels: Tensor | None = None
    extra_conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor | slice) -> Split[Tensor]:
        """Return the rows, with their images in memory."""
        return self._map(lambda values: values[rows])

    def select(self, rows: Tensor | slice) -> Split[Images]:
        """Return the rows in this order, without reading their images if they are memory-mapped."""
        return self._map(lambda values: values.select(rows) if isinstance(values, MappedImages) else values[rows])

    def to(self, device: torch.device) -> Split[Tensor]:
        """Copy the split to ``device``. Copies to a GPU are asynchronous."""
        return self._map(lambda values: values.to(device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + sum(values.nbytes for values in self.extra_conditions.values())

    def _map(self, function: Callable[[Any], Any]) -> Split[Any]:
        return Split(
            function(self.images),
            None if self.labels is None else function(self.labels),
            {name: function(values) for name, values in self.extra_conditions.items()},
        )


def shuffle(split: Split, *purpose: str) -> Split:
    """Shuffle a split, so that its first n images are a fair sample even if the files are sorted by class.

    The permutation depends only on ``purpose`` and the number of images.
    """
    return split.select(torch.randperm(len(split), generator=generator("cpu", *purpose)))


def hold_out(split: Split, n: int, *purpose: str) -> tuple[Split, Split]:
    """Split off ``n`` random images, and return (the rest, the held-out images). ``purpose`` seeds the permutation."""
    shuffled = shuffle(split, *purpose)
    return shuffled.select(slice(n, None)), shuffled.select(slice(n))


def check_splits(splits: dict[str, Split], spec: DataSpec) -> None:
    """Check what ``load`` returned: names, shapes, types, levels and labels.

    Held-out images that are training images, too, give a warning.

    Raises:
        UserError: the splits do not match ``spec``.
    """
    name = f"Data set '{spec.name}': "
    if set(splits) != set(SPLITS):
        raise UserError(f"{name}load() must return the splits {', '.join(SPLITS)}, not {', '.join(sorted(splits))}.")
    channels, height, width = spec.shape
    shape = (channels, height - 2 * spec.padding, width - 2 * spec.padding)
    for key, split in splits.items():
        images, labels = split.images, split.labels
        if not len(images):
            raise UserError(f"{name}'{key}' has no images.")
        if tuple(images.shape[1:]) != shape:
            raise UserError(
                f"{name}'{key}' images are {tuple(images.shape)}, but spec needs (n, {', '.join(map(str, shape))})."
            )
        if spec.num_bins is None and not images.is_floating_point():
            raise UserError(f"{name}'{key}' images are {images.dtype}, but num_bins=None needs floats in [-1, 1].")
        if spec.num_bins is not None and (
            images.dtype != torch.uint8 or (spec.num_bins < 256 and _range(images)[1] >= spec.num_bins)
        ):
            found = "{}, from {:.3g} to {:.3g}".format(images.dtype, *_range(images))
            raise UserError(
                f"{name}'{key}' images are {found}, but must be uint8 from 0 to num_bins - 1 = {spec.num_bins - 1}."
            )
        if spec.num_classes and labels is None:
            raise UserError(f"{name}'{key}' has no labels, but spec.num_classes={spec.num_classes}.")
        if labels is not None and (
            labels.shape != (len(images),)
            or (spec.num_classes and not 0 <= int(labels.min()) <= int(labels.max()) < spec.num_classes)
        ):
            raise UserError(
                f"{name}labels of '{key}' must be one class from 0 to {spec.num_classes - 1} for each of the"
                f" {len(images)} images."
            )
    train = splits["train"].images
    for key in ("val", "test"):
        first = splits[key].images[:50]
        # A few patterns that every split repeats are a deliberate choice.
        if len(first.unique(dim=0)) > 10 and all(_contains(train, image) for image in first):
            warnings.warn(
                f"{name}the '{key}' images are training images, too: splits should be disjoint.", stacklevel=3
            )


def _range(images: Tensor | MappedImages) -> tuple[float, float]:
    bounds = [block.aminmax() for block in blocks(images)]
    return min(float(low) for low, _ in bounds), max(float(high) for _, high in bounds)


def _contains(images: Tensor | MappedImages, image: Tensor) -> bool:
    """Return whether ``image`` is one of ``images``; few pixels decide for most of them, without comparing all."""
    positions = torch.unravel_index(torch.linspace(0, image.numel() - 1, 8).long(), image.shape)
    for block in blocks(images):
        rows = torch.arange(len(block))
        for channel, y, x in zip(*positions, strict=True):
            rows = rows[block[rows, channel, y, x] == image[channel, y, x]]
        if any(bool((block[row] == image).all()) for row in rows):
            return True
    return False


class ImageData(pl.LightningDataModule):
    """Base class of data sets.

    A subclass sets ``spec`` in ``__init__`` and implements
    ``load() -> {"train": Split, "val": Split, "test": Split}``. ``__init__`` reads files only if ``spec`` depends on
    their content.

    Args:
        batch_size: global batch size, divided among the processes.
        random_flip: true flips each training image horizontally with probability 1/2. ``alternating`` flips a random
            half of the images in the first epoch, the other half in the next, and so on in turn, so that two
            consecutive epochs show each image once in each orientation (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds
            on a single GPU", section 3.6, https://arxiv.org/abs/2404.00498).
        seed: determines the order of the training images and the flips.
        eval_batch_size: batch size for validation and test.
        train_subset_size: train on this many images only; None trains on all of them.
    """

    spec: DataSpec

    def __init__(
        self,
        *,
        batch_size: int = 128,
        random_flip: bool | Literal["alternating"] = False,
        seed: int = 0,
        eval_batch_size: int = 500,
        train_subset_size: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"trainer.global_batch_size={batch_size} must be at least 1.")
        if eval_batch_size < 1:
            raise UserError(f"data.eval_batch_size={eval_batch_size} must be at least 1.")
        if train_subset_size is not None and train_subset_size < 1:
            raise UserError(f"data.train_subset_size={train_subset_size} must be at least 1, or null for all images.")
        if not (isinstance(random_flip, bool) or random_flip == "alternating"):
            raise UserError(f"data.random_flip={random_flip} must be true, false or alternating.")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.random_flip: bool | Literal["alternating"] = random_flip  # type: ignore[assignment]
        self.seed = seed
        self.train_subset_size = train_subset_size
        self.start_step = 0
        """First step of the training stream; set when a run is resumed."""

    @abstractmethod
    def load(self) -> dict[str, Split]:
        """Decode all splits. Raise `UserError`, with a suggested override, if files are missing or corrupted."""

    @cached_property
    def splits(self) -> dict[str, Split]:
        splits = self.load()
        check_splits(splits, self.spec)
        return splits

    @property
    def train_subset(self) -> Split:
        """Training images: the first ``train_subset_size`` of ``train``. Reference statistics use the whole split."""
        return self.split("train").select(slice(self.train_subset_size))

    def split(self, name: str) -> Split:
        """Return a split by name. ``+`` concatenates splits in the given order, as in ``train+val``."""
        parts = name.split("+")
        if not set(parts) <= set(SPLITS) or len(set(parts)) < len(parts):
            raise UserError(f"There is no split '{name}': choose from {', '.join(SPLITS)}, or join several with +.")
        if len(parts) == 1:
            return self.splits[name]
        found = [self.splits[part] for part in parts]
        labels = [split.labels for split in found if split.labels is not None]
        extra = found[0].extra_conditions
        return Split(
            concatenate([split.images for split in found]),
            torch.cat(labels) if len(labels) == len(found) else None,
            {key: torch.cat([split.extra_conditions[key] for split in found]) for key in extra},
        )

    def hash(self, name: str) -> str:
        """Return the SHA-256 of the shape, data type, pixels and labels of a split."""
        if name not in self._hashes:
            split = self.split(name)
            digest = hashlib.sha256(str((tuple(split.images.shape), str(split.images.dtype))).encode())
            for tensor in (split.images, split.labels):
                for block in () if tensor is None else blocks(tensor):
                    digest.update(block.contiguous().cpu().numpy().data)
            self._hashes[name] = digest.hexdigest()
        return self._hashes[name]

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {}

    # From stored pixels to model inputs

    def normalize(self, images: Tensor) -> Tensor:
        """Convert stored images to float32 in [-1, 1], and pad them with -1 to ``spec.shape``."""
        if self.spec.num_bins is not None:
            images = images.float().mul_(2 / (self.spec.num_bins - 1)).sub_(1)
        if self.spec.padding:
            images = torch.nn.functional.pad(images, (self.spec.padding,) * 4, value=-1.0)
        return images

    def cond(self, x: Tensor, rows: Split) -> Cond:
        """Return the conditions of the batch ``rows``. ``x`` contains its images, normalised and possibly flipped."""
        return {} if rows.labels is None else {"label": rows.labels}

    def batches(self, name: str, batch_size: int | None = None) -> Iterator[tuple[Tensor, Cond]]:
        """Iterate over a split once, in fixed order, without flips, and including the last partial batch.

        ``train`` is restricted to `train_subset`. ``batch_size`` defaults to ``eval_batch_size``.
        """
        split = self.train_subset if name == "train" else self.split(name)
        batch_size = batch_size or self.eval_batch_size
        for start in range(0, len(split), batch_size):
            rows = split[slice(start, start + batch_size)]
            x = self.normalize(rows.images)
            yield x, self.cond(x, rows)

    # The interface of LightningDataModule

    def setup(self, stage: str | None = None) -> None:
        _ = self.splits

    def train_dataloader(self) -> TrainStream:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        return TrainStream(self, start_step=self.start_step, rank=rank, world_size=world_size, device=device)

    def val_dataloader(self) -> SplitLoader:
        return SplitLoader(self, "val")

    def test_dataloader(self) -> SplitLoader:
        return SplitLoader(self, "test")

    def check_batch_size(self, processes: int) -> None:
        """Raise `UserError` unless the training images can be divided into batches for ``processes`` processes."""
        if self.batch_size % processes:
            raise UserError(
                f"trainer.global_batch_size={self.batch_size} is not divisible by {processes} processes:"
                f" choose a multiple of {processes}."
            )
        num_images = len(self.train_subset)
        if not num_images:
            raise UserError(f"Data set '{self.spec.name}' has no training images.")
        if self.batch_size > MAX_EPOCHS_PER_BATCH * num_images:
            raise UserError(
                f"trainer.global_batch_size={self.batch_size} is more than {MAX_EPOCHS_PER_BATCH} times the"
                f" {num_images} training images: choose a smaller batch size."
            )

    def predict_dataloader(self) -> SplitLoader:
        return SplitLoader(self, "test")


class TrainStream:
    """An infinite stream of training batches, starting at ``start_step``.

    Every epoch visits the images in a new permutation, determined by the seed and the epoch. Step s takes items s B to
    (s + 1) B - 1 of the concatenated permutations, where B is the global batch size. Rank r of W takes the r-th of W
    equal parts of this batch. Training is therefore independent of the number of processes and of where a run was
    resumed.
    """

    def __init__(self, data: ImageData, *, start_step: int, rank: int, world_size: int, device: torch.device) -> None:
        data.check_batch_size(world_size)
        self.data, self.device, self.start_step = data, device, start_step
        self.rank, self.world_size = rank, world_size
        self.split = to_device_if_small(data.train_subset, device)

    def batch_indices(self, step: int) -> Tensor:
        """Return the indices (B,) of the images in the global batch of ``step``."""
        size, positions = len(self.split), self._positions(step)
        indices = torch.empty(len(positions), dtype=torch.int64)
        first, last = step * self.data.batch_size, (step + 1) * self.data.batch_size - 1
        for epoch in range(first // size, last // size + 1):
            in_epoch = positions // size == epoch
            indices[in_epoch] = self._permutation_of(epoch)[positions[in_epoch] % size]
        return indices

    def _positions(self, step: int) -> Tensor:
        """Return the positions (B,) of the global batch of ``step`` in the concatenated permutations."""
        return torch.arange(step * self.data.batch_size, (step + 1) * self.data.batch_size)

    def alternating_flips(self, step: int, indices: Tensor) -> Tensor:
        """Return which images of the global batch of ``step``, whose indices are ``indices``, are flipped, (B,)."""
        epochs = self._positions(step) // len(self.split)
        return self._flipped_in_first_epoch[indices] ^ (epochs % 2 == 1)

    @cached_property
    def _flipped_in_first_epoch(self) -> Tensor:
        flip_generator = generator("cpu", self.data.seed, "alternating flips")
        return torch.rand(len(self.split), generator=flip_generator) < 0.5

    def _permutation_of(self, epoch: int) -> Tensor:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = torch.randperm(
                len(self.split), generator=generator("cpu", self.data.seed, "order", epoch)
            )
        return self._permutation

    def __iter__(self) -> Iterator[tuple[Tensor, Cond]]:
        local_batch_size = self.data.batch_size // self.world_size
        start, stop = self.rank * local_batch_size, (self.rank + 1) * local_batch_size
        flip_generator = torch.Generator(self.device)
        step = self.start_step
        while True:
            indices = self.batch_indices(step)
            rows = self.split[copy_to(self.split.images.device, indices[start:stop])].to(self.device)
            images = self.data.normalize(rows.images)
            if self.data.random_flip:
                if self.data.random_flip == "alternating":
                    flipped = copy_to(self.device, self.alternating_flips(step, indices)[start:stop])
                else:
                    flip_generator.manual_seed(derive_seed(self.data.seed, "flip", step))
                    flipped = RandomSource(flip_generator, start, stop, self.data.batch_size).uniform() < 0.5
                images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
            yield images, self.data.cond(images, rows)
            step += 1


def copy_to(device: torch.device, values: Tensor) -> Tensor:
    """Copy a tensor from the CPU to ``device``."""
    if device.type == "cuda":
        # A copy from pinned memory does not wait for work already queued on the GPU.
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def to_device_if_small(split: Split, device: torch.device) -> Split:
    """Move a split to ``device`` if it is a GPU with enough free memory. Otherwise return the split unchanged."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if split.nbytes <= MAX_RESIDENT_FRACTION * free:
            return split.to(device)
    return split


class SplitLoader:
    """One pass over a split in fixed order, in batches of ``eval_batch_size``; rank r of W takes every W-th batch."""

    def __init__(self, data: ImageData, name: str) -> None:
        self.data, self.name = data, name
        trainer = data.trainer
        self.rank, self.world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def __len__(self) -> int:
        num_batches = -(-len(self.data.split(self.name)) // self.data.eval_batch_size)
        return len(range(self.rank, num_batches, self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Cond]]:
        return islice(self.data.batches(self.name), self.rank, None, self.world_size)
