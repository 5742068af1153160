"""What the folders of an image collection mean: splits, classes, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gencompare.errors import UserError

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
