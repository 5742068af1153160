"""Cheap figures while a model trains: for curves and for the choice of ``best``, never for a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from torch import Tensor

from gencompare.evaluation import reference
from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.evaluation.metrics.class_metrics import (
    CONFIDENCE,
    class_shares,
    classifier_score,
    confident,
    label_accuracy,
)
from gencompare.evaluation.metrics.frechet import Jackknife, Statistics, between, frechet_distance
from gencompare.evaluation.metrics.intervals import Estimate
from gencompare.evaluation.metrics.kernel import kernel_distance, kid, mmd
from gencompare.evaluation.metrics.neighbors import DENSITY_NEIGHBOURS, authenticity, memorization_ratio, neighbor_balls
from gencompare.evaluation.reference import Reference, as_stored, evenly_spaced_indices, reference_of
from gencompare.records import Metric

ExtraMetric = Mapping[str, Callable[[Tensor, Tensor], float]]
"""Metrics that a protocol adds, by name. One with a method ``estimate`` has an interval too."""

HEAVY = 0.25
"""Share of the variance of a distance that one image makes up, above which a note says so."""
FEW_FOR_INFINITY = 3
"""Samples a feature below which the distance at infinity is too low by more than its interval."""


@dataclass(frozen=True)
class RealFeatures:
    """Real images beside the reference, for the figures that look for copies."""

    train: Features
    test: Features
    val: Features


def compute_metrics(
    own: Features,
    reference: Reference,
    extractor: Extractor,
    *,
    labels: Tensor | None = None,
    further: ExtraMetric | None = None,
    error: bool = True,
) -> dict[str, Metric]:
    """Distances, neighbourhood figures and class figures of ``own``, by name.

    Args:
        labels: (n,) the class that each image was made for.
        further: figures that the protocol adds.
        error: give the Frechet distance its interval.
    """
    found = distances(own, reference, extractor, error=error)
    found |= spatial_distance(own, reference, extractor)
    if reference.features is not None:
        found |= neighbor_metrics(own.features, reference.features.features)
        for name, metric in (further or {}).items():
            found[name] = extra_metric(metric, own.features, reference.features.features)
    if own.logits is not None:
        found |= class_metrics(own.logits, labels if extractor.knows_classes else None, extractor)
    if labels is not None:
        found |= by_class(own.features, labels, reference, extractor)
    return found


def add_baselines(own: dict[str, Metric], real: dict[str, Metric], note: str) -> dict[str, Metric]:
    """``own`` with the same figures of real images as floors; ``note`` says what sets these apart, if anything does."""
    paired = {}
    for name, metric in own.items():
        floor = real[name].value if name in real else None
        notes = [part for part in (metric.note, note if floor is not None else "") if part]
        paired[name] = replace(metric, floor=floor, note="; ".join(notes))
    return paired


def distances(own: Features, reference: Reference, extractor: Extractor, *, error: bool) -> dict[str, Metric]:
    """Maximum mean discrepancy, Frechet distance (at n and at n = infinity) and kernel distance."""
    frechet, kernel = extractor.frechet_name, extractor.kernel_name
    found: dict[str, Metric] = {}
    if reference.features is not None and len(own) > 2:
        found[extractor.mmd_name] = distance_metric(mmd(own.features, reference.kernel), unbiased=True)
        found[kernel] = cubic_distance(own.features, reference, kernel)
    statistics = reference.statistics
    if float(statistics.cov.diagonal().sum()) == 0:
        return found | {frechet: Metric(None, "lower", note="all reference images are alike")}
    few = f"{len(own)} images, {extractor.dim} features: mostly bias" if len(own) <= extractor.dim else ""
    jackknife = Jackknife(own.features, statistics)
    found[frechet] = distance_metric(jackknife.distance if error and not few else Estimate(jackknife.value, None), few)
    if not few:
        enough = len(own) >= FEW_FOR_INFINITY * extractor.dim
        low = "" if enough else f"too low, from under {FEW_FOR_INFINITY} images a feature"
        infinity = jackknife.infinity if error else Estimate(jackknife.value_at_infinity, None)
        found[f"{frechet}_infinity"] = distance_metric(infinity, "extrapolated", low)
    return found


def distance_metric(estimate: Estimate, *notes: str, unbiased: bool = False) -> Metric:
    """The metric of a distance and its interval; a note says so where one image decides both."""
    share = estimate.largest_share
    heavy = f"heavy tails: one image makes up {share:.0%} of the variance" if share > HEAVY else ""
    note = "; ".join(filter(None, [*notes, heavy]))
    return Metric(estimate.value, "lower", interval=estimate.interval, note=note, unbiased=unbiased)


def cubic_distance(own: Tensor, reference: Reference, name: str) -> Metric:
    """Kernel distance with the cubic kernel; the one called ``kid`` is the mean over subsets, as it is published."""
    assert reference.features is not None
    estimate = kernel_distance(own, reference.cubic)
    if name != "kid":
        return distance_metric(estimate, unbiased=True)
    mean, spread = kid(own, reference.features.features)
    return distance_metric(replace(estimate, value=mean), f"subsets +- {spread:.2g}", unbiased=True)


def extra_metric(metric: Callable[[Tensor, Tensor], float], own: Tensor, reference: Tensor) -> Metric:
    better = getattr(metric, "better", None)
    if not hasattr(metric, "estimate"):
        return Metric(metric(own, reference), better)
    estimate: Estimate = metric.estimate(own, reference)  # type: ignore[attr-defined]
    return Metric(estimate.value, better, interval=estimate.interval)


def spatial_distance(own: Features, reference: Reference, extractor: Extractor) -> dict[str, Metric]:
    """Frechet distance of activations that still know their places (Nash et al. 2021, "Generating images with sparse
    representations", section 5: sFID)."""
    if own.spatial is None or reference.spatial is None:
        return {}
    name = f"s{extractor.frechet_name}"
    if len(own) <= own.spatial.shape[1]:
        return {name: Metric(None, "lower", note=f"{len(own)} images, {own.spatial.shape[1]} features")}
    return {name: Metric(between(Statistics.of(own.spatial), reference.spatial), "lower")}


def neighbor_metrics(own: Tensor, reference: Tensor) -> dict[str, Metric]:
    """Precision, recall, density, coverage against as many reference images as there are samples: balls shrink as a set
    grows."""
    names = ("precision", "recall", "density", "coverage")
    if min(len(own), len(reference)) <= DENSITY_NEIGHBOURS:
        return {}
    n = min(len(own), len(reference))
    found = neighbor_balls(own[evenly_spaced_indices(len(own), n)], reference[evenly_spaced_indices(len(reference), n)])
    repeated = max(found.zero_radii, found.zero_radii_reference)
    note = f"{repeated:.0%} of the k-NN radii are 0: repeated images" if repeated >= 0.01 else ""
    return {name: Metric(getattr(found, name), "higher", note=note) for name in names}


def class_metrics(logits: Tensor, labels: Tensor | None, extractor: Extractor) -> dict[str, Metric]:
    """What the extractor's classifier sees."""
    score, spread = classifier_score(logits)
    found = {extractor.score_name: Metric(score, "higher", note=f"parts +- {spread:.2g}")}
    if extractor.knows_classes:
        shares = class_shares(logits)
        found["confident"] = Metric(confident(logits), "higher", note=f"classifier at least {CONFIDENCE} sure")
        found["class_share_min"] = Metric(min(shares), "higher")
        found["class_share_max"] = Metric(max(shares), "lower")
    if labels is not None:
        found["label_accuracy"] = Metric(
            label_accuracy(logits, labels), "higher", note="the classifier sees the class asked for"
        )
    return found


def by_class(own: Tensor, labels: Tensor, reference: Reference, extractor: Extractor) -> dict[str, Metric]:
    """Mean over classes of the Frechet distance between samples and real images of one class (intra-FID; Miyato and
    Koyama 2018, "cGANs with Projection Discriminator", section 5)."""
    if reference.features is None or reference.labels is None:
        return {}
    name = f"class_{extractor.frechet_name}"
    pairs = [(own[labels == c], reference.features.features[reference.labels == c]) for c in reference.labels.unique()]
    least = min(len(side) for pair in pairs for side in pair)
    if least <= extractor.dim:
        return {name: Metric(None, "lower", note=f"{least} images of a class, {extractor.dim} features")}
    return {name: Metric(fmean(frechet_distance(a, b) for a, b in pairs), "lower")}


def memorization_metrics(own: Tensor, held: RealFeatures) -> dict[str, Metric]:
    """Figures that copies of training images fail."""
    train, test, val = held.train.features, held.test.features, held.val.features
    ratio = memorization_ratio(own, train, test, val)
    note = "nearest training against nearest held-out image; copies give 0"
    return {
        "memorization": Metric(
            ratio, "one", note=note if ratio is not None else "a mean distance to held-out images is 0"
        ),
        "authenticity": Metric(
            authenticity(own, train), "higher", floor=authenticity(test, train), note="copies give 0"
        ),
    }


def shares_of(own: Features, extractor: Extractor) -> list[float] | None:
    """Share of images in each of the data's classes, where the extractor knows them."""
    return class_shares(own.logits) if own.logits is not None and extractor.knows_classes else None


def cheap_metrics(
    images: Tensor, data: reference.EvaluationData, extractor: Extractor, split: str = "val"
) -> dict[str, float]:
    """The primary metric (the first), density and coverage of ``images`` against a split that no result is measured on.

    A Frechet distance is biased upwards by the small n of both sides, and still falls as samples get better, so it
    orders the evaluations of one run, at one n, and nothing else. Density and coverage are of as many real images as
    samples, and left out where these are fewer than 6.

    Args:
        images: (n, C, H, W), n at least 3, uint8 or float as `evaluate` takes them.
    """
    device = images.device
    own = extractor(as_stored(images, data.spec), device).features
    reference = reference_of(data, split, extractor, device)
    assert reference.features is not None
    if extractor.primary == extractor.frechet_name:
        distance = frechet_distance(own, reference.statistics)
    else:
        distance = mmd(own, reference.kernel).value
    near = neighbor_metrics(own, reference.features.features)
    return {extractor.primary: distance} | {
        name: near[name].value
        for name in ("density", "coverage")
        if name in near  # type: ignore[misc]
    }
