"""The contract of every model, tested for each option of conf/model without naming any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from checkpoints import assert_same_training, checkpoint
from composing import compose, options
from gencompare.data.datamodule import ImageData
from gencompare.generative_model import GenerativeModel, SupportsReconstruction, TrainedModel
from gencompare.models.gaussian import GaussianBaseline
from gencompare.rng import RandomSource, generator
from gencompare.tasks.runs.build import build_callbacks, build_data, build_model, build_trainer
from gencompare.tasks.runs.loading import load_run, load_weights
from gencompare.training.clock import TrainingClock, clock_of
from learning import FourPatterns, UntilLearned, distance, members, shown
from parts import VARIANTS, assert_same_state, loaded, slow_if


def built(family: str, *overrides: str) -> tuple[Any, TrainedModel, ImageData]:
    cfg = compose(
        f"model={family}", "data=digits", "trainer=cpu", "trainer.global_batch_size=16", "budget.images=null",
        "budget.steps=2", "callbacks.evaluation.num_evaluations=0",
        "callbacks.progress_bar=null", "callbacks.metric_logger.log_every_n_steps=1", *overrides,
    )  # fmt: skip
    for name, value in cfg.model.get("sampler", {}).items():
        if name.endswith("steps") and value > 5:
            cfg.model.sampler[name] = 5  # image quality does not matter here
    data = build_data(cfg)
    return cfg, build_model(cfg, data), data


def fitted(family: str, folder: Path, *overrides: str) -> tuple[Any, TrainedModel, ImageData]:
    cfg, model, data = built(family, *overrides)
    trainer = build_trainer(cfg, model, build_callbacks(cfg, model, data, None, folder), [], folder)
    trainer.fit(model, datamodule=data)
    return cfg, model, data


def draw(model: TrainedModel, n: int, seed: int) -> torch.Tensor:
    assert isinstance(model, GenerativeModel)
    cond = {"label": torch.arange(n) % model.spec.num_classes} if model.conditional else {}
    with torch.no_grad():
        return model.eval().sample(n, cond, generator=generator("cpu", seed))


def conditional_options(family: str) -> list[bool]:
    """Return the values of ``conditional`` that the family's config supports."""
    return [False, True] if "conditional" in loaded("", family) else [False]


FAMILIES = options("model")
CONDITIONAL_AS_DDPM = VARIANTS | {"edm", "flow", "meanflow", "ncsn", "consistency"}
CASES = [
    pytest.param(
        family, conditional,
        marks=[pytest.mark.slow] if family in (CONDITIONAL_AS_DDPM if conditional else VARIANTS) else [],
    )
    for family in FAMILIES for conditional in conditional_options(family)
]  # fmt: skip


@pytest.mark.parametrize(("family", "conditional"), CASES)
def test_family(family: str, conditional: bool, tmp_path: Path) -> None:
    overrides = ["model.conditional=true"] if conditional else []
    _, model, data = fitted(family, tmp_path, *overrides)
    clock = next(c for c in model.trainer.callbacks if isinstance(c, TrainingClock))  # type: ignore[attr-defined]
    assert clock.step >= 1

    # A new model with the saved weights has the same weights and samples.
    _, fresh, _ = built(family, *overrides)
    load_weights(fresh, tmp_path, checkpoint="last", weights="raw")
    assert_same_state(model, fresh)

    if not isinstance(model, GenerativeModel):
        return
    x = draw(model, 6, seed=1)
    assert x.shape == (6, *data.spec.shape) and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1
    assert torch.equal(x, draw(model, 6, seed=1)), "samples depend only on the generator"
    assert not torch.equal(x, draw(model, 6, seed=2)), "another seed gives other images"
    assert isinstance(fresh, GenerativeModel)
    assert torch.equal(x, draw(fresh, 6, seed=1)), "the loaded model gives the same images"
    assert len({tuple(row) for row in x.flatten(1).tolist()}) == 6, "samples of one call differ"

    images, cond = next(iter(data.batches("val", 16)))
    for name, likelihood in model.likelihoods().items():
        bits = likelihood.bits_per_dim(images, model.select_conditions(cond), generator("cpu", 0))
        assert likelihood.kind in ("exact", "bound", "estimate") and bits.shape == (16,), name
        assert torch.isfinite(bits).all(), name


