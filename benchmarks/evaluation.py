"""Benchmark an evaluation against torch-fidelity and scipy, on the CPU.

    python benchmarks/evaluation.py

- distance: the Frechet distance between two sets of statistics of 2048 features, with full-rank covariances;
- neighbours: precision, recall, density and coverage of 10,000 x 2048 features against torch-fidelity's precision and
  recall, and the peak memory that each adds, measured in a separate process;
- end to end: FID, KID, IS, precision and recall of two image folders, with the same network and random weights, and
  the largest relative difference of the metrics.

The variants take turns in one process (see paired.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import compare, table, take_turns
from PIL import Image
from random_inception import save_random_inception
from torch import Tensor

from gencompare.evaluation.extractors.torch_fidelity_networks import InceptionExtractor
from gencompare.evaluation.metrics.class_metrics import classifier_score
from gencompare.evaluation.metrics.frechet import Statistics, frechet_distance, gaussian_frechet_distance
from gencompare.evaluation.metrics.kernel import kid
from gencompare.evaluation.metrics.neighbors import compute_prdc
from gencompare.files import write_json
from gencompare.generative_model import DataSpec
from gencompare.records import now
from gencompare.tasks.runs.environment import environment

RESULT = Path(__file__).parent / "results" / "evaluation.json"
DIM, ROWS = 2048, 10_000
PARTS = ["end_to_end", "neighbours", "distance"]


def correlated(rows: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, DIM, generator=g) @ (torch.randn(DIM, DIM, generator=g) / DIM**0.5) + 0.1 * seed


def compare_distances(rounds: int) -> dict[str, Any]:
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    sets = [correlated(3000, seed) for seed in (1, 2)]
    ours = [Statistics.from_features(x) for x in sets]
    theirs = [fid_features_to_statistics(x.double()) for x in sets]
    covariances = [s.cov.numpy() for s in ours]

    def plain() -> None:
        np.trace(np.real(np.asarray(sqrtm(covariances[0] @ covariances[1]))))

    def ours_uncached() -> None:
        gaussian_frechet_distance(ours[0], Statistics(ours[1].mean, ours[1].cov))  # a new object without a cached root

    return compare(
        take_turns(
            {
                "torch-fidelity": lambda: fid_statistics_to_metric(*theirs, verbose=False),
                "scipy sqrtm": plain,
                "gencompare": ours_uncached,
            },
            rounds,
            warm_up=1,
        ),
        base="torch-fidelity",
    )


def own_neighbours(a: Tensor, b: Tensor) -> None:
    compute_prdc(a, b)


def their_neighbours(a: Tensor, b: Tensor) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=ROWS, save_cpu_ram=False, verbose=False)


NEIGHBOURS = {"torch-fidelity": their_neighbours, "gencompare": own_neighbours}


def compare_neighbours(rounds: int) -> dict[str, Any]:
    a, b = correlated(ROWS, 1), correlated(ROWS, 2)
    laps = take_turns({name: lambda f=f: f(a, b) for name, f in NEIGHBOURS.items()}, rounds, warm_up=1)
    found = compare(laps, base="torch-fidelity")
    for name in NEIGHBOURS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name]["added_memory_mb"] = pool.apply(added_memory, (name,))
    return found


def added_memory(name: str) -> int:
    """Return how far the peak resident size grows beyond the two sets of features, in MB."""
    a, b = correlated(ROWS, 1), correlated(ROWS, 2)
    NEIGHBOURS[name](a[:100], b[:100])
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak (Linux)
    before = peak_mb()
    NEIGHBOURS[name](a, b)
    return peak_mb() - before


def peak_mb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def compare_end_to_end(rounds: int, images: int) -> dict[str, Any]:
    """Time both on the same PNG files: this package in one thread, torch-fidelity with its own data loader."""
    from torch_fidelity import calculate_metrics

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        weights = save_random_inception(root / "inception.pth")
        folders = [write_images(root / str(k), images, seed=k) for k in range(2)]
        last: dict[str, list[float]] = {}

        def theirs() -> None:
            found = calculate_metrics(
                input1=str(folders[0]), input2=str(folders[1]), cuda=False, fid=True, kid=True, isc=True, prc=True,
                feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), batch_size=50,
                kid_subset_size=min(1000, images), cache=False, verbose=False, save_cpu_ram=True,
            )  # fmt: skip
            names = ("frechet_inception_distance", "kernel_inception_distance_mean", "inception_score_mean")
            last["theirs"] = [found[key] for key in (*names, "precision", "recall")]

        def ours() -> None:
            extractor = InceptionExtractor(DataSpec(name="photos", shape=(3, 32, 32)), weights)
            a, b = (extractor(read_images(folder)) for folder in folders)
            assert a.logits is not None
            near = compute_prdc(a.features, b.features)
            last["ours"] = [
                frechet_distance(a.features, b.features), kid(a.features, b.features)[0],
                classifier_score(a.logits)[0], near.precision, near.recall,
            ]  # fmt: skip

        laps = take_turns({"torch-fidelity": theirs, "gencompare": ours}, rounds, warm_up=1)
    found = compare(laps, base="torch-fidelity")
    off = max(abs(p - q) / max(abs(q), 1e-12) for p, q in zip(last["ours"], last["theirs"], strict=True))
    found["gencompare"]["largest_relative_difference"] = off
    return found


def write_images(folder: Path, n: int, seed: int) -> Path:
    """Write smooth random images; a larger seed gives more detail and contrast."""
    folder.mkdir()
    side, contrast = 4 * 4**seed, 30 + 60 * seed
    coarse = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").mul(contrast).add(128).clamp(0, 255)
    for k, image in enumerate(images.byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{k:05d}.png")
    return folder


def read_images(folder: Path) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in sorted(folder.iterdir())])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the parts of an evaluation.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--images", type=int, default=100, help="images in each folder of the end-to-end part")
    parser.add_argument("--only", choices=PARTS, help="run this part and keep the stored results of the others")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(torch.device("cpu")), "processors": os.cpu_count()}
    if options.only is not None:
        result = json.loads(options.out.read_text()) | result

    def report(part: str, setting: str, variants: dict[str, Any]) -> None:
        result[part] = {"setting": setting, "created": now(), "load": os.getloadavg()[0], "variants": variants}
        print(table(f"{part}, {setting}", variants), flush=True)
        write_json(options.out, result)  # after each part, because all parts take a quarter of an hour

    parts = [options.only] if options.only else PARTS
    setting = f"2 x {options.images} images of 32x32, FID, KID, IS, precision, recall"
    if "end_to_end" in parts:
        report("end_to_end", setting, compare_end_to_end(options.rounds, options.images))
    if "neighbours" in parts:
        report("neighbours", f"{ROWS:,} x {DIM}", compare_neighbours(options.rounds))
    if "distance" in parts:
        report("distance", f"{DIM} features, full rank", compare_distances(options.rounds))
    for part in ("neighbours", "end_to_end"):
        for name, row in result[part]["variants"].items():
            extra = {key: row[key] for key in ("added_memory_mb", "largest_relative_difference") if key in row}
            if extra:
                print(f"  {part}, {name}: {extra}")
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
