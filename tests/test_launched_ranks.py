"""Runs whose processes torchrun or srun starts: one run folder, restarts after a killed rank, clear refusals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from checkpoints import assert_same_training
from forking import Forked, needs_fork, run_main
from gencompare import private_apis
from gencompare.errors import UserError
from gencompare.private_apis import end_ranks, observe_ranks
from gencompare.tasks.runs.launched_ranks import check_devices, check_no_sweep, end_jobs
from gencompare.tasks.runs.processes import leave_process_group
from gencompare.training.clock import TrainingClock
from test_cli import QUICK

DDP = ["trainer=ddp", "trainer.accelerator=cpu"]
RUN = [
    *QUICK, *DDP, "callbacks.evaluation.num_evaluations=0", "callbacks.checkpoints.every_minutes=0",
    "evaluation.checkpoints=[]", "logger=csv", "hydra.run.dir=run",
]  # fmt: skip


def kill_second_rank() -> None:
    """Kill rank 1 in the third step, before the first restart."""
    original = TrainingClock.on_train_batch_start

    def start(self: TrainingClock, *args: Any) -> None:
        original(self, *args)
        if self.step == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingClock.on_train_batch_start = start  # type: ignore[method-assign]


def torchrun(folder: Path, *overrides: str) -> None:
    """Do what ``torchrun --standalone --nproc-per-node=2 --max-restarts=1 run.py OVERRIDES`` does, with ranks that are
    forks of this process."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, monitor_interval=0.1, start_method="fork",
        run_id=uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    elastic_launch(config, run_main)(folder, *overrides)


@needs_fork
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_torchrun_restarts_a_run_whose_rank_was_killed(tmp_path: Path) -> None:
    """The restarted processes resume from the last checkpoint and end with the same weights, bit for bit."""
    overrides = ["model=vae", "budget.steps=6", *RUN]
    agent = Forked(tmp_path, *overrides, "resume=auto", first=kill_second_rank, run=torchrun)
    assert agent.wait(timeout=150) == 0, agent.output()
    assert agent.output().count("Run folder: run") == 2 and "starts again from" not in agent.output(), agent.output()
    assert json.loads((tmp_path / "run" / "record.json").read_text())["state"] == "finished"
    unbroken = Forked(tmp_path, *overrides[:-1], "hydra.run.dir=unbroken")
    assert unbroken.wait(timeout=100) == 0, unbroken.output()[-4000:]
    assert_same_training(tmp_path / "run", tmp_path / "unbroken")


@needs_fork
@pytest.mark.timeout(200)
def test_tasks_of_srun_train_both_stages_of_a_latent_model(tmp_path: Path) -> None:
    """Two processes in the environment of two tasks of srun. Only the first composes the config and writes the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = {
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0", "SLURM_JOB_NAME": "job",
        "SLURM_JOB_ID": "1", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    overrides = [
        "model=ldm", *RUN, "budget.steps=2", "model.latent.budget.steps=2", "model.latent.budget.images=null",
        "paths.runs=.",
    ]  # fmt: skip
    processes = [
        Forked(
            tmp_path, *overrides, output=tmp_path / f"output_{rank}",
            env=os.environ | tasks | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    codes = [process.wait(timeout=150) for process in processes]
    texts = [process.output() for process in processes]
    assert codes == [0, 0], texts
    assert "Stage 1 of 2" in texts[0] and "Stage 2 of 2" in texts[0] and "Stage" not in texts[1]
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/record.json")]
    assert [(record["state"], record["training"]["processes"]) for record in records] == [("finished", 2)] * 2


def test_what_external_launchers_cannot_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    check_no_sweep(["-m", "seed=0,1"])
    check_devices("auto", 1)
    with pytest.raises(UserError, match=r"trainer.num_nodes=2 needs a launcher"):
        check_devices(2, 2)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    check_devices(4, 2)
    for devices, nodes in ((1, 1), ("auto", 2), (8, 2)):
        with pytest.raises(UserError, match=r"add trainer=ddp trainer.devices=4 trainer.num_nodes=2\."):
            check_devices(devices, nodes)
    with pytest.raises(UserError, match=r"A sweep \(-m\) starts the processes of its jobs itself"):
        check_no_sweep(["--multirun", "seed=0,1"])


def test_one_process_of_torchrun_keeps_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    leave_process_group()
    end_jobs()
    assert os.environ["WORLD_SIZE"] == "1"


def test_ranks_of_a_job_that_ended_do_not_end_the_next_one() -> None:
    """The thread of Lightning finds a dead rank after its job has ended. It leaves this process alone."""
    programs = ("exit(1)", "import time; time.sleep(60)")
    dead, waiting = (subprocess.Popen([sys.executable, "-c", program]) for program in programs)
    dead.wait()
    observe_ranks([dead, waiting])
    end_ranks()
    assert waiting.wait(timeout=10) == -signal.SIGKILL
    assert not private_apis._started
