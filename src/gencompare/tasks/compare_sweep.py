"""A Hydra callback that compares the runs of a sweep when its last job has ended."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from gencompare.errors import UserError, printable
from gencompare.records import RECORD_FILE
from gencompare.tasks.runs.error_reports import FAILURE_CODE, failed_job_codes
from gencompare.tasks.runs.run_folder import touched_since, wait_until_inactive
from gencompare.tasks.runs.sweep import EVALUATE_TASK, TRAIN_TASK, unfinished_runs


class CompareSweep(Callback):
    """Compares all runs in a sweep folder, or all results of a run that was evaluated several times, and lists the runs
    that did not finish."""

    def __init__(self) -> None:
        self.start_ns = 0
        """Start time of the command. Runs with a lock file that was touched after this time are jobs of the command."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.start_ns = time.time_ns()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.task._target_ == EVALUATE_TASK and config.run_dir is not None:
            from gencompare.comparison.terminal import print_tables

            print_tables([config.run_dir])
        if config.task._target_ != TRAIN_TASK:
            return
        from gencompare.tasks.compare_runs import compare_folders, log_to_wandb  # slow to import

        sweep = Path(config.hydra.sweep.dir)
        folders = sorted(path.parent for path in sweep.glob(f"*/{RECORD_FILE}"))
        if not folders:
            return
        own = [folder for folder in folders if touched_since(folder, self.start_ns)]
        for folder in own:
            wait_until_inactive(folder)
        try:
            log_to_wandb(compare_folders(folders, sweep), config.logger, group=sweep.name)
        except UserError as error:
            print(f"The sweep could not be compared: {error}", file=sys.stderr)
        unfinished = unfinished_runs(own)
        if unfinished:
            if not failed_job_codes:  # the jobs ran in other processes
                failed_job_codes.append(FAILURE_CODE)
            print(f"{len(unfinished)} of {len(own)} runs did not finish. Repeat the command to retry them.")
            _print_reasons(unfinished)
        earlier = unfinished_runs([folder for folder in folders if folder not in own])
        if earlier:
            print(f"{len(earlier)} run(s) of other commands in this folder did not finish:")
            _print_reasons(earlier)


def _print_reasons(reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        print(printable(f"  [{name}] {reason}"))
    sys.stdout.flush()
