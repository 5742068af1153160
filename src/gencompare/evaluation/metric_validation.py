"""Does a metric of image quality agree with what a person sees? Degraded images, and how metrics order them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from gencompare.evaluation import reference
from gencompare.evaluation.degradations import DEGRADATIONS, dropped_classes, repeated, unequal_classes
from gencompare.evaluation.extractors.extractor import Extractor
from gencompare.evaluation.reference import as_stored, evenly_spaced_indices, stored_split
from gencompare.rng import generator

REAL, BASELINE = ("real", 0.0), ("gaussian", 0.0)
Key = tuple[str, float]
"""A set of images: the kind of degradation and its strength."""

CLASS_FAULTS: tuple[tuple[str, str, tuple[float, ...], Callable[[Tensor, float, torch.Generator], Tensor]], ...] = (
    ("dropped classes", "classes", (1, 2, 4, 6, 8), dropped_classes),
    ("unequal classes", "largest over smallest share", (1.5, 2, 4, 8, 16), unequal_classes),
)
REPEATS = (2, 4, 8, 16, 32)
COPIES = (0.1, 0.25, 0.5, 0.75, 1.0)
UNITS = {d.name: d.unit for d in DEGRADATIONS} | {name: unit for name, unit, *_ in CLASS_FAULTS} | {
    "repeated images": "times each", "training images": "share of copies",
}  # fmt: skip

PAIRS: tuple[tuple[Key, Key], ...] = (
    # Real images against the mildest fault that anybody sees.
    (REAL, ("jpeg", 50)), (REAL, ("blur", 0.6)), (REAL, ("noise", 10)), (REAL, ("patch shuffle", 2)),
    (REAL, ("mixing", 0.3)), (REAL, ("pixelate", 2)), (REAL, ("contrast", 0.4)), (REAL, ("elastic", 5)),
    (REAL, ("checkerboard", 20)), (REAL, ("local translation", 0.6)), (REAL, ("dropped classes", 4)),
    # One kind, two strengths.
    (("blur", 0.6), ("blur", 1.0)), (("blur", 1.0), ("blur", 2.0)), (("noise", 10), ("noise", 25)),
    (("jpeg", 50), ("jpeg", 85)), (("patch shuffle", 2), ("patch shuffle", 4)), (("mixing", 0.1), ("mixing", 0.5)),
    (("pixelate", 2), ("pixelate", 4)), (("contrast", 0.25), ("contrast", 0.8)), (("elastic", 3), ("elastic", 12)),
    # Two kinds where nobody hesitates: hardly visible against hard to recognise.
    (("jpeg", 50), ("blur", 1.0)), (("blur", 0.6), ("noise", 40)), (("blur", 0.6), ("patch shuffle", 4)),
    (("noise", 5), ("blur", 2.0)), (("noise", 10), ("blur", 3.0)), (("jpeg", 10), ("patch shuffle", 4)),
    (("checkerboard", 2), ("blur", 1.5)), (("checkerboard", 2), ("noise", 25)), (("contrast", 0.1), ("noise", 25)),
    (("blur", 0.6), ("patch shuffle", 14)), (("mixing", 0.1), ("blur", 2.0)), (("elastic", 1.5), ("patch shuffle", 7)),
    # A photograph with a fault against shapeless colours.
    (("jpeg", 50), BASELINE), (("blur", 0.6), BASELINE), (("blur", 1.0), BASELINE), (("noise", 10), BASELINE),
    (("patch shuffle", 2), BASELINE), (("mixing", 0.5), BASELINE), (("contrast", 0.4), BASELINE),
    (("dropped classes", 4), BASELINE), (("checkerboard", 2), BASELINE), (("elastic", 3), BASELINE),
)  # fmt: skip
"""(better, worse): pairs of sets of photographs whose order is obvious to a person."""


def battery(
    data: reference.EvaluationData, n: int, baseline: reference.SupportsSampling, seed: int = 0, split: str = "test"
) -> Iterator[tuple[Key, Tensor]]:
    """((kind, strength), images) of the study: up to ``n`` real images of ``split``, their degraded versions, training
    images, and samples of the ``baseline``; uint8 at the data's own grey levels."""
    spec, part, train = data.spec, data.split(split), data.split("train")
    part = part[evenly_spaced_indices(len(part), n)]
    real = stored_split(part.images, spec)
    n = len(real)
    yield REAL, real
    yield BASELINE, as_stored(baseline.sample(n, generator=generator("cpu", seed, "baseline")).cpu(), spec)
    for degradation in DEGRADATIONS:
        if spec.shape[0] in degradation.channels:
            for strength in strengths(degradation.name, degradation.strengths, min(real.shape[2:])):
                yield (degradation.name, strength), as_stored(degradation(real, strength, seed), spec)
    if part.labels is not None:
        for name, _, levels, rows in CLASS_FAULTS:
            for strength in levels:
                if name != "dropped classes" or strength < len(part.labels.unique()):
                    yield (name, strength), real[rows(part.labels, strength, generator("cpu", seed, name))]
    for times in REPEATS:
        yield ("repeated images", times), real[repeated(n, times, generator("cpu", seed, "repeats"))]
    copies = stored_split(
        train.images[torch.randperm(len(train), generator=generator("cpu", seed, "copies"))[:n]], spec
    )
    for share in COPIES:
        mixed = real.clone()
        mixed[: round(share * n)] = copies[: round(share * n)]
        yield ("training images", share), mixed


