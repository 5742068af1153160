"""Conditions other than the label: in data sets, training, guidance, evaluation and records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gencompare.data.conditions import ConditionedData, Embedding, LowRes
from gencompare.data.datamodule import ImageData, TrainStream
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.model_metrics import super_resolution, with_low_res
from gencompare.evaluation.sampling import choose_conditions, draw_samples
from gencompare.generative_model import Cond, DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.models.gaussian import GaussianBaseline
from gencompare.networks.mlp import DenoisingMLP
from gencompare.rng import RandomSource, generator
from gencompare.tasks.evaluate_run import samples_key
from gencompare.tasks.runs.run_config import load as load_config
from parts import part

Cli = Callable[..., int]


def small(flip: bool = False) -> ConditionedData:
    return ConditionedData(Digits(batch_size=8, random_flip=flip), {"low_res": LowRes(2)})


def one_hot(path: Path, data: ImageData, **changes: int) -> str:
    """Store one-hot labels as embeddings in ``path``; ``changes`` gives the number of missing embeddings per split."""
    rows = {}
    for name in ("train", "val", "test"):
        labels = data.split(name).labels
        assert labels is not None
        rows[name] = torch.eye(10)[labels][: len(labels) - changes.get(name, 0)]
    if path.suffix == ".safetensors":
        save_file(rows, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in rows.items()})
    else:
        for name, value in rows.items():
            np.save(str(path).replace("{split}", name), value.numpy())
    return str(path)


# Data


def test_low_res_is_antialiased_and_preserves_smooth_images() -> None:
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1  # the highest frequency
    flat = torch.full((1, 3, 16, 16), 0.3)
    low_res = LowRes(4).compute(checks.expand(1, 3, 16, 16))
    assert low_res.shape == (1, 3, 4, 4) and low_res.abs().max() < 0.02
    for shift in range(4):
        stripes = ((torch.arange(32) + shift) // 2 % 2 * 2.0 - 1).expand(1, 1, 32, 32)
        assert LowRes(4).compute(stripes)[..., 1:-1].abs().max() < 0.1, "also above the Nyquist frequency, at any phase"
    torch.testing.assert_close(LowRes(4).compute(flat), torch.full((1, 3, 4, 4), 0.3))
    ramp = torch.linspace(-0.9, 0.9, 64).expand(1, 1, 64, 64)
    torch.testing.assert_close(
        LowRes(2).compute(ramp)[..., 4:-4], ramp.unflatten(3, (32, 2)).mean(4)[:, :, ::2][..., 4:-4]
    )


def test_conditions_match_their_images(tmp_path: Path) -> None:
    """Conditions match in the shuffled and flipped training stream, and in every split or union of splits."""
    path = one_hot(tmp_path / "e.npz", Digits())
    digits = Digits(batch_size=64, random_flip=True)
    data = ConditionedData(digits, {"low_res": LowRes(2), "embedding": Embedding(path)})
    assert dict(data.spec.conditions) == {"low_res": (1, 4, 4), "embedding": (10,)}
    streams = [
        TrainStream(data, start_step=s, rank=r, world_size=2, device=torch.device("cpu"))
        for s in (0, 3)
        for r in (0, 1)
    ]
    batches = [batch for stream in streams for batch in islice(stream, 3)]
    batches += [*data.batches("val", 40), *data.batches("train+test", 700)]
    assert sum(len(x) for x, _ in batches) > 1800
    for x, cond in batches:
        assert torch.equal(cond["embedding"].argmax(1), cond["label"]) and cond["embedding"].shape == (len(x), 10)
        assert torch.equal(cond["low_res"], LowRes(2).compute(x))


@pytest.mark.parametrize("name", ["e.npz", "e.safetensors", "e_{split}.npy"])
def test_embeddings_are_read_from_every_file_format(name: str, tmp_path: Path) -> None:
    data = Digits()
    conditioned = ConditionedData(Digits(), {"embedding": Embedding(one_hot(tmp_path / name, data))})
    for split in ("train", "val", "test"):
        assert torch.equal(conditioned.split(split).extra_conditions["embedding"].argmax(1), data.split(split).labels)
    with pytest.raises(UserError, match=r"has 145 embeddings for 'val', but this split has 150 images") as error:
        ConditionedData(Digits(), {"embedding": Embedding(one_hot(tmp_path / name, data, val=5))}).setup()
    assert "\n" not in str(error.value)


def test_invalid_conditions_are_errors(tmp_path: Path) -> None:
    np.savez(tmp_path / "flat.npz", train=np.ones(3), val=np.ones(3), test=np.ones(3))
    np.savez(tmp_path / "less.npz", train=np.ones((3, 2)), val=np.ones((3, 2)))
    np.savez(tmp_path / "odd.npz", train=np.ones((3, 2)), val=np.ones((3, 2)), test=np.ones((3, 4)))
    np.savez(tmp_path / "nan.npz", **{k: np.full((3, 2), math.nan) for k in ("train", "val", "test")})
    np.savez(tmp_path / "pickle.npz", train=np.array([{}], dtype=object))
    (tmp_path / "torn.npz").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 4)
    for name, message in {
        "nowhere.npz": "There is no .*nowhere.npz", "nowhere.safetensors": "There is no", "a.npy": r"\{split\}",
        "a.pt": "npz or .safetensors", "flat.npz": "shape", "less.npz": "no array 'test'", "odd.npz": "unequal",
        "nan.npz": "finite", "pickle.npz": "corrupted", "torn.npz": "corrupted", "torn.safetensors": "corrupted",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            ConditionedData(Digits(), {"embedding": Embedding(tmp_path / name)})
    for factor in (1, 0, 3, 16):
        with pytest.raises(UserError, match=rf"factor={factor} must be an integer above 1 that divides 8x8"):
            ConditionedData(Digits(), {"low_res": LowRes(factor)})
    with pytest.raises(UserError, match="another name"):
        ConditionedData(Digits(), {"label": LowRes(2)})
    with pytest.raises(UserError, match=r"Gaussian.* does not support the condition 'low_res'.*use a diffusion model"):
        GaussianBaseline(small().spec)
    with pytest.raises(UserError, match=r"not support the condition 'depth'.*it supports embedding and low_res"):
        diffusion(replace(small().spec, conditions={"depth": (1, 8, 8)}))


# Model


def diffusion(spec: DataSpec, network: Any = partial(DenoisingMLP, width=32, depth=2), **changes: Any) -> Diffusion:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "schedule": part("schedule", "cosine"), "parameterization": part("parameterization", "eps"),
        "objective": part("objective", "simple"), "sampler": part("sampler", "ddim", num_steps=4),
    }  # fmt: skip
    return Diffusion(spec, network=network, **(parts | changes))


class Recorder(nn.Module):
    """Records its constructor arguments and the conditions of each call."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments, self.received = arguments, []

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Cond) -> Tensor:
        self.received.append(dict(cond))
        return torch.zeros_like(x)


