"""Exceptions whose messages are addressed to the user, and text that is safe to print."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

LINE_BREAKS = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which a terminal obeys; marks that reverse the direction of text; and half characters."""


def printable(text: object) -> str:
    """Return ``text`` in one line that no terminal obeys: names in a record or a folder may come from anywhere.

    Line breaks become spaces, and every other control character a replacement character.
    """
    string = str(text)
    if UNPRINTABLE.search(string) is None:
        return string
    return UNPRINTABLE.sub("\ufffd", LINE_BREAKS.sub(" ", string))


class UserError(Exception):
    """An error that the user can fix. The message is one line that names the cause and the fix.

    The command line prints only the message and exits with code 1; set ``HYDRA_FULL_ERROR=1`` for the traceback.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def check_number(name: str, value: object) -> None:
    """Raise `UserError` unless the config value ``name`` is a number.

    Comparing a string with a number would raise an unhelpful `TypeError`. (``.nan`` on the command line is parsed as a
    string.)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name}={value} must be a number.")


class CorruptedFileError(UserError):
    """Raised when the content of a file does not match its checksum or its format.

    Args:
        path: the file.
        advice: what to do, as a separate sentence.
    """

    def __init__(self, path: object, advice: str = "") -> None:
        super().__init__(path, advice)
        self.path = path

    def __str__(self) -> str:
        path, advice = self.args
        return f"{path} is corrupted: its content does not match its checksum or its format.{advice and ' '}{advice}"


class DiskFullError(UserError):
    """Raised when a file cannot be written because the disk is full or a quota is exceeded."""


def check_positive(name: str, value: object, *, null: str | None = None) -> None:
    """Raise `UserError` unless the config value ``name`` is a positive, finite number.

    Args:
        name: full name of the setting, such as ``model.grad_clip``.
        value: its value.
        null: what None means, if None is allowed.
    """
    if null is None or value is not None:
        _check_range(name, value, "a positive number", null, lambda number: 0 < number < math.inf)


def check_non_negative(name: str, value: object, *, zero: str | None = None) -> None:
    """Raise `UserError` unless the config value ``name`` is a finite number of at least 0; ``zero`` says what 0
    means."""
    kind = "a number of at least 0" + (f" (0 {zero})" if zero else "")
    _check_range(name, value, kind, None, lambda number: 0 <= number < math.inf)


def check_counts(place: str, minimum: int = 1, **values: object) -> None:
    """Raise `UserError` unless each of the config values ``place.name`` is a whole number of at least ``minimum``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(f"{place}.{name}={value} must be a whole number of at least {minimum}.")


def _check_range(name: str, value: object, kind: str, null: str | None, inside: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not inside(value):
        raise UserError(f"{name}={value} must be {kind}{f', or null for {null}' if null else ''}.")


class TrainingStopped(UserError):
    """Raised when training cannot continue.

    Args:
        reason: what went wrong, without a full stop.
        suggestion: what to try, as a separate sentence.
    """

    def __init__(self, reason: str, suggestion: str) -> None:
        super().__init__(reason, suggestion)
        self.checkpoint_saved: bool | None = None
        """Whether a good checkpoint exists; set by the checkpoint callback."""

    def __str__(self) -> str:
        reason, suggestion = self.args
        if self.checkpoint_saved is None:
            return printable(f"{reason}. {suggestion}")
        saved = "the last good checkpoint is kept" if self.checkpoint_saved else "no checkpoint had been saved yet"
        return printable(f"{reason}. Training was stopped; {saved}. {suggestion}")
