"""Several processes train the same model as one process, draw the same samples, and write one run."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import checkpoint
from composing import compose
from forking import Forked
from gencompare import private_apis
from gencompare.errors import DiskFullError, UserError
from gencompare.tasks import train
from gencompare.tasks.runs import run_config
from gencompare.training import lightning_plugins
from test_cli import QUICK

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "data=digits", "trainer.global_batch_size=16", "budget.images=null", "budget.steps=4",
    "callbacks.evaluation.num_evaluations=1", "callbacks.evaluation.num_grid_images=4",
    "callbacks.evaluation.num_samples=70", "callbacks.metric_logger.log_every_n_steps=2",
    "callbacks.progress_bar=null",
    "evaluation.num_images=100", "evaluation.extractors=[classifier]", "evaluation.protocol.chunk_size=30",
    "evaluation.protocol.num_likelihood_images=20",
]  # fmt: skip
ONCE = "evaluation.checkpoints=[last]"

ROUNDING = 2e-5
"""Tolerance for rounding: gradients are summed in another order, which changes the last bits of float32, and Adam
amplifies the difference."""

FAMILIES = ["vae", "gan"]


def overrides_for(*overrides: str, count: int = 2) -> list[str]:
    own = {override.partition("=")[0] for override in overrides}
    settings = [each for each in SETTINGS if each.partition("=")[0] not in own]
    return [*overrides, *settings, "trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={count}"]


def processes(folder: Path, *overrides: str, count: int = 2, first: Callable[[], None] | None = None) -> None:
    """Run ``overrides`` on ``count`` processes; ``first`` is called in the first process before it starts the
    others."""
    process = Forked(folder, *overrides_for(*overrides, count=count), first=first)
    assert process.wait(timeout=280) == 0, process.output()[-4000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def metrics(folder: Path) -> dict[str, float | None]:
    (result,) = json.loads((folder / "record.json").read_text())["results"]
    return {name: metric["value"] for name, metric in result["metrics"].items()}


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_each_job_of_a_sweep_on_two_processes_equals_one_process(cli: Callable[..., int], tmp_path: Path) -> None:
    """A sweep over families runs on two processes, started as a user would."""
    overrides = overrides_for("-m", ONCE, f"model={','.join(FAMILIES)}", "logger=default", "hydra.sweep.dir=sweep")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *overrides], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    sweep = tmp_path / "sweep"
    assert (sweep / "compare.html").is_file() and len(list(sweep.glob("*/record.json"))) == len(FAMILIES)
    assert len(list((sweep / "wandb").glob("offline-run-*"))) == 1, "one W&B run of the comparison"
    for k, family in enumerate(FAMILIES):
        one, two = tmp_path / family, sweep / f"{k}_digits_{family}"
        assert cli(f"model={family}", ONCE, *SETTINGS, "trainer=cpu", "logger=csv", f"hydra.run.dir={family}") == 0
        check_equal(one, two)
        assert len(list((two / "wandb").glob("offline-run-*"))) == 1, "one W&B run per job"
        record = json.loads((two / "record.json").read_text())
        assert record["state"] == "finished" and record["training"]["processes"] == 2


@pytest.mark.timeout(280)
def test_a_sampler_with_several_steps_is_the_same_on_two_processes(cli: Callable[..., int], tmp_path: Path) -> None:
    overrides = ["model=ddpm", "model.sampler.num_steps=3", ONCE, "logger=csv"]
    processes(tmp_path, *overrides, "hydra.run.dir=two")
    assert cli(*overrides, *SETTINGS, "trainer=cpu", "hydra.run.dir=one") == 0
    check_equal(tmp_path / "one", tmp_path / "two")


def check_equal(one: Path, two: Path) -> None:
    assert largest_difference(weights(one), weights(two)) < ROUNDING
    a, b = metrics(one), metrics(two)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert b[name] == (value if value is None else pytest.approx(value, rel=0.02, abs=0.02)), name


def no_reduction() -> None:
    """Disable averaging gradients over processes."""
    from gencompare.models import manual_optimization

    manual_optimization.average_gradients = lambda parameters: None  # type: ignore[assignment]


def same_images() -> None:
    """Make all processes train on the images of the first one."""
    from gencompare.data.datamodule import TrainStream

    original = TrainStream.__init__

    def broken(self: TrainStream, data: Any, *, rank: int, **rest: Any) -> None:
        original(self, data, rank=0, **rest)

    TrainStream.__init__ = broken  # type: ignore[method-assign]


GAN_ONLY = ["model=gan", "model.lr_schedule.warmup_steps=1", "logger=csv", "evaluation.checkpoints=[]"]


@pytest.fixture(scope="module")
def expected_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the weights that one process trains, after checking that two processes train the same."""
    folder = tmp_path_factory.mktemp("expected")
    one = Forked(folder, *GAN_ONLY, *SETTINGS, "trainer=cpu", "hydra.run.dir=one")
    assert one.wait(timeout=280) == 0, one.output()[-4000:]
    processes(folder, *GAN_ONLY, "hydra.run.dir=two")
    assert largest_difference(weights(folder / "one"), weights(folder / "two")) < ROUNDING
    return weights(folder / "one")


