"""The command line: training, resuming, other tasks, and invalid input."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import gencompare
from checkpoints import assert_same_training, checkpoint
from composing import options
from forking import Forked
from gencompare.files import file_lock
from gencompare.tasks import evaluate_run as evaluate_task
from gencompare.training.clock import TrainingClock
from parts import slow_if

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
SIGNALS_BY_FAMILY = {"gaussian": SIGNALS[:1], "vae": SIGNALS, "gan": SIGNALS, "ddpm": SIGNALS[1:]}
"""One family for each kind of optimisation; test_contract.py tests that every family resumes exactly."""
QUICK = [
    "data=digits", "trainer=cpu", "logger=csv", "trainer.global_batch_size=16", "budget.images=null",
    "callbacks.evaluation.num_grid_images=4", "callbacks.evaluation.num_samples=0",
    "callbacks.metric_logger.log_every_n_steps=1", "callbacks.progress_bar=null",
    "evaluation.num_images=100", "evaluation.extractors=[classifier]", "evaluation.protocol.num_likelihood_images=20",
]  # fmt: skip
Cli = Callable[..., int]


def in_step_3(patch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Call ``act`` when the third step begins."""
    original = TrainingClock.on_train_batch_start

    def start(self: TrainingClock, *args: Any) -> None:
        original(self, *args)
        if self.step == 2:
            act()

    patch.setattr(TrainingClock, "on_train_batch_start", start)


