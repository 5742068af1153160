"""bf16-mixed: every family trains, without reading values from the device, and only networks compute in 16 bits."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from composing import compose
from gencompare.rng import RandomSource, generator
from gencompare.tasks.runs.build import build_callbacks, build_data, build_model, build_trainer
from parts import VARIANTS, slow_if
from test_refused_settings import FAMILIES

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}
"""Operations whose result depends on values that the host must read, such as ``float(tensor)``."""
READING_FAMILIES = {"ebm": 2, "hvae": 2}
"""Families that decide in every step, from values on the device, whether to keep it, and how often they read."""


class HostReads(TorchDispatchMode):
    """Counts operations that read values on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in READS:
            frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "/torch/" not in f.filename]
            self.places[frames[-2]] += 1
        return func(*args, **(kwargs or {}))


class During(Callback):
    """Counts the host reads of the second step, between the hooks of all other callbacks, and keeps its outputs."""

    order = -1

    def __init__(self, last: bool = False, first: During | None = None) -> None:
        self.first = first or self
        if last:
            self.order = 100
        self.reads, self.outputs = HostReads(), dict[str, Tensor]()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if self.first is self and index == 1:
            self.reads.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.first is not self and batch_idx == 1:
            self.first.reads.__exit__(None, None, None)
            self.first.outputs = outputs


def second_step(family: str, folder: Path, *overrides: str) -> tuple[pl.LightningModule, During]:
    """Train for three steps with the default callbacks."""
    cfg = compose(f"model={family}", "data=digits", "trainer=cpu", *overrides)
    cfg.trainer.precision, cfg.data.batch_size, cfg.trainer.global_batch_size = "bf16-mixed", 8, 8
    cfg.trainer.fused_optimizer = True  # others read the number of steps from a tensor, which is on the CPU in any case
    cfg.budget.images, cfg.budget.steps = None, 3
    cfg.callbacks.evaluation.num_evaluations = 0
    for name in ("num_sampling_steps", "num_langevin_steps"):
        if name in cfg.model:
            cfg.model[name] = 2
    if "adversarial_start" in cfg.model:
        cfg.model.adversarial_start = 0.0
    data = build_data(cfg)
    model = build_model(cfg, data)
    first = During()
    callbacks = {"first": first, **build_callbacks(cfg, model, data, None, folder), "last": During(True, first)}
    build_trainer(cfg, model, callbacks, [], folder).fit(model, datamodule=data)
    return model, first


@pytest.mark.parametrize("family", slow_if(VARIANTS | {"ldm", "vqvae"}, [f for f in FAMILIES if f != "gaussian"]))
def test_a_family_trains_in_bfloat16_without_reading_from_the_device(family: str, tmp_path: Path) -> None:
    """Its losses are finite, and all metrics in float32. (The Gaussian baseline is fitted in one step.)"""
    model, step = second_step(family, tmp_path)
    for name, value in step.outputs.items():
        assert value.dtype == torch.float32 and value.isfinite(), (name, value)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert step.reads.places.total() == READING_FAMILIES.get(family, 0), step.reads.places


def test_reads_are_counted() -> None:
    """`HostReads` counts what would wait for a device."""
    x = torch.ones(3)
    for read in (lambda: float(x[0]), lambda: x[0].item(), lambda: x.nonzero(), lambda: bool(x.sum() > 1)):
        with HostReads() as reads:
            read()
        assert reads.places.total() == 1
    with HostReads() as reads:
        torch.where(x > 0, x, 0).sum()
    assert not reads.places


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["consistency", "ddpm", "edm", "flow", "meanflow", "vdm"])
def test_a_step_does_not_synchronise_a_gpu(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostReads, "__enter__", lambda self: torch.cuda.set_sync_debug_mode("error"))
    monkeypatch.setattr(HostReads, "__exit__", lambda self, *error: torch.cuda.set_sync_debug_mode("default"))
    second_step(family, tmp_path, "trainer.accelerator=gpu")


class Pointwise(nn.Module):
    """A network that autocast does not affect, and whose output depends on all of its inputs."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Any) -> Tensor:
        y = 0.3 * torch.sin(3 * x) + 0.01 * torch.tanh(noise_cond.float()).view(-1, 1, 1, 1)
        return torch.cat([y] * self.num_outputs, dim=1)


DIFFUSION = ("ddpm", "edm", "flow", "iddpm", "ncsn", "sde_subvp", "sde_ve", "sde_vp", "vdm")


@pytest.mark.parametrize("family", DIFFUSION)
def test_schedules_objectives_samplers_and_likelihoods_ignore_autocast(family: str) -> None:
    """With a network that autocast does not affect, all values are equal, bit for bit, to those without autocast."""
    cfg = compose(f"model={family}", "data=digits", "trainer=cpu")
    for name, value in cfg.model.sampler.items():
        if name.endswith("steps") and value > 3:
            cfg.model.sampler[name] = 3
    data = build_data(cfg)
    model: Any = build_model(cfg, data)
    model.network = Pointwise(model.parameterization.output_multiplier)
    x, cond = next(data.batches("val", 4))
    t = torch.linspace(0.01, 0.99, 4)

    def values() -> Iterator[tuple[str, Tensor]]:
        yield from model.losses(x, cond, RandomSource.for_batch(generator("cpu", 0), 4)).items()
        yield "log-SNR", model.schedule.log_snr(t)
        yield "alpha", model.schedule.log_alpha(t)
        prediction = model(x, t, cond)
        yield from (("x0", prediction.x0), ("eps", prediction.eps))
        yield "sample", model.sample(4, cond, generator=generator("cpu", 1))
        for name, estimate in model.likelihoods().items():
            yield name, estimate.bits_per_dim(x, cond, generator("cpu", 2))

    states: set[torch.dtype] = set()
    model.network.register_forward_pre_hook(lambda module, args: states.update(each.dtype for each in args[:2]))
    expected = dict(values())
    with torch.autocast("cpu", torch.bfloat16):
        found = dict(values())
    for name, value in found.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name
    assert torch.bfloat16 not in states