ALL = DataSpec("x", (1, 4, 4), num_classes=3, conditions={"low_res": (1, 2, 2), "embedding": (5,)})


def all_conditions(n: int) -> dict[str, Tensor]:
    return {"label": torch.arange(n) % 3, "low_res": torch.ones(n, 1, 2, 2), "embedding": torch.ones(n, 5)}


def test_network_is_built_for_the_conditions_of_the_data() -> None:
    for conditional, classes in ((True, 3), (False, 0)):
        model = diffusion(ALL, Recorder, conditional=conditional)
        assert model.network.arguments == {  # type: ignore[union-attr]
            "shape": (1, 4, 4), "out_channels": 1, "num_classes": classes, "low_res_channels": 1, "embedding_dim": 5,
        }  # fmt: skip
        names = {*(["label"] if conditional else []), "low_res", "embedding"}
        assert (
            set(model.condition_names)
            == names
            == set(model.select_conditions(all_conditions(2) | {"else": torch.ones(2)}))
        )
        for name in names:
            with pytest.raises(UserError, match=rf"cond\['{name}'\]"):
                model.sample(
                    2, {k: v for k, v in all_conditions(2).items() if k != name}, generator=generator("cpu", 0)
                )
    unconditional = diffusion(replace(ALL, conditions={}), Recorder)
    assert "low_res_channels" not in unconditional.network.arguments
    assert not unconditional.select_conditions(all_conditions(2))  # type: ignore[operator]