def strengths(name: str, levels: Sequence[float], side: int) -> list[float]:
    """The strengths that images of ``side`` pixels can take: a grid of patches needs a pixel for each."""
    return [level for level in levels if name != "patch shuffle" or level <= side]


@dataclass
class Candidate:
    """Features of one extractor and layer, and metrics that are computed from them together."""

    name: str
    columns: slice
    metrics: Callable[[Tensor], dict[str, float]]
    """Features of samples (n, d) to metrics by name, each the larger the worse the samples are."""
    least: int = 2
    """Fewest images that it takes."""


@dataclass
class Score:
    """How one metric does at one n."""

    metric: str
    n: int
    spearman: dict[str, float]
    """Rank correlation of the metric with the strength, by kind of degradation."""
    pairs: int
    right: int
    wrong: list[str]
    """The pairs in the wrong order."""
    detected: dict[str, float | None]
    """By kind, the weakest strength that every disjoint draw tells apart from every disjoint draw of real images."""
    spread: float
    """Standard deviation over disjoint draws of real images, as a share of the baseline's excess over them."""
    relative: dict[str, dict[str, float]] = field(default_factory=dict)
    """(D - D_real) / (D_baseline - D_real) by kind and strength."""
    milliseconds: float = math.nan
    """Of the extractor, for one image."""


def score(candidate: Candidate, features: Mapping[Key, Tensor], n: int, milliseconds: float = math.nan) -> list[Score]:
    """The scores of each metric of ``candidate`` with ``n`` images a set, or fewer, over disjoint draws."""
    total = len(features[REAL])
    draws = max(1, min(4, total // n))
    found: dict[Key, list[dict[str, float]]] = {}
    for key, own in features.items():
        own = own[:, candidate.columns]
        # Each draw takes every k-th image: of a set sorted by class, a fair part of each.
        parts = [own[k::draws][:n] for k in range(draws)]
        found[key] = [candidate.metrics(part) for part in parts if len(part) >= candidate.least]
    names = list(found[REAL][0])
    return [
        score_of(
            f"{candidate.name}: {name}", {key: [m[name] for m in of] for key, of in found.items()}, n, milliseconds
        )
        for name in names
    ]


def score_of(metric: str, values: Mapping[Key, Sequence[float]], n: int, milliseconds: float) -> Score:
    """The score of one metric from its ``values`` on the draws of each set."""
    draws = len(values[REAL])
    mean = {key: fmean(of) if of else math.nan for key, of in values.items()}
    base, scale = mean[REAL], mean[BASELINE] - mean[REAL]
    kinds: dict[str, list[float]] = {}
    for kind, strength in values:
        if (kind, strength) not in (REAL, BASELINE):
            kinds.setdefault(kind, []).append(strength)
    known = [(a, b) for a, b in PAIRS if a in mean and b in mean and not math.isnan(mean[a] + mean[b])]
    wrong = [f"{title(a)} > {title(b)}" for a, b in known if not mean[a] < mean[b]]
    return Score(
        metric=metric, n=n, pairs=len(known), right=len(known) - len(wrong), wrong=wrong,
        spearman={kind: correlation(levels, [mean[kind, s] for s in levels]) for kind, levels in kinds.items()},
        detected={kind: weakest(kind, levels, values) for kind, levels in kinds.items()},
        spread=stdev(values[REAL]) / scale if draws > 1 and scale > 0 else math.nan,
        relative={k: {f"{s:g}": (mean[k, s] - base) / scale for s in levels} for k, levels in kinds.items()},
        milliseconds=milliseconds,
    )  # fmt: skip


def correlation(levels: Sequence[float], found: Sequence[float]) -> float:
    if len(set(found)) < 2 or any(math.isnan(value) for value in found):
        return math.nan
    return float(spearmanr(levels, found).statistic)  # type: ignore[attr-defined]


def weakest(kind: str, levels: Sequence[float], values: Mapping[Key, Sequence[float]]) -> float | None:
    """The weakest strength from which on all draws lie above all draws of real images; None where none does."""
    found = None
    for level in reversed(levels):
        if not values[kind, level] or min(values[kind, level]) <= max(values[REAL]):
            break
        found = level
    return found


def title(key: Key) -> str:
    return key[0] if key in (REAL, BASELINE) else f"{key[0]} {key[1]:g}"


def extract(
    sets: Mapping[Key, Tensor],
    extractor: Extractor,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Key, Tensor]:
    """Features of each set. Subsets and repeats of real images are computed once."""
    found: dict[Key, Tensor] = {}
    for k, (key, images) in enumerate(sets.items()):
        found[key] = extractor(images, device).features
        if progress is not None:
            progress(f"{extractor.name} {extractor.resize}", k + 1, len(sets))
    return found


def table(scores: Sequence[Score]) -> str:
    """Markdown: a row for each metric and n, the most pairs in the right order first."""
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
    """The scores for a JSON file, in which a value that is not defined is null."""
    return [_defined(asdict(s)) for s in scores]


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _defined(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
