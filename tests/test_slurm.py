"""Sweeps as SLURM jobs through submitit, on a stand-in for the scheduler that runs what it is given at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from checkpoints import assert_same_training, checkpoint
from forking import Forked, needs_fork
from test_cli import QUICK, Cli, error_line, in_step_3

pytest.importorskip("submitit", reason="needs the extra slurm")
from submitit.core.submission import submitit_main

SBATCH = """#!{python}
import os, sys
folder = os.environ["FAKE_SLURM"]
script = open(sys.argv[-1]).read()
open(f"{{folder}}/submitted.sh", "a").write(script)
command = next(line for line in script.splitlines() if "submitit.core._submit" in line)
open(f"{{folder}}/queue", "a").write(command + "\\n")
print("Submitted batch job 100")
"""
SCONTROL = """#!{python}
import glob, os, sys
if sys.argv[1] == "requeue":
    folder = os.environ["FAKE_SLURM"]
    open(f"{{folder}}/requeued", "a").write(sys.argv[2] + "\\n")
    script = glob.glob(f"{{folder}}/sweep/.submitit/100/*.sh")[0]
    os.execvp("sbatch", ["sbatch", script])
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
"""
RUN = [*QUICK, "model=vae", "callbacks.evaluation.num_evaluations=0", "callbacks.checkpoints.every_minutes=60"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the commands of SLURM are found, and that receives what they get."""
    for name, text in {"sbatch": SBATCH, "srun": SACCT, "scontrol": SCONTROL, "sacct": SACCT, "squeue": SACCT}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(python=sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    return tmp_path


def submitit_job(folder: Path, job: str) -> None:
    sys.argv = ["_submit", job]
    submitit_main()


def run_submitted_jobs(cluster: Path, sweep: Forked) -> None:
    """Start each job that is submitted, as a fork of this process, until the sweep has ended."""
    variables = dict.fromkeys(("SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"), "1")
    variables |= dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    variables |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "100"}
    variables["SUBMITIT_EXECUTOR"] = "slurm"  # exported by the submitted script
    queue, jobs, deadline = cluster / "queue", list[Forked](), time.monotonic() + 100
    while sweep.poll() is None:
        assert time.monotonic() < deadline, sweep.output() + (cluster / "log").read_text()
        submitted = queue.read_text().splitlines() if queue.exists() else []
        for command in submitted[len(jobs) :]:
            folder = shlex.split(command)[-1]
            env = os.environ | variables
            jobs.append(Forked(cluster, folder, env=env, output=cluster / "log", run=submitit_job))
        time.sleep(0.05)
    for job in jobs:
        job.wait(timeout=60)


@needs_fork
def test_a_requeued_job_goes_on_where_it_was_interrupted(
    cluster: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR2 announces the end of the job. It saves, asks for a requeue and ends; then it resumes, bit for bit."""
    overrides = [*RUN, "budget.steps=6", "seed=3"]
    with monkeypatch.context() as patch:
        in_step_3(patch, partial(signal.raise_signal, signal.SIGUSR2))
        launcher = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.mem_gb=7"]
        sweep = Forked(cluster, "-m", *overrides, *launcher, "hydra.sweep.dir=sweep")
        run_submitted_jobs(cluster, sweep)
    assert sweep.wait() == 0, sweep.output()[-2000:]
    log = (cluster / "log").read_text()
    assert "Stopped after step 3" in log and "was interrupted: resuming" in log
    assert (cluster / "requeued").read_text() == "100\n"
    run = cluster / "sweep" / "0_digits_vae"
    assert checkpoint(run)["callbacks"]["TrainingClock"]["step"] == 6
    assert json.loads((run / "record.json").read_text())["state"] == "finished"
    script = (cluster / "submitted.sh").read_text()
    for line in ("--partition=gpu", "--mem=7GB", "--gpus-per-node=1", "--cpus-per-task=8", "--signal=USR2@120"):
        assert f"#SBATCH {line}\n" in script
    assert cli(*overrides, "hydra.run.dir=whole") == 0
    assert_same_training(run, cluster / "whole")


def test_the_same_command_starts_and_continues_a_run(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [*RUN, "resume=auto", "hydra.run.dir=run"]
    assert cli(*command, "budget.steps=2") == 0
    assert cli(*command, "budget.steps=4") == 0
    assert checkpoint(tmp_path / "run")["callbacks"]["TrainingClock"]["step"] == 4
    capsys.readouterr()
    assert cli(*RUN, "resume=auto", "budget.steps=2") == 1
    assert "set hydra.run.dir=DIR" in error_line(capsys)
