"""All metrics of a set of samples, as named `Metric` values of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.class_metrics import (
    CONFIDENCE,
    class_shares,
    classifier_score,
    confident_share,
    label_accuracy,
)
from gencompare.evaluation.metrics.frechet import (
    Jackknife,
    Statistics,
    class_frechet_distance,
    frechet_distance,
    gaussian_frechet_distance,
)
from gencompare.evaluation.metrics.intervals import Estimate
from gencompare.evaluation.metrics.kernel import kernel_distance, kid, mmd
from gencompare.evaluation.metrics.neighbors import DENSITY_K, authenticity, compute_prdc, memorization_ratio
from gencompare.evaluation.reference import EvaluationData, Reference, load_reference, quantize_images
from gencompare.records import Metric

ExtraMetrics = Mapping[str, Callable[[Tensor, Tensor], float]]
"""Metrics that a protocol adds, by name. Metrics with a method ``estimate`` also have an interval (see
`GaussianMMD`)."""

HEAVY_TAIL_SHARE = 0.25
"""A note is added if one image contributes more than this fraction of the variance of a distance."""
INFINITY_IMAGES_PER_FEATURE = 3
"""With fewer samples per feature, the distance at n = infinity may be too low by more than its interval's margin."""


@dataclass(frozen=True)
class RealFeatures:
    """Features of the real splits, for the memorisation metrics."""

    train: Features
    val: Features
    test: Features


def compute_metrics(
    features: Features,
    reference: Reference,
    extractor: Extractor,
    *,
    labels: Tensor | None = None,
    extra_metrics: ExtraMetrics | None = None,
    with_intervals: bool = True,
) -> dict[str, Metric]:
    """Compute distances, neighbour metrics and class metrics of samples, by name.

    Args:
        features: features of the samples.
        reference: the real images or statistics to compare with.
        extractor: determines the names of the metrics.
        labels: (n,) the class that each sample was generated for.
        extra_metrics: metrics that the protocol adds.
        with_intervals: compute the interval of the Frechet distance.
    """
    metrics = distance_metrics(features, reference, extractor, with_intervals=with_intervals)
    metrics |= spatial_frechet_metric(features, reference, extractor)
    if reference.features is not None:
        metrics |= neighbor_metrics(features.features, reference.features.features)
        for name, metric in (extra_metrics or {}).items():
            metrics[name] = extra_metric(name, metric, features.features, reference.features.features)
    if features.logits is not None:
        metrics |= class_metrics(features.logits, labels if extractor.predicts_data_classes else None, extractor)
    if labels is not None:
        metrics |= class_frechet_metric(features.features, labels, reference, extractor)
    return metrics


def distance_metrics(
    features: Features, reference: Reference, extractor: Extractor, *, with_intervals: bool
) -> dict[str, Metric]:
    """Compute the maximum mean discrepancy, the kernel distance, and the Frechet distance at n and n = infinity."""
    frechet, n = extractor.frechet_name, len(features)
    metrics: dict[str, Metric] = {}
    if reference.features is not None and n > 2:
        metrics[extractor.mmd_name] = distance_metric(mmd(features.features, reference.gaussian_kernel), unbiased=True)
        metrics[extractor.kernel_name] = cubic_kernel_metric(features.features, reference, extractor.kernel_name)
    statistics = reference.statistics
    if float(statistics.cov.diagonal().sum()) == 0:
        return metrics | {frechet: Metric(None, higher_is_better=False, note="all reference images are identical")}
    jackknife = Jackknife(features.features, statistics)
    if n <= extractor.dim:
        note = f"{n} images for {extractor.dim} features: the value is mostly bias"
        return metrics | {frechet: distance_metric(Estimate(jackknife.value, None), note)}
    if with_intervals:
        distance, at_infinity = jackknife.distance, jackknife.infinity
    else:
        distance, at_infinity = Estimate(jackknife.value, None), Estimate(jackknife.value_at_infinity, None)
    enough = n >= INFINITY_IMAGES_PER_FEATURE * extractor.dim
    note = "" if enough else f"too low with fewer than {INFINITY_IMAGES_PER_FEATURE} images per feature"
    return metrics | {
        frechet: distance_metric(distance),
        f"{frechet}_infinity": distance_metric(at_infinity, "extrapolated", note),
    }


