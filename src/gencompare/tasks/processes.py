"""Several processes under Hydra: the further ones get the composed config, and the next job of a sweep starts fresh."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHILD = "GENCOMPARE_JOB"
"""Names the composed config of a job to its further processes."""

JOB = ".job.yaml"
"""The file in a run folder that holds it."""

_RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", CHILD)


@contextmanager
def children_of(job: Path) -> Iterator[None]:
    """Lightning's further processes run ``gencompare`` on the config file ``job``.

    As shipped, Lightning starts them with Hydra's whole command line, so that under ``-m`` every rank would run the
    whole sweep and compose a config of its own.
    """
    from pytorch_lightning.strategies.launchers import subprocess_script

    def command(local_rank: int) -> tuple[list[str], str]:
        return [sys.executable, "-m", "gencompare.tasks.rank"], os.getcwd()

    original = subprocess_script._hydra_subprocess_cmd  # type: ignore[attr-defined]
    subprocess_script._hydra_subprocess_cmd = command  # type: ignore[attr-defined]
    os.environ[CHILD] = str(job)
    try:
        yield
    finally:
        subprocess_script._hydra_subprocess_cmd = original  # type: ignore[attr-defined]


def several_processes(cfg: Any) -> bool:
    """Whether a job may start further processes, which read its config from the file `JOB`."""
    return cfg.trainer.devices != 1 or cfg.trainer.num_nodes != 1


def alone_again() -> None:
    """After a job: end its process group and drop its rank variables, so that the next job of a sweep starts fresh."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)


def wait_for_children(trainer: Any) -> None:
    """Wait until the further processes that ``trainer`` launched have ended."""
    for process in getattr(trainer.strategy.launcher, "procs", None) or []:
        process.wait()
