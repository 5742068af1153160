"""One-line error messages for the terminal or a run record, and exit codes."""

from __future__ import annotations

import os
import re
import select
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from gencompare.command_line import config_roots
from gencompare.errors import UserError, printable
from gencompare.files import write_error
from gencompare.tasks.runs.config_keys import missing_option_hint, quoting_hint

FAILURE_CODE, USAGE_CODE, INTERRUPT_CODE = 1, 2, 130
HYDRA_VARIABLE, USER_VARIABLE = "HYDRA_FULL_ERROR", "GENCOMPARE_FULL_ERROR"

OUT_OF_MEMORY = (
    "Out of memory. In training, use trainer.num_micro_batches=2 or more, which trains the same in less memory, or"
    " trainer.precision=bf16-mixed, or more processes (trainer=ddp trainer.devices=N); in evaluation, lower"
    " evaluation.protocol.chunk_size."
)

failed_job_codes: list[int] = []
"""Exit codes of the failed jobs of a sweep, whose other jobs still run."""


def enable_hydra_tracebacks() -> None:
    """Make Hydra raise errors instead of printing them, and remember whether the user wants tracebacks."""
    os.environ[USER_VARIABLE] = str(int(wants_tracebacks()))
    os.environ[HYDRA_VARIABLE] = "1"


def wants_tracebacks() -> bool:
    """Return whether the user set HYDRA_FULL_ERROR=1."""
    return os.environ.get(USER_VARIABLE, os.environ.get(HYDRA_VARIABLE)) == "1"


def print_error(error: BaseException, job: str = "") -> int:
    """Print ``error`` in one line on stderr, after its traceback if the user wants it, and return the exit code.

    Args:
        job: name of the job in a sweep.
    """
    if wants_tracebacks():
        lines = "".join(traceback.format_exception(error)).splitlines()
        print(*map(printable, lines), sep="\n", file=sys.stderr)
    cause = _root_cause(error)
    code, message = _describe(cause)
    if message:
        print(printable(f"[{job}] {message}" if job else message), file=sys.stderr)
    return code


def _describe(cause: BaseException) -> tuple[int, str]:
    """Return the exit code and message of an error."""
    if isinstance(cause, KeyboardInterrupt):
        return INTERRUPT_CODE, "Interrupted."
    if isinstance(cause, BrokenPipeError) and _stdout_is_closed():  # as in: python run.py --help | head
        return FAILURE_CODE, ""
    if isinstance(cause, UserError):
        return FAILURE_CODE, f"Error: {cause}"
    if "submitit_slurm" in str(cause):
        return USAGE_CODE, "Error: hydra/launcher=slurm needs submitit: pip install 'gencompare[slurm]'."
    if isinstance(cause, HydraException | OmegaConfBaseException) and not isinstance(cause, InstantiationException):
        hint = quoting_hint(cause) or missing_option_hint(cause, sys.argv[1:])
        message = hint or _one_line(cause).split(" Config search path:")[0]
        if missing := re.search(r"Could not find '([\w/]+)/(\w+)'", message):
            folders = config_roots()
            options = {path.stem for folder in folders for path in (folder / missing[1]).glob("*.yaml")}
            close = get_close_matches(missing[2], options, 1)
            advice = f" Did you mean {close[0]}?" if close else f" Choose from {', '.join(sorted(options))}."
            message = f"There is no {missing[1]}={missing[2]}.{advice if options else ''}"
        if missing and "GENCOMPARE_CONF" not in os.environ:
            message += " For an option of your own, set GENCOMPARE_CONF to the folder of your config groups."
        return USAGE_CODE, f"Error: {message} (python run.py --help lists all options.)"
    if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":  # torch may not be imported
        return FAILURE_CODE, f"Error: {OUT_OF_MEMORY}"
    if isinstance(cause, OSError) and (explained := write_error(cause.filename or "a file", cause)):
        return FAILURE_CODE, f"Error: {explained}"
    frames = traceback.extract_tb(cause.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    name, hint = type(cause).__name__, "(HYDRA_FULL_ERROR=1 shows the traceback.)"
    return FAILURE_CODE, f"Error: {name}{place}: {_one_line(cause)} {hint}"


def _stdout_is_closed() -> bool:
    try:
        sys.stdout.flush()
        poll = select.poll()
        poll.register(sys.stdout, 0)  # reports only that the reader is gone
        closed = bool(poll.poll(0))
    except BrokenPipeError:
        closed = True
    except (OSError, AttributeError):  # no file, or no poll on this system
        closed = False
    if closed:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (Python flushes it at exit)
    return closed


def error_text(error: BaseException) -> str:
    """Return the message of an error in one line, for a record."""
    cause = _root_cause(error)
    return _one_line(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {_one_line(cause)}"


def _root_cause(error: BaseException) -> BaseException:
    """Return the `UserError` or interrupt that caused ``error``, if any.

    Otherwise, return the root cause if ``error`` is a Hydra wrapper, and ``error`` itself if not.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, UserError | KeyboardInterrupt):
            return link
    return chain[-1] if isinstance(error, InstantiationException) else error


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))