@pytest.mark.parametrize("family", slow_if({"vae", "gan"}, SIGNALS_BY_FAMILY))
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(
    family: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    overrides = [
        f"model={family}",
        "debug=fast",
        *QUICK,
        "budget.steps=6",
        "evaluation.checkpoints=[]",
        "callbacks.evaluation.num_evaluations=0",
    ]
    assert cli(*overrides, "hydra.run.dir=whole") == 0
    steps = checkpoint(tmp_path / "whole")["callbacks"]["TrainingClock"]["step"]
    for number in SIGNALS_BY_FAMILY[family]:
        name = number.name
        if number == signal.SIGKILL:
            kill = partial(in_step_3, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
            saving = "callbacks.checkpoints.every_minutes=0"
            process = Forked(tmp_path, *overrides, saving, f"hydra.run.dir={name}", first=kill)
            assert process.wait(timeout=100) == -number
            assert checkpoint(tmp_path / name)["callbacks"]["TrainingClock"]["step"] == 2
        else:
            with monkeypatch.context() as patch:
                in_step_3(patch, partial(signal.raise_signal, number))
                code = cli(*overrides, f"hydra.run.dir={name}")
            # A model that is fitted in closed form finishes before the third step.
            assert code == (128 + number if steps > 2 else 0)
            if code:
                assert "resume=" in capsys.readouterr().out
                assert json.loads((tmp_path / name / "record.json").read_text())["state"] == "interrupted"
                assert checkpoint(tmp_path / name)["callbacks"]["TrainingClock"]["step"] == 3
        assert cli(f"resume={name}", "callbacks.checkpoints.every_minutes=2") == 0
        assert_same_training(tmp_path / "whole", tmp_path / name)
        record = json.loads((tmp_path / name / "record.json").read_text())
        assert record["state"] == "finished" and "resume" not in record["config"], (
            "the folder is not part of the config"
        )
        rows = (tmp_path / name / "curve.csv").read_text().splitlines()[1:]
        assert [row.split(",")[0] for row in rows] == [str(k) for k in range(1, steps + 1)], "each step runs once"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a trained DDPM in ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    run = Forked(
        folder, "model=ddpm", *QUICK, "budget.steps=3", "model/sampler=ddim", "model.sampler.num_steps=4",
        "callbacks.evaluation.num_evaluations=1", "evaluation.checkpoints=[last]", "hydra.run.dir=run",
    )  # fmt: skip
    assert run.wait(timeout=280) == 0, run.output()[-4000:]
    assert "page with images" in run.output() and "FD digits" in run.output()
    return folder


def test_the_record_contains_all_that_a_comparison_needs(trained: Path) -> None:
    record = json.loads((trained / "run" / "record.json").read_text())
    assert record["state"] == "finished" and record["family"] == "ddpm"
    assert record["training"]["images_seen"] == 48 and record["training"]["flops_per_image"] > 1e6
    assert record["training"]["flops_per_second"] == record["training"]["flops"] / record["training"]["seconds"]
    assert 0 < record["training"]["mfu"] < 1.2
    assert record["environment"]["packages"]["torch"] and record["data"]["hash"]
    (result,) = record["results"]
    assert result["measurement"]["extractor_hash"] and result["measurement"]["reference_hash"]
    assert result["generation"]["nfe"] == {"network": 4} and result["generation"]["weights"] == "ema"
    assert result["metrics"]["fd_digits"]["baseline"] > 0
    assert "Users" not in json.dumps(record["environment"]) and str(Path.home()) not in json.dumps(
        record["environment"]
    )


def test_evaluation_with_another_sampler_adds_a_result_without_training(
    trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    before = checkpoint(trained / "run")["state_dict"]
    assert cli("task=evaluate", "run_dir=run", "model/sampler=ancestral", "model.sampler.num_steps=3") == 0
    record = json.loads((trained / "run" / "record.json").read_text())
    assert [r["generation"]["nfe"]["network"] for r in record["results"]] == [4, 3]
    assert record["results"][0]["measurement"] == record["results"][1]["measurement"]
    # Repeating the evaluation gives the same metrics, and replaces the result.
    assert cli("task=evaluate", "run_dir=run", "model/sampler=ancestral", "model.sampler.num_steps=3") == 0
    again = json.loads((trained / "run" / "record.json").read_text())
    assert len(again["results"]) == 2
    for name, metric in record["results"][1]["metrics"].items():
        assert again["results"][1]["metrics"][name]["value"] == metric["value"], name
    after = checkpoint(trained / "run")["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_interpolated_values_follow_overrides_in_a_run_folder_too(trained: Path, cli: Cli, tmp_path: Path) -> None:
    """evaluation.protocol.num_images refers to evaluation.num_images, but the stored config contains only its value."""
    shutil.copytree(trained / "run", tmp_path / "copy")
    overrides = ["task=evaluate", "run_dir=copy", "model/sampler=ddim", "model.sampler.num_steps=2"]
    assert cli(*overrides, "evaluation.num_images=110") == 0
    record = json.loads((tmp_path / "copy" / "record.json").read_text())
    assert record["results"][-1]["measurement"]["num_images"] == 110


def test_version_prints_the_version_of_this_package(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    cli("--version")
    assert capsys.readouterr().out == f"gencompare {gencompare.__version__}\n"


def test_a_group_can_be_set_to_null_on_the_command_line(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("model=ldm", "model/latent=null", "model/guidance=null", "--cfg", "job") == 0
    assert "autoencoder" not in capsys.readouterr().out
    assert cli("experiment=null", "debug=null", "--cfg", "job") == 0


def test_a_run_folder_can_be_moved(trained: Path, tmp_path: Path) -> None:
    import gencompare

    shutil.copytree(trained / "run", tmp_path / "moved")
    run = gencompare.load_run(tmp_path / "moved")
    x = run.model.sample(2, generator=torch.Generator().manual_seed(0))  # type: ignore[operator]
    assert x.shape == (2, 1, 8, 8) and run.record.family == "ddpm"


def test_the_config_of_a_run_folder_is_printed(trained: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    """The options that the folder adds to the command line must not stand behind a flag."""
    for flags in (
        ["--cfg", "job", "task=evaluate", f"run_dir={trained / 'run'}"],
        [f"run_dir={trained / 'run'}", "--cfg", "job"],
    ):
        assert cli(*flags) == 0
        assert "family: " in capsys.readouterr().out


@pytest.mark.parametrize("form", ["png", "npz"])
def test_samples_are_written_to_files(form: str, trained: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("task=sample", f"run_dir={trained / 'run'}", "num_images=5", f"task.format={form}", "task.out=out") == 0
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 8
    if form == "png":
        assert [np.asarray(Image.open(tmp_path / "out" / f"{k:06d}.png")).shape for k in range(5)] == [(8, 8)] * 5
    else:
        assert np.load(tmp_path / "out" / "samples.npz", allow_pickle=False)["arr_0"].shape == (5, 8, 8, 1)


def test_runs_are_compared_and_exported(trained: Path, cli: Cli, tmp_path: Path, capsys: Any) -> None:
    assert cli("task=compare", f"runs={trained}/*", "task.out=cmp") == 0
    assert "ddpm" in capsys.readouterr().out and (tmp_path / "cmp" / "compare.html").stat().st_size > 1000
    assert cli("task=export", f"run_dir={trained / 'run'}", "task.out=w.safetensors") == 0
    from safetensors.torch import load_file

    assert load_file(tmp_path / "w.safetensors").keys() == checkpoint(trained / "run")["state_dict"].keys()


def test_a_sweep_ends_with_a_comparison_despite_failed_jobs(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    code = cli(
        "-m", "model=vae,gan", "model.latent_dim=0,4", *QUICK, "budget.steps=2",
        "callbacks.evaluation.num_evaluations=0", "evaluation.checkpoints=[last]", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert code == 1
    printed = capsys.readouterr()
    assert printed.err.count("latent_dim=0") == 2
    states = [json.loads(path.read_text())["state"] for path in (tmp_path / "sweep").glob("*/record.json")]
    assert sorted(states) == ["failed", "failed", "finished", "finished"]
    assert (tmp_path / "sweep" / "compare.html").is_file()


# Invalid input is reported before any training, in one line that names the cause and the fix.


def error_line(capsys: Any) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["modle=ddpm"], 2, "Did you mean model?"),
        (["model=dpdm"], 2, "ddpm"),
        (["model.optimiser.lr=1"], 2, "Did you mean model.optimizer?"),
        (["evaluation.samplers={fast: {num_steps: 5}}"], 2, "'++evaluation.samplers={...}'"),
        (["-m", "model=vdm,flow", "model.sampler.stpes=3"], 2, "model.sampler has num_steps"),
        (["model.guidance.scale=3"], 2, "add model/guidance=auto|classifier|classifier_free"),
        (["seed.x=3"], 2, "seed is 0"),
        (["evaluation=null"], 1, "evaluation.checkpoints=[] trains without an evaluation at the end"),
        (["model=vae", "trainer=null"], 1, "trainer=null: choose one of auto, cpu, ddp, fsdp, gpu."),
        (["budget.images=0"], 1, "budget.images=0"),
        pytest.param(
            ["trainer=gpu"], 1, "Use trainer=cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
        (["data=toy2d", "model=vae", "model.conditional=maybe"], 1, ""),
        (["evaluation.num_images=10"], 1, "evaluation.num_images=10"),
        (["model.sampler.num_steps=0"], 1, "sampler.num_steps=0"),
        (["model=vae", "model.latent_dim=0"], 1, "latent_dim=0"),
        (["model.network.channel_mult=[1,2,2,2,2]"], 1, "channel_mult"),
        (["data=eurosat64", "paths.data=nowhere"], 1, "eurosat64.zip"),
        (["data=image_folder", "data.root=nowhere"], 1, "nowhere"),
        (["trainer.global_batch_size=0"], 1, "batch"),
        (["evaluation=inception", "evaluation.weights=nowhere.pth", "evaluation.num_images=3000"], 1, "nowhere.pth"),
        (["task=evaluate"], 1, "run_dir=DIR"),
        (["task=evaluate", "run_dir=nowhere"], 1, "nowhere"),
        (["resume=nowhere"], 1, "nowhere"),
        (["task=compare"], 1, "runs="),
        (["task=compare", "runs=nowhere/*"], 1, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_invalid_input(overrides: list[str], code: int, message: str, cli: Cli, tmp_path: Path, capsys: Any) -> None:
    assert cli(*overrides, "logger=csv") == code
    assert message in error_line(capsys)
    assert not list(tmp_path.rglob("*.ckpt")), "nothing is trained"


def test_a_conditional_model_of_data_without_labels_is_refused(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    for k in range(300):
        Image.fromarray(np.full((8, 8), k % 256, np.uint8)).save(_make_folder(tmp_path / "images") / f"{k}.png")
    assert cli("data=image_folder", "data.root=images", "model.conditional=true", "logger=csv") == 1
    assert "labels" in error_line(capsys)


def test_a_checkpoint_of_another_model_is_refused(trained: Path, cli: Cli, capsys: Any) -> None:
    assert cli("task=evaluate", f"run_dir={trained / 'run'}", "model=vae") == 1
    assert "ddpm" in error_line(capsys)
    assert cli("task=evaluate", f"run_dir={trained / 'run'}", "model.network.channels=8") == 1
    assert "not a checkpoint of the model" in error_line(capsys)


def test_a_damaged_checkpoint_is_refused(trained: Path, cli: Cli, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    assert cli("task=evaluate", "run_dir=run") == 1
    assert "last.ckpt" in error_line(capsys)


def test_a_checkpoint_with_code_is_refused(trained: Path, cli: Cli, tmp_path: Path, capsys: Any) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "created"),))

    shutil.copytree(trained / "run", tmp_path / "run")
    torch.save({"state_dict": {}, "x": Malicious()}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert cli("task=evaluate", "run_dir=run") == 1
    assert "last.ckpt" in error_line(capsys) and not (tmp_path / "created").exists()


def test_a_run_is_not_overwritten(trained: Path, cli: Cli, capsys: Any) -> None:
    before = (trained / "run" / "record.json").read_bytes()
    assert cli("model=vae", *QUICK, f"hydra.run.dir={trained / 'run'}") == 1
    assert "resume=" in error_line(capsys)
    assert (trained / "run" / "record.json").read_bytes() == before


def test_the_installed_command_is_main() -> None:
    from importlib.metadata import entry_points

    from gencompare.tasks.main import main

    (command,) = entry_points(group="console_scripts", name="gencompare")
    assert command.load() is main


def test_a_folder_that_another_process_uses_is_refused(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "busy").mkdir()
    with file_lock(tmp_path / "busy" / ".lock"):
        assert cli("model=vae", *QUICK, "budget.steps=1", "hydra.run.dir=busy") == 1
    assert "Another process is using" in error_line(capsys)
    assert not (tmp_path / "busy" / "record.json").exists()


def test_a_failure_outside_of_training_is_recorded(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    overrides = ["model=gaussian", *QUICK, "budget.steps=1", "hydra.run.dir=run"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_task, "evaluate", lambda *args, **kwargs: 1 / 0)
        assert cli(*overrides) == 1
    assert json.loads((tmp_path / "run" / "record.json").read_text())["state"] == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_task, "evaluate", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
        assert cli("resume=run") == 128 + signal.SIGTERM
    assert "resume=" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "record.json").read_text())["state"] == "interrupted"
    assert cli("resume=run") == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["state"] == "finished"


def test_points_in_the_plane_are_trained_and_evaluated(cli: Cli, tmp_path: Path) -> None:
    other = ("data=digits", "evaluation.num_images=", "evaluation.extractors")
    overrides = [
        *(override for override in QUICK if not override.startswith(other)),
        "budget.steps=1",
        "evaluation.num_images=300",
    ]
    assert cli("model=gaussian", "data=toy2d", *overrides, "hydra.run.dir=run") == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["state"] == "finished" and (tmp_path / "run" / record["results"][0]["images"]["samples"]).exists()


def test_metrics_are_validated_on_degraded_images(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    overrides = ["task=validate_metrics", "data=digits", "task.num_images=[60]", "task.num_reference_images=200"]
    assert cli(*overrides, "evaluation.extractors=[classifier]", "hydra.run.dir=run") == 0
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())["scores"]
    names = {score["metric"] for score in scores}
    assert {"digits: cubic kernel", "digits: MMD, b = 1 x median", "digits: 1 - coverage"} <= names
    assert all(0 < score["right"] <= score["pairs"] for score in scores)
    assert (tmp_path / "run" / "metrics.md").read_text().startswith("| metric | n | pairs right |")
    assert (tmp_path / "run" / "metrics.png").stat().st_size > 10_000
    capsys.readouterr()
    assert cli("task=validate_metrics", "data=toy2d", "hydra.run.dir=points") == 1
    assert "has points" in error_line(capsys)


def test_metrics_are_scored_on_known_faults(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    overrides = ["data=exact_ising", "data.num_images=60", "task.num_images=[20]", "task.num_real_images=60"]
    assert cli("task=measure_metrics", "evaluation=pixels", *overrides, "hydra.run.dir=run") == 0
    found = json.loads((tmp_path / "run" / "study.json").read_text())
    (study,) = found["studies"]
    assert study["extractor"] == "pixels" and len(study["cells"]) == len(found["truths"]) == 25
    assert {"mmd", "kd", "fd", "coverage", "memorization"} <= study["real"]["20"].keys()
    assert all(len(values) == 3 for values in study["real"]["20"].values())
    assert "| pixels | 20 | mmd |" in (tmp_path / "run" / "scores.md").read_text()
    capsys.readouterr()
    for data, message in (("digits", "needs a known distribution"), ("exact_ising", "at least 3 sets")):
        assert cli("task=measure_metrics", f"data={data}", "task.num_real_images=900", "hydra.run.dir=other") == 1
        assert message in error_line(capsys)


@pytest.mark.parametrize("preset", slow_if({"profile"}, options("debug")))
def test_every_debug_preset_runs(preset: str, cli: Cli, tmp_path: Path) -> None:
    overrides = ["model=vae", f"debug={preset}", "budget.steps=2", "trainer.accelerator=cpu", "logger=csv"]
    assert cli(*overrides, "evaluation.num_images=100", "evaluation.checkpoints=[last]", "hydra.run.dir=run") == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["results"]
    assert preset != "profile" or list((tmp_path / "run").glob("*profile*"))


# Images and weights from other programs


def test_external_images_are_evaluated_and_compared(trained: Path, cli: Cli, tmp_path: Path, capsys: Any) -> None:
    assert cli("task=sample", f"run_dir={trained / 'run'}", "num_images=120", "task.out=images") == 0
    assert cli("task=sample", f"run_dir={trained / 'run'}", "num_images=120", "task.out=array", "task.format=npz") == 0
    (tmp_path / "images" / "grid.png").unlink()
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "images")
    for k, place in enumerate(("images", "packed.zip", "array/samples.npz")):
        overrides = [
            "task=evaluate",
            "evaluation.num_images=100",
            "evaluation.extractors=[classifier]",
            f"samples={place}",
        ]
        assert cli(*overrides, "name=external", f"hydra.run.dir=runs/{k}") == 0
    records = [json.loads((tmp_path / "runs" / str(k) / "record.json").read_text()) for k in range(3)]
    assert all(record["state"] == "samples" and record["name"] == "external" for record in records)
    distances = [record["results"][0]["metrics"]["fd_digits"]["value"] for record in records]
    assert distances[0] == distances[1] == distances[2]
    shutil.copytree(trained / "run", tmp_path / "runs" / "ours")
    capsys.readouterr()
    assert cli("task=compare", "runs='runs/*'", "task.out=page") == 0
    assert "external" in capsys.readouterr().out


def test_exported_weights_are_evaluated_like_their_run(trained: Path, cli: Cli, tmp_path: Path, capsys: Any) -> None:
    """The weights that task=export writes give the same metrics as the run."""
    sampler = ["model/sampler=ddim", "model.sampler.num_steps=4"]
    overrides = ["task=evaluate", "model=ddpm", *sampler, *QUICK, "name=published"]
    assert cli("task=export", f"run_dir={trained / 'run'}", "task.out=weights.safetensors") == 0
    assert cli(*overrides, "pretrained=weights.safetensors", "hydra.run.dir=runs/published") == 0
    published = json.loads((tmp_path / "runs" / "published" / "record.json").read_text())
    original = json.loads((trained / "run" / "record.json").read_text())
    found, expected = (
        next(r for r in x["results"] if r["measurement"]["num_images"] == 100) for x in (published, original)
    )
    assert found["metrics"]["fd_digits"]["value"] == pytest.approx(expected["metrics"]["fd_digits"]["value"], rel=1e-6)
    assert found["generation"]["weights"] == "as published" and published["family"] == "ddpm"
    for path, message in (
        ("nowhere", "no file or folder nowhere"),
        ("weights.safetensors", "not a checkpoint of the model"),
    ):
        family = "model=ddpm" if path == "nowhere" else "model=gan"
        assert cli("task=evaluate", family, *QUICK, f"pretrained={path}", "hydra.run.dir=runs/x") == 1
        assert message in error_line(capsys)


def test_a_published_ddpm_of_diffusers_is_evaluated(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
        norm_num_groups=8,
    )  # fmt: skip
    network.save_pretrained(tmp_path / "published" / "unet")
    overrides = ["model.network.channels=16", "model.network.attention_resolutions=[8]", "model.sampler.num_steps=2"]
    assert cli("task=evaluate", "model=ddpm", *QUICK, *overrides, "pretrained=published", "hydra.run.dir=run") == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["model"]["parameters"] == sum(p.numel() for p in network.parameters())

    requested = []

    def download(name: str, **_: Any) -> str:
        requested.append(name)
        if name == "someone/ddpm":
            return str(tmp_path / "published")
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub = ["task=evaluate", "model=ddpm", *QUICK, *overrides]
    assert cli(*hub, "pretrained=someone/ddpm", "hydra.run.dir=hub") == 0
    assert json.loads((tmp_path / "hub" / "record.json").read_text())["name"] == "ddpm"
    assert cli(*hub, "pretrained=someone/else", "hydra.run.dir=other") == 1
    error = error_line(capsys)
    assert "no file someone/else" in error and "no network" in error and "pretrained=DIR" in error
    assert requested == ["someone/ddpm", "someone/else"]


def test_a_ddpm_is_exported_to_diffusers_and_imported_again(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    """The run has v prediction and the linear schedule, unlike model=ddpm, which the import must detect."""
    overrides = [
        "model=ddpm",
        *QUICK,
        "budget.steps=3",
        "callbacks.evaluation.num_evaluations=0",
        "model.sampler.num_steps=3",
    ]
    own, small = ["model/schedule=linear", "model/parameterization=v"], "model.network.channels=8"
    assert cli(*overrides, *own, small, "evaluation.checkpoints=[last]", "hydra.run.dir=run") == 0
    assert cli("task=export", "run_dir=run", "format=diffusers", "task.out=exported") == 0
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "exported")
    run = gencompare.load_run(tmp_path / "run")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 731])
    with torch.no_grad():
        expected, got = run.model.network(x, t.float(), {}), pipeline.unet(x, t).sample
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    bar = run.model.schedule.at(run.model.schedule.discrete_times).alpha ** 2
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, bar, rtol=1e-4, atol=1e-7)

    back = ["task=evaluate", *QUICK, "model.sampler.num_steps=3", "pretrained=exported", "hydra.run.dir=back"]
    assert cli(*back) == 1
    assert "use experiment=NAME" in (error := error_line(capsys)) and "model.network" in error
    assert cli(*back, small) == 1
    advised = error_line(capsys).split(" Add ")[1].split()
    assert set(own) <= set(advised)
    assert cli(*back, small, *advised) == 0
    values = [
        json.loads((tmp_path / name / "record.json").read_text())["results"][0]["metrics"]["fd_digits"]["value"]
        for name in ("run", "back")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert cli(*overrides[:-1], small, "model/sampler=ddim", "model.conditional=true", "hydra.run.dir=labels") == 0
    assert cli("task=export", "run_dir=labels", "format=diffusers") == 1
    assert "no counterpart for conditions.label" in error_line(capsys)
    assert cli("task=export", "run_dir=run", "format=onnx") == 1
    assert "choose from safetensors, diffusers, hub" in error_line(capsys)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), "no PNG"),
        (lambda p: None, "There is no"),
        (lambda p: p.with_suffix(".zip").write_bytes(b"PK"), "zip"),
        (
            lambda p: np.savez(p.with_suffix(".npz"), arr_0=np.eye(192, dtype=np.uint8).reshape(-1, 8, 8, 3)),
            "3 channels",
        ),
        (lambda p: np.savez(p.with_suffix(".npz"), arr_0=np.zeros((9, 8, 8, 1), np.float32)), "float32"),
        (lambda p: np.savez(p.with_suffix(".npz"), x=np.zeros(3)), "arr_0"),
        (lambda p: p.with_suffix(".npz").write_bytes(b"PK\3\4 cut short"), "corrupted"),
        (lambda p: np.savez(p.with_suffix(".npz"), arr_0=np.zeros((99, 8, 8, 1), np.uint8)), "99"),
        (lambda p: np.savez(p.with_suffix(".npz"), arr_0=np.array([{}], dtype=object)), "corrupted"),
    ],
)
def test_invalid_external_images_are_refused(make: Any, message: str, cli: Cli, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "images"
    make(path)
    path = next((p for p in (path.with_suffix(".npz"), path.with_suffix(".zip")) if p.exists()), path)
    assert cli("task=evaluate", "evaluation.num_images=100", f"samples={path}", "name=x", "hydra.run.dir=run") == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gencompare.errors import UserError
    from gencompare.files import write_text

    target = tmp_path / "record.json"
    write_text(target, "old")

    def full(descriptor: int, mode: str) -> Any:
        os.close(descriptor)
        return open("/dev/full", mode)

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(UserError, match="No space left on the disk"):
        write_text(target, "new" * 10_000)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_folder_that_cannot_be_written_is_named(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert cli("model=vae", *QUICK, "hydra.run.dir=file/run") == 1
    assert "file" in error_line(capsys)


def _make_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_one_training_is_evaluated_with_several_samplers(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    ddim = "{_target_: gencompare.diffusion.samplers.DDIM, num_steps: 4, eta: 0.0}"
    overrides = [
        "model=ddpm",
        *QUICK,
        "budget.steps=2",
        "callbacks.evaluation.num_evaluations=0",
        "evaluation.checkpoints=[last]",
    ]
    samplers = f"+evaluation.samplers={{fast: {{num_steps: 3}}, other: {ddim}}}"
    assert cli(*overrides, "model.sampler.num_steps=5", samplers, "hydra.run.dir=run") == 0
    results = json.loads((tmp_path / "run" / "record.json").read_text())["results"]
    assert [(r["generation"]["sampler"].split(",")[0], r["generation"]["nfe"]["network"]) for r in results] == [
        ("Ancestral", 5), ("Ancestral", 3), ("DDIM", 4),
    ]  # fmt: skip
    assert cli("model=vae", *overrides[1:], "+evaluation.samplers={fast: {num_steps: 3}}", "hydra.run.dir=vae") == 1
    assert "VAE has no sampler" in capsys.readouterr().err
