"""Measure how the time and memory of training, sampling and evaluation grow with the size of the work, on the CPU.

    python benchmarks/growth.py [training] [sampling] [evaluation] [memory]

- training: one step of the CIFAR-10 DDPM network with AdamW and EMA (train_step.py);
- sampling: one denoiser call of DDIM with this network;
- evaluation: all metrics of samples that are random images, with an extractor that is a random matrix (256 features):
  against the number of samples, with cached features of 10,000 real images, and against the number of real images, with
  1,000 samples, features of real images included;
- memory: the peak memory of an evaluation of 50,000 samples against 50,000 real images of 3x32x32 with 1,280 features,
  as many as the default extractor of photographs has. It must stay below 2 GB, images and features included.

Each measurement runs in a new process. An exponent is the slope of a least-squares line through the logarithms, and
its standard error. Values for 100,000 samples and 1,000,000 real images continue the line through the two largest
sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from memory import in_new_process
from paired import machine
from scipy.stats import linregress
from torch import Tensor, nn
from train_step import PlainLoop

from gencompare.data.datamodule import ImageData, Split
from gencompare.diffusion.denoiser import Denoiser
from gencompare.diffusion.discrete_schedules import LinearBetas
from gencompare.diffusion.parameterizations import Eps, TimestepConditioning
from gencompare.diffusion.samplers import DDIM
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.evaluation.reference import load_reference
from gencompare.files import write_json
from gencompare.generative_model import DataSpec
from gencompare.networks.unet import UNet

RESULT = Path(__file__).parent / "results" / "growth.json"
PARTS = ["training", "sampling", "evaluation", "memory"]
AXES = {
    "batch": [(batch, 32, 32) for batch in (16, 32, 64, 128)],
    "resolution": [(4, side, 32) for side in (32, 64, 128, 256)],
    "width": [(16, 32, channels) for channels in (32, 64, 96, 128)],
}
"""(batch size, height and width, base channels) of the measurements along each axis."""
REPETITIONS = 3
DIM, SAMPLES, REAL = 256, (1_000, 3_000, 10_000, 20_000, 50_000), (1_000, 10_000, 30_000, 100_000)
FEW_SAMPLES, FEW_REAL = 1_000, 10_000
CONTINUED_TO = {"samples": 100_000, "real images": 1_000_000}
MEMORY_SAMPLES, MEMORY_DIM, MEMORY_LIMIT_MIB = 50_000, 1280, 2_000_000_000 / 2**20


def seconds_of(function: Callable[[], object]) -> float:
    """Return the median time of a few calls after the first."""
    times = []
    for _ in range(1 + REPETITIONS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# Training and sampling


def training_seconds(batch: int, side: int, channels: int) -> float:
    network = UNet((3, side, side), 3, channels=channels, dropout=0.0)
    x, noise = torch.randn(2, batch, 3, side, side)
    t = torch.randint(1000, (batch,)).float()
    return seconds_of(PlainLoop(network, lambda: (network(x, t, {}) - noise).square().mean()).step)


def sampling_seconds(batch: int, side: int, channels: int) -> float:
    network = UNet((3, side, side), 3, channels=channels, dropout=0.0).eval()
    denoiser, x = Denoiser(network, LinearBetas(), Eps(TimestepConditioning())), torch.randn(batch, 3, side, side)
    with torch.no_grad():
        return seconds_of(lambda: DDIM(num_steps=1).sample(denoiser, x, generator=torch.Generator()))


# Evaluation


class RandomImages(ImageData):
    """Random images; ``real`` of them for training."""

    def __init__(self, side: int, real: int) -> None:
        super().__init__()
        self.spec, self.real = DataSpec(name="random", shape=(3, side, side)), real

    def load(self) -> dict[str, Split]:
        sizes = {"train": self.real, "val": 1000, "test": min(10_000, self.real)}
        return {name: Split(self.images(n, seed)) for seed, (name, n) in enumerate(sizes.items())}

    def images(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(256, (n, *self.spec.shape), generator=generator, dtype=torch.uint8)


class RandomModel:
    """A model that samples random images."""

    def __init__(self, data: RandomImages) -> None:
        self.spec = data.spec

    def sample(self, n: int, cond: object = None, *, generator: torch.Generator) -> Tensor:
        return torch.rand(n, *self.spec.shape, generator=generator).mul(2).sub(1)


class RandomProjection(Extractor):
    """Projects the pixels with a random matrix, which costs little."""

    name = hash = "random_projection"

    def __init__(self, spec: DataSpec, dim: int) -> None:
        super().__init__()
        self.dim = dim
        torch.manual_seed(0)
        self.module = nn.Linear(spec.num_values, dim)

    def extract_batch(self, images: Tensor) -> Features:
        return Features(self.module(images.flatten(1).float() / 255))


def evaluation_seconds(samples: int, real: int, side: int, dim: int, cached: bool) -> float:
    """Time an evaluation, without or (if ``cached``) after extracting the features of the real images."""
    data = RandomImages(side, real)
    extractor = RandomProjection(data.spec, dim)
    protocol = EvaluationProtocol(extractors=[lambda spec: extractor], num_images=samples)
    if cached:
        for name in ("train", "val", "test"):
            load_reference(data, name, extractor)
    start = time.perf_counter()
    evaluate(RandomModel(data), data, protocol)
    return time.perf_counter() - start


# Growth


def fit(sizes: list[int], values: list[float]) -> dict[str, float]:
    """Return the exponent p of values proportional to size^p, and its standard error."""
    line: Any = linregress([math.log(size) for size in sizes], [math.log(value) for value in values])
    return {"exponent": round(line.slope, 3), "standard_error": round(line.stderr, 3)}


def continued(sizes: list[int], values: list[float], size: int) -> float:
    """Return the value at ``size`` on the power law through the last two points."""
    slope = math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])
    return values[-1] * (size / sizes[-1]) ** slope


def grow(sizes: list[int], measurements: list[tuple[float, int]]) -> dict[str, Any]:
    """Return the points and the exponents of time and memory. Points that add no memory have no place in a fit."""
    seconds, added = ([float(row[k]) for row in measurements] for k in (0, 1))
    result = {"sizes": sizes, "seconds": seconds, "added_mib": added, "time": fit(sizes, seconds)}
    return result | ({"memory": fit(sizes, added)} if min(added) > 0 else {})


def along_axes(function: Callable[..., float]) -> dict[str, Any]:
    rows = {}
    for axis, settings in AXES.items():
        sizes = [setting[list(AXES).index(axis)] for setting in settings]
        rows[axis] = grow(sizes, [in_new_process(function, *setting) for setting in settings])
        print_growth(f"{function.__name__} against {axis}", rows[axis])
    return rows


def evaluation() -> dict[str, Any]:
    rows = {}
    works = {
        "samples": (SAMPLES, lambda n: (n, FEW_REAL, 16, DIM, True)),
        "real images": (REAL, lambda n: (FEW_SAMPLES, n, 16, DIM, False)),
    }
    for axis, (sizes, setting) in works.items():
        rows[axis] = grow(list(sizes), [in_new_process(evaluation_seconds, *setting(n)) for n in sizes])
        points = rows[axis]
        points["continued"] = {
            "size": CONTINUED_TO[axis],
            **{key: continued(list(sizes), points[key], CONTINUED_TO[axis]) for key in ("seconds", "added_mib")},
        }
        print_growth(f"evaluation against {axis}", points)
    return rows


def memory() -> dict[str, Any]:
    n = MEMORY_SAMPLES
    seconds, added = in_new_process(evaluation_seconds, n, n, 32, MEMORY_DIM, False)
    print(f"evaluation of {n:,} samples, {MEMORY_DIM:,} features: {seconds:.0f} s, {added:,} MiB")
    return {
        "samples": n, "real_images": n, "features": MEMORY_DIM, "seconds": seconds, "added_mib": added,
        "limit_mib": round(MEMORY_LIMIT_MIB),
    }  # fmt: skip


def print_growth(title: str, row: Mapping[str, Any]) -> None:
    points = ", ".join(
        f"{size:,}: {seconds:.3g} s, {added:,.0f} MiB"
        for size, seconds, added in zip(row["sizes"], row["seconds"], row["added_mib"], strict=True)
    )
    exponents = "; ".join(
        f"{key} ~ size^{row[key]['exponent']:.2f} +- {row[key]['standard_error']:.2f}"
        for key in ("time", "memory")
        if key in row
    )
    print(f"{title}: {points}; {exponents}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    measure: dict[str, Callable[[], dict[str, Any]]] = {
        "training": lambda: along_axes(training_seconds),
        "sampling": lambda: along_axes(sampling_seconds),
        "evaluation": evaluation,
        "memory": memory,
    }
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in args.parts or PARTS:
        result[part] = {"machine": machine(), "rows": measure[part]()}
        write_json(args.out, result)
    if (found := result.get("memory")) and found["rows"]["added_mib"] > found["rows"]["limit_mib"]:
        raise SystemExit(f"An evaluation needs more than the limit of {found['rows']['limit_mib']:,} MiB.")


if __name__ == "__main__":
    main()