class SaveMidway(Callback):
    """Save a checkpoint ``midway.ckpt`` after ``step`` steps."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path, self.step = folder / "checkpoints" / "midway.ckpt", step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if clock_of(trainer).step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("family", slow_if(VARIANTS, FAMILIES))
def test_resumed_training_equals_uninterrupted_training(family: str, tmp_path: Path) -> None:
    """Online weights, EMA weights and all state that affects the next step are exactly equal."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder, start in ((whole, None), (resumed, whole / "checkpoints" / "midway.ckpt")):
        cfg, model, data = built(family, "budget.steps=3")
        callbacks = build_callbacks(cfg, model, data, None, folder) | {"midway": SaveMidway(folder, step=2)}
        trainer = build_trainer(cfg, model, callbacks, [], folder)
        trainer.fit(model, datamodule=data, ckpt_path=start, weights_only=True if start else None)
        if model.closed_form:
            return
    assert checkpoint(whole, "midway")["callbacks"]["TrainingClock"]["step"] == 2
    assert not (resumed / "checkpoints" / "midway.ckpt").exists(), "the second step is not repeated"
    assert_same_training(whole, resumed)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_initial_weights_depend_on_the_seed_only(family: str) -> None:
    _, one, data = built(family)
    _, two, _ = built(family)
    assert_same_state(one, two)
    x, cond = next(iter(data.batches("val", 16)))
    metrics = []
    for model in (one, two):
        rng = RandomSource.for_batch(generator("cpu", 3), len(x))
        with torch.no_grad():
            metrics.append(model.eval().validation_metrics(x, model.select_conditions(cond), rng))
    for name, value in metrics[0].items():
        assert value.shape == (len(x),), f"{name} is per sample"
        assert torch.equal(value, metrics[1][name]), name


BAR = 0.5
"""Maximum distance of samples from the patterns, in units of the patterns' distance from their mean. If all samples are
this mean, the distance is 1; for a fitted Gaussian it is 0.64."""


STEPS = {"vae": 2000}
"""Training steps of families that may need more than 1,200, since rounding differs between processors."""

SMALLER = {
    "vae": ("model.encoder.channels=16", "model.decoder.channels=16"),
    "vqtransformer": (
        "model.latent.autoencoder.encoder.channels=16", "model.network.hidden_size=32", "model.network.depth=1",
    ),
    "glow": ("model.bijection.depth=4", "model.bijection.width=32"),
    "tarflow": ("model.bijection.depth=1", "model.bijection.hidden_size=48", "model.optimizer.lr=3e-3"),
}  # fmt: skip
"""Overrides for families that learn equally well, and faster, with a smaller network."""

SLOW = {
    "ddpm", "edm", "ncsn", "consistency", "meanflow", "tarflow", "hvae", "autoencoder", "vqvae", "ldm",
    "vqtransformer", "glow", "pixelcnnpp", "vae",
}  # fmt: skip
"""Families that take up to 90 seconds. Of those that are trained, ``gan``, ``ebm`` and ``flow`` remain."""


@pytest.mark.parametrize("family", slow_if(VARIANTS | SLOW, FAMILIES))
def test_a_few_images_are_memorised(
    family: str, cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete run memorises them, including the autoencoder of latent models. A closed-form model has one component
    per class, and each pattern is a class, so it can memorise them too."""
    if not isinstance(built(family)[1], GenerativeModel | SupportsReconstruction):
        return

    def with_end(*parts: Any) -> dict[str, Callback]:
        """Build the callbacks, with one that ends training before checkpoints are saved for the step."""
        callbacks = build_callbacks(*parts)
        checkpoints = callbacks.pop("checkpoints")
        return {**callbacks, "end": UntilLearned(bar=0.8 * BAR, first=150), "checkpoints": checkpoints}

    monkeypatch.setattr("gencompare.tasks.train.build_callbacks", with_end)
    code = cli(
        f"model={family}", "debug=overfit", "data=digits", "data._target_=learning.FourPatterns",
        "data.train_subset_size=4", "trainer=cpu", "trainer.global_batch_size=8",
        f"budget.steps={STEPS.get(family, 1200)}", "logger=none", "callbacks.evaluation.num_evaluations=0",
        "callbacks.progress_bar=null", "evaluation.checkpoints=[]", "hydra.run.dir=run", *SMALLER.get(family, ()),
    )  # fmt: skip
    if code:
        pytest.fail(f"training ended with exit code {code}")
    error, num_modes = distance(shown(load_run(tmp_path / "run", trust=True).model, seed=1))
    assert error < BAR and num_modes > 1, (error, num_modes)


def test_the_distance_detects_models_that_did_not_memorise() -> None:
    few = next(FourPatterns(train_subset_size=4).batches("train"))
    gaussian = GaussianBaseline(FourPatterns.spec, per_class=False).fit([few])
    assert distance(gaussian.sample(500, generator=generator("cpu", 0)))[0] > 0.6
    noise = torch.rand(500, *FourPatterns.spec.shape, generator=generator("cpu", 0)) * 2 - 1
    assert distance(members().mean(0, keepdim=True))[0] == pytest.approx(1)
    assert distance(noise)[0] > 0.8
    assert distance(members()[:1].expand(9, -1, -1, -1)) == (0, 1)
    assert distance(members()) == (0, 4)
