"""Ranks that torchrun or srun starts: rank 0 runs the command, and the other ranks run the jobs it hands out.

All ranks get the same command line, but only rank 0 may read it: the others would see the run folder in another state,
or start a sweep of their own. Without such a launcher, Lightning starts the other ranks (see `processes.ranks_run`).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from gencompare.errors import UserError

_FOREVER = timedelta(days=30)
_END = ""
"""Handed out instead of a config when rank 0 has ended."""
_handed_out = 0


def launched_ranks() -> tuple[int, int]:
    """Return (rank, world size) of a process that torchrun or srun has started, or else (0, 1)."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    # Like Lightning's `SLURMEnvironment`, which treats a shell on a node as no part of a job.
    if "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(env["SLURM_PROCID"]), int(env.get("SLURM_NTASKS", "1"))
    return 0, 1


def check_no_sweep(argv: Iterable[str]) -> None:
    """Raise `UserError` for a sweep under torchrun or srun."""
    if launched_ranks()[1] > 1 and not {*argv}.isdisjoint(("-m", "--multirun")):
        raise UserError(
            "A sweep (-m) starts the processes of its jobs itself: start it without torchrun or srun, with"
            " hydra/launcher=parallel or hydra/launcher=slurm."
        )


def check_devices(devices: Any, num_nodes: Any) -> None:
    """Raise `UserError` unless the settings of the Trainer match the processes that were started."""
    world_size = launched_ranks()[1]
    if world_size == 1 and num_nodes != 1:
        raise UserError(
            f"trainer.num_nodes={num_nodes} needs a launcher that starts processes on all nodes: torchrun, or srun"
            " (see docs/how_to/several_gpus.md)."
        )
    if world_size > 1 and not (isinstance(devices, int) and devices * num_nodes == world_size):
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or world_size)
        nodes = f" trainer.num_nodes={world_size // local}" if local < world_size else ""
        raise UserError(
            f"{world_size} processes were started, but trainer.devices={devices} and trainer.num_nodes={num_nodes}:"
            f" add trainer=ddp trainer.devices={local}{nodes}."
        )


def hand_out(job: Path) -> None:
    """Give the config file ``job`` to the other ranks, if torchrun or srun has started them."""
    global _handed_out
    rank, world_size = launched_ranks()
    if rank > 0 or world_size == 1:
        return
    store = _store()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    _connect_at(port)
    store.set(f"job {_handed_out}", json.dumps({"config": job.read_text(), "port": port}))
    _handed_out += 1


def _connect_at(port: int) -> None:
    """Let the ranks of the next job connect at ``port`` of rank 0.

    The store of torchrun outlives a restart with the addresses of the killed processes, which gloo would then call.
    """
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def end_jobs() -> None:
    """Let the other ranks end, after those of the jobs that were handed out."""
    rank, world_size = launched_ranks()
    if world_size == 1 or rank > 0:
        return
    with suppress(RuntimeError):  # the launcher, which keeps the store, is gone
        _store().set(f"job {_handed_out}", _END)
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # this process keeps the store
            _store().wait([f"ended {other}" for other in range(1, world_size)], timedelta(minutes=5))


def run_handed_out_jobs(run: Callable[[DictConfig], Any]) -> None:
    """Call ``run`` with the config of each job that rank 0 hands out, until rank 0 ends."""
    number = 0
    store = _store()
    try:
        while True:
            store.wait([f"job {number}"], _FOREVER)
            text = store.get(f"job {number}").decode()
            if text == _END:
                return
            job = json.loads(text)
            _connect_at(job["port"])
            run(cast(DictConfig, OmegaConf.create(job["config"])))
            number += 1
    finally:
        with suppress(RuntimeError):
            store.set(f"ended {launched_ranks()[0]}", "")


@lru_cache
def _store() -> Any:
    """Return the store of torchrun, or one that rank 0 of srun keeps beside that of torch.distributed."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    if "TORCHELASTIC_RUN_ID" in os.environ:
        address, port, is_master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), False
    else:
        from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]

        environment = SLURMEnvironment()
        address, port, is_master = environment.main_address, environment.main_port + 1, launched_ranks()[0] == 0
    store = TCPStore(address, port, is_master=is_master, wait_for_workers=False)
    return PrefixStore(f"gencompare {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
