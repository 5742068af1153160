"""Parallel jobs of a sweep, each with a part of the machine and a separate run folder.

test_processes.py tests that each job has one W&B run, since the threads of W&B do not survive a fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forking import Forked, active_process
from gencompare.records import RunRecord
from gencompare.tasks.runs import processes
from test_cli import QUICK, Cli

LAUNCHED = ["-m", "hydra/launcher=parallel", "hydra.sweep.dir=sweep"]


@pytest.mark.parametrize(
    ("n_jobs", "devices", "expected"),
    [
        (2, "0123", ["0,2", "1,3"]),
        (2, "012", ["0,2", "1"]),
        (3, "5", ["5", "5", "5"]),
        (2, "", [None, None]),
        (1, "01", ["0,1"]),
    ],
)
def test_jobs_share_devices_and_cores(
    n_jobs: int, devices: str, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environments = [processes.job_environment(slot, n_jobs, list(devices), cores=7) for slot in range(n_jobs)]
    assert [variables.get("CUDA_VISIBLE_DEVICES") for variables in environments] == expected
    assert {variables["OMP_NUM_THREADS"] for variables in environments} == {str(7 // n_jobs)}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processes.job_environment(0, n_jobs, list(devices), cores=7)["OMP_NUM_THREADS"] == "3"


def test_hidden_devices_stay_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f,3")
    assert processes.visible_devices() == ["GPU-1f", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.visible_devices() == []


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make jobs forks of this process; each stores the number of other jobs that ran when it started."""
    jobs: list[Any] = []

    def start(command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> Forked:
        assert command == [sys.executable, "-m", "gencompare.tasks.runs.rank"]
        job: Any = Forked(tmp_path, env=env, output=Path(stdout.name))
        job.others_running = sum(other.poll() is None for other in jobs)
        jobs.append(job)
        return job

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=start, STDOUT=None))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return jobs


@pytest.mark.timeout(280)
def test_parallel_jobs_of_two_processes_each(cli: Cli, tmp_path: Path, forked: list[Any], capsys: Any) -> None:
    """Two jobs run at a time, with two processes each. One job fails, and the same command runs only that job again."""
    overrides = [
        *LAUNCHED, "model=vae", "model.beta=-1,1,2", *QUICK, "budget.steps=2",
        "callbacks.evaluation.num_evaluations=0", "evaluation.checkpoints=[]", "trainer=ddp", "trainer.accelerator=cpu",
        "trainer.devices=2",
    ]  # fmt: skip
    assert cli(*overrides) == 1
    out = capsys.readouterr().out
    assert "1 of 3 runs did not finish" in out and "[0_digits_vae] failed: model.beta=-1" in out
    assert len(forked) == 3 and max(job.others_running for job in forked) == 1, "two jobs at a time"
    sweep = tmp_path / "sweep"
    for name in ("1_digits_vae", "2_digits_vae"):
        record = json.loads((sweep / name / "record.json").read_text())
        assert record["state"] == "finished" and record["training"]["processes"] == 2
        assert record["training"]["device_seconds"] > record["training"]["seconds"]
        assert record["environment"]["sweep"] == "sweep"
    assert (sweep / "compare.html").is_file()
    forked.clear()
    assert cli(*overrides) == 1
    assert len(forked) == 1 and "[2_digits_vae] already finished" in capsys.readouterr().out


def test_a_job_with_the_same_training_as_a_running_job_evaluates_it_later(
    cli: Cli, tmp_path: Path, forked: list[Any], capsys: Any
) -> None:
    overrides = [
        *LAUNCHED,
        "model=gaussian",
        *QUICK,
        "evaluation.checkpoints=[last]",
        "evaluation.num_images=66,80",
        "budget.steps=1",
    ]
    assert cli(*overrides) == 0
    assert [job.others_running for job in forked] == [
        0,
        0,
    ] and "already trained in 0_digits_gaussian" in capsys.readouterr().out
    (path,) = (tmp_path / "sweep").glob("*/record.json")
    assert [result["measurement"]["num_images"] for result in json.loads(path.read_text())["results"]] == [66, 80]


def test_a_job_that_a_process_of_an_earlier_command_started_is_skipped(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate a sweep that was killed while its job was starting: the job of the next command fails to lock the
    folder."""
    folder = tmp_path / "sweep" / "0_digits_gaussian"

    def run_jobs(configs: Any, *_: Any) -> Any:
        for cfg in configs:
            RunRecord(folder.name, "gaussian", {"name": "digits"}).save(folder)
            stack.enter_context(active_process(folder, "finished"))
            yield cfg, 1, "Another process is using it."

    monkeypatch.setattr(processes, "run_jobs", run_jobs)
    with ExitStack() as stack:
        assert cli(*LAUNCHED, "model=gaussian", *QUICK) == 0
    assert json.loads((folder / "record.json").read_text())["state"] == "finished"


@pytest.mark.timeout(120)
def test_jobs_stop_with_the_sweep_and_save_a_checkpoint(
    cli: Cli, tmp_path: Path, forked: list[Any], capsys: Any
) -> None:
    overrides = [
        *LAUNCHED,
        "model=vae",
        "seed=0,1",
        *QUICK,
        "callbacks.evaluation.num_evaluations=0",
        "evaluation.checkpoints=[]",
    ]

    def stop() -> None:
        curves = [tmp_path / "sweep" / f"{k}_digits_vae" / "curve.csv" for k in (0, 1)]
        while len(forked) < 2 or not all(curve.exists() for curve in curves):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert cli(*overrides, "budget.steps=100000") == 128 + signal.SIGTERM
    records = [json.loads((tmp_path / "sweep" / f"{k}_digits_vae" / "record.json").read_text()) for k in (0, 1)]
    assert [record["state"] for record in records] == ["interrupted"] * 2
    assert all(record["training"]["steps"] > 0 for record in records)


def test_an_invalid_number_of_jobs_is_refused(cli: Cli, capsys: Any) -> None:
    assert cli(*LAUNCHED, "hydra.launcher.n_jobs=0", "seed=0,1") == 1
    assert "hydra.launcher.n_jobs=0" in capsys.readouterr().err
