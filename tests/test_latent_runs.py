"""Latent diffusion from the command line: the same command first trains the autoencoder, and only once."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from composing import compose
from gencompare.data.digits import Digits
from gencompare.image_grid import save_png, to_image
from gencompare.tasks.main import main
from gencompare.tasks.runs.autoencoder_stage import AUTOENCODER_GROUP, autoencoder_config, autoencoder_folder
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.runs.loading import load_run
from gencompare.training.clock import TrainingClock

Cli = Callable[..., int]
QUICK = [
    "data=digits", "trainer=cpu", "logger=none", "trainer.global_batch_size=16", "budget.images=null", "budget.steps=2",
    "callbacks.evaluation.num_evaluations=0", "callbacks.progress_bar=null", "evaluation.num_images=100",
    "evaluation.extractors=[classifier]", "evaluation.protocol.num_likelihood_images=20",
]  # fmt: skip
SMALL = ["model.network.channels=8", "model.network.num_groups=8", "model/sampler=ddim", "model.sampler.num_steps=3"]
STAGE = [
    "model.latent.autoencoder.encoder.channels=8",
    "model.latent.budget.images=null",
    "model.latent.budget.steps=3",
]
LDM = ["model=ldm", *QUICK, *SMALL, *STAGE]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train ``model=ldm`` in a temporary folder and return it. The run is in ``ldm``, its autoencoder in ``runs``."""
    folder = tmp_path_factory.mktemp("latent")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("HYDRA_FULL_ERROR", "GENCOMPARE_FULL_ERROR"):
            patch.setenv(name, "0")
        patch.setattr(sys, "argv", ["run.py", *LDM, "hydra.run.dir=ldm"])
        main()
    return folder


@pytest.fixture(autouse=True)
def at_runs(runs: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def stages(runs: Path) -> list[Path]:
    return sorted(path.parent for path in (runs / "runs").glob("*/record.json"))


def test_both_stages_run_and_the_record_has_cost_and_reconstruction(runs: Path) -> None:
    (stage,) = stages(runs)
    assert stage.name.startswith("digits_autoencoder_") and record(stage)["state"] == "finished"
    assert record(stage)["training"]["steps"] == 3
    own = record(runs / "ldm")
    assert own["training"]["steps"] == 2 and own["model"]["autoencoder"]["run"] == stage.name
    assert own["model"]["autoencoder"]["images_seen"] == 48 and own["model"]["autoencoder"]["flops"] > 0
    name, digest = own["training"]["perceptual_networks"]
    assert name == "perceptual_fashion_mnist" and len(digest) == 64
    (result,) = own["results"]
    assert result["metrics"]["psnr"]["note"].startswith("reconstruction")
    assert result["generation"]["nfe"] == {"network": 3, "decoder": 1}
    assert "clipped" not in result["generation"]["sampler"]


def test_the_autoencoder_is_frozen_whitened_and_part_of_the_run(runs: Path) -> None:
    (stage,) = stages(runs)
    ldm, first = load_run(runs / "ldm"), load_run(stage)
    space = ldm.model.space
    for name, value in first.model.coder.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, space.coder.state_dict()[name]), name  # type: ignore[union-attr]
    x = torch.cat([x for x, _ in ldm.data.batches("train")])
    assert torch.allclose(space.encode(x).var((0, 2, 3)), torch.ones(4), atol=1e-2)  # type: ignore[union-attr,operator]
    averaged = torch.load(runs / "ldm" / "checkpoints" / "last.ckpt", weights_only=True)["ema"]
    assert not any(name.startswith("space.") for name in averaged)


