"""The command line: Hydra composes the config, and the task that it names does the work."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gencompare.command_line import conf_dir
from gencompare.errors import UserError
from gencompare.files import write_error
from gencompare.tasks.runs.processes import CHILD, leave_process_group
from gencompare.tasks.runs.run_config import (
    base_on_run_folder,
    check_keys,
    group_value_hint,
    missing_option_hint,
    rename_options,
    restore,
)
from gencompare.tasks.runs.sweep import fail, is_begun

USAGE, FAILURE = 2, 1
HYDRA_FULL, OWN_FULL = "HYDRA_FULL_ERROR", "GENCOMPARE_FULL_ERROR"


def wants_tracebacks() -> bool:
    """Whether the user set HYDRA_FULL_ERROR=1. (We set it ourselves too, and hand the user's wish to our processes.)"""
    return os.environ.get(OWN_FULL, os.environ.get(HYDRA_FULL)) == "1"


def main() -> None:
    """Run one task, or with ``-m`` one for each combination. Exit code 0, 1 (failed), 2 (usage), or 128 + a signal."""
    # Hydra then hands errors over as they are, and we print one line.
    os.environ[OWN_FULL] = str(int(wants_tracebacks()))
    os.environ[HYDRA_FULL] = "1"
    failures.clear()
    try:
        if CHILD in os.environ:
            call_task(restore(Path(os.environ[CHILD])))
            return
        sys.argv[1:] = base_on_run_folder(_with_extra_conf(_without_groups_of_null(rename_options(sys.argv[1:]))))
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_job)()
        if failures:
            sys.exit(max(failures))
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(error))


failures: list[int] = []
"""Exit codes of the jobs of a sweep that failed: the others still run."""


def _job(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    try:
        check_keys(cfg)
        cfg = restore(cfg, job)
        if job.mode is RunMode.MULTIRUN and not is_begun(cfg, Path(job.sweep.dir)):
            return
        call_task(cfg)
    except Exception as error:
        if job.mode is not RunMode.MULTIRUN:
            raise SystemExit(report(error)) from error
        failures.append(report(error, job=Path(job.runtime.output_dir).name))
        if "out" in cfg:
            fail(cfg, print_error(error))
    finally:
        leave_process_group()


def call_task(cfg: DictConfig) -> None:
    """Import the task that ``cfg.task`` names and call it: heavy imports happen here and not before."""
    for name in ("seed", "num_images"):
        if not isinstance(cfg[name], int):
            raise UserError(f"{name}={cfg[name]}: give a whole number.")
    hydra.utils.get_method(cfg.task._target_)(cfg)


def report(error: BaseException, job: str = "") -> int:
    """Print one line about ``error`` (below the traceback, where it is wanted) and return the exit code."""
    if wants_tracebacks():
        traceback.print_exception(error)
    cause = _cause(error)
    where = f"[{job}] " if job else ""
    hint = "(HYDRA_FULL_ERROR=1 shows the traceback.)"
    if isinstance(cause, KeyboardInterrupt):
        print(f"{where}Interrupted.", file=sys.stderr)
        return 130
    if isinstance(cause, UserError):
        print(f"{where}Error: {cause}", file=sys.stderr)
        return FAILURE
    if "submitit_slurm" in str(cause):
        print(f"{where}Error: hydra/launcher=slurm needs submitit: pip install 'gencompare[slurm]'.", file=sys.stderr)
        return USAGE
    if isinstance(cause, HydraException | OmegaConfBaseException) and not isinstance(cause, InstantiationException):
        text = (
            group_value_hint(cause)
            or missing_option_hint(cause, sys.argv[1:])
            or _plain(cause).split(" Config search path:")[0]
        )
        print(f"{where}Error: {text} (python run.py --help lists what there is.)", file=sys.stderr)
        return USAGE
    if isinstance(cause, OSError) and (told := write_error(cause.filename or "a file", cause)):
        print(f"{where}Error: {told}", file=sys.stderr)
        return FAILURE
    place = traceback.extract_tb(cause.__traceback__)
    at = f" at {Path(place[-1].filename).name}:{place[-1].lineno}" if place else ""
    print(f"{where}Error: {type(cause).__name__}{at}: {_plain(cause)} {hint}", file=sys.stderr)
    return FAILURE


def print_error(error: BaseException) -> str:
    """What went wrong, in one line for a record."""
    cause = _cause(error)
    return _plain(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {_plain(cause)}"


def _cause(error: BaseException) -> BaseException:
    """The `UserError` or interrupt that ``error`` was raised from, if any, else the first cause."""
    chain = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None and following not in chain:
        chain.append(following)
    for link in chain:
        if isinstance(link, UserError | KeyboardInterrupt):
            return link
    if isinstance(error, InstantiationException):
        return chain[-1]
    return error


def _plain(error: BaseException) -> str:
    return " ".join(str(error).split())


def _without_groups_of_null(argv: list[str]) -> list[str]:
    """``~model/guidance`` for ``model/guidance=null``: so it stands in YAML files, and Hydra's words do not know it."""
    return [f"~{word.removesuffix('=null')}" if re.fullmatch(r"\w+/[\w/@.]+=null", word) else word for word in argv]


def _with_extra_conf(argv: list[str]) -> list[str]:
    """``GENCOMPARE_CONF`` names a folder of one's own with the same layout as conf/; it is searched beside it."""
    extra = os.environ.get("GENCOMPARE_CONF")
    if not extra or any(word.startswith(("--config-dir", "-cd")) for word in argv):
        return argv
    return ["--config-dir", extra, *argv]
