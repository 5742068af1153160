"""Conditions other than the class label, computed from the images or read from a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gencompare.data.datamodule import SPLITS, ImageData, Split
from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec
from gencompare.safe_files import read_npy, read_npz


class Condition(ABC):
    """One condition of a data set: a float32 tensor (n, \\*shape) for n images.

    A subclass implements either `compute`, for a condition that is a function of the image, or `load`, for one that is
    stored with the data set.
    """

    @abstractmethod
    def shape(self, spec: DataSpec) -> tuple[int, ...]:
        """Return the condition's shape for one image. Raise `UserError` if it is incompatible with ``spec``."""

    def compute(self, x: Tensor) -> Tensor | None:
        """Compute the condition of images ``x`` (n, C, H, W) in [-1, 1] on their device, or None if it is stored."""
        return None

    def load(self, split: str, num_images: int) -> Tensor | None:
        """Load the condition of a whole split, in the order of its images. Return None if it is computed."""
        return None


@dataclass(frozen=True)
class LowRes(Condition):
    """The image itself, downsampled by ``factor``, as a condition for super-resolution.

    Downsampling is bicubic with antialiasing, as in Saharia et al. (2021), "Image super-resolution via iterative
    refinement", section 4 (https://arxiv.org/abs/2104.07636), and commutes with flips. The result is clamped to [-1, 1]
    and not quantised.

    Args:
        factor: downsampling factor; must divide the height and the width of the images.
    """

    factor: int

    def shape(self, spec: DataSpec) -> tuple[int, ...]:
        channels, height, width = spec.shape
        if self.factor < 2 or height % self.factor or width % self.factor:
            raise UserError(
                f"data.conditions.low_res.factor={self.factor} must be an integer above 1 that divides"
                f" {height}x{width}, the image size of data set '{spec.name}'."
            )
        return channels, height // self.factor, width // self.factor

    def compute(self, x: Tensor) -> Tensor:
        size = (x.shape[2] // self.factor, x.shape[3] // self.factor)
        return F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


@dataclass(frozen=True)
class Embedding(Condition):
    """Precomputed embeddings, in the order of ``data.split(name).images``.

    Args:
        path: an ``.npz`` or ``.safetensors`` file with an array (num_images, dim) for each of ``train``, ``val`` and
            ``test``; or one ``.npy`` file per split, with ``{split}`` in the path.
    """

    path: str | Path

    def shape(self, spec: DataSpec) -> tuple[int, ...]:
        dims = {split: rows.shape[1] for split, rows in self._embeddings.items()}
        if len(set(dims.values())) > 1:
            raise UserError(f"{self.path} has embeddings of unequal length: {dims}.")
        return (dims["train"],)

    def load(self, split: str, num_images: int) -> Tensor:
        rows = self._embeddings[split]
        if len(rows) != num_images:
            raise UserError(
                f"{self.path} has {len(rows)} embeddings for '{split}', but this split has {num_images} images:"
                " provide one for each image."
            )
        return rows

    @cached_property
    def _embeddings(self) -> dict[str, Tensor]:
        arrays = _read_arrays(str(self.path))
        embeddings = {}
        for split in SPLITS:
            if split not in arrays:
                raise UserError(f"{self.path} has no array '{split}': provide embeddings for {', '.join(SPLITS)}.")
            array = arrays[split]
            if array.ndim != 2 or not array.dtype.is_floating_point or not array.numel():
                raise UserError(
                    f"{self.path}: '{split}' is {array.dtype} of shape {tuple(array.shape)}; embeddings must be"
                    " floating-point arrays (num_images, dim)."
                )
            embeddings[split] = array.float()
            if not torch.isfinite(embeddings[split]).all():
                raise UserError(f"{self.path}: '{split}' contains values that are not finite.")
        return embeddings


def _read_arrays(path: str) -> dict[str, Tensor]:
    """Read the arrays by split name, without unpickling."""
    suffix = Path(path).suffix
    if suffix not in (".npy", ".npz", ".safetensors") or (suffix == ".npy" and "{split}" not in path):
        raise UserError(
            f"data.conditions.embedding.path={path}: use an .npz or .safetensors file with the arrays"
            f" {', '.join(SPLITS)}, or .npy files with {{split}} in the path."
        )
    current = path
    try:
        if suffix == ".safetensors":
            return load_file(path)
        if suffix == ".npz":
            return {name: torch.from_numpy(array) for name, array in read_npz(Path(path), SPLITS).items()}
        arrays = {}
        for split in SPLITS:
            current = path.replace("{split}", split)
            arrays[split] = torch.from_numpy(read_npy(Path(current)))
        return arrays
    except FileNotFoundError as error:
        raise UserError(f"There is no file {current}: check data.conditions.embedding.path.") from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{current} is corrupted or not a valid {suffix} file of numbers ({type(error).__name__})."
        ) from error


class ConditionedData(ImageData):
    """A data set with additional conditions.

    Args:
        data: the data set that provides the images.
        conditions: additional conditions, by their key in ``cond``.
    """

    def __init__(self, data: ImageData, conditions: Mapping[str, Condition]) -> None:
        super().__init__(
            batch_size=data.batch_size,
            random_flip=data.random_flip,
            seed=data.seed,
            eval_batch_size=data.eval_batch_size,
            train_subset_size=data.train_subset_size,
        )
        if "label" in conditions:
            raise UserError("data.conditions.label: this name is reserved for class labels; choose another name.")
        self.data, self.conditions = data, dict(conditions)
        self.spec = replace(data.spec, conditions={name: c.shape(data.spec) for name, c in conditions.items()})

    def load(self) -> dict[str, Split]:
        return {
            name: replace(split, extra_conditions=self._stored_conditions(name, len(split)))
            for name, split in self.data.splits.items()
        }

    def _stored_conditions(self, split: str, num_images: int) -> dict[str, Tensor]:
        loaded = {name: condition.load(split, num_images) for name, condition in self.conditions.items()}
        return {name: value for name, value in loaded.items() if value is not None}

    def cond(self, x: Tensor, rows: Split) -> Cond:
        computed = {name: condition.compute(x) for name, condition in self.conditions.items()}
        computed = {name: value for name, value in computed.items() if value is not None}
        return {**super().cond(x, rows), **rows.extra_conditions, **computed}
