"""A sweep that was killed goes on where it was, and ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from checkpoints import assert_same_training, checkpoint
from forking import Forked, living_on
from gencompare.errors import UserError
from gencompare.models.vae import VAE
from gencompare.tasks import evaluate_run, train
from gencompare.training.clock import TrainingClock
from test_cli import QUICK, Cli

WORDS = [
    "-m", "model=vae", "seed=0,1,2", *QUICK, "budget.steps=4", "callbacks.looks.count=0",
    "callbacks.checkpoints.every_minutes=0", "evaluation.checkpoints=[last]", "evaluation.n=80",
]  # fmt: skip


def dies() -> None:
    """The process is killed in the third step of the second job."""
    original, starts = TrainingClock.on_train_batch_start, []

    def start(self: TrainingClock, *args: Any) -> None:
        original(self, *args)
        starts.append(1)
        if len(starts) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingClock.on_train_batch_start = start  # type: ignore[method-assign]


def test_a_killed_sweep_goes_on_and_ends_like_one_that_was_not(cli: Cli, tmp_path: Path, capsys) -> None:
    assert cli(*WORDS, "hydra.sweep.dir=whole") == 0
    words = [*WORDS, "hydra.sweep.dir=killed"]
    assert Forked(tmp_path, *words, first=dies).wait(timeout=120) == -signal.SIGKILL
    first = tmp_path / "killed" / "0_digits_vae"
    states = {
        path.parent.name: json.loads(path.read_text())["state"] for path in (tmp_path / "killed").glob("*/record.json")
    }
    assert states == {"0_digits_vae": "finished", "1_digits_vae": "running"}
    assert checkpoint(tmp_path / "killed" / "1_digits_vae")["callbacks"]["TrainingClock"]["step"] < 4
    before = (first / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    capsys.readouterr()

    assert cli(*words) == 0
    said = capsys.readouterr().out
    assert "[0_digits_vae] finished before" in said and "[1_digits_vae] broke off before" in said
    assert (first / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before, "no finished job is run again"
    for job in ("0_digits_vae", "1_digits_vae", "2_digits_vae"):
        one, two = tmp_path / "whole" / job, tmp_path / "killed" / job
        assert_same_training(one, two)
        a, b = (json.loads((folder / "record.json").read_text()) for folder in (one, two))
        assert a["state"] == b["state"] == "finished"
        assert [r["metrics"] for r in a["results"]] == [r["metrics"] for r in b["results"]]
    assert (tmp_path / "killed" / "compare.html").is_file()


def test_a_job_is_known_wherever_it_stands_in_the_sweep(cli: Cli, tmp_path: Path, capsys) -> None:
    sweep = "hydra.sweep.dir=sweep"
    words = [word for word in WORDS if not word.startswith("seed=")]
    assert cli(*words, "seed=1", sweep) == 0
    assert cli(*words, "seed=0,1", sweep) == 0
    said = capsys.readouterr().out
    # The folder of number 0 holds seed 1, which is done; seed 0 is another job, and gets another folder.
    assert "[0_digits_vae] finished before" in said
    assert {p.parent.name for p in (tmp_path / "sweep").glob("*/record.json")} == {"0_digits_vae", "0_digits_vae_2"}
    seeds = {json.loads(p.read_text())["seed"] for p in (tmp_path / "sweep").glob("*/record.json")}
    assert seeds == {0, 1}


def test_another_setting_is_another_job(cli: Cli, tmp_path: Path) -> None:
    words = [word for word in WORDS if not word.startswith("seed=")]
    assert cli(*words, "seed=0", "hydra.sweep.dir=sweep") == 0
    assert cli(*words, "seed=0,1", "model.beta=0.5", "hydra.sweep.dir=other") == 0
    one, two = (checkpoint(tmp_path / place / "0_digits_vae")["state_dict"] for place in ("sweep", "other"))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_job_that_fails_does_not_stop_the_others_and_is_tried_again(
    cli: Cli, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    words = ["-m", "model=vae", *WORDS[3:], "hydra.sweep.dir=sweep", "model.beta=-1,2"]
    assert cli(*words) == 1
    out = capsys.readouterr().out
    assert "1 of 2 runs did not finish" in out and "[0_digits_vae] failed: " in out
    records = {
        path.parent.name: json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/record.json"))
    }
    assert [record["state"] for record in records.values()] == ["failed", "finished"]
    why = records["0_digits_vae"]["training"]["error"]
    assert "beta" in why and why in (tmp_path / "sweep" / "compare.html").read_text(), "the page lists it"
    times = {name: (tmp_path / "sweep" / name / "record.json").stat().st_mtime_ns for name in records}
    # What was wrong is put right (here: in the model), and the same command does what is left.
    monkeypatch.setattr(VAE, "__init__", forgiving(VAE.__init__))
    assert cli(*words) == 0
    out = capsys.readouterr().out
    assert "[0_digits_vae] did not get to train before: starts anew." in out and "did not finish" not in out
    again = json.loads((tmp_path / "sweep" / "0_digits_vae" / "record.json").read_text())
    assert again["state"] == "finished" and "error" not in again["training"] and again["results"]
    assert len(list((tmp_path / "sweep").glob("*/record.json"))) == 2
    assert (tmp_path / "sweep" / "1_digits_vae" / "record.json").stat().st_mtime_ns == times["1_digits_vae"]


def forgiving(original: Any) -> Any:
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "beta": abs(options["beta"])})

    return init


def test_a_damaged_run_is_done_again_beside_it(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    words = ["-m", "model=gaussian", *WORDS[3:], "seed=0", "hydra.sweep.dir=sweep"]
    assert cli(*words) == 0
    (tmp_path / "sweep" / "0_digits_gaussian" / "record.json").write_text("{")
    capsys.readouterr()
    assert cli(*words) == 0
    assert json.loads((tmp_path / "sweep" / "0_digits_gaussian_2" / "record.json").read_text())["state"] == "finished"
    printed = capsys.readouterr().out
    assert "left out: sweep/0_digits_gaussian:" in printed and "did not finish" not in printed


GAUSSIAN = ["-m", "model=gaussian", *WORDS[3:]]


def records(folder: Path) -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/record.json"))}


def test_the_same_command_finds_its_folder_wherever_and_however_it_logs(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    assert cli(*GAUSSIAN, "seed=0") == 0
    capsys.readouterr()
    assert cli(*GAUSSIAN[:-1], "logger=none", "paths.data=/else", "evaluation.n=80", "seed=0,1") == 0
    assert "[0_digits_gaussian] finished before" in capsys.readouterr().out
    (sweep,) = (tmp_path / "runs").iterdir()
    assert [record["seed"] for record in records(sweep).values()] == [0, 1], "more seeds join it"


def test_training_that_differs_in_sampling_is_done_once(
    cli: Cli, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    words = [
        "-m", "model=ddpm", "model/sampler=ddim", "model.network.channels=8", "model.network.groups=8", *WORDS[3:],
        "budget.steps=2", "evaluation.n=66", "model.sampler.steps=2,3", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    sweep = tmp_path / "sweep"
    original = evaluate_run.measure_trained
    monkeypatch.setattr(train, "measure_trained", fails)
    assert cli(*words) == 1
    assert "1 of 2 runs did not finish" in (out := capsys.readouterr().out) and "[1_digits_ddpm] failed: broken" in out
    monkeypatch.setattr(train, "measure_trained", original)
    assert cli(*words) == 0
    out = capsys.readouterr().out
    assert "[0_digits_ddpm] finished before" in out and "trained before, in 0_digits_ddpm" in out
    (record,) = records(sweep).values()
    assert [r["generation"]["nfe"] for r in record["results"]] == [{"network": 2}, {"network": 3}]
    assert record["state"] == "finished" and record["config"]["model"]["sampler"]["steps"] == 2
    assert cli(*words) == 0
    assert records(sweep) == {"0_digits_ddpm": record}
    assert "[1_digits_ddpm] measured before, in 0_digits_ddpm" in capsys.readouterr().out


def test_settings_swept_at_evaluation_join_the_record_of_the_run(cli: Cli, tmp_path: Path) -> None:
    words = ["model=ddpm", "model/sampler=ddim", "model.network.channels=8", "model.network.groups=8", *WORDS[3:]]
    assert cli(*words, "budget.steps=2", "evaluation.n=66", "model.sampler.steps=4", "hydra.run.dir=run") == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trained = last.stat().st_mtime_ns
    assert cli("-m", "task=evaluate", "run=run", "model.sampler.steps=2,3,5") == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert [r["generation"]["nfe"] for r in record["results"]] == [{"network": n} for n in (4, 2, 3, 5)]
    assert last.stat().st_mtime_ns == trained and len(list(tmp_path.rglob("last.ckpt"))) == 1


def fails(cfg: Any) -> None:
    raise UserError("broken")


def test_a_job_that_lives_on_is_waited_for_and_judged_then(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    """As after SIGKILL of ``hydra/launcher=parallel``, whose jobs are processes of their own."""
    words = [*GAUSSIAN, "seed=0", "hydra.sweep.dir=sweep"]
    assert cli(*words) == 0
    for ends, code in (("finished", 0), ("running", 1)):
        (tmp_path / "sweep" / "compare.html").unlink()
        capsys.readouterr()
        with living_on(tmp_path / "sweep" / "0_digits_gaussian", ends):
            assert cli(*words) == code
        out = capsys.readouterr().out
        assert "left to that" in out and "[0_digits_gaussian] waiting for the process" in out
        assert (tmp_path / "sweep" / "compare.html").is_file()
        assert ("1 of 1 runs did not finish" in out and "broke off" in out) == (ends == "running")


def test_failures_of_other_commands_are_told_apart(cli: Cli, capsys: Any) -> None:
    words = [*WORDS[3:], "hydra.sweep.dir=sweep"]
    assert cli("-m", "model=vae", "model.beta=-1", *words) == 1
    capsys.readouterr()
    assert cli(*GAUSSIAN, "hydra.sweep.dir=sweep") == 0
    out = capsys.readouterr().out
    assert "runs did not finish" not in out
    assert "Of other commands in this folder, 1 did not finish:\n  [0_digits_vae] failed: model.beta=-1" in out
    assert cli("-m", "model=vae", "model.beta=-1", *words) == 1, "tried again, it is one of this command"
    assert "1 of 1 runs did not finish" in capsys.readouterr().out
