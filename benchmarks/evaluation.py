"""Benchmark an evaluation against torch-fidelity, pytorch-fid, clean-fid and scipy, on the CPU.

    python benchmarks/evaluation.py [PART ...]

- end_to_end: FID, KID, IS, precision and recall of two image folders against torch-fidelity, with the same network and
  random weights, and the largest relative difference of the metrics;
- pytorch_fid, clean_fid: the same with FID alone;
- end_to_end_cached, pytorch_fid_cached, clean_fid_cached: the same with stored features (of torch-fidelity and here) or
  statistics of the second folder;
- neighbours: precision, recall, density and coverage of 10,000 x 2048 features against torch-fidelity's precision and
  recall, and the peak memory that each adds, measured in a separate process;
- distance: the Frechet distance between two sets of statistics of 2048 features, with full-rank covariances.

The variants take turns in one process (see paired.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from memory import with_added_memory
from paired import compare, machine, table, take_turns
from PIL import Image
from random_inception import save_random_inception
from torch import Tensor

from gencompare.cache import cached_array
from gencompare.evaluation.extractors.torch_fidelity_networks import InceptionExtractor
from gencompare.evaluation.metrics.class_metrics import classifier_score
from gencompare.evaluation.metrics.frechet import Statistics, frechet_distance, gaussian_frechet_distance
from gencompare.evaluation.metrics.kernel import kid
from gencompare.evaluation.metrics.neighbors import compute_prdc
from gencompare.evaluation.reference import read_statistics
from gencompare.files import write_json
from gencompare.generative_model import DataSpec
from gencompare.records import now

RESULT = Path(__file__).parent / "results" / "evaluation.json"
DIM, ROWS = 2048, 10_000


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
    """Return how far the peak resident size grows beyond the two sets of features, in MiB."""
    a, b = correlated(ROWS, 1), correlated(ROWS, 2)
    NEIGHBOURS[name](a[:100], b[:100])
    return with_added_memory(NEIGHBOURS[name], a, b)[1]


SPEC = DataSpec(name="photos", shape=(3, 32, 32))


@contextmanager
def two_folders(images: int) -> Iterator[tuple[Path, list[Path]]]:
    """Yield a file of random weights of the FID network, and two folders of PNG files, the second real."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        yield save_random_inception(root / "inception.pth"), [write_images(root / str(k), images, k) for k in range(2)]


def compare_in_turns(theirs: Callable[[], list[float]], ours: Callable[[], list[float]], rounds: int) -> dict[str, Any]:
    """Time two functions that return the same metrics, and compare the metrics. The warm-up round fills the caches."""
    last: dict[str, list[float]] = {}
    variants = {"peer": lambda: last.update(peer=theirs()), "gencompare": lambda: last.update(gencompare=ours())}
    found = compare(take_turns(variants, rounds, warm_up=1), base="peer")
    off = max(abs(p - q) / max(abs(q), 1e-12) for p, q in zip(last["gencompare"], last["peer"], strict=True))
    found["gencompare"]["largest_relative_difference"] = off
    return found


def compare_end_to_end(rounds: int, images: int, cached: bool) -> dict[str, Any]:
    """Time both on the same PNG files: this package in one thread, torch-fidelity with its own data loader."""
    from torch_fidelity import calculate_metrics

    with two_folders(images) as (weights, folders):

        def theirs() -> list[float]:
            found = calculate_metrics(
                input1=str(folders[0]), input2=str(folders[1]), cuda=False, fid=True, kid=True, isc=True, prc=True,
                feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), batch_size=50,
                kid_subset_size=min(1000, images), cache=cached, cache_root=str(weights.parent / "cache"),
                input2_cache_name="real" if cached else None, verbose=False, save_cpu_ram=True,
            )  # fmt: skip
            names = ("frechet_inception_distance", "kernel_inception_distance_mean", "inception_score_mean")
            return [found[key] for key in (*names, "precision", "recall")]

        def ours() -> list[float]:
            extractor = InceptionExtractor(SPEC, weights)
            a = extractor(read_images(folders[0]))
            cache = weights.parent / "our_cache" if cached else None
            real = cached_array(cache, "real", lambda: extractor(read_images(folders[1])).features)
            assert a.logits is not None
            near = compute_prdc(a.features, real)
            return [
                frechet_distance(a.features, real), kid(a.features, real)[0], classifier_score(a.logits)[0],
                near.precision, near.recall,
            ]  # fmt: skip

        return compare_in_turns(theirs, ours, rounds)


