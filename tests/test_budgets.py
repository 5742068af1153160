"""Budgets: training ends at the limit, dependencies count, and resumed runs continue to count."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from composing import compose
from gencompare import resources
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.generative_model import Cond, GenerativeModel
from gencompare.records import RunRecord
from gencompare.resources import flops_per_image
from gencompare.rng import RandomSource
from gencompare.tasks.runs import dependency_costs
from gencompare.tasks.runs.loading import load_run
from gencompare.tasks.train import flops_utilization
from gencompare.training import clock as clocks
from gencompare.training.budget import Budget
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock, TrainingFlops
from gencompare.training.lightning_plugins import AtomicCheckpointIO
from gencompare.training.progress_bar import TrainingProgressBar

Cli = Callable[..., int]
BATCH = 32
STEP_FLOPS = 3 * 2 * 64 * 5 * BATCH - 2 * 64 * 5 * BATCH
"""FLOPs of a training step of a linear layer from n = 64 to m = 5 features. Per image, the forward pass takes 2 n m
FLOPs and the weight gradient another 2 n m. The input needs no gradient."""


class Linear(GenerativeModel):
    def __init__(self, data: Digits) -> None:
        super().__init__(data.spec, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        self.layer = nn.Linear(64, 5, bias=False)

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        return {"loss": self.layer(x.flatten(1)).square().sum(1)}


class Twice(Linear):
    """Applies its layer twice per step in the second half of the budget."""

    @property
    def step_kind(self) -> str:
        return "twice" if self.progress >= 0.5 else ""

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        once = super().losses(x, cond, rng)["loss"]
        return {"loss": once + super().losses(x, cond, rng)["loss"] if self.step_kind else once}


def train(
    folder: Path, budget: Budget, *, until: int | None = None, resume: bool = False, kind: type[Linear] = Linear
) -> TrainingClock:
    class StopAt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop |= clock.step == until

    clock = TrainingClock(0, BATCH, budget)
    data = Digits(batch_size=BATCH)
    pl.Trainer(
        callbacks=[clock, TrainingFlops(), StopAt(), Checkpoints(folder)], plugins=[AtomicCheckpointIO()], logger=False,
        max_epochs=-1, limit_val_batches=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    ).fit(
        kind(data), datamodule=data, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=resume or None
    )  # fmt: skip
    return clock


@pytest.mark.parametrize(
    ("flops", "steps"), [(STEP_FLOPS * 7, 7), (STEP_FLOPS * 7 + 1, 8), (STEP_FLOPS * 6.5, 7), (1.0, 1), (STEP_FLOPS, 1)]
)
def test_training_ends_with_the_step_that_spends_the_flops(flops: float, steps: int, tmp_path: Path) -> None:
    clock = train(tmp_path, Budget(flops=flops))
    assert clock.step == steps and clock.flops == steps * STEP_FLOPS


def test_a_resumed_run_continues_to_count(tmp_path: Path) -> None:
    train(tmp_path, Budget(flops=10 * STEP_FLOPS), until=4)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["TrainingClock"]
    assert state["flops"] == 4 * STEP_FLOPS and state["step"] == 4
    resumed = train(tmp_path, Budget(flops=10 * STEP_FLOPS), resume=True)
    assert resumed.step == 10 and resumed.flops == 10 * STEP_FLOPS
    assert resumed.seconds > state["seconds"] and resumed.device_seconds > state["device_seconds"]


def test_the_flops_of_a_step_depend_on_its_kind(tmp_path: Path) -> None:
    """Five single steps are half of the budget; the other half is 2.5 double steps, rounded up."""
    clock = train(tmp_path / "whole", Budget(flops=10 * STEP_FLOPS), kind=Twice)
    assert clock.step == 5 + 3 and clock.flops == 11 * STEP_FLOPS
    train(tmp_path / "broken", Budget(flops=10 * STEP_FLOPS), kind=Twice, until=6)
    resumed = train(tmp_path / "broken", Budget(flops=10 * STEP_FLOPS), kind=Twice, resume=True)
    assert resumed.step == 8 and resumed.flops == 11 * STEP_FLOPS


class Ticking:
    """A clock that advances by a second per reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(("world", "steps"), [(1, 6), (2, 3), (4, 2)])
