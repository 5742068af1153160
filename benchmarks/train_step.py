"""Benchmark training steps against other libraries, and the Trainer against a plain loop.

    python benchmarks/train_step.py [PART ...] [--compile]

All on the CPU; each part can be measured alone:

- network_32, network_64, edm, dit: our network and that of diffusers with the same shape in the same plain loop of
  forward, backward, AdamW and EMA, in float32 and under bfloat16 autocast;
- ddpm, vae: the loss of a whole model and that of denoising-diffusion-pytorch and pythae in this loop, in float32;
- gan: a discriminator and a generator update of SNGAN, and the same in plain PyTorch, in float32;
- trainer, trainer_on_digits: the DDPM with the default callbacks of this project, and the same model in the plain loop.
  Metrics are logged at *every* step; in trainer_default and trainer_on_digits_default, every 50 steps as by default.
  There are no evaluations during training. Steps on the digits are short, so they show the overhead of the Trainer.

peers.py says what the networks have in common. `--compile` adds variants with `torch.compile`, which needs a C++
compiler, and reports the seconds of their first step. A peer that is not installed is left out: pip install -e
'.[bench]'. The variants take turns in one process (see paired.py), which cancels drift in the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from paired import Laps, compare, machine, table, take_turns
from peers import (
    CHANNELS_LAST,
    CONTESTS,
    GAN_BATCH,
    GAN_SETTING,
    GANS,
    SHAPE,
    SMALL_CIFAR10,
    Contest,
    Contestant,
    RandomImages,
    config,
    parameters,
    predicts_noise,
    same_networks,
)
from torch import Tensor, nn

from gencompare.files import write_json
from gencompare.generative_model import Cond
from gencompare.models.diffusion import Diffusion
from gencompare.resources import flops_per_image
from gencompare.rng import RandomSource
from gencompare.tasks.runs.build import build_callbacks, build_loggers, build_model, build_trainer

RESULT = Path(__file__).parent / "results" / "train_step.json"
WARM_UP = 3
ROUNDS = {"network_64": 0.5, "edm": 0.5, "ddpm": 0.5, "trainer_on_digits": 5.0, "trainer_on_digits_default": 5.0}
"""Rounds of a part as a multiple of ``--rounds``, if not 1: fewer of long steps, more of short ones."""
INTERVAL = "callbacks.metric_logger.log_every_n_steps"
TRAINERS = {
    "trainer": ("3x32x32, batch 64, 32 channels", SHAPE, 64, SMALL_CIFAR10),
    "trainer_on_digits": ("1x8x8, batch 128, the default network", (1, 8, 8), 128, ["model=ddpm"]),
}
TRAINERS |= {
    f"{name}_default": (f"{setting}, logging every 50 steps", shape, batch, [*overrides, f"{INTERVAL}=50"])
    for name, (setting, shape, batch, overrides) in TRAINERS.items()
}
PARTS = [*CONTESTS, "gan", *TRAINERS]
PEERS = ("diffusers", "denoising-diffusion-pytorch", "pythae")


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


# Networks and losses


def loop(contestant: Contestant, bf16: bool = False) -> PlainLoop:
    """Return a plain loop with the loss of a contestant, in float32 or under bfloat16 autocast."""

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return contestant.loss()

    return PlainLoop(contestant.network, loss)


def compare_losses(contest: Contest, rounds: int, with_compiled: bool) -> dict[str, Any]:
    loops: dict[str, PlainLoop] = {}
    facts: dict[str, dict[str, Any]] = {}
    for compiled in (False, True) if with_compiled else (False,):
        for bf16 in (False, True) if contest.with_bf16 else (False,):
            for name, make in contest.make.items():
                if bf16 and name == CHANNELS_LAST:
                    continue
                torch.manual_seed(0)
                contestant = make()
                variant = name + (", bf16" if bf16 else "") + (", compiled" if compiled else "")
                flops = flops_per_image(lambda c=contestant: c.loss().backward(), contest.batch)
                facts[variant] = {"parameters": parameters(contestant.network), "gflops_per_image": flops / 1e9}
                if compiled:
                    contestant.network.compile()
                loops[variant] = loop(contestant, bf16)
                if compiled:
                    start = time.perf_counter()
                    loops[variant].step()
                    facts[variant]["first_step_seconds"] = time.perf_counter() - start
    laps = take_turns({name: each.step for name, each in loops.items()}, rounds, WARM_UP)
    return {name: row | facts[name] for name, row in compare(laps, base=next(iter(loops))).items()}


def compare_gans(rounds: int) -> dict[str, Any]:
    steps, facts = {}, {}
    for name, make in GANS.items():
        torch.manual_seed(0)
        networks, steps[name] = make()
        flops = flops_per_image(steps[name], GAN_BATCH)
        facts[name] = {"parameters": parameters(networks), "gflops_per_image": flops / 1e9}
    laps = take_turns(steps, rounds, WARM_UP)
    return {name: row | facts[name] for name, row in compare(laps, base=next(iter(GANS))).items()}


def print_profile() -> None:
    """Print the operations of a step of our network with 32 channels, in float32 and under bfloat16 autocast."""
    from torch.profiler import ProfilerActivity, profile

    network, _ = same_networks(32)
    contestant = predicts_noise(network, 64, lambda x, t: network(x, t.float(), {}))
    for bf16 in (False, True):
        plain = loop(contestant, bf16)
        for _ in range(WARM_UP):
            plain.step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            plain.step()
        print("bfloat16 autocast" if bf16 else "float32")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


# Trainer


class Turns(RandomImages):
    """Random images, whose training stream runs a step of a plain loop before it yields each batch.

    Lightning requests one batch per step, so the time from one yield to the next request is a whole step of the
    Trainer, and the two loops take turns.
    """

    def __init__(self, shape: tuple[int, int, int], batch: int) -> None:
        super().__init__(shape, batch)
        self.laps = {"plain loop": Laps(), "gencompare trainer": Laps()}
        self.plain_step: Callable[[Tensor], None]

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each variant; five times as many on digits")
    parser.add_argument("--compile", action="store_true", help="add variants with torch.compile (minutes more)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--logger", default="csv", help="an option of conf/logger")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, and nothing else")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.profile:
        print_profile()
        return

    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    result |= machine()
    packages = result["environment"]["packages"]
    packages |= {name: metadata.version(name) for name in PEERS if find_spec(name.replace("-", "_"))}
    for part in options.parts or PARTS:
        rounds = round(options.rounds * ROUNDS.get(part, 1))
        if part in CONTESTS:
            contest = CONTESTS[part]
            if not contest.available:
                print(f"{part}: {contest.package} is not installed, so this part is left out")
                continue
            setting, variants = contest.setting, compare_losses(contest, rounds, options.compile)
        elif part == "gan":
            setting, variants = GAN_SETTING, compare_gans(rounds)
        else:
            setting, shape, batch, overrides = TRAINERS[part]
            variants = compare_trainer(Turns(shape, batch), overrides, rounds, options.logger)
        result[part] = {"setting": setting, "variants": variants}
        print(table(f"{part}, {setting}", variants), flush=True)
        for name, row in variants.items():
            facts = {key: row[key] for key in ("parameters", "gflops_per_image", "first_step_seconds") if key in row}
            print(f"  {name}: {facts}" if facts else "", end="\n" if facts else "")
        write_json(options.out, result)  # after each part, because all parts take minutes
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
