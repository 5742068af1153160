"""SHA-256 checksums inside the files of a run, verified before a file is used.

Each file contains the checksum of its own other bytes, so that it can be replaced atomically and moved on its own:

====================  ============================================================
file                  where the checksum is
====================  ============================================================
YAML                  a comment in the first line
JSON                  the last entry, ``"sha256"``
safetensors           the entry ``gencompare_whole_file_sha256`` of the metadata
checkpoint (zip)      the archive comment
CSV that grows        a hidden file next to it, with the length that it covers
====================  ============================================================

YAML, JSON, CSV and safetensors files without a checksum, from earlier versions or other programs, are accepted. In
checkpoints without one, the CRC-32 of each zip entry is verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from gencompare.errors import CorruptedFileError
from gencompare.files import atomic_write, write_text
from gencompare.safe_files import check_torch_file, parse_json, read_bytes

DIGITS = 64
"""Hexadecimal digits of a SHA-256."""
BLOCK_SIZE = 1 << 22
_YAML_LINE = re.compile(rb"# sha256 of the lines below: ([0-9a-f]{64})\n")
_JSON_END = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')
_JSON_DIGEST = re.compile(rb'"[0-9a-f]{64}"\n}\n\Z')
"""A checksum at the end whose name may be corrupted."""
_SAFETENSORS_ENTRY = re.compile(rb'"gencompare_whole_file_sha256":"([0-9a-f]{64})"')
_UNCOVERED_LINE = re.compile(rb"(?:[0-9a-z.,+-]*\r?\n){0,2}[0-9a-z.,+-]*")
"""Lines of numbers that were appended to a CSV file after its checksum was read, the last perhaps incomplete."""
MAX_GROWING_SIZE = 1 << 30
"""Size limit of a CSV file that grows, in bytes (1 GiB)."""
_ZIP_COMMENT = re.compile(rb"sha256: ([0-9a-f]{64})\Z")
_ZIP_END = b"PK\x05\x06"
_ZIP_END_SIZE = 22
"""Bytes of a zip's end record, whose last two are the length of the comment after it."""


def write_checked_yaml(path: str | os.PathLike[str], text: str) -> None:
    """Write YAML atomically, with a checksum."""
    write_text(path, f"# sha256 of the lines below: {_sha256(text.encode())}\n{text}")


def read_checked_yaml(path: str | os.PathLike[str], limit: int | None = None) -> str:
    """Read the text of a YAML file of at most ``limit`` bytes.

    Raises:
        CorruptedFileError: the checksum does not match.
        UserError: the file is larger.
    """
    raw = read_bytes(Path(path), limit)
    first, newline, rest = raw.partition(b"\n")
    if match := _YAML_LINE.fullmatch(first + newline):
        if match[1].decode() != _sha256(rest):
            raise _corrupted(path, "If you edited it, delete its first line.")
        raw = rest
    elif not raw or first.startswith(b"#") or re.search(rb"[0-9a-f]{32}", first):
        raise _corrupted(path, "If you edited it, delete its first line.")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _corrupted(path) from error


