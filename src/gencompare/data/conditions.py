"""Conditions beside the label: what a data set tells of each image, made from it or kept in a file."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gencompare.data.datamodule import SPLITS, ImageData, Split
from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec


class Condition(ABC):
    """One condition of a data set: (n, *shape) float32 for n images.

    It is made from the image (``of``), or kept beside it, one row an image (``kept``); a subclass writes one of them.
    """

    @abstractmethod
    def shape(self, spec: DataSpec) -> tuple[int, ...]:
        """Of one row, for images of ``spec``. Raises `UserError` where it does not go with these images."""

    def of(self, x: Tensor) -> Tensor | None:
        """The condition of images (n, C, H, W) in [-1, 1], on their device."""
        return None

    def kept(self, split: str, images: int) -> Tensor | None:
        """The rows of a whole split, in the order of its images."""
        return None


@dataclass(frozen=True)
class LowRes(Condition):
    """The image itself, made smaller by ``factor``: super-resolution.

    Bicubic with antialiasing, as Saharia et al. (2021), "Image super-resolution via iterative refinement", section 4,
    made theirs; cut to [-1, 1], and not rounded to grey levels. Mirrored images give mirrored ones.
    """

    factor: int

    def shape(self, spec: DataSpec) -> tuple[int, ...]:
        channels, height, width = spec.shape
        if self.factor < 2 or height % self.factor or width % self.factor:
            raise UserError(
                f"data.conditions.low_res.factor={self.factor} does not divide images of {height}x{width} (data"
                f" '{spec.name}'): give a whole number above 1 that does."
            )
        return channels, height // self.factor, width // self.factor

    def of(self, x: Tensor) -> Tensor:
        size = (x.shape[2] // self.factor, x.shape[3] // self.factor)
        return F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


@dataclass(frozen=True)
class Embedding(Condition):
    """Features that were computed beforehand: row k is of image k of ``data.split(name).images``.

    Args:
        path: an ``.npz`` or ``.safetensors`` file with an array (images, features) for each of ``train``, ``val`` and
            ``test``; or ``.npy`` files, one a split, with ``{split}`` in their name.
    """

    path: str | Path

    def shape(self, spec: DataSpec) -> tuple[int, ...]:
        lengths = {split: rows.shape[1] for split, rows in self._rows.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{self.path} holds embeddings of unequal length: {lengths}.")
        return (lengths["train"],)

    def kept(self, split: str, images: int) -> Tensor:
        rows = self._rows[split]
        if len(rows) != images:
            raise UserError(
                f"{self.path} holds {len(rows)} embeddings of '{split}', which has {images} images: give one for each."
            )
        return rows

    @cached_property
    def _rows(self) -> dict[str, Tensor]:
        arrays = _arrays(str(self.path))
        rows = {}
        for split in SPLITS:
            if split not in arrays:
                raise UserError(f"{self.path} holds no array '{split}': embeddings are wanted for {', '.join(SPLITS)}.")
            array = arrays[split]
            if array.ndim != 2 or not array.dtype.is_floating_point or not array.numel():
                raise UserError(
                    f"{self.path}: '{split}' is {array.dtype} of shape {tuple(array.shape)}; embeddings are real"
                    " numbers (images, features)."
                )
            rows[split] = array.float()
            if not torch.isfinite(rows[split]).all():
                raise UserError(f"{self.path}: '{split}' holds values that are not finite.")
        return rows


def _arrays(path: str) -> dict[str, Tensor]:
    """Arrays by name; nothing in the files is run."""
    kind = Path(path).suffix
    if kind not in (".npy", ".npz", ".safetensors") or (kind == ".npy" and "{split}" not in path):
        raise UserError(
            f"data.conditions.embedding.path={path}: give an .npz or .safetensors file with the arrays"
            f" {', '.join(SPLITS)}, or .npy files with {{split}} in their name."
        )
    place = path
    try:
        if kind == ".safetensors":
            return load_file(path)
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files if name in SPLITS}
        arrays = {}
        for split in SPLITS:
            place = path.replace("{split}", split)
            arrays[split] = torch.from_numpy(np.load(place, allow_pickle=False))
        return arrays
    except FileNotFoundError as error:
        raise UserError(f"There is no {place}: data.conditions.embedding.path names it.") from error
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise UserError(f"{place} is damaged, or no {kind} file of numbers ({type(error).__name__}).") from error


class Conditioned(ImageData):
    """Another data set, whose images come with further conditions.

    Args:
        data: the images.
        conditions: by the names under which models find them in ``cond``.
    """

    def __init__(self, data: ImageData, conditions: Mapping[str, Condition]) -> None:
        super().__init__(
            batch_size=data.batch_size, flip=data.flip, seed=data.seed, eval_batch_size=data.eval_batch_size,
            limit=data.limit,
        )  # fmt: skip
        if "label" in conditions:
            raise UserError("data.conditions.label: labels come with the images; give the condition another name.")
        self.data, self.conditions = data, dict(conditions)
        self.spec = replace(data.spec, conditions={name: c.shape(data.spec) for name, c in conditions.items()})

    def load(self) -> dict[str, Split]:
        return {name: replace(split, kept=self._kept(name, len(split))) for name, split in self.data.splits.items()}

    def _kept(self, name: str, images: int) -> dict[str, Tensor]:
        rows = {key: condition.kept(name, images) for key, condition in self.conditions.items()}
        return {key: value for key, value in rows.items() if value is not None}

    def cond(self, x: Tensor, part: Split) -> Cond:
        made = {name: condition.of(x) for name, condition in self.conditions.items()}
        return {**super().cond(x, part), **part.kept, **{k: v for k, v in made.items() if v is not None}}