def distance_metric(estimate: Estimate, *notes: str, unbiased: bool = False) -> Metric:
    """Convert a distance to a `Metric`, with a note if a single image dominates the value and its interval."""
    share = estimate.largest_share
    heavy = f"heavy tails: one image makes up {share:.0%} of the variance" if share > HEAVY_TAIL_SHARE else ""
    note = "; ".join(filter(None, [*notes, heavy]))
    return Metric(estimate.value, higher_is_better=False, interval=estimate.interval, note=note, unbiased=unbiased)


def cubic_kernel_metric(features: Tensor, reference: Reference, name: str) -> Metric:
    """Compute the kernel distance with the cubic kernel. ``kid`` is the mean over subsets, as in the paper."""
    assert reference.features is not None
    estimate = kernel_distance(features, reference.cubic_kernel)
    if name != "kid":
        return distance_metric(estimate, unbiased=True)
    mean, std = kid(features, reference.features.features)
    return distance_metric(replace(estimate, value=mean), f"subsets +- {std:.2g}", unbiased=True)


def spatial_frechet_metric(features: Features, reference: Reference, extractor: Extractor) -> dict[str, Metric]:
    """Compute the Frechet distance of spatial features (sFID; Nash et al. 2021, "Generating images with sparse
    representations", section 5, https://arxiv.org/abs/2103.03841)."""
    statistics = reference.spatial_statistics
    if features.spatial is None or statistics is None:
        return {}
    name, (n, dim) = f"s{extractor.frechet_name}", features.spatial.shape
    if n <= dim:
        return {name: Metric(None, higher_is_better=False, note=f"{n} images, {dim} features")}
    distance = gaussian_frechet_distance(Statistics.from_features(features.spatial), statistics)
    return {name: Metric(distance, higher_is_better=False)}


def class_frechet_metric(
    features: Tensor, labels: Tensor, reference: Reference, extractor: Extractor
) -> dict[str, Metric]:
    """Compute `class_frechet_distance`. The value is None if a class has no more images than there are features."""
    if reference.features is None or reference.labels is None:
        return {}
    name, real = f"class_{extractor.frechet_name}", reference.features.features
    fewest = min(int((side == c).sum()) for c in reference.labels.unique() for side in (labels, reference.labels))
    if fewest <= extractor.dim:
        note = f"a class has only {fewest} images for {extractor.dim} features"
        return {name: Metric(None, higher_is_better=False, note=note)}
    distance = class_frechet_distance(features, labels, real, reference.labels)
    return {name: Metric(distance, higher_is_better=False)}


def neighbor_metrics(features: Tensor, reference: Tensor) -> dict[str, Metric]:
    """Compute precision, recall, density and coverage on equally many samples and reference images.

    The set sizes are equal because neighbourhoods shrink as a set grows.
    """
    n = min(len(features), len(reference))
    if n <= DENSITY_K:
        return {}
    # Indexing copies, so the smaller set is used as it is.
    prdc = compute_prdc(*(x if len(x) == n else x[evenly_spaced_indices(len(x), n)] for x in (features, reference)))
    repeated = max(prdc.zero_radii, prdc.zero_radii_reference)
    note = f"{repeated:.0%} of the k-NN radii are 0: repeated images" if repeated >= 0.01 else ""
    names = ("precision", "recall", "density", "coverage")
    return {name: Metric(getattr(prdc, name), higher_is_better=True, note=note) for name in names}


def class_metrics(logits: Tensor, labels: Tensor | None, extractor: Extractor) -> dict[str, Metric]:
    """Compute metrics of the extractor's predictions."""
    score, std = classifier_score(logits)
    metrics = {extractor.score_name: Metric(score, higher_is_better=True, note=f"parts +- {std:.2g}")}
    if extractor.predicts_data_classes:
        shares = class_shares(logits)
        note = f"fraction with a class probability of at least {CONFIDENCE}"
        metrics["confident"] = Metric(confident_share(logits), higher_is_better=True, note=note)
        metrics["class_share_min"] = Metric(min(shares), higher_is_better=True)
        metrics["class_share_max"] = Metric(max(shares), higher_is_better=False)
    if labels is not None:
        note = "fraction of samples classified as the class that the model was given"
        metrics["label_accuracy"] = Metric(label_accuracy(logits, labels), higher_is_better=True, note=note)
    return metrics


