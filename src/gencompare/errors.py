"""Exceptions whose messages are addressed to the user."""

from __future__ import annotations

import math
from collections.abc import Callable


class UserError(Exception):
    """An error that the user can fix. The message is one line that names the cause and the fix.

    The command line prints only the message and exits with code 1; set ``HYDRA_FULL_ERROR=1`` for the traceback.
    """


def check_number(name: str, value: object) -> None:
    """Raise `UserError` unless the config value ``name`` is a number.

    Comparing a string with a number would raise an unhelpful `TypeError`. (``.nan`` on the command line is parsed as a
    string.)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name}={value} must be a number.")


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
            return f"{reason}. {suggestion}"
        saved = "the last good checkpoint is kept" if self.checkpoint_saved else "no checkpoint had been saved yet"
        return f"{reason}. Training was stopped; {saved}. {suggestion}"
