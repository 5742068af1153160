"""The one exception that a user is meant to read."""


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
