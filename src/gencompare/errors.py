"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something that the user can put right: one line that names the thing and the way out.

    The command line prints the message alone and ends with exit code 1; set ``HYDRA_FULL_ERROR=1`` for the traceback.
    """