@pytest.mark.parametrize("conditional", [True, False])
def test_dropout_and_guidance_drop_label_and_embedding_but_not_low_res(conditional: bool) -> None:
    guidance = part("guidance", "classifier_free", scale=3.0)
    model = diffusion(ALL, Recorder, conditional=conditional, label_dropout=0.25, guidance=guidance)
    n = 2000
    model.train().losses(
        torch.zeros(n, 1, 4, 4),
        model.select_conditions(all_conditions(n)),
        RandomSource.for_batch(generator("cpu", 0), n),
    )
    (cond,) = model.network.received  # type: ignore[union-attr]
    dropped = (cond["embedding"] == 0).all(1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.04) and (cond["embedding"][~dropped] == 1).all()
    assert (cond["low_res"] == 1).all()
    if conditional:
        assert torch.equal(cond["label"] == 3, dropped), "both conditions are dropped, or neither"
    model.network.received.clear()  # type: ignore[union-attr]
    model.eval().sample(4, all_conditions(4), generator=generator("cpu", 0))
    for cond in model.network.received:  # type: ignore[union-attr]
        assert (cond["embedding"][:4] == 0).all() and (cond["embedding"][4:] == 1).all()
        assert (cond["low_res"] == 1).all() and len(cond["low_res"]) == 8
        assert ("label" in cond) == conditional


def test_classifier_free_guidance_needs_a_label_or_embedding() -> None:
    spec = replace(ALL, conditions={"low_res": (1, 2, 2)})
    with pytest.raises(UserError, match="needs labels or embeddings"):
        diffusion(spec, label_dropout=0.1)
    with pytest.raises(UserError, match="Classifier-free"):
        diffusion(spec, guidance=part("guidance", "classifier_free", scale=3.0))


# Evaluation


class Oracle:
    """Returns the original of each low-resolution image if it is in ``known``, and otherwise upsamples the image."""

    condition_names = ("low_res",)

    def __init__(self, known: dict[bytes, Tensor] | None = None) -> None:
        self.known, self.calls = known, []

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        assert cond is not None
        low = cond["low_res"]
        self.calls.append(low)
        if self.known is None:
            return torch.nn.functional.interpolate(low, scale_factor=2)
        return torch.stack([self.known[row.numpy().tobytes()] for row in low])


def originals(data: ImageData, split: str) -> dict[bytes, Tensor]:
    x, cond = next(data.batches(split, 10_000))
    return {low.numpy().tobytes(): image for low, image in zip(cond["low_res"], x, strict=True)}


def test_condition_of_sample_k_is_independent_of_n_and_chunk_size() -> None:
    data, model = small(), Oracle(originals(small(), "test"))
    source = choose_conditions(model, data, 1200, seed=3, split="test")
    assert source is not None
    assert torch.equal(source.rows[:300], choose_conditions(model, data, 300, seed=3, split="test").rows)  # type: ignore[union-attr]
    assert not torch.equal(source.rows[:300], choose_conditions(model, data, 300, seed=4, split="test").rows[:300])  # type: ignore[union-attr]
    assert sorted(source.rows[:500].tolist()) == list(range(500)), "each image is used once before any is repeated"
    assert torch.equal(source.rows[500:1000], source.rows[:500])
    images = [
        draw_samples(model, 1200, chunk_size=chunk, condition_source=source, spec=data.spec).images
        for chunk in (1200, 7)
    ]
    assert torch.equal(images[0], images[1])
    expected = data.normalize(data.split("test").images[source.rows])
    assert torch.equal(images[0], ((expected + 1) / 2 * 255).round().to(torch.uint8))
    assert choose_conditions(object(), data, 10, seed=0, split="test") is None


