"""Test whether a metric orders degraded images as a person would."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from gencompare.evaluation.degradations import DEGRADATIONS, dropped_classes, repeated, unequal_classes
from gencompare.evaluation.extractors.extractor import Extractor
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.reference import EvaluationData, SupportsSampling, quantize_images, quantize_split
from gencompare.rng import generator

REAL, BASELINE = ("real", 0.0), ("gaussian", 0.0)
Key = tuple[str, float]
"""Identifies an image set: kind of degradation, and strength."""

CLASS_FAULTS: tuple[tuple[str, str, tuple[float, ...], Callable[[Tensor, float, torch.Generator], Tensor]], ...] = (
    ("dropped classes", "classes", (1, 2, 4, 6, 8), dropped_classes),
    ("unequal classes", "largest over smallest fraction", (1.5, 2, 4, 8, 16), unequal_classes),
)
REPEATS = (2, 4, 8, 16, 32)
COPIES = (0.1, 0.25, 0.5, 0.75, 1.0)
UNITS = {d.name: d.unit for d in DEGRADATIONS} | {name: unit for name, unit, *_ in CLASS_FAULTS} | {
    "repeated images": "times each", "training images": "fraction of copies",
}  # fmt: skip

PAIRS: tuple[tuple[Key, Key], ...] = (
    # Real images against the mildest visible degradation.
    (REAL, ("jpeg", 50)), (REAL, ("blur", 0.6)), (REAL, ("noise", 10)), (REAL, ("patch shuffle", 2)),
    (REAL, ("mixing", 0.3)), (REAL, ("pixelate", 2)), (REAL, ("contrast", 0.4)), (REAL, ("elastic", 5)),
    (REAL, ("checkerboard", 20)), (REAL, ("local translation", 0.6)), (REAL, ("dropped classes", 4)),
    # Two strengths of the same kind.
    (("blur", 0.6), ("blur", 1.0)), (("blur", 1.0), ("blur", 2.0)), (("noise", 10), ("noise", 25)),
    (("jpeg", 50), ("jpeg", 85)), (("patch shuffle", 2), ("patch shuffle", 4)), (("mixing", 0.1), ("mixing", 0.5)),
    (("pixelate", 2), ("pixelate", 4)), (("contrast", 0.25), ("contrast", 0.8)), (("elastic", 3), ("elastic", 12)),
    # Two kinds: a barely visible degradation against one that leaves images barely recognisable.
    (("jpeg", 50), ("blur", 1.0)), (("blur", 0.6), ("noise", 40)), (("blur", 0.6), ("patch shuffle", 4)),
    (("noise", 5), ("blur", 2.0)), (("noise", 10), ("blur", 3.0)), (("jpeg", 10), ("patch shuffle", 4)),
    (("checkerboard", 2), ("blur", 1.5)), (("checkerboard", 2), ("noise", 25)), (("contrast", 0.1), ("noise", 25)),
    (("blur", 0.6), ("patch shuffle", 14)), (("mixing", 0.1), ("blur", 2.0)), (("elastic", 1.5), ("patch shuffle", 7)),
    # Degraded images against samples of the Gaussian baseline.
    (("jpeg", 50), BASELINE), (("blur", 0.6), BASELINE), (("blur", 1.0), BASELINE), (("noise", 10), BASELINE),
    (("patch shuffle", 2), BASELINE), (("mixing", 0.5), BASELINE), (("contrast", 0.4), BASELINE),
    (("dropped classes", 4), BASELINE), (("checkerboard", 2), BASELINE), (("elastic", 3), BASELINE),
)  # fmt: skip
"""(better, worse): pairs of image sets whose order is obvious to a person."""


def image_sets(
    data: EvaluationData, n: int, baseline: SupportsSampling, seed: int = 0, split: str = "test"
) -> Iterator[tuple[Key, Tensor]]:
    """Yield the image sets to compare as (key, images), uint8 at the data set's own levels.

    They are up to ``n`` real images of ``split``, samples of ``baseline``, degraded real images, subsets with missing,
    unequal or repeated content, and mixtures with training images.
    """
    spec, part, train = data.spec, data.split(split), data.split("train")
    part = part[evenly_spaced_indices(len(part), n)]
    real = quantize_split(part.images, spec)
    n = len(real)
    yield REAL, real
    yield BASELINE, quantize_images(baseline.sample(n, generator=generator("cpu", seed, "baseline")).cpu(), spec)
    for degradation in DEGRADATIONS:
        if spec.shape[0] in degradation.channels:
            for strength in strengths(degradation.name, degradation.strengths, min(real.shape[2:])):
                yield (degradation.name, strength), quantize_images(degradation(real, strength, seed), spec)
    if part.labels is not None:
        for name, _, levels, rows in CLASS_FAULTS:
            for strength in levels:
                if name != "dropped classes" or strength < len(part.labels.unique()):
                    yield (name, strength), real[rows(part.labels, strength, generator("cpu", seed, name))]
    for times in REPEATS:
        yield ("repeated images", times), real[repeated(n, times, generator("cpu", seed, "repeats"))]
    copies = quantize_split(
        train.images[torch.randperm(len(train), generator=generator("cpu", seed, "copies"))[:n]], spec
    )
    for share in COPIES:
        mixed = real.clone()
        mixed[: round(share * n)] = copies[: round(share * n)]
        yield ("training images", share), mixed


def strengths(name: str, levels: Sequence[float], side: int) -> list[float]:
    """Return the strengths that images of ``side`` x ``side`` pixels allow: each patch needs at least one pixel."""
    return [level for level in levels if name != "patch shuffle" or level <= side]


@dataclass
class Candidate:
    """One layer of an extractor, and the metrics that are computed from its features."""

    name: str
    columns: slice
    metrics: Callable[[Tensor], dict[str, float]]
    """Maps sample features (n, d) to metrics by name. Lower is better for all of them."""
    min_images: int = 2
    """Smallest number of images for these metrics."""


@dataclass
class Score:
    """The result of one metric at one sample size n."""

    metric: str
    n: int
    spearman: dict[str, float]
    """Spearman's rank correlation between metric and strength, by kind of degradation."""
    pairs: int
    """Number of `PAIRS` that could be compared."""
    right: int
    """Number of pairs in the right order."""
    wrong: list[str]
    """The pairs in the wrong order."""
    detected: dict[str, float | None]
    """Lowest strength that the metric detects, by kind of degradation; None if it detects none (see
    `weakest_detected`)."""
    spread: float
    """Standard deviation of the metric over disjoint subsets of real images, divided by D_baseline - D_real, the
    difference of its mean values on samples of the Gaussian baseline and on real images."""
    relative: dict[str, dict[str, float]] = field(default_factory=dict)
    """(D - D_real) / (D_baseline - D_real) by kind of degradation and strength, where D is the mean value of the
    metric."""
    milliseconds: float = math.nan
    """Feature extraction time per image."""


