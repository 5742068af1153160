"""Where a data set lies under the user's root, and how it gets there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from gencompare.errors import UserError
from gencompare.locks import locked

Found = TypeVar("Found")


def places(root: Path, name: str, layouts: tuple[str, ...]) -> Iterator[Path]:
    """``root`` and ``root/name``, each with the folders that the data set is known to be kept in."""
    for base in (root, root / name):
        for layout in layouts:
            yield base / layout


def obtain(find: Callable[[], Found | None], *, name: str, root: Path, wanted: str, torchvision: str | None) -> Found:
    """What ``find`` finds; where it finds nothing, it looks again after a download.

    ``torchvision`` is the name of the torchvision class that may download into ``root``, or None where nothing may be
    downloaded. Processes that start together download once: the others wait, then find the files. ``wanted`` completes
    the error "put ...". Raises `UserError` when there is nothing at the end.
    """
    try:
        found = find()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): set data.root=DIR.") from error
    if found is not None:
        return found
    reason = ""
    if torchvision is not None:
        try:
            with locked(root / f".{name}.lock"):
                found = find()
                if found is None:
                    _download(torchvision, root)
                    found = find()
        except (RuntimeError, OSError) as error:  # what torchvision raises without a network, or for a bad check sum
            reason = f" and could not be downloaded ({_first_line(error)})"
    if found is None:
        raise UserError(f"Data '{name}' is not in {root}{reason}: put {wanted} there, or set data.root=DIR.")
    return found


def _download(torchvision: str, root: Path) -> None:
    from torchvision import datasets

    getattr(datasets, torchvision)(str(root), train=True, download=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
