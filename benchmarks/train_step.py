"""Benchmark a training step of the DDPM against the same step in a plain loop.

    python benchmarks/train_step.py

Two comparisons on the CPU:

- network: our U-Net and the `UNet2DModel` of diffusers with the same shape, at 3x32x32, batch 64, 32 and 64 base
  channels, both in the same plain loop of forward, backward, AdamW and EMA, in float32 and under bfloat16 autocast;
- trainer: the DDPM with the default callbacks of this project, and the same model in the plain loop. Metrics are logged
  at *every* step, fifty times as often as by default. There are no evaluations during training. Steps on the digits are
  short, so they show the overhead of the Trainer.

The variants take turns in one process (see paired.py), which cancels drift in the machine's speed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from paired import Laps, compare, table, take_turns
from torch import Tensor, nn

from gencompare.command_line import conf_dir
from gencompare.data.datamodule import ImageData, Split
from gencompare.files import write_json
from gencompare.generative_model import Cond, DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.networks.unet import UNet
from gencompare.records import now
from gencompare.rng import RandomSource
from gencompare.tasks.runs.build import build_callbacks, build_loggers, build_model, build_trainer
from gencompare.tasks.runs.environment import environment

RESULT = Path(__file__).parent / "results" / "train_step.json"
WARM_UP = 3
SHAPE, BATCH = (3, 32, 32), 64
SMALL_CIFAR10 = ["model/network=unet_ddpm_cifar10", "model.network.channels=32", "model.network.dropout=0"]
DIGITS_SHAPE, DIGITS_BATCH = (1, 8, 8), 128


class PlainLoop:
    """A plain training step: forward, backward, AdamW, EMA of the weights."""

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor], clip: float | None = None) -> None:
        self.parameters, self.loss, self.clip = list(network.parameters()), loss, clip
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4)
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, *batch: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(*batch).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        with torch.no_grad():
            for average, p in zip(self.average, self.parameters, strict=True):
                average.lerp_(p, 1e-3)


# Network


def same_networks(channels: int) -> tuple[UNet, Any]:
    """Return our U-Net and that of diffusers with the same shape."""
    from diffusers import UNet2DModel  # type: ignore[attr-defined]

    theirs = UNet2DModel(
        sample_size=32,
        block_out_channels=(channels, 2 * channels, 2 * channels, 2 * channels),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    ours = UNet(SHAPE, SHAPE[0], channels=channels, dropout=0.0)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    return ours, theirs


def compare_networks(channels: int, rounds: int) -> dict[str, Any]:
    ours, theirs = same_networks(channels)
    x, noise = torch.randn(2, BATCH, *SHAPE)
    t = torch.randint(1000, (BATCH,))

    def loop(network: nn.Module, predict: Callable[[nn.Module], Tensor], autocast: bool) -> PlainLoop:
        network = deepcopy(network)

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                predicted = predict(network)
            return F.mse_loss(predicted.float(), noise)

        return PlainLoop(network, loss)

    def by_ours(network: nn.Module) -> Tensor:
        return network(x, t.float(), {})

    def by_theirs(network: nn.Module) -> Tensor:
        return network(x, t).sample

    loops = {
        "diffusers": loop(theirs, by_theirs, False),
        "gencompare": loop(ours, by_ours, False),
        "diffusers, bf16": loop(theirs, by_theirs, True),
        "gencompare, bf16": loop(ours, by_ours, True),
    }
    laps = take_turns({name: loop.step for name, loop in loops.items()}, rounds, WARM_UP)
    return compare(laps, base="diffusers")


def print_profile() -> None:
    """Print the operations of a step of our network with 32 channels, in float32 and under bfloat16 autocast."""
    from torch.profiler import ProfilerActivity, profile

    network, _ = same_networks(32)
    x, noise = torch.randn(2, BATCH, *SHAPE)
    t = torch.randint(1000, (BATCH,)).float()
    for autocast in (False, True):

        def loss(autocast: bool = autocast) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                predicted = network(x, t, {})
            return F.mse_loss(predicted.float(), noise)

        loop = PlainLoop(network, loss)
        for _ in range(WARM_UP):
            loop.step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            loop.step()
        print("bfloat16 autocast" if autocast else "float32")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


# Trainer


class Turns(ImageData):
    """Random images, whose training stream runs a step of a plain loop before it yields each batch.

    Lightning requests one batch per step, so the time from one yield to the next request is a whole step of the
    Trainer, and the two loops take turns.
    """

    def __init__(self, shape: tuple[int, int, int], batch: int) -> None:
        super().__init__(batch_size=batch)
        self.spec = DataSpec(name="random", shape=shape)
        self.laps = {"plain loop": Laps(), "gencompare trainer": Laps()}
        self.plain_step: Callable[[Tensor], None]

    def load(self) -> dict[str, Split]:
        return {name: Split(torch.randint(256, (512, *self.spec.shape)).byte()) for name in ("train", "val", "test")}

    def train_dataloader(self) -> Any:
        return Interleaved(self, super().train_dataloader())


class Interleaved:
    """The stream of `Turns`."""

    def __init__(self, turns: Turns, batches: Iterable[tuple[Tensor, Cond]]) -> None:
        self.turns, self.batches = turns, batches

    def __iter__(self) -> Iterator[tuple[Tensor, Cond]]:
        plain, trainer = self.turns.laps.values()
        for x, cond in self.batches:
            plain.start()
            self.turns.plain_step(x)
            plain.stop()
            trainer.start()
            yield x, cond
            trainer.stop()


def compare_trainer(data: Turns, overrides: list[str], rounds: int, logger: str) -> dict[str, Any]:
    cfg = config(
        *overrides,
        f"logger={logger}",
        f"budget.steps={rounds + WARM_UP}",
        f"trainer.global_batch_size={data.batch_size}",
    )
    model = build_model(cfg, data)
    assert isinstance(model, Diffusion)
    twin = deepcopy(model)
    rng = RandomSource.for_batch(torch.Generator().manual_seed(0), data.batch_size)
    data.plain_step = PlainLoop(twin, lambda x: twin.losses(x, {}, rng)["loss"].mean(), model.grad_clip).step
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loggers = build_loggers(cfg, folder, run_id="benchmark", start_step=0)
        trainer = build_trainer(cfg, model, build_callbacks(cfg, model, data, None, folder), loggers, folder)
        trainer.fit(model, datamodule=data)
    # The first laps are dropped: since Lightning prefetches a batch, the Trainer's first lap contains no step.
    return compare({name: laps.last(rounds) for name, laps in data.laps.items()}, base="plain loop")


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(
            "config",
            [
                "model=ddpm",
                "model.optimizer._target_=torch.optim.AdamW",
                "trainer=cpu",
                "budget.images=null",
                "callbacks.evaluation.num_evaluations=0",
                "callbacks.metric_logger.log_every_n_steps=1",
                *overrides,
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step of the DDPM.")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each variant; ten times as many on digits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--logger", default="csv", help="an option of conf/logger")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.profile:
        print_profile()
        return

    result: dict[str, Any] = {
        "created": now(),
        "environment": environment(torch.device("cpu")),
        "processors": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }

    def report(part: str, setting: str, variants: dict[str, Any]) -> None:
        result[part] = {"setting": setting, "variants": variants}
        print(table(f"{part}, {setting}", variants), flush=True)

    if find_spec("diffusers"):
        result["environment"]["packages"]["diffusers"] = metadata.version("diffusers")
        for channels in (32, 64):
            setting = f"3x32x32, batch 64, {channels} channels"
            report(f"network_{channels}", setting, compare_networks(channels, options.rounds // (channels // 32)))
    else:
        print("The network is compared with that of diffusers: pip install 'gencompare[dev]'")
    report(
        "trainer",
        "3x32x32, batch 64, 32 channels",
        compare_trainer(Turns(SHAPE, BATCH), SMALL_CIFAR10, options.rounds, options.logger),
    )
    report(
        "trainer_on_digits",
        "1x8x8, batch 128, the default network",
        compare_trainer(Turns(DIGITS_SHAPE, DIGITS_BATCH), [], 10 * options.rounds, options.logger),
    )
    write_json(options.out, result)
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
