"""Several processes train the model that one would, draw the same samples, and leave one run behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "data=digits", "trainer.global_batch_size=16", "budget.images=null", "budget.steps=4", "callbacks.looks.count=1",
    "callbacks.looks.grid=4", "callbacks.looks.preview=70", "callbacks.curve.every=2", "callbacks.progress=false",
    "evaluation.n=100", "evaluation.protocol.chunk=30",
    "evaluation.protocol.likelihood_n=20",
]  # fmt: skip
ONCE = "evaluation.checkpoints=[last]"
FAMILIES = ["vae", "gan", "ddpm", "gaussian"]
EXTRA = {"ddpm": ["model.sampler.steps=3"]}
DDP = ["trainer=ddp", "trainer.accelerator=cpu"]

ROUNDING = 2e-5
"""Sums of gradients are taken in another order, so the last bits of float32 differ, and Adam makes the most of them."""

PLANT = """
import os
if os.environ.get("PLANT") == "gradients":
    import gencompare.models.gan as gan
    gan.average_gradients = lambda parameters: None
if os.environ.get("PLANT") == "data":
    import gencompare.data.stream as stream
    init = stream.TrainStream.__init__
    def wrong(self, data, *, start_step, rank, world, device):
        init(self, data, start_step=start_step, rank=0, world=world, device=device)
    stream.TrainStream.__init__ = wrong
"""


def processes(folder: Path, *words: str, plant: str = "", count: int = 2) -> None:
    (folder / "sitecustomize.py").write_text(PLANT if plant else "")
    env = {**os.environ, "PYTHONPATH": str(folder), "PLANT": plant, "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words, *SETTINGS, *DDP, f"trainer.devices={count}"],
        cwd=folder, env=env, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def figures(folder: Path) -> dict[str, float | None]:
    (result,) = json.loads((folder / "record.json").read_text())["results"]
    return {name: metric["value"] for name, metric in result["metrics"].items()}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over the families, each job on two processes."""
    folder = tmp_path_factory.mktemp("two")
    processes(
        folder,
        "-m",
        ONCE,
        f"model={','.join(f for f in FAMILIES if f not in EXTRA)}",
        "logger=default",
        "hydra.sweep.dir=sweep",
    )
    return folder


@pytest.mark.timeout(280)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in EXTRA])
def test_each_job_of_a_sweep_on_two_processes_equals_one_process(
    family: str, sweep: Path, cli: Callable[..., int], tmp_path: Path
) -> None:
    number = [f for f in FAMILIES if f not in EXTRA].index(family)
    two = sweep / "sweep" / f"{number}_digits_{family}"
    assert cli(f"model={family}", ONCE, *SETTINGS, "trainer=cpu", "logger=csv", "hydra.run.dir=one") == 0
    check_equal(tmp_path / "one", two)
    runs = list((two / "wandb").glob("offline-run-*"))
    assert len(runs) == 1, "one W&B run a job"
    record = json.loads((two / "record.json").read_text())
    assert record["state"] == "finished" and record["training"]["processes"] == 2


@pytest.mark.timeout(280)
def test_a_sampler_of_many_steps_on_two_processes_equals_one(cli: Callable[..., int], tmp_path: Path) -> None:
    processes(tmp_path, "model=ddpm", *EXTRA["ddpm"], ONCE, "logger=csv", "hydra.run.dir=two")
    assert cli("model=ddpm", *EXTRA["ddpm"], ONCE, *SETTINGS, "trainer=cpu", "logger=csv", "hydra.run.dir=one") == 0
    check_equal(tmp_path / "one", tmp_path / "two")


def check_equal(one: Path, two: Path) -> None:
    assert largest_difference(weights(one), weights(two)) < ROUNDING
    a, b = figures(one), figures(two)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert b[name] == (value if value is None else pytest.approx(value, rel=0.02, abs=0.02)), name


def test_one_comparison_of_the_sweep(sweep: Path) -> None:
    assert (sweep / "sweep" / "compare.html").is_file()
    assert len(list((sweep / "sweep").glob("*/record.json"))) == len(FAMILIES) - len(EXTRA)


@pytest.mark.timeout(280)
@pytest.mark.parametrize("plant", ["gradients", "data"])
def test_the_comparison_with_one_process_bites(plant: str, cli: Callable[..., int], tmp_path: Path) -> None:
    """Without the reduction of gradients, or with the same images on both ranks, the weights come out different."""
    quick = [
        "model=gan",
        "model.lr_schedule.warmup_steps=1",
        "logger=csv",
        "evaluation.checkpoints=[]",
        "hydra.run.dir=two",
    ]
    processes(tmp_path, *quick, plant=plant)
    assert cli(*quick[:-1], *SETTINGS, "trainer=cpu", "hydra.run.dir=one") == 0
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) > 5 * ROUNDING


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