def test_record_states_the_conditions_and_the_agreement_of_samples() -> None:
    data = small()
    protocol = EvaluationProtocol(num_images=400)
    perfect = evaluate(Oracle(originals(data, "test")), data, protocol)
    m = perfect.measurement
    assert (m.conditioning, m.label_distribution) == ("low_res 1x4x4 of test", "none")
    assert perfect.metrics["consistency"].value == 0 and perfect.metrics["psnr"].value is None, "PSNR is infinite"
    blurred = evaluate(Oracle(), data, protocol)
    x, cond = data.batches("test", 500).__next__()
    source = choose_conditions(Oracle(), data, 400, seed=0, split="test")
    assert source is not None
    x, low = x[source.rows], cond["low_res"][source.rows]
    upsampled = ((low.repeat_interleave(2, 2).repeat_interleave(2, 3) + 1) * 8).round() / 8 - 1  # 17 levels
    levels, real = ((upsampled + 1) / 2 * 255).round(), ((x + 1) / 2 * 255).round()
    assert blurred.metrics["psnr"].value == pytest.approx(
        float(10 * torch.log10(255**2 / (levels - real).double().square().mean())), rel=1e-6
    )
    low_again = torch.nn.functional.interpolate(upsampled, (4, 4), mode="bicubic", antialias=True).clamp(-1, 1)
    expected = float(((low_again - low) / 2).double().square().mean())
    assert blurred.metrics["consistency"].value == pytest.approx(expected, rel=1e-4) and expected > 1e-4
    assert "bicubic upscaling" in blurred.metrics["psnr"].note and "400 test images" in blurred.metrics["psnr"].note
    val = evaluate(Oracle(originals(data, "val")), data, replace(protocol, condition_split="val"))
    assert val.measurement.conditioning == "low_res 1x4x4 of val"
    assert set(m.differences(val.measurement)) == {"conditioning"}
    for split in ("train", "train+val"):
        with pytest.raises(UserError, match="conditions must not come from training images"):
            evaluate(Oracle(), data, replace(protocol, condition_split=split))
    wrong = torch.roll(((x + 1) / 2 * 255).round().to(torch.uint8), 1, dims=0)
    assert super_resolution(wrong, source)["consistency"].value > 0.05, "samples for other conditions are inconsistent"  # type: ignore[operator]


def test_description_of_embeddings_depends_on_their_content(tmp_path: Path) -> None:
    names = []
    for scale in (1.0, 2.0):
        path = tmp_path / f"{scale}.safetensors"
        save_file({k: scale * torch.eye(10)[Digits().split(k).labels] for k in ("train", "val", "test")}, path)
        data = ConditionedData(Digits(), {"embedding": Embedding(path)})
        source = choose_conditions(diffusion(data.spec), data, 10, seed=0, split="test")
        assert source is not None
        names.append(source.describe(("label", "embedding")))
    assert names[0] != names[1] and names[0].startswith("labels and embedding 10 (") and names[0].endswith(" of test")


def test_grid_shows_low_res_image_sample_and_original() -> None:
    data = small()
    source = choose_conditions(Oracle(), data, 12, seed=0, split="test")
    images = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
    shown, columns = with_low_res(images, source)
    assert shown.shape == (36, 1, 8, 8) and columns == 6
    x, cond = next(data.batches("test", 500))
    row = int(source.rows[4])  # type: ignore[union-attr]
    assert torch.equal(shown[12:15, 0, ::2, ::2][1], images[0, 0, ::2, ::2])
    assert torch.equal(shown[14], ((x[row] + 1) / 2 * 255).round().to(torch.uint8))
    nearest = ((cond["low_res"][row] + 1) * 8).round() / 16 * 255
    assert torch.equal(shown[12, :, ::2, ::2], nearest.round().to(torch.uint8))
    assert with_low_res(images, None) == (images, None)


# From the command line

