"""Settings that make training steps faster: compiled blocks, memory format, TF32 and fused optimisers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor

from composing import compose
from gencompare import compilation
from gencompare.checkpoint_files import EMA_KEY
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.private_apis import remove_compiled_call
from gencompare.rng import generator
from gencompare.tasks.runs import trainer_options
from gencompare.tasks.runs.build import build_data, build_model, build_trainer, check_trainer_for_model
from gencompare.training.budget import Budget
from gencompare.training.clock import TrainingClock, TrainingFlops
from gencompare.training.ema import EMA
from hydra_plugins.gencompare_sweeps.resolvers import cpu_precision
from test_contract import SaveMidway
from test_same_weights import UNET

DIT = ["model/network=dit", "model.network.depth=1", "model.network.hidden_size=32", "model.network.num_heads=2"]
STEPS = 3


class Probe(Callback):
    """After each step, calls a function, as an evaluation does."""

    order = 6

    def __init__(self, function: Callable[[Any], object]) -> None:
        self.function, self.results = function, []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        self.results.append(self.function(pl_module))


def fit(
    folder: Path, *overrides: str, probe: Callable[[Any], object] = lambda model: None, resumed: Path | None = None
) -> tuple[TrainedModel, list[Any], TrainingFlops, Path]:  # fmt: skip
    """Train a diffusion model on digits. Return it, what ``probe`` returned, the counted FLOPs, and a checkpoint."""
    cfg = compose("model=ddpm", "data=digits", "trainer=cpu", "trainer.global_batch_size=8", *overrides)
    data = build_data(cfg)
    model = build_model(cfg, data)
    callbacks = {
        "clock": TrainingClock(0, 8, Budget(steps=STEPS)),
        "flops": (flops := TrainingFlops()),
        "ema": EMA(0.5),
        "probe": (probed := Probe(probe)),
        "midway": SaveMidway(folder, step=STEPS - 1),
    }
    trainer = build_trainer(cfg, model, callbacks, [], folder)
    trainer.fit(model, datamodule=data, ckpt_path=resumed, weights_only=True if resumed else None)
    trainer.save_checkpoint(path := folder / "last.ckpt")
    return model, probed.results, flops, path


def states(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    moments = {
        f"{key}.{name}": value
        for key, state in content["optimizer_states"][0]["state"].items()
        for name, value in state.items()
    }
    return {**content["state_dict"], **{f"ema.{name}": value for name, value in content[EMA_KEY].items()}, **moments}


def test_blocks_are_compiled_in_training_steps_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, their names, the average, the optimiser state, samples and FLOPs are those of a run without."""
    calls = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph.forward(*args)

        return call

    monkeypatch.setattr(compilation, "BACKEND", backend)

    def sampled(model: Any) -> tuple[int, Tensor, int]:
        before = calls
        images = model.eval().sample(2, generator=generator("cpu", 0))
        model.train()
        return before, images, calls - before

    settings = [*DIT, "model.sampler.num_steps=2", "model/sampler=ddim", "trainer.num_micro_batches=2"]
    plain, expected, counted, path = fit(tmp_path, *settings, probe=sampled)
    assert calls == 0
    reference = states(path)
    model, results, flops, path = fit(tmp_path, *settings, "trainer.compile=default", probe=sampled)
    assert plain.state_dict().keys() == model.state_dict().keys()
    for name, value in states(path).items():
        assert torch.equal(value, reference[name]), name
    done = [before for before, _, _ in results]
    # The FLOPs of the first step are counted. A step calls both parts of the batch, and the first again in backward.
    assert done[0] == 0 and done[1] >= 3 and done[2] > done[1], done
    assert flops.per_image == counted.per_image
    for (_, images, in_sampling), (_, plain_images, _) in zip(results, expected, strict=True):
        assert torch.equal(images, plain_images) and in_sampling == 0
    total = calls
    assert isinstance(model, GenerativeModel)
    model.eval().sample(2, generator=generator("cpu", 0))
    assert calls == total, "the blocks are compiled no more after training"
    printed = capsys.readouterr().out
    assert printed.count("Compiling the blocks") == 1 and "which count as training time" in printed


