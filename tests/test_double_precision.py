"""trainer.precision=64-true: every family trains, samples and is evaluated in float64, with the draws of float32."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from composing import compose, options
from gencompare.data.digits import Digits
from gencompare.diffusion import editing
from gencompare.evaluation.model_metrics import bits_per_dim
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import GenerativeModel, SupportsReconstruction, SupportsVisualization, TrainedModel
from gencompare.models.diffusion import Diffusion
from gencompare.rng import RandomSource, draw_normal, generator, normal_like, uniform_like
from gencompare.tasks.runs.build import build_data, build_model, build_trainer
from gencompare.training.budget import Budget
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from gencompare.training.evaluation_callback import validation_metrics
from gencompare.training.learning_rate import LearningRateScheduler
from parts import VARIANTS, slow_if

FAMILIES = options("model")
SLOW = VARIANTS | {"ldm", "ncsn", "flow", "edm", "consistency", "meanflow", "autoencoder", "classifier", "tarflow"}
"""Families that are compared in ``make test-slow``."""
CLOSE = 1e-3
"""Tolerance after three steps. Adam divides small gradients by their own size, which enlarges rounding errors."""
CONDITIONAL = {"vae", "gan", "ebm", "hvae", "glow", "tarflow", "ddpm"}


def config(family: str, precision: str, *overrides: str) -> Any:
    cfg = compose(f"model={family}", "data=digits", "trainer=cpu", "trainer.global_batch_size=8", *overrides)
    cfg.trainer.precision = precision
    if family in CONDITIONAL:
        cfg.model.conditional = True
    for name, value in cfg.model.get("sampler", {}).items():
        if name.endswith("steps") and value > 3:
            cfg.model.sampler[name] = 3
    if "num_sampling_steps" in cfg.model:
        cfg.model.num_langevin_steps = cfg.model.num_sampling_steps = 2
    if "adversarial_start" in cfg.model:
        cfg.model.adversarial_start = 0.0
    return cfg


def trained(cfg: Any, folder: Path, steps: int = 3) -> tuple[TrainedModel, pl.Trainer]:
    data = build_data(cfg)
    model = build_model(cfg, data)
    budget = Budget(steps=steps)
    callbacks = {"clock": TrainingClock(0, 8, budget), "rate": LearningRateScheduler(), "ema": EMA(0.9)}
    trainer = build_trainer(cfg, model, callbacks, [], folder)
    trainer.fit(model, datamodule=data)
    return model.eval(), trainer


def outputs(model: TrainedModel, trainer: pl.Trainer) -> dict[str, Tensor]:
    """Return what a model computes in an evaluation: samples, reconstructions, images, likelihoods and losses."""
    data = Digits()
    x, cond = next(data.batches("val", 4))
    given = x.to(model.dtype)
    found = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in validation_metrics(trainer, model, 8, 0).items()
    }
    with torch.no_grad():
        if isinstance(model, GenerativeModel):
            found["samples"] = model.sample(4, cond, generator=generator("cpu", 1))
            found["drawn"] = draw_samples(model, 4).images / 16
        if isinstance(model, SupportsReconstruction):
            found["reconstructions"] = model.reconstruct(given, cond, generator=generator("cpu", 2))
        if isinstance(model, SupportsVisualization) and not isinstance(model, Diffusion):
            found |= model.visualize(given, cond, generator=generator("cpu", 3))
        for name, metric in bits_per_dim(model, data, 4, 0).items():
            assert metric.value is not None, metric
            found[name] = torch.tensor(metric.value, dtype=torch.float64)
    return found


@pytest.mark.parametrize("family", slow_if(SLOW, FAMILIES))
def test_a_family_in_float64_equals_itself_in_float32(family: str, tmp_path: Path) -> None:
    """Weights and all outputs are equal up to the rounding of float32, so the random numbers are equal."""
    single, double = (trained(config(family, precision), tmp_path) for precision in ("32-true", "64-true"))
    for name, value in double[0].state_dict().items():
        other = single[0].state_dict()[name]
        assert value.dtype == (torch.float64 if other.is_floating_point() else other.dtype), name
        assert torch.allclose(value, other.to(value.dtype), rtol=CLOSE, atol=CLOSE), name
    average = next(c for c in double[1].callbacks if isinstance(c, EMA)).average  # type: ignore[attr-defined]
    assert all(value.dtype == torch.float64 for value in average.values())
    expected = outputs(*single)
    for name, value in outputs(*double).items():
        assert torch.isfinite(value).all(), name
        difference = (value - expected[name].to(value.dtype)).abs()
        # A pixel or a code may round to its other neighbour.
        assert difference.mean() <= 5e-3 * (1 + expected[name].abs().mean()), (name, difference.mean())


@pytest.mark.parametrize("family", slow_if(VARIANTS, FAMILIES))
def test_a_plain_trainer_in_float64(family: str, tmp_path: Path) -> None:
    model = build_model(config(family, "32-true"), Digits())
    trainer = pl.Trainer(
        accelerator="cpu", precision="64-true", max_steps=2 * max(1, len(model.build_optimizers())), logger=False,
        callbacks=[EMA(0.9)], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=1, limit_predict_batches=1,
    )  # fmt: skip
    trainer.fit(model, datamodule=Digits(batch_size=8, eval_batch_size=8))
    assert all(p.dtype == torch.float64 for p in model.parameters())
    (predicted,) = trainer.predict(model, datamodule=Digits(eval_batch_size=4))  # type: ignore[misc]
    assert predicted.dtype == torch.float64 and torch.isfinite(predicted).all()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model/sampler=dpmpp_2m", "model/sampler/grid=log_snr"],
        ["model/sampler=unipc", "model/sampler/grid=quadratic"],
        ["model/sampler=heun", "model.sampler.s_churn=1", "model/sampler/grid=karras"],
        ["model/sampler=rk45", "model.sampler.rtol=0.5", "model.sampler.atol=0.5", "model/network=mlp"],
        ["model/sampler=annealed_langevin", "model.sampler.num_langevin_steps=2", "model/network=mlp"],
        ["model/sampler=reverse_diffusion", "model/network=dit"],
        ["model/sampler=euler", "model/augmentation=edm"],
        ["model.conditional=true", "model.label_dropout=0.1", "model/guidance=classifier_free"],
        ["+data/condition=low_res", "model/objective=edm"],
        ["model/parameterization=posterior_mean", "model/objective=vlb_discrete"],
        ["model/likelihoods=ode", "model.likelihoods.ode.rtol=0.1", "model/network=mlp"],
        [
            "model/schedule=ncsn", "model/sampler/grid=log_snr", "model.parameterization.noise_conditioning._target_="
            "gencompare.diffusion.parameterizations.LevelIndexConditioning",
        ],
    ],
    ids=lambda overrides: " ".join(overrides)[:60],
)  # fmt: skip
def test_parts_of_diffusion_models_in_float64(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing, "NUM_ODE_STEPS", 2)
    results = []
    for precision in ("32-true", "64-true"):
        cfg = compose("model=ddpm", "data=digits", "trainer=cpu", "trainer.global_batch_size=8", *overrides)
        cfg.trainer.precision = precision
        cfg.model.sampler.num_steps = 2
        model, _ = trained(cfg, tmp_path, steps=2)
        data = build_data(cfg)
        x, cond = next(data.batches("val", 2))
        assert isinstance(model, GenerativeModel)
        estimates = [
            estimate.bits_per_dim(x.to(model.dtype), cond, generator("cpu", 1))
            for estimate in model.likelihoods().values()
        ]
        images = model.visualize(x.to(model.dtype), cond, generator=generator("cpu", 2)).values()  # type: ignore[operator]
        results.append([model.sample(2, cond, generator=generator("cpu", 0)), *estimates, *images])
    for single, double in zip(*results, strict=True):
        assert double.dtype == torch.float64 and torch.isfinite(double).all()
        assert (single - double).abs().mean() < 5e-3 * (1 + single.abs().mean())


def test_random_numbers_are_the_same_in_both_precisions() -> None:
    for draw in (
        lambda rng: rng.normal((3,)), lambda rng: rng.uniform((2, 2)), lambda rng: rng.stratified(),
    ):  # fmt: skip
        single, double = (
            draw(RandomSource(generator("cpu", 0), 2, 5, 8, dtype)) for dtype in (torch.float32, torch.float64)
        )
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        assert torch.allclose(single.double(), double, atol=1e-7)
    x = torch.zeros(4, 3)
    for like in (normal_like, uniform_like):
        assert torch.equal(like(x, generator("cpu", 0)).double(), like(x.double(), generator("cpu", 0)))
    assert draw_normal((2,), generator("cpu", 0), dtype=torch.float64).dtype == torch.float64


@pytest.mark.timeout(200)
def test_a_run_in_float64_is_resumed_and_evaluated_in_float64(cli: Callable[..., int], tmp_path: Path) -> None:
    overrides = [
        "model=flow", "model/network=mlp", "data=digits", "trainer=cpu", "trainer.precision=64-true",
        "trainer.global_batch_size=8",
        "budget=steps", "budget.steps=2", "callbacks.evaluation.num_evaluations=1", "model.sampler.num_steps=2",
        "callbacks.evaluation.num_grid_images=4", "callbacks.evaluation.num_samples=40", "evaluation.num_images=40",
        "evaluation.extractors=[classifier]", "evaluation.protocol.num_likelihood_images=10", "logger=none",
        "evaluation.checkpoints=[last]", "hydra.run.dir=run",
    ]  # fmt: skip
    assert cli(*overrides) == 0
    assert cli("resume=run", "budget.steps=4") == 0
    stored = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    for part in (stored["state_dict"], stored["ema"]):
        assert {value.dtype for value in part.values() if value.is_floating_point()} == {torch.float64}
    before = json.loads((tmp_path / "run" / "record.json").read_text())
    assert before["training"]["precision"] == "64-true" and before["training"]["steps"] == 4
    assert cli("task=evaluate", "run_dir=run") == 0
    after = json.loads((tmp_path / "run" / "record.json").read_text())
    last, again = ([metric["value"] for metric in r["results"][-1]["metrics"].values()] for r in (before, after))
    assert last == again and math.isfinite(sum(value for value in last if value is not None))
    for task in ("sample", "visualize", "export"):
        assert cli(f"task={task}", "run_dir=run") == 0, task
