"""Do comparisons that stop by themselves keep their error rate, and how many samples do they need?

    python benchmarks/sequential.py

Pairs of models whose features are Gaussian, compared by the kernel distance to one reference. Equal pairs count false
claims of a sign. For different pairs, the second model is shifted until the expected difference is a given number of
standard errors of the difference at all samples; the median number of samples at the decision is relative to these.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from gencompare.evaluation.metrics.kernel import GaussianKernel, KernelReference, KernelSums
from gencompare.evaluation.sequential import (
    difference_looks,
    early_spending,
    even_spending,
    first_look,
    levels,
    looks,
    mean_looks,
    sign_is_known,
)
from gencompare.files import write_text

RESULT = Path(__file__).parent / "results" / "sequential.json"
DIM, NUM_REFERENCE, NUM_IMAGES, CHUNK_SIZE = 8, 250, 240, 60
CALIBRATION_PAIRS = 200


def samples(shift: float, n: int, random: torch.Generator) -> Tensor:
    x = torch.randn(n, DIM, generator=random)
    x[:, 0] += shift
    return x


def reference() -> KernelReference:
    return KernelReference.from_features(samples(0.0, NUM_REFERENCE, generator(0)), GaussianKernel())


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def differences_at_all_samples(shifts: tuple[float, float], real: KernelReference, pairs: int) -> np.ndarray:
    values = []
    for k in range(pairs):
        a, b = KernelSums(real), KernelSums(real)
        random = generator(1, k)
        a.add(samples(shifts[0], NUM_IMAGES, random))
        b.add(samples(shifts[1], NUM_IMAGES, random))
        values.append(a.difference(b).value)
    return np.array(values)


def calibrated(shift: float, standard_errors: float, real: KernelReference) -> float:
    """Return the shift of the second model at which the expected difference is ``standard_errors`` of it."""
    grid = shift + np.array([0.0, 0.05, 0.1, 0.2, 0.4, 0.8])
    ratios = []
    for other in grid:
        values = differences_at_all_samples((shift, float(other)), real, CALIBRATION_PAIRS)
        ratios.append(abs(values.mean()) / values.std(ddof=1) if other > shift else 0.0)
    for (x_0, r_0), (x_1, r_1) in pairwise(zip(grid, ratios, strict=True)):
        if r_1 >= standard_errors:
            return float(x_0 + (x_1 - x_0) * (standard_errors - r_0) / (r_1 - r_0))
    raise ValueError("the grid of shifts is too narrow")


def distances(shift: float, other: float, pairs: int, real: KernelReference) -> dict[str, Any]:
    """Compare pairs by the kernel distance. The sign of the truth is negative: the first model is closer."""
    stops, signs = [], []
    for k in range(pairs):
        random = generator(2, k, int(1e6 * other))
        a, b = samples(shift, NUM_IMAGES, random), samples(other, NUM_IMAGES, random)
        found = difference_looks(lambda n, a=a: a[:n], lambda n, b=b: b[:n], real, NUM_IMAGES, CHUNK_SIZE)
        look = first_look(found, sign_is_known)
        stops.append(look.num_images if sign_is_known(look) else np.inf)
        signs.append(np.sign(look.estimate.value) if sign_is_known(look) else 0)
    return summary(stops, signs, NUM_IMAGES)


def likelihoods(standard_errors: float, pairs: int) -> dict[str, Any]:
    """Compare pairs by bits/dim: differences of images are a Student t with 5 degrees of freedom."""
    stops, signs = [], []
    spread = (5 / 3) ** 0.5
    for k in range(pairs):
        noise = np.random.default_rng([3, k]).standard_t(5, NUM_IMAGES)
        values = torch.from_numpy(noise - standard_errors * spread / NUM_IMAGES**0.5)
        look = first_look(mean_looks(lambda n, values=values: values[:n], NUM_IMAGES, CHUNK_SIZE), sign_is_known)
        stops.append(look.num_images if sign_is_known(look) else np.inf)
        signs.append(np.sign(look.estimate.value) if sign_is_known(look) else 0)
    return summary(stops, signs, NUM_IMAGES)


def normal_theory(paths: int = 100_000) -> dict[str, Any]:
    """Return the power of both ways to spend the error for a Wiener process with drift."""
    shares = tuple(n / NUM_IMAGES for n in looks(NUM_IMAGES, CHUNK_SIZE))
    steps = np.random.default_rng(4).standard_normal((paths, len(shares)))
    wiener = np.cumsum(steps * np.sqrt(np.diff((0.0, *shares))), axis=1)
    found: dict[str, Any] = {}
    for spending in (early_spending, even_spending):
        limits = np.array([norm.isf((1 - level) / 2) for level in levels(shares, spending(shares))]) * np.sqrt(shares)
        for errors in (3.0, 4.0):
            outside = wiener + errors * np.array(shares) > limits
            found.setdefault(spending.__name__, {})[f"{errors:g} standard errors"] = {
                "claims": round(float(outside.any(1).mean()), 3),
                "decided_at_a_quarter": round(float(outside[:, 0].mean()), 3),
            }
    return found


def summary(stops: list[float], signs: list[float], num_images: int) -> dict[str, Any]:
    median = float(np.median(stops))
    return {
        "pairs": len(stops),
        "claims": float(np.mean(np.isfinite(stops))),
        "wrong_signs": float(np.mean(np.array(signs) > 0)),
        "decided_at_a_quarter": float(np.mean(np.array(stops) <= num_images / 4)),
        "median_share": median / num_images if np.isfinite(median) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = reference()
    results: dict[str, Any] = {
        "setting": {
            "features": DIM, "reference_images": NUM_REFERENCE, "images": NUM_IMAGES, "chunk_size": CHUNK_SIZE,
            "looks": looks(NUM_IMAGES, CHUNK_SIZE),
        },
        "normal_theory": normal_theory(), "kernel_distance": {}, "bits_per_dim": {},
    }  # fmt: skip
    for name, shift in (("equal, as far from the reference as a model", 0.5), ("equal to the reference", 0.0)):
        results["kernel_distance"][name] = distances(shift, shift, options.pairs, real)
        print(name, results["kernel_distance"][name], flush=True)
    results["bits_per_dim"]["equal"] = likelihoods(0.0, options.pairs)
    for errors in (3.0, 4.0, 6.0):
        name, other = f"differ by {errors:g} standard errors", calibrated(0.5, errors, real)
        results["kernel_distance"][name] = distances(0.5, other, options.pairs, real) | {"shift": round(other, 4)}
        results["bits_per_dim"][name] = likelihoods(errors, options.pairs)
        print(name, results["kernel_distance"][name], results["bits_per_dim"][name], flush=True)
    write_text(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
