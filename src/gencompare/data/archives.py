"""Data set files: where they lie, how they are downloaded, and reading them from a folder or a zip file."""

from __future__ import annotations

import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from gencompare.errors import UserError
from gencompare.files import locked

LARGEST = 1 << 28
"""Bytes that one image file may take (256 MiB); a longer one is refused before it is read."""
JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini"}
"""What file managers leave behind; hidden files are passed over likewise."""


class Archive(ABC):
    """Files by their path inside a folder or zip file, with ``/`` between the parts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def names(self) -> list[str]:
        """All files in alphabetical order, without hidden ones."""
        return sorted(name for name in self._names() if not _is_junk(name))

    @abstractmethod
    def _names(self) -> Iterable[str]: ...

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises OSError or `zipfile.BadZipFile` where it is damaged."""

    @abstractmethod
    def fingerprint(self, names: Iterable[str]) -> str:
        """A hash of these files' names and contents, equal whenever both are equal."""


class Folder(Archive):
    """A folder, with the folders below it (those behind symbolic links too)."""

    def _names(self) -> Iterable[str]:
        seen: set[str] = set()
        for here, folders, files in os.walk(self.path, followlinks=True, onerror=_cannot_list):
            real = os.path.realpath(here)
            if real in seen:  # a link that leads back up
                folders.clear()
                continue
            seen.add(real)
            for file in files:
                yield (Path(here) / file).relative_to(self.path).as_posix()

    def read(self, name: str) -> bytes:
        path = self.path / name
        _check_size(self.path, name, path.stat().st_size)
        return path.read_bytes()

    def fingerprint(self, names: Iterable[str]) -> str:
        # Times and sizes would be quicker to ask for, but a copy may keep both and differ in content.
        digest = hashlib.sha256()
        for name in names:
            try:
                content = hashlib.sha256(self.read(name)).hexdigest()
            except OSError as error:
                raise UserError(f"{self.path / name} cannot be read: {error.strerror}.") from error
            digest.update(f"{name}\0{content}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class Zip(Archive):
    """A zip file, read in place."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"{path} cannot be read as a zip file ({error}): fetch or pack it again.") from error
        self._members = {}
        for member in self._zip.infolist():
            if _escapes(member.filename):
                raise UserError(f"{path} holds the path '{member.filename}', which leads out of it: pack it again.")
            if member.filename in self._members and not member.is_dir():
                raise UserError(f"{path} holds '{member.filename}' twice: pack it again.")
            self._members[member.filename] = member

    def _names(self) -> Iterable[str]:
        return (name for name, member in self._members.items() if not member.is_dir())

    def read(self, name: str) -> bytes:
        member = self._members[name]
        _check_size(self.path, name, member.file_size)
        return self._zip.read(member)

    def fingerprint(self, names: Iterable[str]) -> str:
        # The directory at the end of a zip file gives length and CRC-32 of each file's content, and reading a file
        # checks them: so it stands for the content, without reading gigabytes at every start.
        digest = hashlib.sha256()
        for name in names:
            member = self._members[name]
            digest.update(f"{name}\0{member.file_size}\0{member.CRC}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def open_archive(path: Path) -> Archive:
    """The folder or zip file at ``path``. Raises `UserError` where there is neither."""
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        return Zip(path)
    raise UserError(f"There is no folder or zip file '{path}': set data.root=PATH.")


def _is_junk(name: str) -> bool:
    return any(part.startswith(".") or part in JUNK for part in name.split("/"))


def _escapes(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or "\\" in name or name[1:2] == ":"


def _check_size(where: Path, name: str, size: int) -> None:
    if size > LARGEST:
        raise UserError(f"{where}: {name} takes {size >> 20} MiB, too much for one image: move it out.")


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error


DatasetFiles = TypeVar("DatasetFiles")


def candidate_paths(root: Path, name: str, layouts: tuple[str, ...]) -> Iterator[Path]:
    """``root`` and ``root/name``, each with the folders that the data set is known to be kept in."""
    for base in (root, root / name):
        for layout in layouts:
            yield base / layout


def obtain(
    find: Callable[[], DatasetFiles | None], *, name: str, root: Path, wanted: str, torchvision: str | None
) -> DatasetFiles:
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
