"""Any collection of PNG and JPEG files: a folder tree or a zip file."""

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
from gencompare.data.datamodule import ImageData, Split, hold_out, shuffled
from gencompare.data.file_formats import decode_cached
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Layout:
    """Split and class of each file, in the order of the names given; None where the folders tell none."""

    splits: list[str] | None
    labels: list[int] | None
    classes: tuple[str, ...] = ()
    """Class names in alphabetical order: label k is ``classes[k]``."""


def read_layout(names: Sequence[str], where: Path) -> Layout:
    """Tell ``split/class/name``, ``split/name``, ``class/name`` and ``name`` apart.

    One folder around everything is passed over. Top folders are splits when all of them have a split's name; the
    folders below (or the top ones, where there are no splits) are classes when there are at least two. ``where`` is
    named in errors.
    """
    paths = [PurePosixPath(name).parts for name in names]
    while len(tops := {path[0] for path in paths}) == 1 and not tops & SPLIT_FOLDERS.keys() and _all_deep(paths):
        paths = [path[1:] for path in paths]
    splits = None
    tops = {path[0] for path in paths if len(path) > 1}
    if named := tops & SPLIT_FOLDERS.keys():
        others = sorted(tops - named) or [path[0] for path in paths if len(path) == 1]
        if others:
            raise UserError(
                f"{where} holds the split folder '{min(named)}' beside '{others[0]}':"
                " sort all images into train, val and test, or name no folder so."
            )
        if "train" not in named:
            raise UserError(f"{where} holds the split folder '{min(named)}' and no 'train': add it.")
        splits = [SPLIT_FOLDERS[path[0]] for path in paths]
        paths = [path[1:] for path in paths]
    folders = [path[0] if len(path) > 1 else None for path in paths]
    classes = tuple(sorted({folder for folder in folders if folder is not None}))
    if classes and None in folders:
        raise UserError(
            f"{where} holds {names[folders.index(None)]} beside folders of classes such as '{classes[0]}':"
            " put every image into a class folder, or none."
        )
    if len(classes) < 2:
        return Layout(splits, None)
    return Layout(splits, [classes.index(str(folder)) for folder in folders], classes)


def _all_deep(paths: Sequence[tuple[str, ...]]) -> bool:
    return all(len(path) > 1 for path in paths)


SUFFIXES = {".png", ".jpg", ".jpeg"}


class ImageFolder(ImageData):
    """Images as ``split/class/name``, ``split/name``, ``class/name`` or ``name``.

    Splits that the folders do not tell are cut from the training images by a fixed permutation of their names in
    alphabetical order. Labels are given when there are at least two class folders, numbered in alphabetical order.
    Transparent pixels are laid on white, and photographs turned as the camera was held.

    Args:
        root: the folder or the zip file.
        cache: folder for the decoded images; None decodes them at every start.
        size: height and width that the centre of each image is resized to (bicubic, antialiased); None takes the
            images as they are, all of one size.
        channels: 1 (grey), 3 (RGB), or None for 1 where all files are grey and 3 otherwise.
        val_fraction: the share of the training images that becomes the validation split where no folder does.
        test_fraction: likewise for the test split.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        cache: str | Path | None = None,
        size: int | None = None,
        channels: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if size is not None and size < 1:
            raise UserError(f"data.size={size} must be at least 1 pixel, or null.")
        if channels not in (None, 1, 3):
            raise UserError(f"data.channels={channels} must be 1 (grey), 3 (RGB) or null.")
        if min(val_fraction, test_fraction) <= 0 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} must be positive and leave"
                " some images to train on."
            )
        self.root = Path(root).expanduser()
        self.cache = None if cache is None else Path(cache).expanduser()
        self.size, self.channels = size, channels
        self.fractions = {"test": test_fraction, "val": val_fraction}

    @cached_property
    def spec(self) -> DataSpec:  # type: ignore[override]  # known only once the files were looked at
        images, layout = self._content
        channels, height, width = images.shape[1:]
        stem = re.sub(r"\W+", "_", self.root.resolve().stem).strip("_")
        return DataSpec(f"image_folder_{stem}", (channels, height, width), num_classes=len(layout.classes))

    @cached_property
    def _content(self) -> tuple[Tensor, Layout]:
        """All images in the order of their names, and what their folders say of them."""
        archive = open_archive(self.root)
        if not archive.names:
            raise UserError(f"{self.root} holds no images: set data.root=PATH to a folder or zip of PNG or JPEG files.")
        for name in archive.names:
            if PurePosixPath(name).suffix.lower() not in SUFFIXES:
                raise UserError(f"{self.root} holds {name}, which is neither PNG nor JPEG: convert it or move it out.")
        layout = read_layout(archive.names, self.root)  # folders are judged before anything is decoded
        return decode_cached(archive, archive.names, cache=self.cache, size=self.size, channels=self.channels), layout

    def load(self) -> dict[str, Split]:
        images, layout = self._content
        whole = Split(images, None if layout.labels is None else torch.tensor(layout.labels))
        of = layout.splits or ["train"] * len(whole)
        parts = {}
        for name in ("train", "val", "test"):
            rows = [k for k, split in enumerate(of) if split == name]
            if rows:
                parts[name] = shuffled(whole[torch.tensor(rows)], "image_folder", name)
        n = len(parts["train"])
        lacking = {name: max(1, round(f * n)) for name, f in self.fractions.items() if name not in parts}
        if sum(lacking.values()) >= n:
            raise UserError(
                f"{self.root} holds {n} training images, too few to cut {' and '.join(lacking)} from: add some."
            )
        for name, held in lacking.items():
            parts["train"], parts[name] = hold_out(parts["train"], held, "image_folder", "split", name)
        return parts