@pytest.mark.timeout(280)
@pytest.mark.parametrize("fault", [no_reduction, same_images])
def test_the_comparison_with_one_process_finds_planted_faults(
    fault: Callable[[], None], expected_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Without gradient reduction, or with the same images on both ranks, the weights differ."""
    processes(tmp_path, *GAN_ONLY, "hydra.run.dir=wrong", first=fault)
    assert largest_difference(expected_weights, weights(tmp_path / "wrong")) > 5 * ROUNDING


def disk_is_full_for_a_while() -> None:
    """Make the second and third checkpoint of rank 0 fail, as on a full disk."""
    original, calls = lightning_plugins.write_checkpoint, itertools.count()

    def write(path: Any, checkpoint: dict[str, Any]) -> None:
        if 1 <= next(calls) <= 2:
            raise DiskFullError(f"No space left on the disk: {path}.")
        original(path, checkpoint)

    lightning_plugins.write_checkpoint = write  # type: ignore[assignment]


@pytest.mark.timeout(120)
def test_a_full_disk_does_not_end_training_on_several_processes(tmp_path: Path) -> None:
    overrides = ["model=vae", "logger=csv", "callbacks.checkpoints.every_minutes=0", "evaluation.checkpoints=[]"]
    process = Forked(tmp_path, *overrides_for(*overrides, "hydra.run.dir=run"), first=disk_is_full_for_a_while)
    assert process.wait(timeout=100) == 0, process.output()[-4000:]
    assert process.output().count("Training continues without this checkpoint") == 2
    assert checkpoint(tmp_path / "run")["callbacks"]["TrainingClock"]["step"] == 4


def second_fails() -> None:
    """Make the second process fail to read the data before it connects to the first, which is soon killed."""
    private_apis.GRACE_SECONDS = 0.2
    original = train.build_data

    def broken(cfg: Any) -> Any:
        if os.environ.get("LOCAL_RANK") == "1":
            raise UserError("no such disk")
        return original(cfg)

    train.build_data = broken


@pytest.mark.timeout(120)
def test_one_failing_process_ends_all(tmp_path: Path) -> None:
    process = Forked(tmp_path, *overrides_for("model=gan", "logger=csv", "hydra.run.dir=two"), first=second_fails)
    assert process.wait(timeout=100) == -signal.SIGKILL
    assert "no such disk" in process.output()


@pytest.mark.timeout(280)
def test_four_processes_evaluate_like_one(cli: Callable[..., int], tmp_path: Path) -> None:
    """The same weights give the same images, also if sampling stops by itself, and metrics that agree up to the
    rounding of features."""
    early = ["evaluation.num_images=160", "evaluation.protocol.chunk_size=10", "evaluation.protocol.max_half_width=0.9"]
    run = ["model=gaussian", ONCE, *SETTINGS, *early, "trainer=cpu", "logger=none", "hydra.run.dir=run"]
    assert cli(*run) == 0
    (result,) = json.loads((tmp_path / "run" / "record.json").read_text())["results"]
    assert 10 < result["measurement"]["num_images"] < 160
    one = metrics(tmp_path / "run")
    grids = [path.read_bytes() for path in sorted((tmp_path / "run" / "samples").glob("result_*.png"))]
    processes(tmp_path, "task=evaluate", "run_dir=run", *early, count=4)
    four = metrics(tmp_path / "run")
    assert one.keys() == four.keys()
    for name, value in one.items():
        assert four[name] == (value if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)), name
    assert grids == [path.read_bytes() for path in sorted((tmp_path / "run" / "samples").glob("result_*.png"))]
    assert grids


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_run_with_one_line_and_a_record(tmp_path: Path, rank: int) -> None:
    overrides = [
        "model=vae", *QUICK, "trainer=ddp", "trainer.accelerator=cpu", "budget.steps=100000",
        "callbacks.evaluation.num_evaluations=0", "callbacks.checkpoints.every_minutes=0", "logger=csv",
        "hydra.run.dir=run",
    ]  # fmt: skip
    process: Any
    if rank == 0:  # a fork of the killed process would still hold its lock of the run folder
        command = [sys.executable, "-m", "gencompare.tasks.runs.rank", *overrides]
        with (tmp_path / "output.txt").open("w") as log:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    else:
        process = Forked(tmp_path, *overrides)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill([process.pid, *map(int, children)][rank], signal.SIGKILL)
    process.wait(timeout=60)
    errors: list[str] = []
    while not errors and time.monotonic() < deadline:  # of the other process, which first writes the record
        time.sleep(0.05)
        errors = [line for line in (tmp_path / "output.txt").read_text().splitlines() if line.startswith("Error")]
    assert json.loads((tmp_path / "run" / "record.json").read_text())["state"] == "interrupted"
    assert len(errors) == 1 and "Another process of this run ended unexpectedly" in errors[0] and "resume=" in errors[0]


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_written(
    cli: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.global_batch_size=15", "budget.steps=2"]
    assert cli("model=vae", *QUICK, *ddp, "hydra.run.dir=run") == 1
    assert "global_batch_size=15 is not divisible by 2 processes" in capsys.readouterr().err
    gan = ["model=gan", "model.d_steps=3", "trainer.global_batch_size=16", "budget.steps=2"]
    assert cli(*gan[:1], *QUICK, *gan[1:], *ddp[:2], "hydra.run.dir=run") == 1
    assert "not divisible by model.d_steps=3" in capsys.readouterr().err
    assert cli("model=ebm", *QUICK, "model.buffer_size=10", "budget.steps=2", "hydra.run.dir=run") == 1
    assert "raise model.buffer_size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_resumed_with_another_trainer_keeps_its_batch_size_and_precision(
    cli: Callable[..., int], tmp_path: Path
) -> None:
    settings = ["trainer.global_batch_size=24", "trainer.precision=bf16-mixed"]
    assert cli("model=vae", *QUICK, "budget.steps=2", *settings, "hydra.run.dir=run") == 0
    stored, composed = run_config.read(tmp_path / "run"), compose("model=vae", "trainer=ddp", "resume=run")
    for batch_size, overrides in {24: [], 64: ["trainer.global_batch_size=64"]}.items():
        words = ["resume=run", "trainer=ddp", *overrides]
        merged = run_config._override_stored(stored, composed, words, {}, tmp_path / "run")
        assert merged.trainer.global_batch_size == batch_size and merged.trainer.devices == 2
        assert merged.trainer.precision == "bf16-mixed"
    words = ["resume=run", "trainer=ddp", "trainer.precision=32-true"]
    merged = run_config._override_stored(stored, composed, words, {}, tmp_path / "run")
    assert merged.trainer.precision == "32-true"
