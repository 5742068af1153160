"""Several jobs of a sweep at once: each has its share of the machine and its run folder.

That each has one W&B run is tested in test_processes.py: W&B's threads do not live through a fork.
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

from forking import Forked, living_on
from gencompare.records import RunRecord
from gencompare.tasks.runs import processes
from test_cli import QUICK, Cli

LAUNCHED = ["-m", "hydra/launcher=parallel", "hydra.sweep.dir=sweep"]


@pytest.mark.parametrize(
    ("at_once", "devices", "shares"),
    [
        (2, "0123", ["0,2", "1,3"]),
        (2, "012", ["0,2", "1"]),
        (3, "5", ["5", "5", "5"]),
        (2, "", [None, None]),
        (1, "01", ["0,1"]),
    ],
)
def test_devices_and_cores_are_shared_out(
    at_once: int, devices: str, shares: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given = [processes.share(place, at_once, list(devices), cores=7) for place in range(at_once)]
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in given] == shares
    assert {one["OMP_NUM_THREADS"] for one in given} == {str(7 // at_once)}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processes.share(0, at_once, list(devices), cores=7)["OMP_NUM_THREADS"] == "3"


def test_devices_that_are_hidden_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f,3")
    assert processes.visible_devices() == ["GPU-1f", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.visible_devices() == []


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Jobs are forks of this process, without the seconds of imports; the most that were at work at once is counted."""
    jobs: list[Any] = []

    def start(command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> Forked:
        assert command == [sys.executable, "-m", "gencompare.tasks.runs.rank"]
        job: Any = Forked(tmp_path, env=env, output=Path(stdout.name))
        job.beside = sum(other.poll() is None for other in jobs)
        jobs.append(job)
        return job

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=start, STDOUT=None))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return jobs


@pytest.mark.timeout(280)
def test_jobs_at_once_of_two_processes_each(cli: Cli, tmp_path: Path, forked: list[Any], capsys: Any) -> None:
    """Two jobs at a time on two processes each; one fails; started again, only that one is tried."""
    words = [
        *LAUNCHED, "model=vae", "model.beta=-1,1,2", *QUICK, "budget.steps=2",
        "callbacks.looks.count=0", "evaluation.checkpoints=[]", "trainer=ddp", "trainer.accelerator=cpu",
        "trainer.devices=2",
    ]  # fmt: skip
    assert cli(*words) == 1
    out = capsys.readouterr().out
    assert "1 of 3 runs did not finish" in out and "[0_digits_vae] failed: model.beta=-1" in out
    assert len(forked) == 3 and max(job.beside for job in forked) == 1, "two at a time"
    sweep = tmp_path / "sweep"
    for name in ("1_digits_vae", "2_digits_vae"):
        record = json.loads((sweep / name / "record.json").read_text())
        assert record["state"] == "finished" and record["training"]["processes"] == 2
        assert record["training"]["device_seconds"] > record["training"]["seconds"]
        assert record["environment"]["sweep"] == "sweep"
    assert (sweep / "compare.html").is_file()
    forked.clear()
    assert cli(*words) == 1
    assert len(forked) == 1 and "[2_digits_vae] finished before" in capsys.readouterr().out


def test_a_job_that_trains_what_another_is_training_measures_that_afterwards(
    cli: Cli, tmp_path: Path, forked: list[Any], capsys: Any
) -> None:
    words = [
        *LAUNCHED,
        "model=gaussian",
        *QUICK,
        "evaluation.checkpoints=[last]",
        "evaluation.n=66,80",
        "budget.steps=1",
    ]
    assert cli(*words) == 0
    assert [job.beside for job in forked] == [
        0,
        0,
    ] and "trained before, in 0_digits_gaussian" in capsys.readouterr().out
    (path,) = (tmp_path / "sweep").glob("*/record.json")
    assert [result["measurement"]["n"] for result in json.loads(path.read_text())["results"]] == [66, 80]


def test_a_job_that_a_process_of_an_earlier_sitting_begins_first_is_left_to_that(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL of the sweep while its job was still starting: the one that comes second finds it taken."""
    folder = tmp_path / "sweep" / "0_digits_gaussian"

    def run_all(jobs: Any, *_: Any) -> Any:
        for cfg in jobs:
            RunRecord(folder.name, "gaussian", {"name": "digits"}).save(folder)
            living.enter_context(living_on(folder, "finished"))
            yield cfg, 1, "Another process is at work in it."

    monkeypatch.setattr(processes, "run_all", run_all)
    with ExitStack() as living:
        assert cli(*LAUNCHED, "model=gaussian", *QUICK) == 0
    assert json.loads((folder / "record.json").read_text())["state"] == "finished"


@pytest.mark.timeout(120)
def test_jobs_are_told_to_stop_with_the_sweep_and_go_on_later(
    cli: Cli, tmp_path: Path, forked: list[Any], capsys: Any
) -> None:
    words = [*LAUNCHED, "model=vae", "seed=0,1", *QUICK, "callbacks.looks.count=0", "evaluation.checkpoints=[]"]

    def stop() -> None:
        curves = [tmp_path / "sweep" / f"{k}_digits_vae" / "curve.csv" for k in (0, 1)]
        while len(forked) < 2 or not all(curve.exists() for curve in curves):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert cli(*words, "budget.steps=100000") == 128 + signal.SIGTERM
    records = [json.loads((tmp_path / "sweep" / f"{k}_digits_vae" / "record.json").read_text()) for k in (0, 1)]
    assert [record["state"] for record in records] == ["interrupted"] * 2
    assert all(record["training"]["steps"] > 0 for record in records)


def test_a_number_of_jobs_that_is_none_is_refused(cli: Cli, capsys: Any) -> None:
    assert cli(*LAUNCHED, "hydra.launcher.jobs=0", "seed=0,1") == 1
    assert "hydra.launcher.jobs=0" in capsys.readouterr().err
