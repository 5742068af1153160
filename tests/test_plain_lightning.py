"""Every model under a plain Lightning Trainer, with this project's data modules or any data loaders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

import gencompare
from composing import compose, options
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.rng import generator
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.training.ema import EMA
from parts import VARIANTS, assert_same_state

FAMILIES = options("model")
SLOW = VARIANTS | {"flow", "consistency", "edm", "meanflow", "ncsn"}
"""Families that train in ``make test-slow``."""


def model_of(family: str) -> TrainedModel:
    cfg = compose(f"model={family}", "data=digits", "trainer=cpu")
    for name, value in cfg.model.get("sampler", {}).items():
        if name.endswith("steps") and value > 3:
            cfg.model.sampler[name] = 3
    if "num_sampling_steps" in cfg.model:
        cfg.model.num_langevin_steps = cfg.model.num_sampling_steps = 2
    return build_model(cfg, build_data(cfg))


def pairs(n: int) -> DataLoader[Any]:
    """Return batches (x, y) of floats in [-1, 1] and class indices, like those of any image data set."""
    split = Digits().split("train")
    assert split.labels is not None
    return DataLoader(TensorDataset(Digits().normalize(split.images[:n]), split.labels[:n]), batch_size=16)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=CSVLogger(folder), callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "own"),
    [
        pytest.param(family, own, marks=[pytest.mark.slow] if family in SLOW else [])
        for family in FAMILIES for own in (True, False)
    ],
)  # fmt: skip
def test_a_plain_trainer_trains_validates_predicts_and_saves(family: str, own: bool, tmp_path: Path) -> None:
    model = model_of(family)
    saved = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=4)
    rates = LearningRateMonitor("step")
    run = trainer(
        tmp_path, saved, rates, max_steps=8, limit_val_batches=1, limit_predict_batches=1, val_check_interval=4
    )
    data: dict[str, Any] = {"datamodule": Digits(batch_size=16)} if own else {
        "train_dataloaders": pairs(160), "val_dataloaders": pairs(32),
    }  # fmt: skip
    pl.seed_everything(0)
    run.fit(model, **data)
    logged = run.callback_metrics
    assert any(name.startswith("train/") and "loss" in name for name in logged), logged
    assert all(torch.isfinite(value) for value in logged.values())
    held_out: dict[str, Any] = {"datamodule": Digits()} if own else {"dataloaders": pairs(32)}
    assert run.validate(model, verbose=False, **held_out)[0], "metrics"
    predicted = run.predict(model, **held_out)
    assert predicted and torch.isfinite(predicted[0]).all()
    assert predicted[0].shape[1:] == ((10,) if "classifier" in family else model.spec.shape)
    loaded = type(model).load_from_checkpoint(tmp_path / "last.ckpt")
    assert_same_state(model, loaded)
    if isinstance(model, GenerativeModel):
        assert isinstance(loaded, GenerativeModel)
        one, other = (each.eval().sample(4, generator=generator("cpu", 1)) for each in (model, loaded))
        assert torch.equal(one, other)


@pytest.mark.parametrize("limit", ["max_steps", "max_epochs"])
@pytest.mark.parametrize("family", ["ddpm", "gan"])
def test_the_learning_rate_follows_its_schedule(family: str, limit: str, tmp_path: Path) -> None:
    """Warm-up depends on steps and decay on the fraction of training, with automatic and manual optimisation."""
    model, rates = model_of(family), []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    num_optimizers = len(model.build_optimizers())
    base = model.build_optimizers()[0].param_groups[0]["lr"]
    steps = 10
    limits: dict[str, Any] = {"max_steps": steps * num_optimizers}
    if limit == "max_epochs":
        limits = {"max_epochs": 2, "limit_train_batches": steps // 2}
    for fit in range(2):  # a second Trainer starts again
        rates.clear()
        trainer(tmp_path / str(fit), Watch(), limit_val_batches=0, **limits).fit(model, Digits(batch_size=16))
    assert model.lr_schedule is not None
    expected = [base * model.lr_schedule(s, s / steps) for s in range(len(rates) // num_optimizers)]
    assert rates[::num_optimizers] == pytest.approx(expected)


def test_early_stopping_and_best_checkpoint_use_a_logged_metric(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    stop = EarlyStopping("val/loss", patience=1, min_delta=1e9)
    run = trainer(tmp_path, best, stop, max_steps=50, val_check_interval=2, limit_val_batches=1)
    run.fit(model_of("vae"), Digits(batch_size=16))
    assert run.global_step == 4 and stop.stopped_epoch == 0 and best.best_model_path
    assert best.best_model_score == pytest.approx(float(stop.best_score), rel=0.5)


def test_loading_a_checkpoint_gives_the_ema_weights(tmp_path: Path) -> None:
    average, model = EMA(0.9), model_of("ddpm")
    saved = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=4)
    trainer(tmp_path, average, saved, max_steps=4, limit_val_batches=0).fit(model, Digits(batch_size=16))
    loaded = TrainedModel.load_from_checkpoint(tmp_path / "last.ckpt")
    assert type(loaded) is type(model)
    for name, value in average.average.items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert value.numel() == 1 or not torch.equal(model.state_dict()[name], value)
    assert average.step == 4


def test_a_closed_form_model_ends_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=-1, limit_val_batches=0)
    run.fit(model_of("gaussian"), Digits(batch_size=16))
    assert run.global_step == 1


@pytest.mark.parametrize("form", ["x", "pair", "conditions", "mapping"])
def test_batches_of_every_supported_form_train(form: str) -> None:
    model = model_of("ddpm")
    x, y = next(iter(pairs(16)))
    batch = {"x": x, "pair": (x, y), "conditions": (x, {"label": y}), "mapping": {"image": x, "label": y}}[form]
    assert model.training_step(batch, 0)["loss"].isfinite()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(4, 1, 28, 28), r"\(n, 1, 8, 8\) in \[-1, 1\].*\(4, 1, 28, 28\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), r"float tensors.*uint8"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4, 10)), r"class indices.*\(4, 10\)"),
        ("text", r"\{'image': x, 'label': class indices\}"),
        ({"pixels": torch.zeros(4, 1, 8, 8)}, r"\{'image': x, 'label': class indices\}"),
    ],
)
def test_a_batch_of_another_form_raises_an_error(batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_of("ddpm").training_step(batch, 0)


def test_the_script_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is unchanged except for fewer steps."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    script = readme.partition("## Use it from your own code")[2].partition("```python\n")[2].partition("```")[0]
    assert script and len(script.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    for steps, fewer in [
        (r"max_steps=[\d_]+", "max_steps=2"),
        (r"val_check_interval=\d+", "val_check_interval=1"),
        (r'"data=digits"', '"data=digits", "model.sampler.num_steps=5"'),
    ]:
        script = re.sub(steps, fewer, script)
    exec(compile(script, "README.md", "exec"), {})
    assert list(tmp_path.rglob("*.ckpt"))


def test_a_config_composed_in_python_trains(tmp_path: Path) -> None:
    cfg = gencompare.compose(
        "model=flow", "trainer=cpu", "budget=steps", "budget.steps=2", "logger=none",
        "callbacks.evaluation.num_evaluations=0", "evaluation.checkpoints=[]", folder=tmp_path / "run",
    )  # fmt: skip
    run = gencompare.train(cfg)
    assert run.record.state == "finished" and run.record.overrides[0] == "model=flow"
    loaded = gencompare.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert isinstance(run.model, GenerativeModel) and isinstance(loaded, GenerativeModel)
    one, other = (model.sample(2, generator=generator("cpu", 0)) for model in (run.model, loaded))
    assert torch.equal(one, other)


def test_results_samples_and_comparisons_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, model = gencompare.build(gencompare.compose("model=gaussian", "data=digits"))
    trainer(tmp_path).fit(model, datamodule=data)
    samples = gencompare.sample(model, 300, seed=1)
    assert torch.equal(gencompare.sample(model, 250, seed=1).images, samples.images[:250])
    assert samples._repr_png_().startswith(b"\x89PNG")
    results = {
        name: gencompare.evaluate(images, data, EvaluationProtocol(num_images=300))
        for name, images in {"<a>": samples.images, "dark": samples.images // 2}.items()
    }
    result = results["<a>"]
    value = f"{result.metrics[result.primary_metric].value:.4g}"
    assert value in str(result).splitlines()[1] and value in result._repr_html_()
    assert "Warning: samples" in str(results["dark"]) and "Warning: samples" in results["dark"]._repr_html_()
    result.images["samples"] = "grid.png"
    compared = gencompare.compare(results, rank_by="coverage")
    assert result.images == {"samples": "grid.png"} and not compared.loaded.runs[0].record.results[0].images
    assert [(row["rank"], row["run"]) for row in compared.rows[:2]] == [(1, "<a>"), (2, "dark")]
    (tmp_path / "curve.csv").write_text("step,images,train/loss\n1,1,1\n2,2,2\n")  # belongs to another run
    page = compared.save(tmp_path / "page")
    assert "Learning curves" not in page.read_text()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert page.is_file() and "&lt;a&gt;" in compared._repr_html_() and "<a>" in str(compared)


def test_functions_of_the_python_api_name_what_is_missing() -> None:
    model = gencompare.build(gencompare.compose("experiment=cifar10_super_resolution", "data=digits"))[1]
    with pytest.raises(UserError, match=r"needs the condition 'low_res': call sample\(model, data=...\)"):
        gencompare.sample(model, 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="matches no run folder"):
        gencompare.compare("no/such/*")
    records = Path(__file__).parents[1] / "docs" / "results" / "sde_vp"
    with pytest.raises(UserError, match=r"no\.such\.key"):
        gencompare.compare(str(records / "*"), group_by="no.such.key")
    assert len(gencompare.compare(records / "gaussian").tables) == 2