@pytest.mark.parametrize(
    "settings",
    [["model=ddpm", *DIT, "model.sampler.num_steps=3", "model/sampler=heun"], ["model=gan"]],
    ids=["ddpm", "gan"],
)
def test_compiled_networks_sample_the_same_images(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network is compiled once for all chunks of a size, its calls are counted, and nothing of it stays."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    cfg = compose("data=digits", *settings)
    model = build_model(cfg, build_data(cfg))
    assert isinstance(model, GenerativeModel)
    plain = draw_samples(model, 8, chunk_size=4)
    assert not graphs
    sampled = draw_samples(model, 8, chunk_size=4, compile=True)
    assert torch.equal(sampled.images, plain.images) and sampled.nfe == plain.nfe
    assert len(graphs) == 1 and graphs[0] > 20, graphs
    draw_samples(model, 4, chunk_size=4)
    assert len(graphs) == 1 and "forward" not in model.nfe_networks().popitem()[1].__dict__


def test_resuming_in_channels_last_with_a_fused_optimiser_is_exact(tmp_path: Path) -> None:
    """Weights are in channels_last during training and not after it, and the result differs by rounding only."""
    settings = [*UNET, "trainer.memory_format=channels_last", "trainer.fused_optimizer=true"]

    def last_channel_is_first(model: Any) -> bool:
        return model.network.encoder[0].residual.conv1.weight.is_contiguous(memory_format=torch.channels_last)

    whole, *_, path = fit(tmp_path, *settings, probe=last_channel_is_first)
    expected = states(path)
    midway = tmp_path / "checkpoints" / "midway.ckpt"
    model, results, _, path = fit(tmp_path, *settings, probe=last_channel_is_first, resumed=midway)
    assert results == [True] and not last_channel_is_first(model) and not last_channel_is_first(whole)
    for name, value in states(path).items():
        assert torch.equal(value, expected[name]), name
    *_, path = fit(tmp_path, *UNET)
    plain = states(path)
    for name, value in expected.items():
        # Adam divides small gradients by their own size, which enlarges rounding errors.
        assert torch.allclose(value, plain[name], rtol=1e-3, atol=1e-3), name


def test_tf32_is_for_training_steps_only(tmp_path: Path) -> None:
    during: list[str] = []

    cfg = compose("model=ddpm", "data=digits", "trainer=cpu", "trainer.global_batch_size=8", *DIT)
    cfg.trainer.matmul_precision = "high"
    data = build_data(cfg)
    model: Any = build_model(cfg, data)
    model.network.register_forward_pre_hook(lambda *args: during.append(torch.get_float32_matmul_precision()))
    probe = Probe(lambda model: torch.get_float32_matmul_precision())
    callbacks = {"clock": TrainingClock(0, 8, Budget(steps=2)), "probe": probe}
    build_trainer(cfg, model, callbacks, [], tmp_path).fit(model, datamodule=data)
    assert during == ["high"] * 2 and probe.results == ["highest"] * 2


@pytest.mark.parametrize("family", ["vae", "gan", "autoencoder"])
def test_fused_kernels_are_used_where_an_optimiser_has_one(family: str) -> None:
    model = build_model(cfg := compose(f"model={family}", "data=digits", "trainer=cpu"), build_data(cfg))
    factory: Any = model.optimizer_factory
    for fused, arguments, expected in ((True, {}, True), (False, {}, None), (True, {"fused": False}, False)):
        model.fused_optimizer, model.optimizer_factory = fused, partial(factory, **arguments)
        (group,) = {optimizer.param_groups[0]["fused"] for optimizer in model.build_optimizers()}
        assert group is expected
    model.fused_optimizer, model.optimizer_factory = True, lambda parameters: torch.optim.RAdam(parameters)
    assert all("fused" not in optimizer.param_groups[0] for optimizer in model.build_optimizers())


def test_auto_compiles_only_what_and_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for family in ("ddpm", "gan"):
        cfg = compose(f"model={family}", "data=digits", "trainer=gpu")
        found[family] = build_model(cfg, build_data(cfg))
    options = trainer_options.complete_options(cfg.trainer)  # type: ignore[arg-type]
    assert options["compile"] == "auto" and options["precision"] == "bf16-mixed" and options["fused_optimizer"]
    assert trainer_options.compiled_mode(options, found["ddpm"]) == "default"
    assert trainer_options.compiled_mode(options, found["gan"]) is None
    assert trainer_options.compiled_mode(options | {"strategy": "fsdp"}, found["ddpm"]) is None
    for module in (trainer_options, compilation):
        monkeypatch.setattr(module, "has_compiler", lambda: False)
    with pytest.raises(UserError, match=r"evaluation.protocol.compile=true needs a C\+\+ compiler"):
        EvaluationProtocol(compile=True).check(build_data(cfg))
    with pytest.raises(UserError, match=r"evaluation.protocol.compile=true needs a C\+\+ compiler"):
        draw_samples(found["ddpm"], 2, compile=True)
    assert trainer_options.compiled_mode(options, found["ddpm"]) is None
    cfg.trainer.compile = "default"
    with pytest.raises(UserError, match=r"trainer.compile=default needs a C\+\+ compiler"):
        check_trainer_for_model(cfg, found["ddpm"])


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True, "avx512_bf16": False}, "bf16-mixed"),
        ({"avx512_f": True, "avx512_bf16": False}, "32-true"), ({}, "32-true"),
    ],
)  # fmt: skip
def test_the_precision_of_trainer_cpu(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_precision() == expected


def test_a_compiled_call_can_be_removed() -> None:
    module, calls = torch.nn.Linear(2, 2), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return lambda *args: calls.append(1) or graph.forward(*args)

    module.compile(backend=backend)
    module(torch.zeros(1, 2))
    assert calls
    remove_compiled_call(module)
    module(torch.zeros(1, 2))
    assert len(calls) == 1
