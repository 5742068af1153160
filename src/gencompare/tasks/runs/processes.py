"""Processes of a run: those of torch.distributed under Hydra, and jobs of a sweep at once."""

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

from gencompare.tasks.runs import run_config

SIGTERM_CODE = 128 + signal.SIGTERM


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the block as Ctrl-C does. (While a model trains, `GracefulStop` has the signal.)"""

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
        return [sys.executable, "-m", "gencompare.tasks.runs.rank"], os.getcwd()

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


def leave_process_group() -> None:
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


JOBS = ".jobs"
"""Folder in that of the sweep, for the configs of its jobs and for what they print."""
POLL_SECONDS = 0.2


@dataclass
class ParallelJob:
    """A process at work, its place among those that run at once, and where it prints."""

    name: str
    process: subprocess.Popen[bytes]
    place: int
    log: Path
    since: float


def run_all(jobs: Iterator[DictConfig], sweep: Path, at_once: int) -> Iterator[tuple[DictConfig, int, str]]:
    """Run configs of jobs, ``at_once`` at a time; yields each, as it ends, with its exit code and the reason it gave.

    When the block is left early (Ctrl-C, SIGTERM), jobs at work are told to stop, and save first.
    """
    devices, running = visible_devices(), {}
    places = list(range(at_once))
    left = iter(jobs)
    with sigterm_raises(), stopped_at_the_end(running):
        while True:
            while places and (cfg := next(left, None)) is not None:
                job = started(cfg, sweep, places.pop(0), at_once, devices)
                running[job.process.pid] = (cfg, job)
                print(f"[{job.name}] started; it prints to {job.log}", flush=True)
            if not running:
                return
            ended = [pid for pid, (_, job) in running.items() if job.process.poll() is not None]
            for pid in ended:
                cfg, job = running.pop(pid)
                places.append(job.place)
                code, minutes = job.process.returncode, (time.monotonic() - job.since) / 60
                why = "" if code == 0 else reason(job.log, code)
                print(f"[{job.name}] {why or 'ended well'} after {minutes:.1f} min", flush=True)
                yield cfg, code, why
            if not ended:
                time.sleep(POLL_SECONDS)


def started(cfg: DictConfig, sweep: Path, place: int, at_once: int, devices: Sequence[str]) -> ParallelJob:
    """A job as a process of its own, which reads its composed config as the further processes of a job do."""
    name = Path(cfg.out).name
    config, log = sweep / JOBS / f"{name}.yaml", sweep / JOBS / f"{name}.log"
    run_config.save(cfg, config)
    environment = {**os.environ, **share(place, at_once, devices), CHILD: str(config.absolute())}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gencompare.tasks.runs.rank"],
            env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return ParallelJob(name, process, place, log, time.monotonic())


def share(place: int, at_once: int, devices: Sequence[str], cores: int | None = None) -> dict[str, str]:
    """Environment variables that give one of ``at_once`` jobs its part of the machine.

    CUDA devices go round; where there are fewer than jobs, several jobs share one. Of processor cores, each job gets an
    equal number, unless OMP_NUM_THREADS is set.
    """
    mine = list(devices[place::at_once]) or [devices[place % len(devices)]] if devices else []
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // at_once))
    return {"OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})}


def visible_devices() -> list[str]:
    """CUDA devices that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device for device in named.split(",") if device]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def reason(log: Path, code: int) -> str:
    """What a job that failed said last of it, in one line."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("Error: ")]
    return said[-1].removeprefix("Error: ") if said else f"exit code {code}, see {log}"


@contextmanager
def stopped_at_the_end(running: dict[int, tuple[DictConfig, ParallelJob]]) -> Iterator[None]:
    """When the block ends, processes that still run are told to stop and waited for."""
    try:
        yield
    finally:
        for _, job in running.values():
            job.process.terminate()
        for _, job in running.values():
            job.process.wait()
