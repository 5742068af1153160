"""Measure the coverage and the width of 95 % confidence intervals of distances.

    python benchmarks/interval_coverage.py

Each case draws features from a model with known parameters and measures them against a fixed reference: 100 repetitions
at n = 500 and 1,000. The target is the expected value of the statistic at the same n, estimated from further draws; for
the Frechet distance at n = infinity it is the distance of 400,000 draws. The report contains

- coverage, and the fractions of intervals below and above the target;
- width: the mean width, divided by 3.92 standard deviations of the statistic, which is the width of a normal interval
  with known standard deviation.

Frechet distances use 64 features. Kernel distances (cubic, and Gaussian with the median bandwidth) also use 320 and
1,280 features with a decaying spectrum, like those of networks. Takes about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencompare.evaluation.metrics.frechet import Jackknife, Statistics, frechet_distance
from gencompare.evaluation.metrics.intervals import Estimate
from gencompare.evaluation.metrics.kernel import CubicKernel, GaussianKernel, KernelReference, kernel_distance
from gencompare.files import write_json
from gencompare.records import now
from gencompare.tasks.runs.environment import environment

RESULT = Path(__file__).parent / "results" / "interval_coverage.json"
SIZES = (500, 1000)
KERNELS = {"cubic": CubicKernel(), "gaussian": GaussianKernel()}
KERNEL_REFERENCE = 2000
Draw = Callable[[int, torch.Generator], Tensor]


def gaussian(scale: float = 1.0, shift: float = 0.0, dim: int = 64, decay: float = 0.0) -> Draw:
    spectrum = torch.arange(1, dim + 1).float() ** -decay
    return lambda n, g: (scale * torch.randn(n, dim, generator=g) + shift) * spectrum


def student(scale: float = 1.0, shift: float = 0.0, dim: int = 64, decay: float = 0.0) -> Draw:
    """Draw from a multivariate t distribution with 5 degrees of freedom, where the features of an image share a random
    scale."""
    spectrum = torch.arange(1, dim + 1).float() ** -decay

    def draw(n: int, g: torch.Generator) -> Tensor:
        chi2 = torch.randn(n, 5, generator=g).square().sum(1, keepdim=True)
        return (scale * torch.randn(n, dim, generator=g) * (5 / chi2).sqrt() + shift) * spectrum

    return draw


def mixture(modes: int, shift: float = 0.0) -> Draw:
    """Draw the first of ten modes, with exponential tails, a decaying spectrum, and a ReLU as for activations."""
    centres = 2 * torch.randn(10, 64, generator=torch.Generator().manual_seed(99))

    def draw(n: int, g: torch.Generator) -> Tensor:
        centre = centres[torch.randint(modes, (n,), generator=g)]
        tails = torch.empty(n, 1).exponential_(generator=g)
        noise = (0.3 + tails) * torch.randn(n, 64, generator=g) * torch.logspace(0, -2, 64)
        return (centre + noise).relu() + shift

    return draw


@dataclass(frozen=True)
class Case:
    model: Draw
    reference: Draw
    sizes: tuple[int, ...] = SIZES
    frechet: bool = True


CASES = {
    "equal": Case(gaussian(), gaussian()),
    "shifted": Case(gaussian(1.2, 0.1), gaussian()),
    "narrowed": Case(gaussian(0.8), gaussian()),
    "mode dropped": Case(mixture(9), mixture(10)),
    "mode dropped by both, shifted": Case(mixture(9), mixture(9, 0.25)),
    "heavy tails, equal": Case(student(), student()),
    "heavy tails, shifted": Case(student(1.2, 0.1), student()),
    "heavy tails, Gaussian reference": Case(student(), gaussian()),
}
for dim in (320, 1280):
    CASES |= {
        f"equal, {dim} features": Case(gaussian(1, 0, dim, 0.7), gaussian(1, 0, dim, 0.7), (500,), False),
        f"shifted, {dim} features": Case(gaussian(1.1, 0.1, dim, 0.7), gaussian(1, 0, dim, 0.7), (500,), False),
        f"heavy tails, shifted, {dim} features": Case(
            student(1.1, 0.1, dim, 0.7), student(1, 0, dim, 0.7), (500,), False
        ),
    }


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def study(name: str, n: int, repetitions: int, draws: int) -> dict[str, Any]:
    case = CASES[name]
    features = case.reference(10_000, generator(name, "reference"))
    statistics = Statistics.from_features(features)
    kernels = {
        key: KernelReference.from_features(features[:KERNEL_REFERENCE], kernel) for key, kernel in KERNELS.items()
    }
    all_estimates: dict[str, list[Estimate]] = {}
    values_at_n: dict[str, list[float]] = {}
    for k in range(draws):
        x = case.model(n, generator(name, n, "target", k))
        for key, reference in kernels.items():
            values_at_n.setdefault(key, []).append(kernel_distance(x, reference).value)
        if case.frechet:
            values_at_n.setdefault("frechet", []).append(frechet_distance(x, statistics))
    for k in range(repetitions):
        x = case.model(n, generator(name, n, "interval", k))
        for key, reference in kernels.items():
            all_estimates.setdefault(key, []).append(kernel_distance(x, reference))
        if case.frechet:
            jackknife = Jackknife(x, statistics)
            all_estimates.setdefault("frechet", []).append(jackknife.distance)
            all_estimates.setdefault("frechet_infinity", []).append(jackknife.infinity)
    rows = {}
    for key, estimates in all_estimates.items():
        values = np.array([e.value for e in estimates])
        intervals = np.array([e.interval for e in estimates])
        if key == "frechet_infinity":
            target = frechet_distance(case.model(400_000, generator(name, "population")), statistics)
            deviation = float(values.std(ddof=1))
        else:
            target, deviation = float(np.mean(values_at_n[key])), float(np.std(values_at_n[key], ddof=1))
        below, above = float((intervals[:, 1] < target).mean()), float((intervals[:, 0] > target).mean())
        rows[key] = {
            "coverage": round(1 - below - above, 4),
            "too_low": below,
            "too_high": above,
            "width": round(float((intervals[:, 1] - intervals[:, 0]).mean()) / (3.92 * deviation), 3),
            "target": target,
            "deviation": deviation,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the coverage of intervals.")
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--draws", type=int, default=400, help="draws that estimate the target")
    parser.add_argument("--only", help="only cases whose names contain this")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "created": now(),
        "environment": environment(torch.device("cpu")),
        "load": os.getloadavg()[0],
        "repetitions": options.repetitions,
        "draws": options.draws,
        "cases": {},
    }
    for name, case in CASES.items():
        if options.only and options.only not in name:
            continue
        for n in case.sizes:
            rows = study(name, n, options.repetitions, options.draws)
            result["cases"].setdefault(name, {})[str(n)] = rows
            line = " | ".join(f"{key} {row['coverage']:.2f}, width {row['width']:.2f}" for key, row in rows.items())
            print(f"{name}, n = {n}: {line}", flush=True)
    metrics = ("frechet", "frechet_infinity", *KERNELS)
    all_rows = [rows for sizes in result["cases"].values() for rows in sizes.values()]
    covers = {key: [rows[key]["coverage"] for rows in all_rows if key in rows] for key in metrics}
    result["overall"] = {
        key: {"coverage": round(float(np.mean(values)), 4), "least": min(values)}
        for key, values in covers.items()
        if values
    }
    print(result["overall"])
    write_json(options.out, result)
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
