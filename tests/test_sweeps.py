"""Sweeps: resuming, failed jobs, and jobs that share their training."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch

from checkpoints import assert_same_training, checkpoint
from forking import Forked, active_process
from gencompare.errors import UserError
from gencompare.models.vae import VAE
from gencompare.tasks import evaluate_run, train
from gencompare.training.clock import TrainingClock
from test_cli import QUICK, Cli

OVERRIDES = [
    "-m", "model=vae", "seed=0,1,2", *QUICK, "budget.steps=4", "callbacks.evaluation.num_evaluations=0",
    "callbacks.checkpoints.every_minutes=0", "evaluation.checkpoints=[last]", "evaluation.num_images=80",
]  # fmt: skip


def kill_in_second_job() -> None:
    """Kill the process in the third step of the second job."""
    original, starts = TrainingClock.on_train_batch_start, []

    def start(self: TrainingClock, *args: Any) -> None:
        original(self, *args)
        starts.append(1)
        if len(starts) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingClock.on_train_batch_start = start  # type: ignore[method-assign]


def test_a_killed_sweep_resumes_and_ends_like_an_uninterrupted_one(cli: Cli, tmp_path: Path, capsys) -> None:
    assert cli(*OVERRIDES, "hydra.sweep.dir=whole") == 0
    overrides = [*OVERRIDES, "hydra.sweep.dir=killed"]
    assert Forked(tmp_path, *overrides, first=kill_in_second_job).wait(timeout=120) == -signal.SIGKILL
    first = tmp_path / "killed" / "0_digits_vae"
    states = {
        path.parent.name: json.loads(path.read_text())["state"] for path in (tmp_path / "killed").glob("*/record.json")
    }
    assert states == {"0_digits_vae": "finished", "1_digits_vae": "running"}
    assert checkpoint(tmp_path / "killed" / "1_digits_vae")["callbacks"]["TrainingClock"]["step"] < 4
    before = (first / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    capsys.readouterr()

    assert cli(*overrides) == 0
    out = capsys.readouterr().out
    assert "[0_digits_vae] already finished" in out and "[1_digits_vae] was interrupted: resuming" in out
    assert (first / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before, "finished jobs do not run again"
    for job in ("0_digits_vae", "1_digits_vae", "2_digits_vae"):
        one, two = tmp_path / "whole" / job, tmp_path / "killed" / job
        assert_same_training(one, two)
        a, b = (json.loads((folder / "record.json").read_text()) for folder in (one, two))
        assert a["state"] == b["state"] == "finished"
        assert [r["metrics"] for r in a["results"]] == [r["metrics"] for r in b["results"]]
    assert (tmp_path / "killed" / "compare.html").is_file()


def test_a_job_is_recognised_in_any_folder_of_the_sweep(cli: Cli, tmp_path: Path, capsys) -> None:
    sweep = "hydra.sweep.dir=sweep"
    overrides = [override for override in OVERRIDES if not override.startswith("seed=")]
    assert cli(*overrides, "seed=1", sweep) == 0
    assert cli(*overrides, "seed=0,1", sweep) == 0
    out = capsys.readouterr().out
    # Folder 0 contains the finished job of seed 1; the job of seed 0 gets another folder.
    assert "[0_digits_vae] already finished" in out
    assert {p.parent.name for p in (tmp_path / "sweep").glob("*/record.json")} == {"0_digits_vae", "0_digits_vae_2"}
    seeds = {json.loads(p.read_text())["seed"] for p in (tmp_path / "sweep").glob("*/record.json")}
    assert seeds == {0, 1}


def test_other_settings_make_another_job(cli: Cli, tmp_path: Path) -> None:
    overrides = [override for override in OVERRIDES if not override.startswith("seed=")]
    assert cli(*overrides, "seed=0", "hydra.sweep.dir=sweep") == 0
    assert cli(*overrides, "seed=0,1", "model.beta=0.5", "hydra.sweep.dir=other") == 0
    one, two = (checkpoint(tmp_path / place / "0_digits_vae")["state_dict"] for place in ("sweep", "other"))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_failed_job_does_not_stop_the_others_and_is_tried_again(
    cli: Cli, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    overrides = ["-m", "model=vae", *OVERRIDES[3:], "hydra.sweep.dir=sweep", "model.beta=-1,2"]
    assert cli(*overrides) == 1
    out = capsys.readouterr().out
    assert "1 of 2 runs did not finish" in out and "[0_digits_vae] failed: " in out
    records = {
        path.parent.name: json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/record.json"))
    }
    assert [record["state"] for record in records.values()] == ["failed", "finished"]
    error = records["0_digits_vae"]["training"]["error"]
    assert "beta" in error and error in (tmp_path / "sweep" / "compare.html").read_text(), "the page shows the error"
    times = {name: (tmp_path / "sweep" / name / "record.json").stat().st_mtime_ns for name in records}
    # Once the cause is fixed (here, in the model), the same command runs the remaining job.
    monkeypatch.setattr(VAE, "__init__", with_positive_beta(VAE.__init__))
    assert cli(*overrides) == 0
    out = capsys.readouterr().out
    assert "[0_digits_vae] has no checkpoint yet: restarting." in out and "did not finish" not in out
    again = json.loads((tmp_path / "sweep" / "0_digits_vae" / "record.json").read_text())
    assert again["state"] == "finished" and "error" not in again["training"] and again["results"]
    assert len(list((tmp_path / "sweep").glob("*/record.json"))) == 2
    assert (tmp_path / "sweep" / "1_digits_vae" / "record.json").stat().st_mtime_ns == times["1_digits_vae"]


def with_positive_beta(original: Any) -> Any:
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "beta": abs(options["beta"])})

    return init


def test_a_run_without_record_and_checkpoints_is_repeated_in_another_folder(
    cli: Cli, tmp_path: Path, capsys: Any
) -> None:
    overrides = ["-m", "model=gaussian", *OVERRIDES[3:], "seed=0", "hydra.sweep.dir=sweep"]
    assert cli(*overrides) == 0
    (tmp_path / "sweep" / "0_digits_gaussian" / "record.json").write_text("{")
    shutil.rmtree(tmp_path / "sweep" / "0_digits_gaussian" / "checkpoints")
    capsys.readouterr()
    assert cli(*overrides) == 0
    assert json.loads((tmp_path / "sweep" / "0_digits_gaussian_2" / "record.json").read_text())["state"] == "finished"
    printed = capsys.readouterr().out
    assert "skipped: sweep/0_digits_gaussian:" in printed and "did not finish" not in printed


GAUSSIAN = ["-m", "model=gaussian", *OVERRIDES[3:]]


def records(folder: Path) -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/record.json"))}


def test_loggers_and_paths_do_not_change_the_folder_of_a_sweep(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    assert cli(*GAUSSIAN, "seed=0") == 0
    capsys.readouterr()
    assert cli(*GAUSSIAN[:-1], "logger=none", "paths.data=/else", "evaluation.num_images=80", "seed=0,1") == 0
    assert "[0_digits_gaussian] already finished" in capsys.readouterr().out
    (sweep,) = (tmp_path / "runs").iterdir()
    assert [record["seed"] for record in records(sweep).values()] == [0, 1]


def test_jobs_that_differ_in_sampling_share_their_training(
    cli: Cli, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    overrides = [
        "-m", "model=ddpm", "model/sampler=ddim", "model.network.channels=8", "model.network.num_groups=8",
        *OVERRIDES[3:], "budget.steps=2", "evaluation.num_images=66", "model.sampler.num_steps=2,3",
        "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    sweep = tmp_path / "sweep"
    original = evaluate_run.evaluate_trained_run
    monkeypatch.setattr(train, "evaluate_trained_run", fail)
    assert cli(*overrides) == 1
    assert "1 of 2 runs did not finish" in (out := capsys.readouterr().out) and "[1_digits_ddpm] failed: broken" in out
    monkeypatch.setattr(train, "evaluate_trained_run", original)
    assert cli(*overrides) == 0
    out = capsys.readouterr().out
    assert "[0_digits_ddpm] already finished" in out and "already trained in 0_digits_ddpm" in out
    (record,) = records(sweep).values()
    assert [r["generation"]["nfe"] for r in record["results"]] == [{"network": 2}, {"network": 3}]
    assert record["state"] == "finished" and record["config"]["model"]["sampler"]["num_steps"] == 2
    assert cli(*overrides) == 0
    assert records(sweep) == {"0_digits_ddpm": record}
    assert "[1_digits_ddpm] already evaluated in 0_digits_ddpm" in capsys.readouterr().out


def test_a_sweep_of_evaluations_adds_results_to_the_record(cli: Cli, tmp_path: Path) -> None:
    overrides = [
        "model=ddpm",
        "model/sampler=ddim",
        "model.network.channels=8",
        "model.network.num_groups=8",
        *OVERRIDES[3:],
    ]
    assert (
        cli(*overrides, "budget.steps=2", "evaluation.num_images=66", "model.sampler.num_steps=4", "hydra.run.dir=run")
        == 0
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trained = last.stat().st_mtime_ns
    assert cli("-m", "task=evaluate", "run_dir=run", "model.sampler.num_steps=2,3,5") == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert [r["generation"]["nfe"] for r in record["results"]] == [{"network": n} for n in (4, 2, 3, 5)]
    assert last.stat().st_mtime_ns == trained and len(list(tmp_path.rglob("last.ckpt"))) == 1


def fail(cfg: Any) -> None:
    raise UserError("broken")


def test_a_sweep_waits_for_active_jobs_before_it_compares(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    """Simulate a parallel launcher (``hydra/launcher=parallel``) killed by SIGKILL: its jobs continue, since they are
    separate processes."""
    overrides = [*GAUSSIAN, "seed=0", "hydra.sweep.dir=sweep"]
    assert cli(*overrides) == 0
    for final_state, code in (("finished", 0), ("running", 1)):
        (tmp_path / "sweep" / "compare.html").unlink()
        capsys.readouterr()
        with active_process(tmp_path / "sweep" / "0_digits_gaussian", final_state):
            assert cli(*overrides) == code
        out = capsys.readouterr().out
        assert "another process is working on it" in out and "[0_digits_gaussian] waiting for the process" in out
        assert (tmp_path / "sweep" / "compare.html").is_file()
        assert ("1 of 1 runs did not finish" in out and "its process ended" in out) == (final_state == "running")


def test_failures_of_other_commands_are_listed_separately(cli: Cli, capsys: Any) -> None:
    overrides = [*OVERRIDES[3:], "hydra.sweep.dir=sweep"]
    assert cli("-m", "model=vae", "model.beta=-1", *overrides) == 1
    capsys.readouterr()
    assert cli(*GAUSSIAN, "hydra.sweep.dir=sweep") == 0
    out = capsys.readouterr().out
    assert "runs did not finish" not in out
    assert "1 run(s) of other commands in this folder did not finish:\n  [0_digits_vae] failed: model.beta=-1" in out
    assert cli("-m", "model=vae", "model.beta=-1", *overrides) == 1, "the same command runs the job again"
    assert "1 of 1 runs did not finish" in capsys.readouterr().out
