"""hydra/launcher=parallel: several jobs at once on this machine."""

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
"""Its number and its words."""
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of jobs that were told to stop: their own records say so."""


class ParallelLauncher(Launcher):
    """Each job is a process of its own, with its share of GPUs and processor cores.

    Args:
        jobs: how many run at once.
    """

    def __init__(self, jobs: int) -> None:
        super().__init__()
        self.jobs = jobs
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from gencompare.errors import UserError
        from gencompare.tasks import main
        from gencompare.tasks.runs import sweep
        from gencompare.tasks.runs.processes import run_all

        assert self.config is not None
        if not isinstance(self.jobs, int) or self.jobs < 1:
            raise UserError(f"hydra.launcher.jobs={self.jobs}: give a whole number of jobs at once, at least 1.")
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        waiting = list(enumerate(job_overrides, start=initial_job_idx))
        while waiting:
            later: list[Job] = []
            for cfg, code, why in run_all(self.composed(waiting, later), folder, self.jobs):
                if code and sweep.at_work(Path(cfg.out)):
                    continue  # a process that outlived an earlier sitting was about to begin it
                if code:
                    main.failures.append(code)
                if code not in (0, *STOPPED):
                    sweep.fail(cfg, why)
            waiting = later
        # What failed is in the records; to Hydra, a job that failed would end the sweep.
        return [JobReturn(overrides=list(words), status=JobStatus.COMPLETED) for words in job_overrides]

    def composed(self, jobs: Sequence[Job], later: list[Job]) -> Iterator[DictConfig]:
        """The configs of the jobs that have anything left to do, each as its turn comes.

        Put into ``later`` are those that train what one of them is training: they can measure that, once it is done.
        """
        from gencompare.tasks import main
        from gencompare.tasks.runs import sweep
        from gencompare.tasks.runs.run_config import restore
        from gencompare.tasks.runs.sweep import job_identity

        assert self.config is not None and self.hydra_context is not None
        training: set[str] = set()
        for number, words in jobs:
            whole = self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
            with open_dict(whole):
                whole.hydra.job.id = whole.hydra.job.num = number
            HydraConfig.instance().set_config(whole)  # from which the name of the folder is made
            place = Path(whole.hydra.sweep.dir) / whole.hydra.sweep.subdir
            with read_write(whole.hydra.runtime), open_dict(whole.hydra.runtime):
                whole.hydra.runtime.output_dir = str(place.absolute())
            HydraConfig.instance().set_config(whole)
            own = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
            OmegaConf.set_struct(own, True)
            try:
                cfg = restore(own, HydraConfig.get())
                trained = job_identity(cfg).training if cfg.task._target_ == sweep.TRAIN else None
                if trained in training:
                    later.append((number, words))
                    continue
                if not sweep.is_begun(cfg, Path(whole.hydra.sweep.dir)):
                    continue
            except Exception as error:
                main.failures.append(main.report(error, job=place.name))
                continue
            if trained is not None and "trained_in" not in cfg:
                training.add(trained)
            yield cfg
