"""Sweeps as SLURM jobs through submitit, on a stand-in for the scheduler that runs what it is given at once."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints import assert_same_training, checkpoint
from test_cli import QUICK, Cli, error_line

pytest.importorskip("submitit", reason="needs the extra slurm")

SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
text = open(script).read()
folder = os.environ["FAKE_SLURM"]
open(f"{{folder}}/submitted.sh", "a").write(text)
array = re.search(r"#SBATCH --array=(\\d+)-(\\d+)", text)
for task in range(int(array[1]), int(array[2]) + 1) if array else [0]:
    job = {{"SLURM_JOB_ID": str(100 + task)}}
    job |= {{"SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": str(task)}} if array else {{}}
    one = {{name: "1" for name in ("SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")}}
    zero = {{name: "0" for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")}}
    env = os.environ | job | one | zero | {{"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NAME": "job"}}
    log = open(f"{{folder}}/log{{task}}", "a")
    streams = {{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}}
    subprocess.Popen(["bash", script], env=env, start_new_session=True, **streams)
print("Submitted batch job 100")
"""
SRUN = """#!{python}
import os, sys
start = next(k for k, each in enumerate(sys.argv) if "python" in os.path.basename(each) and k)
os.execvp(sys.argv[start], sys.argv[start:])
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
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "sacct": SACCT, "squeue": SACCT}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(python=sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    return tmp_path


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gencompare.tasks.runs.rank", "-m", *RUN, "hydra/launcher=slurm", *overrides]
    return subprocess.Popen(
        [*command, "hydra.sweep.dir=sweep"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_requeued_job_goes_on_where_it_was_interrupted(cluster: Path, cli: Cli) -> None:
    """SIGUSR2 announces the end of the job. It saves, asks for a requeue and ends; then it resumes, bit for bit."""
    steps = 300
    sweep = start(cluster, f"budget.steps={steps}", "seed=3", "hydra.launcher.partition=gpu", "hydra.launcher.mem_gb=7")
    run = cluster / "sweep" / "0_digits_vae"
    deadline = time.monotonic() + 120
    while not (run / "curve.csv").exists() or len((run / "curve.csv").read_text().splitlines()) < 20:
        assert time.monotonic() < deadline and sweep.poll() is None, sweep.stdout.read() if sweep.stdout else ""
        time.sleep(0.1)
    jobs = subprocess.run(["pgrep", "-f", "submitit.core._submit"], capture_output=True, text=True).stdout.split()
    (job,) = [pid for pid in jobs if str(cluster) in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(job), signal.SIGUSR2)
    output = sweep.communicate(timeout=200)[0]
    assert sweep.returncode == 0, output[-2000:]
    log = (cluster / "log0").read_text()
    assert "Stopped after step" in log and "was interrupted: resuming" in log
    assert (cluster / "requeued").read_text() == "100\n"
    assert checkpoint(run)["callbacks"]["TrainingClock"]["step"] == steps
    assert json.loads((run / "record.json").read_text())["state"] == "finished"
    script = (cluster / "submitted.sh").read_text()
    for line in ("--partition=gpu", "--mem=7GB", "--gpus-per-node=1", "--cpus-per-task=8", "--signal=USR2@120"):
        assert f"#SBATCH {line}\n" in script
    assert cli(*RUN, f"budget.steps={steps}", "seed=3", "hydra.run.dir=whole") == 0
    assert_same_training(run, cluster / "whole")


def test_the_same_command_starts_and_continues_a_run(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [*RUN, "resume=auto", "hydra.run.dir=run"]
    assert cli(*command, "budget.steps=2") == 0
    assert cli(*command, "budget.steps=4") == 0
    assert checkpoint(tmp_path / "run")["callbacks"]["TrainingClock"]["step"] == 4
    capsys.readouterr()
    assert cli(*RUN, "resume=auto", "budget.steps=2") == 1
    assert "set hydra.run.dir=DIR" in error_line(capsys)
