"""Several processes train the model that one would, draw the same samples, and leave one run behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forking import Forked
from gencompare.errors import UserError
from gencompare.tasks import train

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "data=digits", "trainer.global_batch_size=16", "budget.images=null", "budget.steps=4", "callbacks.looks.count=1",
    "callbacks.looks.grid=4", "callbacks.looks.preview=70", "callbacks.curve.every=2", "callbacks.progress=false",
    "evaluation.n=100", "evaluation.extractors=[classifier]", "evaluation.protocol.chunk=30",
    "evaluation.protocol.likelihood_n=20",
]  # fmt: skip
ONCE = "evaluation.checkpoints=[last]"

ROUNDING = 2e-5
"""Sums of gradients are taken in another order, so the last bits of float32 differ, and Adam makes the most of them."""

SWEPT = ["vae", "gan"]


def words_of(*words: str, count: int = 2) -> list[str]:
    return [*words, *SETTINGS, "trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={count}"]


def processes(folder: Path, *words: str, count: int = 2, first: Callable[[], None] | None = None) -> None:
    """Run ``words`` on ``count`` processes; ``first`` is called in the first of them, and so done to all."""
    whole = Forked(folder, *words_of(*words, count=count), first=first)
    assert whole.wait(timeout=280) == 0, whole.output()[-4000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def figures(folder: Path) -> dict[str, float | None]:
    (result,) = json.loads((folder / "record.json").read_text())["results"]
    return {name: metric["value"] for name, metric in result["metrics"].items()}


@pytest.mark.timeout(280)
def test_each_job_of_a_sweep_on_two_processes_equals_one_process(cli: Callable[..., int], tmp_path: Path) -> None:
    """A sweep over the families, each job on two processes, as a user starts it."""
    words = words_of("-m", ONCE, f"model={','.join(SWEPT)}", "logger=default", "hydra.sweep.dir=sweep")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    sweep = tmp_path / "sweep"
    assert (sweep / "compare.html").is_file() and len(list(sweep.glob("*/record.json"))) == len(SWEPT)
    assert len(list((sweep / "wandb").glob("offline-run-*"))) == 1, "and one of the comparison"
    for k, family in enumerate(SWEPT):
        one, two = tmp_path / family, sweep / f"{k}_digits_{family}"
        assert cli(f"model={family}", ONCE, *SETTINGS, "trainer=cpu", "logger=csv", f"hydra.run.dir={family}") == 0
        check_equal(one, two)
        assert len(list((two / "wandb").glob("offline-run-*"))) == 1, "one W&B run a job"
        record = json.loads((two / "record.json").read_text())
        assert record["state"] == "finished" and record["training"]["processes"] == 2


@pytest.mark.timeout(280)
def test_a_sampler_of_many_steps_on_two_processes_equals_one(cli: Callable[..., int], tmp_path: Path) -> None:
    words = ["model=ddpm", "model.sampler.steps=3", ONCE, "logger=csv"]
    processes(tmp_path, *words, "hydra.run.dir=two")
    assert cli(*words, *SETTINGS, "trainer=cpu", "hydra.run.dir=one") == 0
    check_equal(tmp_path / "one", tmp_path / "two")


def check_equal(one: Path, two: Path) -> None:
    assert largest_difference(weights(one), weights(two)) < ROUNDING
    a, b = figures(one), figures(two)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert b[name] == (value if value is None else pytest.approx(value, rel=0.02, abs=0.02)), name


def no_reduction() -> None:
    """Each process goes its own way."""
    import gencompare.models.manual_optimization as alternating

    alternating.average_gradients = lambda parameters: None  # type: ignore[assignment]


def same_images() -> None:
    """Each process sees what the first one should."""
    from gencompare.data.datamodule import TrainStream

    right = TrainStream.__init__

    def wrong(self: TrainStream, data: Any, *, rank: int, **rest: Any) -> None:
        right(self, data, rank=0, **rest)

    TrainStream.__init__ = wrong  # type: ignore[method-assign]


LONE = ["model=gan", "model.lr_schedule.warmup_steps=1", "logger=csv", "evaluation.checkpoints=[]"]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that one process trains, which two come to as well."""
    folder = tmp_path_factory.mktemp("right")
    one = Forked(folder, *LONE, *SETTINGS, "trainer=cpu", "hydra.run.dir=one")
    assert one.wait(timeout=280) == 0, one.output()[-4000:]
    processes(folder, *LONE, "hydra.run.dir=two")
    assert largest_difference(weights(folder / "one"), weights(folder / "two")) < ROUNDING
    return weights(folder / "one")


@pytest.mark.timeout(280)
@pytest.mark.parametrize("plant", [no_reduction, same_images])
def test_the_comparison_with_one_process_bites(
    plant: Callable[[], None], right: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Without the reduction of gradients, or with the same images on both ranks, the weights come out different."""
    processes(tmp_path, *LONE, "hydra.run.dir=wrong", first=plant)
    assert largest_difference(right, weights(tmp_path / "wrong")) > 5 * ROUNDING


def second_fails() -> None:
    """The second process cannot read the data, before it meets the first."""
    right = train.build_data

    def wrong(cfg: Any) -> Any:
        if os.environ.get("LOCAL_RANK") == "1":
            raise UserError("no such disk")
        return right(cfg)

    train.build_data = wrong


@pytest.mark.timeout(120)
def test_one_that_fails_ends_all(tmp_path: Path) -> None:
    process = Forked(tmp_path, *words_of("model=gan", "logger=csv", "hydra.run.dir=two"), first=second_fails)
    assert process.wait(timeout=100) == -signal.SIGKILL
    assert "no such disk" in process.output()


@pytest.mark.timeout(280)
def test_four_processes_measure_what_one_measures(cli: Callable[..., int], tmp_path: Path) -> None:
    """The same weights: the same images, so figures that agree to the rounding of features."""
    assert cli("model=gaussian", ONCE, *SETTINGS, "trainer=cpu", "logger=none", "hydra.run.dir=run") == 0
    one = figures(tmp_path / "run")
    pictures = [path.read_bytes() for path in sorted((tmp_path / "run" / "samples").glob("result_*.png"))]
    processes(tmp_path, "task=evaluate", "run=run", count=4)
    four = figures(tmp_path / "run")
    assert one.keys() == four.keys()
    for name, value in one.items():
        assert four[name] == (value if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)), name
    assert pictures == [path.read_bytes() for path in sorted((tmp_path / "run" / "samples").glob("result_*.png"))]
    assert pictures
