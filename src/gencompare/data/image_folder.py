"""Any collection of PNG and JPEG files in a folder tree or a zip file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from gencompare.data.archives import open_archive
from gencompare.data.datamodule import SPLITS, ImageData, Split, hold_out, shuffle
from gencompare.data.file_formats import IMAGE_SUFFIXES, decode_or_map
from gencompare.data.mapped_images import MappedImages
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Layout:
    """The splits and classes of the files of a data set, as defined by its folders."""

    splits: list[str] | None
    """Split of each file, or None if the folders define no splits."""
    labels: list[int] | None
    """Class index of each file, or None if the folders define no classes."""
    classes: tuple[str, ...] = ()
    """Class names in alphabetical order; label k is ``classes[k]``."""


def read_layout(names: Sequence[str], archive: Path) -> Layout:
    """Infer splits and classes from the paths of all files.

    The supported layouts are ``split/class/name``, ``split/name``, ``class/name`` and ``name``. A single folder that
    contains everything is ignored. The top-level folders are splits if each is named after a split. The folders below
    them, or the top-level folders if there are no splits, are classes if there are at least two.

    Args:
        names: file names, as in `Archive.names`.
        archive: the folder or zip file, for error messages.
    """
    paths = [PurePosixPath(name).parts for name in names]
    while len(top := {path[0] for path in paths}) == 1 and not top & SPLIT_FOLDERS.keys() and _all_in_folders(paths):
        paths = [path[1:] for path in paths]
    splits = None
    top = {path[0] for path in paths if len(path) > 1}
    if split_folders := top & SPLIT_FOLDERS.keys():
        others = sorted(top - split_folders) or [path[0] for path in paths if len(path) == 1]
        if others:
            raise UserError(
                f"{archive} contains the split folder '{min(split_folders)}' next to '{others[0]}':"
                " move all images into train, val and test, or rename the split folders."
            )
        if "train" not in split_folders:
            raise UserError(f"{archive} contains the split folder '{min(split_folders)}' but no 'train': add it.")
        splits = [SPLIT_FOLDERS[path[0]] for path in paths]
        paths = [path[1:] for path in paths]
    folders = [path[0] if len(path) > 1 else None for path in paths]
    classes = tuple(sorted({folder for folder in folders if folder is not None}))
    if classes and None in folders:
        raise UserError(
            f"{archive} contains {names[folders.index(None)]} next to class folders such as '{classes[0]}':"
            " move all images into class folders, or none."
        )
    if len(classes) < 2:
        return Layout(splits, None)
    class_index = {name: k for k, name in enumerate(classes)}
    return Layout(splits, [class_index[str(folder)] for folder in folders], classes)


def _all_in_folders(paths: Sequence[tuple[str, ...]]) -> bool:
    return all(len(path) > 1 for path in paths)


class ImageFolder(ImageData):
    """Images stored as ``split/class/name``, ``split/name``, ``class/name`` or ``name``.

    Splits without a folder are held out from the training images by a fixed permutation of the sorted file names.
    Class folders, if there are at least two, are numbered in alphabetical order. Transparent pixels become white, and
    the EXIF orientation is applied. Images that take more than `file_formats.MAX_IN_MEMORY_BYTES` when decoded are read
    from the cache on disk when they are needed.

    Args:
        root: the folder or the zip file.
        cache: folder for the decoded images; None decodes them at every start, and keeps them in memory even if they
            are large.
        image_size: centre-crop and resize each image to this height and width (bicubic, antialiased); None keeps the
            images as they are, which requires that all have the same size.
        channels: 1 (greyscale), 3 (RGB), or None for 1 if all files are greyscale and 3 otherwise.
        val_fraction: fraction of the training images held out for validation if there is no folder for that split.
        test_fraction: likewise for the test split.
        common: arguments of `ImageData`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        cache: str | Path | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
            raise UserError(f"data.image_size={image_size} must be one whole number of pixels, such as 32, or null.")
        if channels not in (None, 1, 3):
            raise UserError(f"data.channels={channels} must be 1 (greyscale), 3 (RGB) or null.")
        if min(val_fraction, test_fraction) <= 0 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} must be positive and leave"
                " some images for training."
            )
        self.root = Path(root).expanduser()
        self.cache = None if cache is None else Path(cache).expanduser()
        self.image_size, self.channels = image_size, channels
        self.fractions = {"test": test_fraction, "val": val_fraction}

    @cached_property
    def spec(self) -> DataSpec:  # type: ignore[override]  # depends on the files
        images, layout = self._images_and_layout
        channels, height, width = images.shape[1:]
        stem = re.sub(r"\W+", "_", self.root.resolve().stem).strip("_")
        return DataSpec(f"image_folder_{stem}", (channels, height, width), num_classes=len(layout.classes))

    @cached_property
    def _images_and_layout(self) -> tuple[Tensor | MappedImages, Layout]:
        """All images in the order of their names, with their splits and labels."""
        archive = open_archive(self.root)
        if not archive.names:
            raise UserError(
                f"{self.root} contains no images: set data.root=PATH to a folder or zip file of PNG or JPEG files."
            )
        for name in archive.names:
            if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
                raise UserError(f"{self.root} contains {name}, which is neither PNG nor JPEG: convert or remove it.")
        layout = read_layout(archive.names, self.root)  # before decoding, so that errors appear early
        images = decode_or_map(archive, archive.names, cache=self.cache, size=self.image_size, channels=self.channels)
        return images, layout

    def load(self) -> dict[str, Split]:
        images, layout = self._images_and_layout
        everything = Split(images, None if layout.labels is None else torch.tensor(layout.labels))
        split_of = layout.splits or ["train"] * len(everything)
        splits = {}
        for name in SPLITS:
            rows = [k for k, split in enumerate(split_of) if split == name]
            if rows:
                splits[name] = shuffle(everything.select(torch.tensor(rows)), "image_folder", name)
        n = len(splits["train"])
        missing = {name: max(1, round(f * n)) for name, f in self.fractions.items() if name not in splits}
        if sum(missing.values()) >= n:
            raise UserError(
                f"{self.root} contains {n} training images, too few to hold out {' and '.join(missing)}: add some."
            )
        for name, size in missing.items():
            splits["train"], splits[name] = hold_out(splits["train"], size, "image_folder", "split", name)
        return splits