def test_device_minutes_are_wall_time_times_processes(
    world: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes a second: 6 device seconds are 6 steps of one process, 3 of two, and 2 (8 seconds) of four."""
    monkeypatch.setattr(clocks, "time", Ticking())
    broadcasts: list[float] = []

    class Trainer:
        world_size, should_stop = world, False

        class strategy:
            @staticmethod
            def broadcast(value: float, src: int) -> float:
                broadcasts.append(value)
                return value

    clock, trainer = TrainingClock(0, BATCH, Budget(device_minutes=0.1)), Trainer()
    while not trainer.should_stop:
        clock.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert clock.step == steps and clock.device_seconds == steps * world and clock.seconds == steps
    assert len(broadcasts) == (steps if world > 1 else 0), "the first process decides for all processes"


@pytest.mark.parametrize(("world", "precision"), [(1, "32-true"), (2, "bf16-mixed")])
def test_mfu_is_flops_over_what_matrix_products_reach_in_that_time(
    world: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take a second each, also those after a resumption, and a matrix product could do twice as much per second
    on each device, in the precision of training."""
    monkeypatch.setattr(clocks, "time", Ticking())
    train(tmp_path, Budget(steps=5), until=2)
    clock = train(tmp_path, Budget(steps=5), resume=True)
    assert clock.flops == 5 * STEP_FLOPS and clock.seconds == 5
    clock.device_seconds *= world
    measured = []

    def ceiling(device: torch.device, dtype: torch.dtype) -> float:
        measured.append(dtype)
        return 2.0 * STEP_FLOPS / world

    monkeypatch.setattr("gencompare.tasks.train.matmul_flops_per_second", ceiling)
    trainer = pl.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)  # type: ignore[arg-type]
    assert flops_utilization(clock, trainer) == 0.5
    assert measured == [torch.float32 if precision == "32-true" else torch.bfloat16]
    clock.flops = 0.0
    assert flops_utilization(clock, trainer) is None


