"""Several jobs of a sweep at once on one machine, each a process with its share of the devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from gencompare.tasks import frozen
from gencompare.tasks.processes import CHILD
from gencompare.tasks.signals import sigterm_raises

JOBS = ".jobs"
"""Folder in that of the sweep, for the configs of its jobs and for what they print."""
POLL_SECONDS = 0.2


@dataclass
class Job:
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


def started(cfg: DictConfig, sweep: Path, place: int, at_once: int, devices: Sequence[str]) -> Job:
    """A job as a process of its own, which reads its composed config as the further processes of a job do."""
    name = Path(cfg.out).name
    config, log = sweep / JOBS / f"{name}.yaml", sweep / JOBS / f"{name}.log"
    frozen.save(cfg, config)
    environment = {**os.environ, **share(place, at_once, devices), CHILD: str(config.absolute())}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gencompare.tasks.rank"], env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return Job(name, process, place, log, time.monotonic())


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
def stopped_at_the_end(running: dict[int, tuple[DictConfig, Job]]) -> Iterator[None]:
    """When the block ends, processes that still run are told to stop and waited for."""
    try:
        yield
    finally:
        for _, job in running.values():
            job.process.terminate()
        for _, job in running.values():
            job.process.wait()
