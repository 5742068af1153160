"""Measure how sampling and evaluation scale with processes, and the memory of training.

    python benchmarks/scaling.py [evaluation] [micro_batches] [sharding] [models]

All on the CPU, with one core for each process:

- evaluation: 1,000 images of a DDPM with random weights on the digits, 50 steps each, sampled and evaluated over 1 and
  2 processes: seconds, images per second, and the memory that this adds to the peak of each process;
- micro_batches: training steps of the CIFAR-10 DDPM (35.7 M parameters, batches of 32) with ``num_micro_batches`` of 1
  to 8: seconds per step, and the memory that the step adds to weights, gradients and optimiser state;
- sharding: the same network on the digits over 2 processes with ``trainer=ddp`` and ``trainer=fsdp``: memory of
  weights, gradients, average and optimiser state on each process, and training images per second;
- models: parameters, FLOPs of training on one image, and the memory of the training state, of the networks of the
  presets.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gencompare.distributed import run_on_rank_zero
from gencompare.evaluation.evaluate import evaluate
from gencompare.evaluation.sampling import draw_samples
from gencompare.files import write_json
from gencompare.generative_model import DataSpec
from gencompare.records import now
from gencompare.resources import flops_per_image
from gencompare.rng import RandomSource
from gencompare.sharding import local_tensor
from gencompare.tasks.python_api import build, compose
from gencompare.tasks.runs.build import build_model, build_protocol, build_trainer
from gencompare.tasks.runs.environment import environment
from gencompare.training.budget import Budget
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA

RESULT = Path(__file__).parent / "results" / "scaling.json"
PARTS = ["evaluation", "micro_batches", "sharding", "models"]
NETWORKS = {
    "unet_ddpm_cifar10": (3, 32, 32), "unet_edm_cifar10": (3, 32, 32), "unet_adm_imagenet64": (3, 64, 64),
    "dit_s": (4, 32, 32), "dit_b": (4, 32, 32), "dit_l": (4, 32, 32), "dit_xl": (4, 32, 32),
}  # fmt: skip
"""Networks of the presets by name, with the shape of what they are trained on: images, or latents (4, 32, 32)."""
BYTES_PER_PARAMETER = 20
"""Weights, gradients, the two moments of Adam, and the moving average, 4 bytes each."""
IMAGES, BATCH, TRAIN_STEPS = 1000, 32, 3
MIB = 2**20


def memory() -> float:
    """Return the peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def evaluate_part() -> dict[str, float]:
    """Sample and evaluate as one of several processes."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    cfg = compose("model=ddpm", "data=digits", f"evaluation.num_images={IMAGES}", "model.sampler.num_steps=50")
    data, model = build(cfg)
    data.setup()
    model.eval()
    protocol = build_protocol(cfg)
    draw_samples(model, 8)  # type: ignore[arg-type]  # warm-up
    run_on_rank_zero(lambda: None)
    before, start = memory(), time.perf_counter()
    samples = draw_samples(model, IMAGES)  # type: ignore[arg-type]
    sampled = time.perf_counter()
    evaluate(samples.images, data, protocol)
    seconds = time.perf_counter() - sampled
    return {"sampling_seconds": sampled - start, "evaluation_seconds": seconds, "added_mib": memory() - before}


def micro_batch_part(count: int) -> dict[str, float]:
    """Take training steps of the CIFAR-10 DDPM."""
    cfg = compose("experiment=cifar10_ddpm", "trainer=cpu")
    model = build_model(cfg, SimpleNamespace(spec=DataSpec("cifar10", (3, 32, 32), 10)))  # type: ignore[arg-type]
    model.train()
    model.num_micro_batches = count
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    before, seconds = memory(), []
    images = torch.rand(BATCH, 3, 32, 32) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRAIN_STEPS):
        start = time.perf_counter()
        model.rng = RandomSource.for_batch(generator, BATCH)
        optimizer.zero_grad(set_to_none=False)
        model.training_step(images, 0)["loss"].backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {"step_seconds": min(seconds), "added_mib": memory() - before}


def measure(part: str, *args: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--measure", part, *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def start_ranks(part: str, world: int, *args: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [measure(part, *args, environment=environment) for environment in ranks]


def output(process: subprocess.Popen[str]) -> dict[str, float]:
    text = process.communicate()[0]
    assert process.returncode == 0, text
    return json.loads(text.splitlines()[-1])


def compare_evaluation() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for world in (1, 2):
        ranks = [output(process) for process in start_ranks("evaluation", world)]
        seconds = max(rank["sampling_seconds"] for rank in ranks)
        results[f"{world} processes"] = {
            "sampling_seconds": seconds,
            "samples_per_second": IMAGES / seconds,
            "evaluation_seconds": max(rank["evaluation_seconds"] for rank in ranks),
            "added_mib": [rank["added_mib"] for rank in ranks],
        }
    one, two = results.values()
    results["speedup"] = {name: one[name] / two[name] for name in ("sampling_seconds", "evaluation_seconds")}
    return results


def compare_micro_batches() -> dict[str, Any]:
    return {f"{count} parts": output(measure("micro_batches", str(count))) for count in (1, 2, 4, 8)}


def sharding_part(strategy: str) -> dict[str, float]:
    """Train as one of two processes."""
    cfg = compose(
        "model=ddpm", "data=digits", "model/network=unet_ddpm_cifar10", f"trainer={strategy}",
        "trainer.accelerator=cpu", "trainer.devices=2", "trainer.global_batch_size=16",
    )  # fmt: skip
    data, model = build(cfg)
    ema = EMA()
    callbacks = {"clock": TrainingClock(0, 16, Budget(steps=20)), "ema": ema}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(cfg, model, callbacks, [], Path(folder))  # type: ignore[arg-type]
        trainer.fit(model, datamodule=data)
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        held = [*model.parameters(), *ema.average.values(), *(value for value in states if isinstance(value, Tensor))]
        held += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    held_mib = sum(local_tensor(value).nbytes for value in held) / MIB
    clock = callbacks["clock"]
    assert isinstance(clock, TrainingClock)
    return {"state_mib": held_mib, "images_per_second": clock.images / clock.seconds}


def model_part(network: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """Count the parameters of a network and the FLOPs of its training on one image."""
    cfg = compose("model=ddpm", f"model/network={network}", "trainer=cpu")
    model = build_model(cfg, SimpleNamespace(spec=DataSpec("any", shape)))  # type: ignore[arg-type]
    parameters = sum(parameter.numel() for parameter in model.parameters())

    def step() -> None:
        model.training_step(torch.zeros(1, *shape), 0)["loss"].backward()

    return {
        "parameters": parameters,
        "training_gflops_per_image": flops_per_image(step, 1) / 1e9,
        "state_mib": parameters * BYTES_PER_PARAMETER / MIB,
    }


def compare_models() -> dict[str, Any]:
    return {name: model_part(name, shape) | {"shape": list(shape)} for name, shape in NETWORKS.items()}


def compare_sharding() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        ranks = [output(process) for process in start_ranks("sharding", 2, strategy)]
        results[strategy] = {
            "state_mib": [rank["state_mib"] for rank in ranks],
            "images_per_second": min(rank["images_per_second"] for rank in ranks),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        part, *rest = args.measure
        measured = {
            "evaluation": evaluate_part, "micro_batches": lambda: micro_batch_part(int(rest[0])),
            "sharding": lambda: sharding_part(rest[0]),
        }  # fmt: skip
        print(json.dumps(measured[part]()))
        return
    compared = {
        "evaluation": compare_evaluation, "micro_batches": compare_micro_batches, "sharding": compare_sharding,
        "models": compare_models,
    }  # fmt: skip
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result |= {"time": now(), "environment": environment(torch.device("cpu"))}
    for part in args.parts or PARTS:
        result[part] = compared[part]()
        print(part, json.dumps(result[part], indent=1), flush=True)
        write_json(RESULT, result)


if __name__ == "__main__":
    main()
