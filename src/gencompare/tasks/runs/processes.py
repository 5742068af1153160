"""Processes: the ranks of torch.distributed under Hydra, and the parallel jobs of a sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gencompare.errors import printable
from gencompare.private_apis import end_ranks, rank_command
from gencompare.tasks.runs import run_config
from gencompare.tasks.runs.launched_ranks import hand_out, is_launched

SIGTERM_CODE = 128 + signal.SIGTERM
"""Exit code of a process that was ended by SIGTERM."""
CONFIG_VARIABLE = "GENCOMPARE_JOB"
"""Environment variable with the config path of a rank or a parallel job."""
JOB_FILE = ".job.yaml"
"""File in a run folder with the config for the other ranks of the job."""
JOBS_FOLDER = ".jobs"
"""Folder in a sweep folder with the configs and output of parallel jobs."""
POLL_SECONDS = 0.2
RANK_COMMAND = [sys.executable, "-m", "gencompare.tasks.runs.rank"]
_RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", CONFIG_VARIABLE)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Make SIGTERM raise `SystemExit` in the block, as Ctrl-C raises `KeyboardInterrupt`.

    During training, `GracefulStop` handles the signal instead.
    """

    def stop(number: int, frame: object) -> None:
        raise SystemExit(SIGTERM_CODE)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def ranks_run(job: Path) -> Iterator[None]:
    """Make the other ranks run the job in the config file ``job``: those of an external launcher, or Lightning's."""
    hand_out(job)
    os.environ[CONFIG_VARIABLE] = str(job)
    with rank_command(RANK_COMMAND, os.getcwd()):
        yield


def is_multiprocess(cfg: Any) -> bool:
    """Return whether a job may start other ranks, which read its config from a file."""
    return cfg.trainer.devices != 1 or cfg.trainer.num_nodes != 1


def leave_process_group() -> None:
    """Destroy the process group of a job and its rank variables, so the next job can create new ones.

    The ranks of an external launcher keep their variables: the next job has the same ranks.
    """
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    end_ranks()
    if is_launched():
        return
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)


def wait_for_ranks(trainer: Any) -> None:
    """Wait until the processes that ``trainer`` launched have ended."""
    for process in getattr(trainer.strategy.launcher, "procs", None) or []:
        process.wait()


@dataclass
class ParallelJob:
    """A job of a sweep that runs in a separate process."""

    name: str
    process: subprocess.Popen[bytes]
    slot: int
    """Index of the job among the jobs that run at the same time."""
    log: Path
    """File with the output of the job."""
    start: float


def run_jobs(configs: Iterator[DictConfig], sweep: Path, n_jobs: int) -> Iterator[tuple[DictConfig, int, str]]:
    """Run a job per config, ``n_jobs`` at a time. Yield config, exit code and error message as each job ends.

    If the caller stops early (Ctrl-C, SIGTERM), running jobs receive SIGTERM, save a checkpoint if training, and end.
    """
    devices, running = visible_devices(), {}
    free_slots = list(range(n_jobs))
    remaining = iter(configs)
    with sigterm_exits(), terminate_on_exit(running):
        while True:
            while free_slots and (cfg := next(remaining, None)) is not None:
                job = start_job(cfg, sweep, free_slots.pop(0), n_jobs, devices)
                running[job.process.pid] = (cfg, job)
                print(printable(f"[{job.name}] started, with its output in {job.log}"), flush=True)
            if not running:
                return
            ended = [pid for pid, (_, job) in running.items() if job.process.poll() is not None]
            for pid in ended:
                cfg, job = running.pop(pid)
                free_slots.append(job.slot)
                code, minutes = job.process.returncode, (time.monotonic() - job.start) / 60
                reason = "" if code == 0 else failure_reason(job.log, code)
                print(printable(f"[{job.name}] {reason or 'finished'} after {minutes:.1f} min"), flush=True)
                yield cfg, code, reason
            if not ended:
                time.sleep(POLL_SECONDS)


def start_job(cfg: DictConfig, sweep: Path, slot: int, n_jobs: int, devices: Sequence[str]) -> ParallelJob:
    """Start a process that reads the complete config ``cfg`` from a file, as a rank does."""
    name = Path(cfg.out).name
    config, log = sweep / JOBS_FOLDER / f"{name}.yaml", sweep / JOBS_FOLDER / f"{name}.log"
    run_config.save(cfg, config)
    environment = {**os.environ, **job_environment(slot, n_jobs, devices), CONFIG_VARIABLE: str(config.absolute())}
    with log.open("wb") as output:
        process = subprocess.Popen(
            RANK_COMMAND, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return ParallelJob(name, process, slot, log, time.monotonic())


def job_environment(slot: int, n_jobs: int, devices: Sequence[str], cores: int | None = None) -> dict[str, str]:
    """Return environment variables that assign a job its part of the machine.

    CUDA devices are assigned round-robin; with fewer devices than jobs, several jobs share one. Processor cores are
    divided equally, unless OMP_NUM_THREADS is set.
    """
    own = list(devices[slot::n_jobs]) or [devices[slot % len(devices)]] if devices else []
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // n_jobs))
    return {"OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {})}


def visible_devices() -> list[str]:
    """Return the CUDA devices that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        return [device for device in names.split(",") if device]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def failure_reason(log: Path, code: int) -> str:
    """Return the last error message of a failed job, in one line."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("Error: ")]
    return errors[-1].removeprefix("Error: ") if errors else f"exit code {code}, see {log}"


@contextmanager
def terminate_on_exit(running: dict[int, tuple[DictConfig, ParallelJob]]) -> Iterator[None]:
    """Terminate the jobs that are still running at the end of the block, and wait for them."""
    try:
        yield
    finally:
        for _, job in running.values():
            job.process.terminate()
        for _, job in running.values():
            job.process.wait()
