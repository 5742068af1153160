"""task=validate_metrics: check how each metric ranks test images with degradations of known strength."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib as mpl
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metric_validation import (  # fmt: skip
    UNITS,
    Candidate,
    Score,
    as_json,
    extract,
    image_sets,
    score,
    table,
)
from gencompare.evaluation.metrics.frechet import Statistics, frechet_distance
from gencompare.evaluation.metrics.kernel import CubicKernel, GaussianKernel, Kernel, KernelReference, kernel_distance
from gencompare.evaluation.metrics.neighbors import compute_prdc
from gencompare.evaluation.reference import quantize_split
from gencompare.files import atomic_write, write_json, write_text
from gencompare.tasks.runs.build import build_data, build_protocol, choose_device
from gencompare.tasks.runs.console import stage_progress
from gencompare.tasks.runs.environment import environment
from gencompare.tasks.runs.run_folder import refuse_existing_run

NUM_TIMED_IMAGES = 100
LOCATION_PREFIXES = ("hydra.", "paths.", "trainer", "logger")
"""Prefixes of overrides that do not affect the scores."""


def validate_metrics(cfg: DictConfig) -> None:
    """Score every metric on every layer of every extractor, for each sample size in ``cfg.task.num_images``.

    Write ``metrics.json`` (all values), ``metrics.md`` (a table) and ``metrics.png`` to ``cfg.out``.
    """
    folder = Path(cfg.out)
    refuse_existing_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = build_data(cfg)
    if data.spec.num_bins is None:
        raise UserError(f"task=validate_metrics needs images, but data set '{data.spec.name}' has points.")
    sizes = sorted(int(n) for n in cfg.task.num_images)
    baseline = instantiate(cfg.task.baseline, _partial_=True)(spec=data.spec)
    baseline.fit(data.batches("train"), data.batches("val"))
    sets = dict(image_sets(data, sizes[-1], baseline, cfg.seed))
    train = data.split("train")
    reference = quantize_split(
        train[evenly_spaced_indices(len(train), cfg.task.num_reference_images)].images, data.spec
    )
    device, scores = choose_device(cfg), []
    with stage_progress(cfg.callbacks.progress_bar) as progress:
        for extractor in build_protocol(cfg).build_extractors(data.spec):
            milliseconds = milliseconds_per_image(extractor, reference[:NUM_TIMED_IMAGES], device)
            real = extractor(reference, device).features
            features = extract(sets, extractor, device, progress)
            for candidate in candidates(extractor, real):
                usable = sorted({min(n, len(sets["real", 0.0])) for n in sizes})
                scores += [
                    s for n in usable if n >= candidate.min_images for s in score(candidate, features, n, milliseconds)
                ]
                if progress is not None:
                    progress(f"scores of {extractor.name} {extractor.resize}", len(scores), len(scores))
    write_json(folder / "metrics.json", {
        "data": data.spec.name, "hash": data.hash("test"), "references": len(reference), "seed": cfg.seed,
        "environment": environment(device), "command": [o for o in cfg.command if not o.startswith(LOCATION_PREFIXES)],
        "scores": as_json(scores),
    })  # fmt: skip
    text = table(scores)
    write_text(folder / "metrics.md", text)
    with atomic_write(folder / "metrics.png") as file:
        plot_scores(scores, data.spec.name).savefig(file, format="png", dpi=80)
    print(f"{text}\n{folder / 'metrics.png'}")


def milliseconds_per_image(extractor: Extractor, images: Tensor, device: torch.device) -> float:
    """Measure the time of an extractor per image, after a warm-up."""
    extractor(images, device)
    start = time.perf_counter()
    extractor(images, device)
    return 1000 * (time.perf_counter() - start) / len(images)


def candidates(extractor: Extractor, reference: Tensor) -> list[Candidate]:
    """Combine every layer of ``extractor`` with every metric. ``reference`` (m, d) are the features of real images."""
    kernels: dict[str, Kernel] = {
        "cubic kernel": CubicKernel(),
        **{f"MMD, b = {factor:g} x median": GaussianKernel(median_factor=factor) for factor in (0.5, 1.0, 2.0)},
        "CMMD": GaussianKernel(10.0, normalize=True),
    }
    result = []
    for layer, columns in extractor.layer_slices.items():
        real = reference[:, columns]
        name = " ".join(part for part in (extractor.name, short_resize(extractor.resize), layer) if part)
        statistics, dim = Statistics.from_features(real), real.shape[1]
        fitted = {name: KernelReference.from_features(real, kernel) for name, kernel in kernels.items()}

        def distances(own: Tensor, fitted: dict[str, KernelReference] = fitted) -> dict[str, float]:
            return {name: kernel_distance(own, side).value for name, side in fitted.items()}

        def frechet(own: Tensor, statistics: Statistics = statistics) -> dict[str, float]:
            return {"Frechet": frechet_distance(own, statistics)}

        def complements(own: Tensor, real: Tensor = real) -> dict[str, float]:
            values = compute_prdc(own, real[evenly_spaced_indices(len(real), len(own))])
            return {f"1 - {kind}": 1 - getattr(values, kind) for kind in ("precision", "recall", "density", "coverage")}

        result += [
            Candidate(name, columns, distances, min_images=10),
            Candidate(name, columns, frechet, min_images=dim + 1),
            Candidate(name, columns, complements, min_images=10),
        ]
    return result


def short_resize(resize: str) -> str:
    """Extract the size from a description of resizing, such as ``96 px``. Return an empty string if there is none."""
    sizes = [
        word.split("x")[0] for word in resize.replace(",", " ").split() if word.count("x") == 1 and word[0].isdigit()
    ]
    return f"{sizes[0]} px" if sizes else ""


def plotted_scores(scores: list[Score]) -> list[Score]:
    """Select the distances of the layer with the best MMD, and the Frechet distances of other layers; at most ten."""
    mmd = [s for s in scores if s.metric.endswith(": MMD, b = 1 x median")]
    first = min(mmd, key=lambda s: (-s.right / max(1, s.pairs), s.metric)).metric.split(":")[0]
    own = [s for s in scores if s.metric.split(":")[0] == first and " - " not in s.metric]
    return [*own, *(s for s in scores if s not in own and s.metric.endswith(": Frechet"))][:10]


def plot_scores(scores: list[Score], data: str) -> Figure:
    """Plot each metric, relative to the Gaussian baseline, against strength, with a panel per kind of degradation."""
    largest = max(s.n for s in scores)
    shown = [s for s in scores if s.n == largest]
    best = plotted_scores(shown)
    kinds = list(dict.fromkeys(kind for s in shown for kind in s.relative))
    figure = Figure(figsize=(16, 3.1 * -(-len(kinds) // 4) + 1.0), layout="constrained")
    axes = figure.subplots(-(-len(kinds) // 4), 4, squeeze=False).ravel()
    colors = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axis, kind in zip(axes, kinds, strict=False):
        for k, s in enumerate(best):
            values = s.relative.get(kind, {})
            axis.plot(range(len(values)), list(values.values()), "o-", ms=3, lw=1, color=colors[k], label=s.metric)
        levels = list(best[0].relative.get(kind, {}))
        axis.set_xticks(range(len(levels)), levels)
        axis.axhline(1, color="0.6", lw=0.8, ls=":")
        axis.set_yscale("symlog", linthresh=0.1)
        axis.set_title(kind, fontsize=10)
        axis.set_xlabel(UNITS.get(kind, ""), fontsize=8)
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(
        f"{data}, {largest:,} images per set: distance relative to the Gaussian baseline (dotted: 1)", fontsize=11
    )
    return figure