Peer = Callable[[list[Path], Path | None, Path], float]
"""Returns the FID of two folders, with the weights in a file; a statistics file, if given, replaces the second."""


def by_pytorch_fid(folders: list[Path], statistics: Path | None, weights: Path) -> float:
    """It resizes images as torch does, not as TensorFlow 1 does, so its values differ by more than rounding."""
    from pytorch_fid import fid_score

    with patch("pytorch_fid.inception.load_state_dict_from_url", lambda *args, **kwargs: torch.load(weights)):
        paths = [str(folders[0]), str(statistics or folders[1])]
        return fid_score.calculate_fid_given_paths(paths, 50, torch.device("cpu"), 2048, os.cpu_count() or 1)


def by_clean_fid(folders: list[Path], statistics: Path | None, weights: Path) -> float:
    """clean-fid downloads its network as a TorchScript file; here it gets torch-fidelity's, which has the same weights
    and resizes inside the network, as in clean-fid's mode "legacy_tensorflow"."""
    from cleanfid import fid
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network: Any = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    options: dict[str, Any] = {
        "mode": "legacy_tensorflow", "num_workers": os.cpu_count(), "batch_size": 50, "device": torch.device("cpu"),
        "verbose": False, "custom_feat_extractor": lambda x: network(x.round().byte())[0],
    }  # fmt: skip
    if statistics is None:
        return fid.compute_fid(str(folders[0]), str(folders[1]), **options)

    def stored(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        with np.load(statistics) as file:
            return file["mu"], file["sigma"]

    with patch.object(fid, "get_reference_statistics", stored):
        return fid.compute_fid(str(folders[0]), dataset_name="photos", **options)


def compare_fid(peer: Peer, rounds: int, images: int, cached: bool) -> dict[str, Any]:
    with two_folders(images) as (weights, folders):
        statistics = weights.parent / "statistics.npz" if cached else None
        if statistics is not None:
            real = Statistics.from_features(InceptionExtractor(SPEC, weights)(read_images(folders[1])).features)
            np.savez(statistics, mu=real.mean.numpy(), sigma=real.cov.numpy())

        def ours() -> list[float]:
            extractor = InceptionExtractor(SPEC, weights)
            features = extractor(read_images(folders[0])).features
            if statistics is None:
                return [frechet_distance(features, extractor(read_images(folders[1])).features)]
            return [frechet_distance(features, read_statistics(statistics, extractor).statistics)]

        return compare_in_turns(lambda: [float(peer(folders, statistics, weights))], ours, rounds)


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


PEERS = {
    "end_to_end": ("torch-fidelity", "torch_fidelity", compare_end_to_end),
    "pytorch_fid": ("pytorch-fid", "pytorch_fid", partial(compare_fid, by_pytorch_fid)),
    "clean_fid": ("clean-fid", "cleanfid", partial(compare_fid, by_clean_fid)),
}
"""Name of the peer, its module, and the comparison, of each part that begins with image files."""
PARTS = [*(f"{part}{suffix}" for part in PEERS for suffix in ("", "_cached")), "neighbours", "distance"]


def measure(part: str, rounds: int, images: int) -> tuple[str, dict[str, Any]] | None:
    """Return (setting, variants) of a part, or None if its peer is not installed."""
    if part == "neighbours":
        return f"{ROWS:,} x {DIM}", compare_neighbours(rounds)
    if part == "distance":
        return f"{DIM} features, full rank", compare_distances(rounds)
    cached = part.endswith("_cached")
    name, module, function = PEERS[part.removesuffix("_cached")]
    if find_spec(module) is None:
        return None
    metrics = "FID, KID, IS, precision, recall" if name == "torch-fidelity" else "FID"
    setting = f"2 x {images} images of 32x32, {metrics}" + (", real images from a cache" if cached else "")
    variants = function(rounds, images, cached)
    return setting, {name: variants.pop("peer")} | variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--images", type=int, default=100, help="images in each folder of the parts with image files")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts or PARTS:
        description = machine()
        if (measured := measure(part, options.rounds, options.images)) is None:
            print(f"{part}: its peer is not installed, so this part is left out")
            continue
        setting, variants = measured
        result |= description
        result[part] = {"setting": setting, "created": now(), "load": description["load"], "variants": variants}
        print(table(f"{part}, {setting}", variants), flush=True)
        for name, row in variants.items():
            extra = {key: row[key] for key in ("added_memory_mb", "largest_relative_difference") if key in row}
            print(f"  {name}: {extra}" if extra else "", end="\n" if extra else "")
        write_json(options.out, result)  # after each part, because all parts take a quarter of an hour
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
