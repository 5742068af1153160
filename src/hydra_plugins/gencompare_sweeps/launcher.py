"""hydra/launcher=parallel, which runs several jobs of a sweep at once on this machine."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

Job = tuple[int, Sequence[str]]
"""The number of a job and its overrides."""
SIGNAL_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of jobs stopped by a signal, which are recorded as interrupted and not as failed."""


class ParallelLauncher(Launcher):
    """Runs each job in a separate process, with an equal part of the GPUs and processor cores.

    Args:
        n_jobs: number of jobs that run at the same time.
    """

    def __init__(self, n_jobs: int) -> None:
        super().__init__()
        self.n_jobs = n_jobs
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from gencompare.errors import UserError
        from gencompare.tasks.runs.error_reports import failed_job_codes
        from gencompare.tasks.runs.processes import run_jobs
        from gencompare.tasks.runs.run_folder import is_active
        from gencompare.tasks.runs.sweep import record_failure

        assert self.config is not None
        if not isinstance(self.n_jobs, int) or self.n_jobs < 1:
            raise UserError(f"hydra.launcher.n_jobs={self.n_jobs} must be a whole number of at least 1.")
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        waiting = list(enumerate(job_overrides, start=initial_job_idx))
        while waiting:
            deferred: list[Job] = []
            for cfg, code, reason in run_jobs(self.compose_jobs(waiting, deferred), folder, self.n_jobs):
                if code and is_active(Path(cfg.out)):
                    continue  # a process left by an earlier command is running this job
                if code:
                    failed_job_codes.append(code)
                if code not in (0, *SIGNAL_CODES):
                    record_failure(cfg, reason)
            waiting = deferred
        # Records say which jobs failed. A failed status would make Hydra end the sweep.
        return [JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED) for overrides in job_overrides]

    def compose_jobs(self, jobs: Sequence[Job], deferred: list[Job]) -> Iterator[DictConfig]:
        """Compose the configs of jobs that have work left, one at a time as slots become free.

        Jobs with the same training as a running job are appended to ``deferred``, to evaluate its weights later.
        """
        from gencompare.tasks.runs.error_reports import failed_job_codes, print_error
        from gencompare.tasks.runs.run_config import complete_config
        from gencompare.tasks.runs.sweep import TRAIN_TASK, job_identity, prepare_job

        assert self.config is not None and self.hydra_context is not None
        in_training: set[str] = set()
        for number, overrides in jobs:
            whole = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(whole):
                whole.hydra.job.id = whole.hydra.job.num = number
            HydraConfig.instance().set_config(whole)  # hydra.sweep.subdir is interpolated from it
            folder = Path(whole.hydra.sweep.dir) / whole.hydra.sweep.subdir
            with read_write(whole.hydra.runtime), open_dict(whole.hydra.runtime):
                whole.hydra.runtime.output_dir = str(folder.absolute())
            HydraConfig.instance().set_config(whole)
            own = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
            OmegaConf.set_struct(own, True)
            try:
                cfg = complete_config(own, HydraConfig.get())
                training = job_identity(cfg).training if cfg.task._target_ == TRAIN_TASK else None
                if training in in_training:
                    deferred.append((number, overrides))
                    continue
                if not prepare_job(cfg, Path(whole.hydra.sweep.dir)):
                    continue
            except Exception as error:
                failed_job_codes.append(print_error(error, job=folder.name))
                continue
            if training is not None and "trained_run" not in cfg:
                in_training.add(training)
            yield cfg