RUN = [
    "data=digits", "model=ddpm", "model/network=mlp", "model.network.width=192", "model/sampler=ddim",
    "model.sampler.num_steps=10", "trainer=cpu", "logger=none", "callbacks.progress_bar=null",
    "callbacks.evaluation.num_samples=50", "callbacks.evaluation.num_grid_images=9", "evaluation.num_images=150",
    "evaluation.protocol.num_likelihood_images=20",
    "evaluation.checkpoints=[last]", "budget.images=null", "trainer.global_batch_size=64", "model.likelihoods=null",
    "evaluation.extractors=[classifier]",
]  # fmt: skip


def metrics(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    result = json.loads((folder / "record.json").read_text())["results"][-1]
    return result["metrics"], result["measurement"]


@pytest.mark.slow
def test_super_resolution_from_the_command_line(cli: Cli, tmp_path: Path) -> None:
    overrides = [
        "+data/condition=low_res",
        "data.conditions.low_res.factor=2",
        "callbacks.evaluation.num_evaluations=1",
    ]
    assert cli(*RUN, *overrides, "budget.steps=450", "hydra.run.dir=sr") == 0
    found, measurement = metrics(tmp_path / "sr")
    assert measurement["conditioning"] == "low_res 1x4x4 of test"
    assert list((tmp_path / "sr" / "samples").glob("step_*.png"))
    # A model that ignores the condition would return arbitrary digits.
    data = small()
    source = choose_conditions(Oracle(), data, 150, seed=0, split="test")
    assert source is not None
    arbitrary = (data.split("val").images[torch.arange(150)].float() / 16 * 255).round().to(torch.uint8)
    ignoring = super_resolution(arbitrary, source)
    assert found["consistency"]["value"] < 0.25 * ignoring["consistency"].value  # type: ignore[operator]
    assert found["psnr"]["value"] > ignoring["psnr"].value + 3  # type: ignore[operator]
    assert cli("task=sample", "run_dir=sr", "num_images=6") == 0
    assert (tmp_path / "sr" / "drawn" / "grid.png").exists()
    assert cli("task=evaluate", "run_dir=sr", "evaluation.protocol.condition_split=val", "+evaluation/metric=mmd") == 0
    more, other = metrics(tmp_path / "sr")
    assert other["conditioning"] == "low_res 1x4x4 of val" and "mmd" in more
    assert cli("task=visualize", "run_dir=sr", "task.num_images=2") == 0


@pytest.mark.slow
def test_embeddings_condition_the_samples(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    path = one_hot(tmp_path / "classes.npz", Digits())
    overrides = [
        "+data/condition=embedding",
        f"data.conditions.embedding.path={path}",
        "callbacks.evaluation.num_evaluations=0",
    ]
    assert cli(*RUN, *overrides, "budget.steps=450", "model.label_dropout=0.1", "hydra.run.dir=conditional") == 0
    found, measurement = metrics(tmp_path / "conditional")
    assert measurement["conditioning"].startswith("embedding 10 (")
    assert found["label_accuracy"]["value"] > 0.6, "chance level is 0.1"
    assert cli("task=evaluate", "run_dir=conditional", "model/guidance=classifier_free", "model.guidance.scale=3") == 0
    assert metrics(tmp_path / "conditional")[0]["label_accuracy"]["value"] > found["label_accuracy"]["value"]
    # Cached samples are identified by the content of the conditions, not by their names.
    cfg, data = load_config(tmp_path / "conditional"), ConditionedData(Digits(), {"embedding": Embedding(path)})
    shuffled = {k: data.split(k).extra_conditions["embedding"].roll(1, 1).numpy() for k in ("train", "val", "test")}
    np.savez(tmp_path / "shuffled.npz", **shuffled)
    other = ConditionedData(Digits(), {"embedding": Embedding(tmp_path / "shuffled.npz")})
    keys = {
        samples_key(cfg, d, EvaluationProtocol(), tmp_path / "conditional", "last", "ema", "own") for d in (data, other)
    }
    assert len(keys) == 2
    assert cli(*RUN, "+data/condition=embedding", f"data.conditions.embedding.path={tmp_path}/no.npz") == 1
    assert "There is no" in capsys.readouterr().err