def score(candidate: Candidate, features: Mapping[Key, Tensor], n: int, milliseconds: float = math.nan) -> list[Score]:
    """Score the metrics of ``candidate`` on disjoint subsets of at most ``n`` images of each set."""
    total = len(features[REAL])
    num_subsets = max(1, min(4, total // n))
    values: dict[Key, list[dict[str, float]]] = {}
    for key, rows in features.items():
        rows = rows[:, candidate.columns]
        # Strided subsets keep the class proportions of a sorted set.
        subsets = [rows[k::num_subsets][:n] for k in range(num_subsets)]
        values[key] = [candidate.metrics(subset) for subset in subsets if len(subset) >= candidate.min_images]
    scores = []
    for name in values[REAL][0]:
        of_metric = {key: [metrics[name] for metrics in subsets] for key, subsets in values.items()}
        scores.append(score_values(f"{candidate.name}: {name}", of_metric, n, milliseconds))
    return scores


def score_values(metric: str, values: Mapping[Key, Sequence[float]], n: int, milliseconds: float) -> Score:
    """Score one metric from its ``values`` on the subsets of each set."""
    mean = {key: fmean(subsets) if subsets else math.nan for key, subsets in values.items()}
    base, scale = mean[REAL], mean[BASELINE] - mean[REAL]
    kinds: dict[str, list[float]] = {}
    for kind, strength in values:
        if (kind, strength) not in (REAL, BASELINE):
            kinds.setdefault(kind, []).append(strength)
    known = [(a, b) for a, b in PAIRS if a in mean and b in mean and not math.isnan(mean[a] + mean[b])]
    wrong = [f"{_title(a)} > {_title(b)}" for a, b in known if not mean[a] < mean[b]]
    return Score(
        metric=metric, n=n, pairs=len(known), right=len(known) - len(wrong), wrong=wrong,
        spearman={kind: rank_correlation(levels, [mean[kind, s] for s in levels]) for kind, levels in kinds.items()},
        detected={kind: weakest_detected(kind, levels, values) for kind, levels in kinds.items()},
        spread=stdev(values[REAL]) / scale if len(values[REAL]) > 1 and scale > 0 else math.nan,
        relative={k: {f"{s:g}": (mean[k, s] - base) / scale for s in levels} for k, levels in kinds.items()},
        milliseconds=milliseconds,
    )  # fmt: skip


def rank_correlation(levels: Sequence[float], values: Sequence[float]) -> float:
    if len(set(values)) < 2 or any(math.isnan(value) for value in values):
        return math.nan
    return float(spearmanr(levels, values).statistic)  # type: ignore[attr-defined]


def weakest_detected(kind: str, levels: Sequence[float], values: Mapping[Key, Sequence[float]]) -> float | None:
    """Return the lowest strength of a degradation that the metric detects, or None.

    From that strength on, the metric is higher on every degraded subset than on any subset of real images.
    """
    weakest = None
    for level in reversed(levels):
        if not values[kind, level] or min(values[kind, level]) <= max(values[REAL]):
            break
        weakest = level
    return weakest


def _title(key: Key) -> str:
    return key[0] if key in (REAL, BASELINE) else f"{key[0]} {key[1]:g}"


def extract(
    sets: Mapping[Key, Tensor],
    extractor: Extractor,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Key, Tensor]:
    """Extract the features of each set."""
    features: dict[Key, Tensor] = {}
    for k, (key, images) in enumerate(sets.items()):
        features[key] = extractor(images, device).features
        if progress is not None:
            progress(f"{extractor.name} {extractor.resize}", k + 1, len(sets))
    return features


def table(scores: Sequence[Score]) -> str:
    """Format a Markdown table with a row for each metric and n: largest n first, then most pairs in the right order."""
    kinds = list(dict.fromkeys(kind for s in scores for kind in s.spearman))
    head = ["metric", "n", "pairs right", "mean Spearman", "spread / Gaussian", "ms an image", *kinds]
    lines = [head, ["---"] * len(head)]
    for s in sorted(scores, key=lambda s: (-s.n, -s.right / max(1, s.pairs), s.metric)):
        known = [value for kind, value in s.spearman.items() if not math.isnan(value) and kind != "training images"]
        lines.append([
            s.metric, f"{s.n:,}", f"{s.right} of {s.pairs}", f"{fmean(known):.3f}" if known else "",
            "" if math.isnan(s.spread) else f"{s.spread:.4f}", f"{s.milliseconds:.1f}",
            *("none" if s.detected.get(kind) is None else f"{s.detected[kind]:g}" for kind in kinds),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the scores as JSON data, with null for undefined values."""
    return [_defined(asdict(s)) for s in scores]


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _defined(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