def test_the_fastest_matrix_product_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the clock takes a hundredth of a second, and so does each product: larger ones would be slow."""
    readings = itertools.count()
    monkeypatch.setattr(resources.time, "perf_counter", lambda: next(readings) / 100)
    resources._measured_matmul.cache_clear()
    cpu = torch.device("cpu")
    assert resources.matmul_flops_per_second(cpu, torch.float32) == pytest.approx(2 * 256**3 * 100)
    count = next(readings)
    assert resources.matmul_flops_per_second(cpu, torch.float32) > 0 and next(readings) == count + 1
    resources._measured_matmul.cache_clear()


def test_the_progress_line_shows_the_speed_of_this_process() -> None:
    """Steps before a resumption do not count."""
    clock = TrainingClock(0, BATCH, Budget(steps=100))
    clock.load_state_dict({"step": 10, "images": 320, "seconds": 500.0, "flops": 7e12})
    bar, model = TrainingProgressBar(), SimpleNamespace(clock=clock)
    trainer: Any = SimpleNamespace(
        lightning_module=model, callback_metrics={"train/loss": 0.25}, is_global_zero=True, should_stop=False
    )
    bar.on_train_start(trainer, model)  # type: ignore[arg-type]
    clock.load_state_dict({"step": 20, "images": 640, "seconds": 504.0, "flops": 7e12 + 180e9})
    assert bar.describe(trainer).startswith("step 20  loss 0.25  80 images/s  45 GFLOP/s  ")
    clock.flops = 7e12 + 1e9
    assert "  80 images/s  0.25 GFLOP/s  " in bar.describe(trainer)
    clock.flops = 7e12
    assert "GFLOP/s" not in bar.describe(trainer)


def test_a_model_without_countable_flops_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "losses", lambda self, x, *_: {"loss": (x.flatten(1) * self.layer.weight[0]).sum(1)})
    with pytest.raises(UserError, match=r"budget\.flops"):
        train(tmp_path, Budget(flops=1e9))


@pytest.mark.parametrize("name", ["flops", "device_minutes"])
def test_the_cost_of_dependencies_reduces_the_budget(name: str) -> None:
    budget = Budget(**{"images": 50, name: 10.0})
    left = budget.after(flops=4.0, device_seconds=240.0, spender="the autoencoder")
    assert vars(left) == {**vars(budget), name: 6.0}
    with pytest.raises(UserError, match=rf"budget\.{name}=10.*the autoencoder used 10"):
        budget.after(flops=10.0, device_seconds=600.0, spender="the autoencoder")


def test_dependencies_do_not_reduce_limits_on_images() -> None:
    assert Budget(images=50).after(flops=1e30, device_seconds=1e30, spender="x") == Budget(images=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"flops": 0.0}, "positive"), ({"flops": "1e12"}, "1.0e"), ({"device_minutes": -1}, "positive")],
)
def test_invalid_limits_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Budget(**options)


@pytest.mark.parametrize(
    ("overrides", "limits"),
    [
        ([], {"images": 60_000}),
        (["budget=images", "budget.images=7"], {"images": 7}),
        (["budget=steps", "budget.steps=9"], {"steps": 9}),
        (["budget=flops", "budget.flops=2.5e12"], {"flops": 2.5e12}),
        (["budget=device_minutes", "budget.device_minutes=3"], {"device_minutes": 3}),
    ],
)
def test_a_budget_option_replaces_the_limits_of_an_experiment(overrides: list[str], limits: dict[str, float]) -> None:
    cfg = compose("experiment=digits_vae", *overrides)
    assert {key: value for key, value in cfg.budget.items() if key != "_target_" and value is not None} == limits
    assert cfg.model.importance_samples == 50


def record(name: str, flops: float | None, seconds: float, dependencies: Any = ()) -> RunRecord:
    training = {
        "images_seen": 10, "steps": 1, "flops": flops, "seconds": seconds, "processes": 2, "energy_joules": 5.0,
        "dependencies": list(dependencies),
    }  # fmt: skip
    return RunRecord(name=name, family=name, data={}, environment={"run_id": name}, training=training)


def test_the_total_cost_includes_each_dependency_once() -> None:
    """A guide and the guided model depend on the same autoencoder."""
    coder = dependency_costs.cost_entry(record("coder", 100.0, 1.0), "autoencoder")
    guide = record("guide", 20.0, 2.0, [coder])
    model = record("model", 3.0, 4.0, [coder, dependency_costs.cost_entry(guide, "classifier")])
    dependency_costs.update_total_cost(model)
    costs = {"images_seen": 30, "steps": 3, "flops": 123.0, "device_seconds": 14.0, "energy_joules": 15.0}
    assert model.training["total_cost"] == costs
    # The other trials of a search are part of the cost, but do not reduce the budget.
    trial = dependency_costs.cost_entry(record("other", 1000.0, 1.0), "trial")
    assert dependency_costs.remaining_budget(Budget(flops=130.0), [coder, trial]).flops == 30.0
    unknown = record("old", None, 1.0)
    dependency_costs.update_total_cost(unknown)
    assert unknown.training["total_cost"]["flops"] is None and unknown.training["total_cost"]["steps"] == 1


QUICK = [
    "data=digits", "trainer=cpu", "logger=none", "trainer.global_batch_size=16",
    "callbacks.evaluation.num_evaluations=0", "callbacks.progress_bar=null", "evaluation.checkpoints=[]",
    "callbacks.checkpoints.every_minutes=100",
]  # fmt: skip
SMALL = ["model.network.channels=8", "model.network.num_groups=8"]
STAGE = [
    "model.latent.autoencoder.encoder.channels=8", "model.latent.budget.images=null", "model.latent.budget.steps=3",
    "model.latent.autoencoder.perceptual=null",
]  # fmt: skip


def training(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())["training"]


def test_a_budget_in_flops_includes_the_autoencoder(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    """A run with a budget in steps measures the FLOPs of a step. A budget in FLOPs then pays for the autoencoder and
    for as many steps as this predicts, also if the run is resumed."""
    overrides = ["model=ldm", *QUICK, *SMALL, *STAGE]
    assert cli(*overrides, "budget=steps", "budget.steps=2", "hydra.run.dir=probe") == 0
    probe = training(tmp_path / "probe")
    stage, whitening = probe["dependencies"]
    assert stage["role"] == "autoencoder" and stage["steps"] == 3 and stage["images_seen"] == 48
    assert probe["total_cost"]["images_seen"] == 32 + 48 and probe["total_cost"]["steps"] == 5
    # The whitening encodes all training images.
    loaded: Any = load_run(tmp_path / "probe")
    images, encode = len(loaded.data.train_subset), loaded.model.space.coder.encode
    assert whitening["role"] == "whitening" and whitening["images_seen"] == 0
    assert whitening["flops"] == pytest.approx(images * flops_per_image(lambda: encode(torch.zeros(1, 1, 8, 8)), 1))
    # The last of the autoencoder's three steps also trains the discriminator, and costs more.
    coder = training(next((tmp_path / "runs").glob("digits_autoencoder_*")))
    first = torch.load(next((tmp_path / "runs").glob("*/checkpoints/last.ckpt")), weights_only=True)["callbacks"]
    per_image = first["TrainingFlops"]["per_image"]
    assert per_image["adversarial"] > 1.05 * per_image[""]
    assert coder["flops"] == pytest.approx(16 * (2 * per_image[""] + per_image["adversarial"]))
    before = stage["flops"] + whitening["flops"]
    assert probe["total_cost"]["flops"] == probe["flops"] + before
    assert probe["total_cost"]["device_seconds"] == pytest.approx(
        probe["seconds"] + stage["device_seconds"] + whitening["device_seconds"]
    )

    flops = float(f"{before + 4.5 * 16 * probe['flops_per_image']:.6e}")
    assert cli(*overrides, "budget=flops", f"budget.flops={flops:.6e}", "hydra.run.dir=run") == 0
    run = training(tmp_path / "run")
    assert run["dependencies"][0]["id"] == stage["id"], "the autoencoder of the other run is reused"
    assert run["steps"] == math.ceil((flops - before) / (16 * run["flops_per_image"])) == 5
    assert flops <= run["total_cost"]["flops"] < flops + 16 * run["flops_per_image"]

    assert cli("resume=run", f"budget.flops={flops + 2 * 16 * run['flops_per_image']:.8e}") == 0
    again = training(tmp_path / "run")
    assert again["steps"] == 7 and again["dependencies"] == run["dependencies"]
    assert again["total_cost"]["flops"] == again["flops"] + before

    capsys.readouterr()
    assert cli(*overrides, "budget=flops", f"budget.flops={before:.6e}", "hydra.run.dir=none") == 1
    error = capsys.readouterr().err
    assert "the autoencoder (digits_autoencoder_" in error and "nothing is left" in error
    assert not (tmp_path / "none" / "record.json").exists()


def test_a_noisy_classifier_is_a_dependency_of_a_guided_model(cli: Cli, tmp_path: Path) -> None:
    base = [*QUICK, "budget=steps", "budget.steps=1"]
    assert cli("model=noisy_classifier", *base, "hydra.run.dir=guide") == 0
    guide = training(tmp_path / "guide")
    guided = ["model/guidance=classifier", "model.guidance.classifier.run=guide"]
    assert cli("model=ddpm", *SMALL, *base, *guided, "hydra.run.dir=guided") == 0
    found = training(tmp_path / "guided")
    assert [part["role"] for part in found["dependencies"]] == ["classifier"]
    assert found["total_cost"]["flops"] == found["flops"] + guide["flops"]
    # An evaluation may use a different guide than training, so its result lists guides too.
    overrides = [
        "evaluation.num_images=100", "evaluation.extractors=[classifier]", "model/likelihoods=null",
        "model/sampler=ddim", "model.sampler.num_steps=2",
    ]  # fmt: skip
    assert cli("task=evaluate", "run_dir=guided", *overrides) == 0
    (result,) = json.loads((tmp_path / "guided" / "record.json").read_text())["results"]
    assert [part["id"] for part in result["details"]["guides"]] == [found["dependencies"][0]["id"]]


def test_one_training_is_evaluated_with_several_guidance_scales(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    overrides = [
        "model=ddpm", *SMALL, *QUICK[:-2], "budget=steps", "budget.steps=1", "model.conditional=true",
        "model.label_dropout=0.1", "model/guidance=classifier_free", "model/sampler=ddim", "model.sampler.num_steps=2",
        "model.guidance.scale=1", "evaluation.num_images=100",
        "evaluation.extractors=[classifier]", "evaluation.checkpoints=[last]", "model/likelihoods=null",
    ]  # fmt: skip
    variants = "+evaluation.guidance={w0: {scale: 0}, w4: {scale: 4, interval: [0.3, 3]}}"
    assert cli(*overrides, variants, "hydra.run.dir=run") == 0
    results = json.loads((tmp_path / "run" / "record.json").read_text())["results"]
    samplers = [result["generation"]["sampler"] for result in results]
    assert "scale 1" in samplers[0] and "scale 0" in samplers[1]
    assert "scale 4" in samplers[2] and "0.3" in samplers[2]
    capsys.readouterr()
    assert cli(*overrides, "+evaluation.guidance={w: {scael: 0}}", "hydra.run.dir=wrong") == 1
    assert "cannot change scael" in capsys.readouterr().err