def write_checked_json(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Write a dictionary as JSON, atomically, with a checksum. Raise `ValueError` for NaN and infinity."""
    start = json.dumps(value, indent=1, allow_nan=False).removesuffix("\n}")
    end = ',\n "sha256": "{}"\n}}\n'
    write_text(path, start + end.format(_sha256((start + end.format("")).encode())))


def read_checked_json(path: str | os.PathLike[str], limit: int | None = None, **options: Any) -> dict[str, Any]:
    """Read a JSON object, without the entry of its checksum.

    Args:
        path: the file.
        limit: its maximum size in bytes.
        options: arguments of `json.loads`.

    Raises:
        CorruptedFileError: the checksum does not match, or the file is not a JSON object.
        UserError: the file is larger than ``limit`` or nested too deeply.
    """
    raw = read_bytes(Path(path), limit)
    try:
        value = parse_json(path, raw, **options)
    except ValueError as error:
        raise _corrupted(path) from error
    if not isinstance(value, dict):
        raise _corrupted(path)
    if value.pop("sha256", None) is not None:
        match = _JSON_END.search(raw)
        if match is None or match[1].decode() != _sha256(raw[: match.start(1)], raw[match.end(1) :]):
            raise _corrupted(path, 'If you edited it, set "sha256" to null.')
    elif _JSON_DIGEST.search(raw):
        raise _corrupted(path)
    return value


def seal_safetensors(save: Callable[[dict[str, str]], bytes], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file with a checksum in its metadata.

    Args:
        save: returns the bytes of the file with the given metadata.
        metadata: the other metadata.
    """
    payload = save({**metadata, "gencompare_whole_file_sha256": "0" * DIGITS})
    match = _SAFETENSORS_ENTRY.search(payload)
    assert match is not None
    start, end = match.span(1)
    return b"".join([payload[:start], _sha256(payload[:start], payload[end:]).encode(), payload[end:]])


def check_safetensors(path: str | os.PathLike[str], payload: bytes) -> None:
    """Verify the bytes of a safetensors file, if it has a checksum.

    Args:
        path: the file, for the error message.
        payload: the bytes of the file.

    Raises:
        CorruptedFileError: the checksum does not match.
    """
    header_end = min(8 + int.from_bytes(payload[:8], "little"), len(payload))
    view = memoryview(payload)
    match = _SAFETENSORS_ENTRY.search(payload, 0, header_end)
    if match is not None:
        if match[1].decode() != _sha256(view[: match.start(1)], view[match.end(1) :]):
            raise _corrupted(path)
    # A corrupted name of the entry.
    elif max(payload.find(b"gencompare_w", 0, header_end), payload.find(b"file_sha256", 0, header_end)) >= 0:
        raise _corrupted(path)


def write_zip(path: str | os.PathLike[str], content: memoryview) -> None:
    """Write a zip archive without a comment, such as a file of `torch.save`, atomically and with a checksum."""
    comment_size = len("sha256: ") + DIGITS
    start = content[:-2], comment_size.to_bytes(2, "little"), b"sha256: "
    with atomic_write(path) as file:
        for part in (*start, _sha256(*start).encode()):
            file.write(part)


def check_zip(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """Verify a zip archive by its checksum or, if it has none, by the CRC-32 of each entry.

    Args:
        path: the file, for the error message.
        file: the open file; its position is at the start afterwards.

    Raises:
        CorruptedFileError: the archive is corrupted, or the file is not a zip archive.
        UserError: it is compressed, unlike the files of torch.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ZIP_END_SIZE - 8 - DIGITS))
    end = file.read()
    file.seek(0)
    if match := _ZIP_COMMENT.search(end):
        digest = hashlib.sha256()
        remaining = size - DIGITS
        while remaining > 0 and (block := file.read(min(BLOCK_SIZE, remaining))):
            digest.update(block)
            remaining -= len(block)
        if digest.hexdigest() != match[1].decode():
            raise _corrupted(path)
    else:
        # Without a comment the end record is the end of the file. Otherwise, the corruption is in the comment.
        if end[-_ZIP_END_SIZE:-18] != _ZIP_END:
            raise _corrupted(path)
        check_torch_file(path)
        try:
            with zipfile.ZipFile(file) as archive:
                intact = archive.testzip() is None
        except Exception as error:  # zipfile raises many kinds
            raise _corrupted(path) from error
        if not intact:
            raise _corrupted(path)
    file.seek(0)


class GrowingFile:
    """The checksum of a text file to which lines are appended: the SHA-256 of its first bytes, and their number.

    It is in a hidden file next to the text, and updated after the text. If a process is killed between the two, the
    text has one more line, perhaps incomplete, than the checksum covers, but it is not corrupted. (It has two more if
    it grows while it is read.)

    Args:
        path: the text file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest, self._size = hashlib.sha256(), 0

    @property
    def checksum_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.sha256")

    def rewrite(self, text: str) -> None:
        """Replace the text atomically."""
        self.checksum_path.unlink(missing_ok=True)
        write_text(self.path, text)
        self._digest, self._size = hashlib.sha256(), 0
        self._cover(text)

    def append(self, text: str) -> None:
        """Append text."""
        with self.path.open("ab") as file:
            file.write(text.encode())
        self._cover(text)

    def remove(self) -> None:
        """Remove the file and its checksum."""
        self.checksum_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self._digest, self._size = hashlib.sha256(), 0

    def _cover(self, text: str) -> None:
        self._digest.update(text.encode())
        self._size += len(text.encode())
        # Not synced to disk: after a power failure, an old checksum still fits the longer text.
        with atomic_write(self.checksum_path, sync=False) as file:
            file.write(f"{self._size} {self._digest.hexdigest()}\n".encode())

    def is_intact(self) -> bool:
        """Return whether the text has no checksum, or has the bytes that it covers and few more lines."""
        try:
            stored = read_bytes(self.checksum_path, 100)
        except FileNotFoundError:
            return True
        match = re.fullmatch(rb"(\d{1,15}) ([0-9a-f]{64})\n", stored)
        if match is None:
            return False
        content = read_bytes(self.path, MAX_GROWING_SIZE)
        covered, rest = content[: int(match[1])], content[int(match[1]) :]
        return _sha256(covered) == match[2].decode() and _UNCOVERED_LINE.fullmatch(rest) is not None


def _sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _corrupted(path: str | os.PathLike[str], advice: str = "") -> CorruptedFileError:
    return CorruptedFileError(path, advice)