def test_runs_with_equal_settings_share_an_autoencoder(
    runs: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    (stage,) = stages(runs)
    before = (stage / "checkpoints" / "last.ckpt").stat().st_mtime
    none = "evaluation.checkpoints=[]"
    assert cli(*LDM, "model/schedule=linear", none, "hydra.run.dir=other") == 0
    assert "is already trained" in capsys.readouterr().out
    assert stages(runs) == [stage] and (stage / "checkpoints" / "last.ckpt").stat().st_mtime == before
    vq = "model@model.latent.autoencoder=vqvae"
    assert cli("model=flow", "model/latent=autoencoder", vq, *LDM[1:], none, "hydra.run.dir=vq") == 0
    (second,) = set(stages(runs)) - {stage}
    assert "vqvae" in second.name and record(second)["family"] == "vqvae"
    # A given autoencoder run is used unchanged, with its own settings.
    own = [word for word in LDM if not word.startswith("model.latent.autoencoder")]
    assert cli(*own, none, f"model.latent.autoencoder_run={second}", "hydra.run.dir=given") == 0
    assert record(runs / "given")["model"]["autoencoder"]["run"] == second.name
    shutil.rmtree(second)


def test_a_run_folder_is_self_contained(runs: Path, cli: Cli) -> None:
    (stage,) = stages(runs)
    shutil.move(stage, runs / "elsewhere")
    try:
        assert cli("task=evaluate", "run_dir=ldm", "model.sampler.num_steps=2") == 0
        assert cli("task=visualize", "run_dir=ldm") == 0
        assert cli("resume=ldm", "budget.steps=3") == 0
        assert record(runs / "ldm")["training"]["steps"] == 3
    finally:
        shutil.move(runs / "elsewhere", stage)


def test_an_autoencoder_is_a_run_like_any_other(runs: Path, cli: Cli) -> None:
    (stage,) = stages(runs)
    assert cli("task=export", f"run_dir={stage}") == 0
    assert cli(f"resume={stage}", "budget.steps=3") == 0


def name(*words: str) -> str:
    """Return the name of the folder where the autoencoder would be trained."""
    cfg = compose(*LDM, *words)
    OmegaConf.set_struct(cfg, False)
    cfg.choices = {"data": "digits", "debug": None, AUTOENCODER_GROUP: "autoencoder"}
    return autoencoder_folder(autoencoder_config(cfg), build_data(cfg)).name


def test_other_data_or_budget_train_another_autoencoder(runs: Path) -> None:
    first = name()
    same = ["model/schedule=linear", "budget.steps=7", "evaluation.num_images=200", "trainer.accelerator=cpu"]
    assert name(*same) == first
    names = {
        name(w)
        for w in ("data.train_subset_size=16", "seed=3", "model.latent.budget.steps=4", "trainer.global_batch_size=8")
    }
    assert len(names | {first}) == 5


def test_a_guide_on_other_latents_raises_an_error(runs: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    (stage,) = stages(runs)
    assert cli(*LDM, "model.latent.budget.steps=2", "evaluation.checkpoints=[]", "hydra.run.dir=stranger") == 0
    capsys.readouterr()
    guided = ["task=sample", "run_dir=ldm", "num_images=2", "model/guidance=auto"]
    assert cli(*guided, "model.guidance.weak.run=stranger") == 1
    assert "the latents of another autoencoder" in capsys.readouterr().err
    assert cli(*guided, "model.guidance.weak.run=ldm") == 0
    shutil.rmtree(next(iter(set(stages(runs)) - {stage})))


def test_the_same_command_resumes_an_interrupted_autoencoder(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*LDM, "evaluation.checkpoints=[]", "hydra.run.dir=ldm"]
    with monkeypatch.context() as patch:
        original = TrainingClock.on_train_batch_start

        def start(self: TrainingClock, *args: Any) -> None:
            original(self, *args)
            if self.step == 1:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(TrainingClock, "on_train_batch_start", start)
        assert cli(*words) == 128 + signal.SIGTERM
    assert "Repeat the command to resume" in capsys.readouterr().out
    (stage,) = stages(tmp_path)
    assert record(stage)["state"] == "interrupted" and not (tmp_path / "ldm" / "record.json").exists()
    assert cli(*words) == 0
    assert stages(tmp_path) == [stage] and record(stage)["training"]["steps"] == 3
    assert record(tmp_path / "ldm")["state"] == "finished"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.latent.autoencoder_run=nowhere"], "nowhere is not a run folder"),
        (["model.latent.autoencoder_run=ldm"], "not an autoencoder"),
        (["model.latent.autoencoder.encoder.channel_mult=[1,1,1,1,1]"], "halved 4 times"),
        (["+data/condition=low_res"], "model/latent=null"),
        (["budget.steps=0"], "must be positive"),
        (["data=toy2d", "model.latent.autoencoder.perceptual=null"], "cannot be halved"),
    ],
)
def test_incompatible_settings_raise_an_error(
    overrides: list[str], message: str, runs: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*LDM, *overrides, "hydra.run.dir=refused") == 1
    assert message in capsys.readouterr().err
    assert not (runs / "refused" / "record.json").exists()


def test_a_sigma_data_that_does_not_fit_whitened_latents_is_reported() -> None:
    words = ["model=edm", "model/latent=autoencoder", "data=digits", "model.latent.autoencoder.perceptual=null"]
    with pytest.warns(UserWarning, match=r"sigma_data=0.5.*use model\.parameterization\.sigma_data=1"):
        build_model(compose(*words), Digits())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_model(compose(*words, "model.parameterization.sigma_data=1"), Digits())
        build_model(compose("model=ldm", *words[2:]), Digits())


