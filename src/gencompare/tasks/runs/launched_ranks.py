"""Ranks that torchrun or srun starts: rank 0 runs the command, and the other ranks run the jobs it hands out.

All ranks get the same command line, but only rank 0 may read it: the others would see the run folder in another state,
or start a sweep of their own. Without such a launcher, Lightning starts the other ranks (see `processes.ranks_run`).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from gencompare.errors import UserError

_FOREVER = timedelta(days=30)
_ADDRESS = "gencompare"
"""Key of the agent's store of torchrun with the address of rank 0's store."""
_END = ""
"""Handed out instead of a config when rank 0 exits."""
_handed_out = 0


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_launched() -> bool:
    """Return whether torchrun or srun has started this process."""
    # Like Lightning's `SLURMEnvironment`, which treats a shell on a node as no part of a job. The number of tasks of
    # the step is only set by srun, unlike that of the job.
    env = os.environ
    by_srun = "SLURM_STEP_NUM_TASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return _by_torchrun() or by_srun


def launched_ranks() -> tuple[int, int]:
    """Return (rank, world size) of a process that torchrun or srun has started, or else (0, 1)."""
    if _by_torchrun():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return (int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])) if is_launched() else (0, 1)


def expect_ranks() -> None:
    """Open the store for the other ranks, if torchrun or srun has started them and this is rank 0."""
    rank, world_size = launched_ranks()
    if rank == 0 and world_size > 1:
        _store()


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
            " (see docs/scaling.md)."
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
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    _connect_at(_own_host(), port)
    message = {"config": job.read_text(), "host": _own_host(), "port": port}
    _store().set(f"job {_handed_out}", json.dumps(message))
    _handed_out += 1


def _connect_at(host: str, port: int) -> None:
    """Let the ranks of the next job connect at a new port of rank 0.

    The store of torchrun outlives a restart with the addresses of the killed processes, which gloo would then call.
    """
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def end_jobs() -> None:
    """Let the other ranks exit, after the jobs that were handed out."""
    rank, world_size = launched_ranks()
    if world_size == 1 or rank > 0:
        return
    _store().set(f"job {_handed_out}", _END)
    # The store ends with this process: ranks that are still starting must find it.
    _poll([f"connected {other}" for other in range(1, world_size)], seconds=60)
    _poll([f"exited {other}" for other in range(1, world_size)], seconds=2)


def _poll(keys: list[str], seconds: float) -> None:
    """Wait until the store has all keys, or until the time is over, as when a rank was killed."""
    deadline = time.monotonic() + seconds
    while not _store().check(keys) and time.monotonic() < deadline:
        time.sleep(0.05)


def run_handed_out_jobs(run: Callable[[DictConfig], Any]) -> None:
    """Call ``run`` with the config of each job that rank 0 hands out, until rank 0 exits."""
    number, rank = 0, launched_ranks()[0]
    store = _store()
    store.set(f"connected {rank}", "")
    try:
        while True:
            store.wait([f"job {number}"], _FOREVER)
            text = store.get(f"job {number}").decode()
            if text == _END:
                return
            job = json.loads(text)
            _connect_at(job["host"], job["port"])
            run(cast(DictConfig, OmegaConf.create(job["config"])))
            number += 1
    finally:
        with suppress(RuntimeError):  # rank 0 is gone
            store.set(f"exited {rank}", "")


@lru_cache
def _own_host() -> str:
    """Return the name at which other ranks reach this process."""
    local = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE") or not _by_torchrun()
    return os.environ.get("MASTER_ADDR", "127.0.0.1") if local else socket.getfqdn()


@lru_cache
def _store() -> Any:
    """Return the store through which rank 0, which keeps it, hands out jobs.

    Under torchrun, its address is in the agent's store, which outlives restarts: other ranks try until a live process
    answers. Under srun, it is one port above that of torch.distributed.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    rank = launched_ranks()[0]
    agent: Any = None
    if _by_torchrun():
        agent = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_FOREVER)
        address = _own_host(), 0
    else:
        from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]

        environment = SLURMEnvironment()
        address = environment.main_address, environment.main_port + 1
    if rank == 0:
        store = TCPStore(*address, is_master=True, wait_for_workers=False)
        if agent is not None:
            agent.set(_ADDRESS, f"{address[0]} {store.port}")
        return store
    while True:
        if agent is not None:
            host, port = agent.get(_ADDRESS).decode().split()
            address = host, int(port)
        with suppress(OSError, RuntimeError):
            socket.create_connection(address, timeout=10).close()  # the store would print each failure
            return TCPStore(*address, is_master=False, timeout=timedelta(seconds=10))
        time.sleep(0.2)
