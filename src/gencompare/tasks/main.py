"""The command line: Hydra composes the config, and ``cfg.task`` names the function to call."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gencompare.command_line import conf_dir
from gencompare.tasks.runs.config_keys import check_keys
from gencompare.tasks.runs.config_types import check_types
from gencompare.tasks.runs.error_reports import enable_hydra_tracebacks, error_text, failed_job_codes, print_error
from gencompare.tasks.runs.launched_ranks import (
    check_no_sweep,
    end_jobs,
    expect_ranks,
    launched_ranks,
    run_handed_out_jobs,
)
from gencompare.tasks.runs.overrides import rewrite_overrides
from gencompare.tasks.runs.processes import CONFIG_VARIABLE, leave_process_group
from gencompare.tasks.runs.run_config import complete_config, opener, read_config
from gencompare.tasks.runs.sweep import prepare_job, record_failure
from gencompare.trust import opened_by
from gencompare.version import __version__

READING_TASKS = ("list_runs", "compare_runs", "plan", "forecast_runs", "bench")
"""Modules of tasks that build nothing from the config, and start without importing torch."""


def main() -> None:
    """Run one task, or, with ``-m``, one task per combination of overrides.

    The exit code is 0 (success), 1 (failure), 2 (usage error), or 128 plus a signal number.
    """
    if sys.argv[1:] == ["--version"]:
        print(f"gencompare {__version__}")
        return
    enable_hydra_tracebacks()
    failed_job_codes.clear()
    try:
        if CONFIG_VARIABLE in os.environ:
            call_task(read_config(Path(os.environ[CONFIG_VARIABLE])))
            return
        if launched_ranks()[0] > 0:
            run_handed_out_jobs(_run_rank)
            return
        check_no_sweep(sys.argv[1:])
        expect_ranks()
        sys.argv[1:] = rewrite_overrides(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_run_job)()
        if failed_job_codes:
            sys.exit(max(failed_job_codes))
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(print_error(error))
    finally:
        end_jobs()


def _run_job(cfg: DictConfig) -> None:
    """Run the task of a composed config. In a sweep, record failures and let the next job run."""
    if launched_ranks()[0] > 0:  # a job of the launcher of SLURM, with several tasks
        run_handed_out_jobs(_run_rank)
        return
    expect_ranks()
    hydra_config = HydraConfig.get()
    in_sweep = hydra_config.mode is RunMode.MULTIRUN
    try:
        check_keys(cfg)
        cfg = complete_config(cfg, hydra_config)
        if in_sweep and not prepare_job(cfg, Path(hydra_config.sweep.dir)):
            return
        call_task(cfg)
    except Exception as error:
        if not in_sweep:
            raise SystemExit(print_error(error)) from error
        failed_job_codes.append(print_error(error, job=Path(hydra_config.runtime.output_dir).name))
        if "out" in cfg:
            record_failure(cfg, error_text(error))
    finally:
        leave_process_group()
        end_jobs()
        # Hydra creates a folder for every command, also for one that writes nothing; rmdir keeps a folder with files.
        with suppress(OSError):
            Path(hydra_config.runtime.output_dir).rmdir()


def call_task(cfg: DictConfig) -> None:
    """Import and call the function ``cfg.task._target_``. Slow imports, such as torch, happen here."""
    task = hydra.utils.get_method(cfg.task._target_)
    if task.__module__.removeprefix("gencompare.tasks.") not in READING_TASKS:
        check_types(cfg)
    with opened_by(opener(cfg)):
        task(cfg)


def _run_rank(cfg: DictConfig) -> None:
    """Run a job on another rank than the first."""
    try:
        call_task(cfg)
    finally:
        leave_process_group()
