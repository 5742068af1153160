"""Typical mistakes of users who extend the package are answered in one line that names the thing and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gencompare
from gencompare.comparison import formatting
from gencompare.comparison.load_runs import ComparisonOptions, load_runs
from gencompare.comparison.ranking import rank_results
from gencompare.data.datamodule import ImageData, Split
from gencompare.errors import UserError
from gencompare.evaluation.metrics.modules import Coverage
from gencompare.generative_model import DataSpec, GenerativeModel
from synthetic import DIGITS, result, write_run

QUICK = [
    "trainer=cpu", "logger=none", "budget=steps", "budget.steps=2", "trainer.global_batch_size=8",
    "callbacks.evaluation.num_evaluations=0", "evaluation.checkpoints=[]", "hydra.run.dir=run",
]  # fmt: skip


class Pixels(GenerativeModel):
    """A family with an argument that is called ``latent``, whose losses are what the test asks for."""

    def __init__(self, spec: DataSpec, *, latent: int = 2, losses: str = "right", **training: Any) -> None:
        super().__init__(spec, **training)
        self.scale, self.kind = nn.Parameter(torch.ones(latent)), losses

    def losses(self, x: torch.Tensor, cond: Any, rng: Any) -> dict[str, torch.Tensor]:
        loss = x.flatten(1).square().mean(1) * self.scale.mean()
        return {"right": {"loss": loss}, "scalar": {"loss": loss.mean()}, "missing": {"mean": loss}}[self.kind]

    def sample(self, n: int, cond: Any = None, *, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros(n, *self.spec.shape)


def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str = "") -> None:
    """Make ``model=pixels`` an option of the user's own config groups."""
    path = tmp_path / "conf" / "model" / "pixels.yaml"
    path.parent.mkdir(parents=True)
    optimizer = "optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 1.0e-3}"
    path.write_text(text or f"_target_: test_user_mistakes.Pixels\nlatent: 2\nlosses: right\n{optimizer}\n")
    monkeypatch.setenv("GENCOMPARE_CONF", str(tmp_path / "conf"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.losses=scalar", "Pixels.losses must return one value per image, (8,), but 'loss' has shape ()."),
        ("model.losses=missing", "Pixels.losses must return 'loss', which is minimised; it returned mean."),
        ("+model.latnet=3", "Pixels has no argument 'latnet' (model.latnet). Did you mean model.latent?"),
        ("model._target_=test_user_mistakes.Pixel", "Pixel"),
        ("model._target_=no_such_file.Pixels", "No module named 'no_such_file'. If it is your own, set PYTHONPATH"),
    ],
)  # fmt: skip
def test_mistakes_in_a_family(
    override: str, message: str, cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    family(tmp_path, monkeypatch)
    assert cli("model=pixels", *QUICK, override) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1, error


def test_a_family_may_have_an_argument_called_latent(
    cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path, monkeypatch)
    assert cli("model=pixels", *QUICK) == 0
    assert cli("-m", "model=pixels", *QUICK[:-1], "hydra.sweep.dir=sweep", "seed=0") == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=pixles"], "There is no model=pixles. Choose from autoencoder, "),
        (["experiment=cifar10_dpm"], "There is no experiment=cifar10_dpm. Did you mean cifar10_ddpm?"),
        (["model=vae", "model/schedule=cosine"], "model=vae has no schedule: it has model/decoder"),
        (["model=vae", "evaluation/metric=mmd"], "needs a plus sign: +evaluation/metric=NAME"),
        (["model=vae", "trainer.benchmark=true"], "add +trainer.benchmark=VALUE"),
        (["data=image_folder", "data.root=.", "data.image_size=32x32"], "32x32 must be a whole number"),
        (["data=image_folder", "data.root=~/photos"], "Quote it: \"data.root='~/photos'\""),
        (["task=evaluate", "pretrained=no/such/file"], "There is no file or folder no/such/file"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(
    overrides: list[str], message: str, cli: Callable[..., int], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GENCOMPARE_CONF", raising=False)
    assert cli(*overrides) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1, error


def test_the_folder_of_own_config_groups_must_exist(
    cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("GENCOMPARE_CONF", "no/such/folder")
    assert cli("model=vae") == 1
    assert "GENCOMPARE_CONF=no/such/folder is not a folder" in capsys.readouterr().err


def test_a_failed_command_leaves_no_folder(cli: Callable[..., int], tmp_path: Path) -> None:
    assert cli("data=image_folder", "data.root=no/such/folder") == 1
    assert not list(tmp_path.glob("runs/*"))


# Metrics


def text_metric(generated: torch.Tensor, reference: torch.Tensor) -> str:
    return "high"


def broken_metric(generated: torch.Tensor, reference: torch.Tensor) -> float:
    return float((generated - reference).mean())


EVALUATED = [
    "model=gaussian", "trainer=cpu", "logger=none", "evaluation.num_images=20", "evaluation.extractors=[classifier]",
    "evaluation.protocol.num_likelihood_images=10", "callbacks.evaluation.num_evaluations=0",
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("_target_: test_user_mistakes.text_metric\n_partial_: true", "Metric 'mine' failed on features (20,"),
        ("_target_: test_user_mistakes.broken_metric\n_partial_: true", "Metric 'mine' failed on features (20,"),
        ("_target_: test_user_mistakes.broken_metric", "Add _partial_: true to its YAML file."),
        ("_target_: test_user_mistakes.no_such_metric", "no_such_metric"),
    ],
)
def test_mistakes_in_a_metric(
    body: str, message: str, cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_metric(tmp_path, "mine", body)
    monkeypatch.setenv("GENCOMPARE_CONF", str(tmp_path / "conf"))
    assert cli(*EVALUATED, "+evaluation/metric=mine") == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "mine" in error and len(error.splitlines()) == 1, error


def test_a_metric_without_a_package_line(
    cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_metric(tmp_path, "mine", "_target_: test_user_mistakes.broken_metric", package="# mine.yaml\n")
    monkeypatch.setenv("GENCOMPARE_CONF", str(tmp_path / "conf"))
    assert cli(*EVALUATED, "+evaluation/metric=mine") == 1
    assert "must be: # @package evaluation.protocol.metrics.NAME" in capsys.readouterr().err


def write_metric(tmp_path: Path, name: str, body: str, package: str | None = None) -> None:
    path = tmp_path / "conf" / "evaluation" / "metric" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((f"# @package evaluation.protocol.metrics.{name}\n" if package is None else package) + body + "\n")


def size_metric(generated: torch.Tensor, reference: torch.Tensor) -> float:
    return float(len(generated))


def test_a_later_evaluation_adds_another_metric(
    cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        write_metric(tmp_path, name, "_target_: test_user_mistakes.size_metric\n_partial_: true")
    monkeypatch.setenv("GENCOMPARE_CONF", str(tmp_path / "conf"))
    monkeypatch.setenv("GENCOMPARE_TRUSTED_PACKAGES", "test_user_mistakes")
    assert cli(*EVALUATED, "+evaluation/metric=first", "hydra.run.dir=run") == 0
    assert cli("task=evaluate", "run_dir=run", "+evaluation/metric=second") == 0
    (run,) = load_runs([tmp_path / "run"]).runs
    assert {"first", "second"} <= set(run.record.results[0].metrics)


def test_the_command_for_a_missing_baseline_repeats_the_metric(tmp_path: Path) -> None:
    write_run(tmp_path / "vae", [result(1.0)], overrides=["model=vae", "+evaluation/metric=mine"], family="vae")
    (table,) = rank_results(load_runs([tmp_path / "vae"]).runs, ComparisonOptions(rank_by="kd_digits"))
    assert "+evaluation/metric=mine" in table.notes()[0] and "model=gaussian" in table.notes()[0]
    # A baseline without the metric is evaluated again, not trained again.
    write_run(tmp_path / "gaussian", [result(2.0)], family="gaussian")
    folders = [tmp_path / "vae", tmp_path / "gaussian"]
    runs = load_runs(folders).runs
    runs[0].record.results[0].metrics["mine"] = runs[0].record.results[0].metrics["kd_digits"]
    (table,) = rank_results(runs, ComparisonOptions(rank_by="mine"))
    assert "Evaluate it again: python run.py task=evaluate" in table.notes()[0]
    assert "gaussian +evaluation/metric=mine" in table.notes()[0]


@pytest.mark.parametrize(
    ("arguments", "images", "message"),
    [
        ({"normalize": True}, torch.rand(4, 3, 8, 8) * 2 - 1, "floats in [0, 1]: pass (x + 1) / 2"),
        ({"normalize": True}, torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "uint8 images without normalize"),
        ({}, torch.zeros(4, 8, 8, 3, dtype=torch.uint8), "pass images.permute(0, 3, 1, 2)"),
        ({"feature": lambda x: x.float()}, torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "feature must return (n, d)"),
    ],
)
def test_mistakes_with_torchmetrics(arguments: dict[str, Any], images: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Coverage(**arguments).update(images, real=True)


def test_a_feature_must_be_a_function() -> None:
    with pytest.raises(UserError, match="feature=2048 must be a function"):
        Coverage(feature=2048)  # type: ignore[arg-type]


# Data sets


class Dots(ImageData):
    """Random images, with a mistake."""

    def __init__(self, change: Callable[[dict[str, Split]], None], **spec: Any) -> None:
        super().__init__()
        self.spec = DataSpec(name="dots", shape=(3, 8, 8), **{"num_classes": 2, **spec})
        self.change = change

    def load(self) -> dict[str, Split]:
        generator = torch.Generator().manual_seed(0)
        splits = {
            name: Split(
                torch.randint(0, 256, (60, 3, 8, 8), generator=generator).to(torch.uint8),
                torch.randint(0, 2, (60,), generator=generator),
            )
            for name in ("train", "val", "test")
        }
        self.change(splits)
        return splits


def images_of(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Split]], None]:
    def apply(splits: dict[str, Split]) -> None:
        splits["train"] = Split(change(splits["train"].images), splits["train"].labels)

    return apply


@pytest.mark.parametrize(
    ("change", "spec", "message"),
    [
        (images_of(lambda x: x.float() / 255), {}, "'train' images are torch.float32, from 0 to 1, but must be uint8"),
        (images_of(lambda x: x.long()), {}, "must be uint8 from 0 to num_bins - 1 = 255"),
        (images_of(lambda x: x), {"num_bins": 17}, "must be uint8 from 0 to num_bins - 1 = 16"),
        (images_of(lambda x: x), {"num_bins": None}, "num_bins=None needs floats in [-1, 1]"),
        (images_of(lambda x: x.permute(0, 2, 3, 1)), {}, "(60, 8, 8, 3), but spec needs (n, 3, 8, 8)"),
        (lambda s: s.update(val=Split(s["val"].images)), {}, "'val' has no labels, but spec.num_classes=2"),
        (lambda s: s.update(val=Split(s["val"].images, s["val"].labels + 1)), {}, "one class from 0 to 1"),
        (lambda s: s.update(val=s["val"][:0]), {}, "'val' has no images"),
        (lambda s: s.pop("val"), {}, "load() must return the splits train, val, test, not test, train"),
    ],
)  # fmt: skip
def test_mistakes_in_a_data_set(change: Any, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        _ = Dots(change, **spec).splits


def test_held_out_images_that_are_training_images_give_a_warning() -> None:
    with pytest.warns(UserWarning, match="the 'test' images are training images, too"):
        _ = Dots(lambda splits: splits.update(test=splits["train"])).splits


def test_a_right_data_set_is_accepted() -> None:
    assert len(Dots(lambda splits: None).splits) == 3


# Samples and the Python interface


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((4, 1, 8, 8), np.uint8)}, "looks like (n, channels, height, width): transpose it"),
        ({"images": np.zeros((4, 8, 8, 1), np.uint8)}, "contains the array images: images must be in an array with"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8)}, "4 samples are too few: at least 20 are needed"),
    ],
)
def test_mistakes_in_samples(arrays: dict[str, Any], message: str, cli: Callable[..., int], capsys: Any) -> None:
    np.savez("theirs.npz", **arrays)
    assert cli("task=evaluate", "samples=theirs.npz", "data=digits") == 1
    assert message in capsys.readouterr().err


def test_an_npy_file_is_not_an_npz_file(cli: Callable[..., int], capsys: Any) -> None:
    np.save("theirs.npy", np.zeros((4, 8, 8, 1), np.uint8))
    assert cli("task=evaluate", "samples=theirs.npy", "data=digits") == 1
    assert "np.savez(FILE, arr_0=images)" in capsys.readouterr().err


def test_mistakes_in_python() -> None:
    data, model = gencompare.build(gencompare.compose("model=gaussian", "data=digits"))
    with pytest.raises(UserError, match="must be a model or a tensor of images, not ndarray; convert"):
        gencompare.evaluate(np.zeros((4, 1, 8, 8)), data)  # type: ignore[arg-type]
    for wrong in ("digits", torch.zeros(3)):
        with pytest.raises(UserError, match="data must be a data set such as Digits"):
            gencompare.evaluate(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="separate arguments"):
        gencompare.compose(["model=ddpm"])  # type: ignore[arg-type]


def test_a_small_protocol_does_not_mention_its_chunks() -> None:
    assert "250 per seed" in formatting.describe_protocol(DIGITS)
    small = formatting.describe_protocol(DIGITS.__class__(**{**vars(DIGITS), "num_images": 100}))
    assert "per seed" not in small