@pytest.mark.parametrize("how", ["resume=ldm", "task=evaluate run_dir=ldm", "task=sample run_dir=ldm"])
@pytest.mark.parametrize("word", ["model.latent.autoencoder_run=elsewhere", "model.latent.budget.steps=4"])
def test_a_trained_model_keeps_its_autoencoder(
    how: str, word: str, runs: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (runs / "ldm" / "record.json").read_text()
    assert cli(*how.split(), word) == 1
    assert "was trained with a different model.latent" in capsys.readouterr().err
    assert (runs / "ldm" / "record.json").read_text() == before


def test_an_autoencoder_of_other_data_raises_an_error(
    runs: Path, cli: Cli, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stage,) = stages(runs)
    words = [f"model.latent.autoencoder_run={stage}", "data=mnist", f"paths.data={data_root}"]
    assert cli(*LDM, *words, "hydra.run.dir=refused") == 1
    error = capsys.readouterr().err
    assert "was trained on 'digits' data of shape 1x8x8, not on 'mnist' data of shape 1x32x32" in error


def test_the_autoencoder_name_depends_on_the_content_of_perceptual_weights(tmp_path: Path) -> None:
    def key(file: str, content: str) -> str:
        (tmp_path / file).write_text(content)
        return name(f"model.latent.autoencoder.perceptual.weights={tmp_path / file}")

    one = key("a.safetensors", "one")
    assert key("b.safetensors", "one") == one != key("a.safetensors", "two")


@pytest.mark.parametrize("state", ["interrupted", "failed", "running"])
def test_an_unfinished_autoencoder_raises_an_error(
    runs: Path, cli: Cli, tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (stage, *_) = stages(runs)
    shutil.copytree(stage, tmp_path / "stage")
    (tmp_path / "stage" / "record.json").write_text(json.dumps(record(stage) | {"state": state, "sha256": None}))
    assert (
        cli("model=ldm", *QUICK, *SMALL, f"model.latent.autoencoder_run={tmp_path / 'stage'}", "hydra.run.dir=early")
        == 1
    )
    error = capsys.readouterr().err
    assert "did not finish" in error and f"resume={tmp_path / 'stage'}" in error
    assert not (Path("early") / "record.json").exists()


def write_digits(folder: Path, *, mirrored: bool) -> None:
    """Write 300 digits as PNG files, enlarged to 16x16, the minimum for SSIM."""
    images = next(Digits().batches("train", 300))[0]
    for k, image in enumerate(images.flip(3) if mirrored else images):
        levels = ((image.numpy() + 1) * 127.5).round().astype(np.uint8)
        save_png(to_image(levels.repeat(2, axis=1).repeat(2, axis=2)), folder / f"{k:03d}.png")


def test_an_autoencoder_is_used_with_its_images_at_any_location(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_digits(Path("here/scans"), mirrored=False)
    write_digits(Path("others/scans"), mirrored=True)
    words = [
        *QUICK[1:-1],
        "evaluation.protocol.num_likelihood_images=90",
        "data=image_folder",
        "data.test_fraction=0.3",
    ]
    first = ["model=autoencoder", "model/perceptual=null", "model.encoder.channels=8", "hydra.run.dir=first"]
    assert cli(*first, *words, "data.root=here/scans") == 0
    Path("here").rename("there")
    second = ["model=ldm", *SMALL, *words, "evaluation.checkpoints=[last]", "model.latent.autoencoder_run=first"]
    assert cli(*second, "data.root=there/scans", "hydra.run.dir=moved") == 0

    metrics = record(Path("moved"))["results"][0]["metrics"]
    run = load_run("moved")
    x, cond = next(run.data.batches("test"))
    again = run.model.autoencoder().reconstruct(x, cond, generator=torch.Generator())  # type: ignore[union-attr]
    levels, rebuilt = ((images.clamp(-1, 1) * 127.5 + 127.5).round() for images in (x, again))
    psnr = 10 * torch.log10(255**2 / (levels - rebuilt).square().mean())
    assert len(x) == 90 and metrics["psnr"]["value"] == pytest.approx(float(psnr), abs=0.02)
    assert "too few for 128 features" in metrics["rfd_fashion_mnist"]["note"] and 0 < metrics["ssim"]["value"] < 1
    assert all(metrics[name]["note"].startswith("reconstruction") for name in ("psnr", "ssim", "rfd_fashion_mnist"))

    capsys.readouterr()
    assert cli(*second, "data.root=others/scans", "hydra.run.dir=refused") == 1
    error = capsys.readouterr().err
    assert "trained on 'image_folder_scans' data of shape 1x16x16, not on these images of the same name" in error
    assert not Path("refused/record.json").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_an_autoencoder_with_a_corrupted_checkpoint_is_trained_again(
    runs: Path, cli: Cli, tmp_path: Path, capsys: Any, kept: bool
) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    stage = stages(tmp_path)[0]
    last = stage / "checkpoints" / "last.ckpt"
    weights = torch.load(last, weights_only=True)["state_dict"]
    if kept:  # as if a checkpoint of an earlier step had been kept
        shutil.copy(last, stage / "checkpoints" / "step_00000003.ckpt")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    code = cli(*LDM, f"paths.runs={tmp_path / 'runs'}", f"hydra.run.dir={tmp_path / 'ldm'}")
    printed = capsys.readouterr()
    assert "last.ckpt is corrupted" in printed.out
    if kept:
        assert code == 0, printed.err
        assert "resuming from step_00000003.ckpt" in printed.out
        again = torch.load(last, weights_only=True)["state_dict"]
        assert all(torch.equal(value, again[name]) for name, value in weights.items())
    else:
        assert code == 1 and f"delete {stage}" in printed.err
