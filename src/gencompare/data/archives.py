"""Locate and download data set files, and read them from a folder or a zip file."""

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
from gencompare.files import file_lock

MAX_FILE_SIZE = 1 << 28
"""Size limit of one image file in bytes (256 MiB), checked before the file is read."""
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compressions of zip files that can be unpacked up to a limit."""
IGNORED_NAMES = {"__MACOSX", "Thumbs.db", "desktop.ini"}
"""Operating-system files that are ignored, as are hidden files."""


class Archive(ABC):
    """Read access to the files of a folder or a zip file. File names are relative paths with ``/`` as separator."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def names(self) -> list[str]:
        """Names of all files in alphabetical order, without hidden files."""
        return sorted(name for name in self._names() if not _is_ignored(name))

    @abstractmethod
    def _names(self) -> Iterable[str]: ...

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file. Raise `OSError` or `zipfile.BadZipFile` if it is corrupted."""

    @abstractmethod
    def fingerprint(self, names: Iterable[str]) -> str:
        """Return a hash of the names and contents of the given files."""


class FolderArchive(Archive):
    """A folder and all its subfolders, following symbolic links."""

    def _names(self) -> Iterable[str]:
        seen: set[str] = set()
        for folder, subfolders, files in os.walk(self.path, followlinks=True, onerror=_raise_cannot_list):
            real_path = os.path.realpath(folder)
            if real_path in seen:  # a symbolic link to a parent folder
                subfolders.clear()
                continue
            seen.add(real_path)
            inside = Path(folder).relative_to(self.path)  # once for each folder, since there may be millions of files
            prefix = "" if inside == Path() else f"{inside.as_posix()}/"
            for file in files:
                yield prefix + file

    def read(self, name: str) -> bytes:
        path = self.path / name
        _check_size(self.path, name, path.stat().st_size)
        return path.read_bytes()

    def fingerprint(self, names: Iterable[str]) -> str:
        # Comparing modification times and sizes would be faster, but different files can agree in both.
        digest = hashlib.sha256()
        for name in names:
            try:
                content = hashlib.sha256(self.read(name)).hexdigest()
            except OSError as error:
                raise UserError(f"{self.path / name} cannot be read: {error.strerror}.") from error
            digest.update(f"{name}\0{content}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class ZipArchive(Archive):
    """A zip file, read without unpacking it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"{path} cannot be read as a zip file ({error}): download or create it again.") from error
        self._members = {}
        for member in self._zip.infolist():
            if _escapes(member.filename):
                raise UserError(
                    f"{path} contains the path '{member.filename}', which points outside the archive: create it again."
                )
            if member.filename in self._members and not member.is_dir():
                raise UserError(f"{path} contains '{member.filename}' twice: create it again.")
            self._members[member.filename] = member

    def _names(self) -> Iterable[str]:
        return (name for name, member in self._members.items() if not member.is_dir())

    def read(self, name: str) -> bytes:
        member = self._members[name]
        _check_size(self.path, name, member.file_size)
        if member.compress_type not in COMPRESSIONS:
            raise UserError(f"{self.path}: {name} is not compressed with deflate: create the zip file again.")
        with self._zip.open(member) as file:  # `ZipFile.read` would unpack what is there, which may be far more
            return file.read(member.file_size)

    def fingerprint(self, names: Iterable[str]) -> str:
        # The central directory lists the length and CRC-32 of each file, and `read` verifies them. Hashing these
        # instead of the contents avoids reading gigabytes at every start.
        digest = hashlib.sha256()
        for name in names:
            member = self._members[name]
            digest.update(f"{name}\0{member.file_size}\0{member.CRC}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def open_archive(path: Path) -> Archive:
    """Open a folder or zip file. Raise `UserError` if ``path`` is neither."""
    if path.is_dir():
        return FolderArchive(path)
    if path.is_file():
        return ZipArchive(path)
    raise UserError(f"There is no folder or zip file '{path}': set data.root=PATH.")


def _is_ignored(name: str) -> bool:
    return any(part.startswith(".") or part in IGNORED_NAMES for part in name.split("/"))


def _escapes(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or "\\" in name or name[1:2] == ":"


def _check_size(archive: Path, name: str, size: int) -> None:
    if size > MAX_FILE_SIZE:
        raise UserError(f"{archive}: {name} is too large for an image ({size >> 20} MiB): remove it.")


def _raise_cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error


DatasetFiles = TypeVar("DatasetFiles")


def candidate_paths(root: Path, name: str, layouts: tuple[str, ...]) -> Iterator[Path]:
    """Yield paths where a data set may be: each of ``layouts`` (relative paths) below ``root`` and ``root/name``."""
    for base in (root, root / name):
        for layout in layouts:
            yield base / layout


def find_or_download(
    find: Callable[[], DatasetFiles | None],
    *,
    name: str,
    root: Path,
    expected_files: str,
    torchvision_class: str | None,
) -> DatasetFiles:
    """Return the result of ``find``. If it is None, download the data set and call ``find`` again.

    If several processes start together, one downloads and the others wait.

    Args:
        find: returns the files, or None if they are missing.
        name: name of the data set.
        root: folder to download into.
        expected_files: the files that the error message asks the user to provide.
        torchvision_class: class in ``torchvision.datasets`` that downloads the files; None disables downloads.

    Raises:
        UserError: if the files are missing and cannot be downloaded.
    """
    try:
        found = find()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): set data.root=DIR.") from error
    if found is not None:
        return found
    reason = ""
    if torchvision_class is not None:
        try:
            with file_lock(root / f".{name}.lock"):
                found = find()
                if found is None:
                    _download(torchvision_class, root)
                    found = find()
        except (RuntimeError, OSError) as error:  # raised by torchvision without a network or on a wrong checksum
            reason = f" and could not be downloaded ({_first_line(error)})"
    if found is None:
        raise UserError(
            f"Data set '{name}' is not in {root}{reason}: put {expected_files} there, or set data.root=DIR."
        )
    return found


def _download(torchvision_class: str, root: Path) -> None:
    from torchvision import datasets

    getattr(datasets, torchvision_class)(str(root), train=True, download=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
