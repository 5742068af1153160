"""The exceptions that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right: one line that names the thing and the way out.

    The command line prints the message alone and ends with exit code 1; set ``HYDRA_FULL_ERROR=1`` for the traceback.
    """


def check_number(name: str, value: object) -> None:
    """Raises `UserError` unless the setting ``name`` is a number. (On the command line ``.nan`` is a word.)

    Without this, Python says in its own words that what is no number cannot be compared with one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name}={value}: give a number.")


class TrainingStopped(UserError):
    """Training cannot go on, whatever the next batch. Who finds that out need not know what is left of it.

    Args:
        why: what went wrong.
        remedy: what to try, a sentence of its own.
    """

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why, remedy)
        self.kept: bool | None = None
        """Whether there is a checkpoint, which can only be a good one: the callback that writes them says so."""

    def __str__(self) -> str:
        why, remedy = self.args
        if self.kept is None:
            return f"{why}. {remedy}"
        left = "the last good checkpoint is kept" if self.kept else "no checkpoint had been saved yet"
        return f"{why}. Training was stopped; {left}. {remedy}"