def extra_metric(name: str, metric: Callable[[Tensor, Tensor], float], features: Tensor, reference: Tensor) -> Metric:
    """Compute an extra metric of the protocol, with its direction or target and, if available, its interval.

    Raises:
        UserError: the metric fails, or its value is not a number.
    """
    try:
        if hasattr(metric, "estimate"):
            estimate: Estimate = metric.estimate(features, reference)  # type: ignore[attr-defined]
        else:
            estimate = Estimate(metric(features, reference), None)
        estimate = replace(estimate, value=float(estimate.value))
    except UserError:
        raise
    except Exception as error:  # code of the user
        raise UserError(
            f"Metric '{name}' failed on features {tuple(features.shape)} and {tuple(reference.shape)}:"
            f" {' '.join(str(error).split())}. It must return a number."
        ) from error
    function = metric.func if isinstance(metric, partial) else metric  # a partial hides attributes of its function
    return Metric(
        estimate.value,
        higher_is_better=getattr(metric, "higher_is_better", getattr(function, "higher_is_better", None)),
        target=getattr(metric, "target", getattr(function, "target", None)),
        interval=estimate.interval,
    )


def memorization_metrics(features: Tensor, real: RealFeatures) -> dict[str, Metric]:
    """Compute metrics that detect copies of training images."""
    train, test, val = real.train.features, real.test.features, real.val.features
    ratio = memorization_ratio(features, train, test, val)
    note = "distance to the nearest training image, relative to the nearest held-out image; copies give 0"
    if ratio is None:
        note = "a mean distance to held-out images is 0"
    real_samples = test[evenly_spaced_indices(len(test), min(len(test), len(features)))]
    return {
        "memorization": Metric(ratio, target=1.0, note=note),
        "authenticity": Metric(
            authenticity(features, train),
            higher_is_better=True,
            baseline=authenticity(real_samples, train),
            note="copies give 0",
        ),
    }


def add_baselines(metrics: dict[str, Metric], real: dict[str, Metric], note: str) -> dict[str, Metric]:
    """Add the values of ``real`` images to ``metrics`` as baselines, and ``note`` to metrics that get a baseline."""
    with_baselines = {}
    for name, metric in metrics.items():
        baseline = real[name].value if name in real else None
        notes = [part for part in (metric.note, note if baseline is not None else "") if part]
        with_baselines[name] = replace(metric, baseline=baseline, note="; ".join(notes))
    return with_baselines


def data_class_shares(features: Features, extractor: Extractor) -> list[float] | None:
    """Return the fraction of images in each class of the data, or None if the extractor does not predict classes."""
    return class_shares(features.logits) if features.logits is not None and extractor.predicts_data_classes else None


def cheap_metrics(images: Tensor, data: EvaluationData, extractor: Extractor, split: str = "val") -> dict[str, float]:
    """Compute the primary metric (first), density and coverage of a few images, for evaluation during training.

    Images are compared with ``split``, which should not be used for final results. A Frechet distance is biased upwards
    for small n, but still decreases as samples improve, so use it only to compare evaluations of the same run with the
    same n. Density and coverage need at least 6 samples and real images.

    Args:
        images: (n, C, H, W), n at least 3, uint8 or float as accepted by `evaluate`.
    """
    features = extractor(quantize_images(images, data.spec), images.device).features
    reference = load_reference(data, split, extractor, images.device)
    assert reference.features is not None
    if extractor.primary == extractor.frechet_name:
        distance = frechet_distance(features, reference.statistics)
    else:
        distance = mmd(features, reference.gaussian_kernel).value
    neighbors = neighbor_metrics(features, reference.features.features)
    values = {name: neighbors[name].value for name in ("density", "coverage") if name in neighbors}
    return {extractor.primary: distance} | values  # type: ignore[return-value]
