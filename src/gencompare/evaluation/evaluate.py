"""Measure a model, or a set of images, under one protocol."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from gencompare.compilation import check_compiler
from gencompare.distributed import all_ranks_true, run_on_rank_zero
from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.evaluation.extractors.selection import ExtractorFactory, build_extractors
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.compute import (
    ExtraMetrics,
    RealFeatures,
    add_baselines,
    compute_metrics,
    data_class_shares,
    extra_metric,
    memorization_metrics,
)
from gencompare.evaluation.metrics.neighbors import missing_modes, nearest_neighbors
from gencompare.evaluation.model_metrics import bits_per_dim, reconstruction, super_resolution
from gencompare.evaluation.reference import (
    EvaluationData,
    Reference,
    SupportsSampling,
    is_statistics_file,
    load_reference,
    quantize_images,
)
from gencompare.evaluation.sampling import (
    CHUNK_SIZE,
    ConditionSource,
    Samples,
    choose_conditions,
    draw_samples,
    flops_per_sample,
    labels_like,
)
from gencompare.evaluation.sanity import check_features, check_images, check_reference
from gencompare.evaluation.sequential import Look, distance_looks, first_look
from gencompare.generative_model import DataSpec
from gencompare.records import Measurement, Metric, Result, SampleSettings, now

DEFAULT_MAX_IMAGES = 2_000
"""Upper limit of the default number of samples. At this size, the primary metric detects the differences that a person
can see (docs/evaluation.md)."""
FRECHET_MAX_IMAGES = 10_000
"""Upper limit of the default number of samples if the primary metric is a Frechet distance."""
FRECHET_IMAGES_PER_FEATURE = 4
"""Default number of samples per feature if the primary metric is a Frechet distance."""
MIN_IMAGES = 20

NEIGHBOR_QUERIES, NEIGHBORS_PER_QUERY = 8, 3
"""The result lists the nearest training images of the first samples, for display. The first samples are not
cherry-picked, and all models draw them with the same random seed."""

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, the number of finished items, and their total."""


@dataclass(frozen=True)
class EvaluationProtocol:
    """How samples are measured. Everything that affects a metric is set here or hashed into the result's `Measurement`.

    Args:
        extractors: factories ``spec -> Extractor``. All of them measure the same samples; runs are ranked by the
            primary metric of the first. None selects the defaults for the data (`default_extractors`).
        weights: weights file of the first extractor; None uses the published or bundled weights.
        num_images: number of samples. None draws as many as there are test images, at most 2,000 (10,000 if the primary
            metric is a Frechet distance).
        reference: what samples are compared with: a split (``train``, ``train+val``, ``test``), or an ``.npz`` file
            of published statistics (`read_statistics`).
        condition_split: split whose images provide the conditions of the samples, for models with conditions other than
            the class. Must not contain ``train``.
        chunk_size: number of samples drawn with the same random seed.
        compile: compile the networks for sampling with ``torch.compile``, which changes samples only by rounding. The
            first chunk takes longer.
        num_likelihood_images: number of test images that are scored in bits/dim and reconstructed. Some families need
            a thousand network evaluations per image.
        max_half_width: stop sampling once the half-width of a confidence sequence for the primary metric, a kernel
            distance, is at most this share of its value (`gencompare.evaluation.sequential`). The result has the number
            of samples drawn until then, which makes it another protocol. None draws all samples.
        seed: sampling seed.
        metrics: extra metrics by name, functions ``(sample features, reference features) -> float``. An attribute
            ``higher_is_better``, or ``target`` (the ideal value), determines how the metric is ranked.
        cache: folder that caches the features of real images; None caches them in memory only.
    """

    extractors: Sequence[ExtractorFactory] | None = None
    weights: str | Path | None = None
    num_images: int | None = None
    reference: str = "train"
    condition_split: str = "test"
    chunk_size: int = CHUNK_SIZE
    compile: bool = False
    num_likelihood_images: int = 500
    max_half_width: float | None = None
    seed: int = 0
    metrics: ExtraMetrics = field(default_factory=dict)
    cache: str | Path | None = None

    def build_extractors(self, spec: DataSpec) -> list[Extractor]:
        """Build the extractors for the data described by ``spec``; runs are ranked by the first."""
        return build_extractors(self.extractors, spec, self.weights)

    def check(self, data: EvaluationData) -> list[Extractor]:
        r"""Build the extractors and check that this protocol can measure ``data``.

        With :math:`n \le d` images the :math:`d \times d` covariance is singular, and a Frechet distance depends more
        on :math:`n` than on the model, so such a protocol is rejected.

        Raises:
            UserError: weights are missing, an option is invalid, or there are too few images for the primary metric.
        """
        if "train" in self.condition_split.split("+"):
            raise UserError(
                f"evaluation.protocol.condition_split={self.condition_split}: conditions must not come from training"
                " images. Choose test or val."
            )
        data.split(self.condition_split)
        if self.chunk_size < 1 or self.num_likelihood_images < 1:
            raise UserError("evaluation.protocol: chunk_size and num_likelihood_images must be at least 1.")
        if self.compile:
            check_compiler("evaluation.protocol.compile=true", "false")
        if self.max_half_width is not None and not 0 < self.max_half_width < math.inf:
            raise UserError(
                f"evaluation.protocol.max_half_width={self.max_half_width} must be positive: 0.1 stops at 10 % of the"
                " primary metric."
            )
        extractors = self.build_extractors(data.spec)
        extractor, n = extractors[0], self.resolve_num_images(data, extractors[0])
        if n < MIN_IMAGES:
            raise UserError(f"evaluation.num_images={n} is too few samples: use at least {MIN_IMAGES}.")
        frechet, dim = self.ranks_by_frechet(extractor), extractor.dim
        if self.max_half_width is not None and extractor.primary != extractor.mmd_name:
            raise UserError(
                f"evaluation.protocol.max_half_width needs an extractor that ranks by a kernel distance, and"
                f" {extractor.name} ranks by {extractor.primary}: use evaluation=default, or set it to null."
            )
        if frechet and n <= dim:
            raise UserError(
                f"evaluation.num_images={n} is too few samples for a Frechet distance on the {dim} features of "
                f"{extractor.name}: use more than {dim} (evaluation.num_images={FRECHET_IMAGES_PER_FEATURE * dim})."
            )
        if is_statistics_file(self.reference):
            # The statistics are of the features of a single network, so the other extractors have no reference.
            load_reference(data, self.reference, extractor)
            return extractors[:1]
        if frechet and (size := len(data.split(self.reference))) <= dim:
            raise UserError(
                f"The '{self.reference}' split of data set '{data.spec.name}' has {size} images, too few for a Frechet "
                f"distance on the {dim} features of {extractor.name}, which needs more than {dim}"
                + (". Use evaluation=default." if dim > 64 else ".")
            )
        return extractors

    def ranks_by_frechet(self, extractor: Extractor) -> bool:
        """Return whether the Frechet distance is the primary metric. With a statistics file, it always is."""
        return extractor.primary == extractor.frechet_name or is_statistics_file(self.reference)

    def resolve_num_images(self, data: EvaluationData, extractor: Extractor) -> int:
        """Return ``num_images``, or its default for the data and the extractor."""
        if self.num_images is not None:
            return self.num_images
        if not self.ranks_by_frechet(extractor):
            return min(len(data.split("test")), DEFAULT_MAX_IMAGES)
        return min(max(len(data.split("test")), FRECHET_IMAGES_PER_FEATURE * extractor.dim), FRECHET_MAX_IMAGES)

    @property
    def cache_dir(self) -> Path | None:
        """``cache`` as a path, or None."""
        return None if self.cache is None else Path(self.cache)


def evaluate(
    model_or_images: SupportsSampling | Tensor,
    data: EvaluationData,
    protocol: EvaluationProtocol | None = None,
    *,
    generation: SampleSettings | None = None,
    labels: Tensor | None = None,
    progress: Progress | None = None,
    on_samples: Callable[[Tensor], None] | None = None,
    chunk_dir: Path | None = None,
) -> Result:
    """Measure a model, or a set of images, against ``data``.

    Under torch.distributed, all ranks must call this function. They split the work, and all return the same result.

    Args:
        model_or_images: anything with ``sample(n, cond, *, generator)``, or images (n, C, H, W), with or without the
            data's padding: uint8 in [0, 255] as in an image file, even if the data have fewer levels, or float in
            [-1, 1]. Images of a split have the data set's own levels, so pass ``data.normalize(images)``.
        data: a datamodule of this package, or any object with the same interface (`EvaluationData`).
        protocol: how to measure; None uses the default `EvaluationProtocol`.
        generation: known facts about how the samples were generated. For a model, network evaluations, sampler and seed
            are added here.
        labels: (n,) the class that each given image was generated for. For a model, labels are chosen here.
        progress: called after each unit of work (see `Progress`).
        on_samples: called on rank zero with the images as they are measured.
        chunk_dir: folder where finished chunks of samples are stored, used by this model alone. An interrupted
            evaluation resumes from them.

    Returns:
        The `Result` of the first extractor: the metrics of `compute_metrics` and `memorization_metrics`, each distance
        with its real-data baseline; ``bpd_<name>``, ``psnr``, ``ssim`` and the Frechet distance of reconstructions for
        models that support them; and the metrics of `super_resolution` for a super-resolution model. The results of
        the other extractors on the same samples are its ``secondary_results``.

    Raises:
        UserError: there are too few samples; samples are not finite, outside [-1, 1] or of the wrong shape; or given
            images cannot be samples of this data set (`check_images`). Milder problems go to ``details["warnings"]``.
    """
    protocol = protocol or EvaluationProtocol()
    generation = generation or SampleSettings()
    for name, value, method in (("model_or_images", model_or_images, "sample"), ("data", data, "spec")):
        is_images = isinstance(value, Tensor) and method == "sample"
        if not is_images and not hasattr(value, method):
            hint = "; convert an array with torch.from_numpy" if type(value).__module__ == "numpy" else ""
            expected = "a model or a tensor of images" if method == "sample" else "a data set such as Digits()"
            raise UserError(f"{name} must be {expected}, not {type(value).__name__}{hint}.")
    extractors = protocol.check(data)

    if isinstance(model_or_images, Tensor):
        measured = _from_images(model_or_images, labels, data, protocol, extractors[0], generation)
    else:
        measured = _from_model(model_or_images, data, protocol, extractors[0], generation, progress, chunk_dir)
    if on_samples is not None:
        run_on_rank_zero(lambda: on_samples(measured.images))

    model_metrics, model_seconds = _model_metrics(measured, data, protocol, extractors, progress)
    first, *others = [_result(measured, data, protocol, extractor, progress) for extractor in extractors]
    return replace(
        first,
        metrics=first.metrics | model_metrics,
        seconds=measured.seconds | model_seconds | first.seconds,
        secondary_results=others,
    )


@dataclass(frozen=True)
class _MeasuredSamples:
    """The samples of one evaluation and their origin."""

    images: Tensor
    """The samples, as returned by `quantize_images`."""
    labels: Tensor | None
    condition_source: ConditionSource | None
    generation: SampleSettings
    warnings: list[str]
    """Warnings from the sanity checks."""
    model: Any = None
    """The model that drew the samples; None if images were given."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def conditioning(self, reference: Reference) -> dict[str, str]:
        """Return the values of the `Measurement` fields ``conditioning`` and ``label_distribution``."""
        if self.condition_source is not None:
            names = self.model.condition_names
            return {
                "conditioning": self.condition_source.describe(names),
                "label_distribution": self.condition_source.split if "label" in names else "none",
            }
        if self.labels is None:
            return {"conditioning": "unconditional", "label_distribution": "none"}
        distribution = reference.name if self.model is not None else "as given"
        return {"conditioning": "labels", "label_distribution": distribution}


def _from_images(
    images: Tensor,
    labels: Tensor | None,
    data: EvaluationData,
    protocol: EvaluationProtocol,
    extractor: Extractor,
    generation: SampleSettings,
) -> _MeasuredSamples:
    """Select the first ``protocol.num_images`` images. If this is None, select the default number, or all images if
    there are fewer."""
    n = protocol.resolve_num_images(data, extractor)
    if len(images) < n:
        if protocol.num_images is not None:
            raise UserError(
                f"The protocol needs {n} images, but only {len(images)} were given: add some, or set"
                f" evaluation.num_images={len(images)}."
            )
        if len(images) < MIN_IMAGES:
            raise UserError(f"{len(images)} samples are too few: at least {MIN_IMAGES} are needed.")
        if protocol.ranks_by_frechet(extractor) and len(images) <= extractor.dim:
            raise UserError(
                f"{len(images)} images are too few for a Frechet distance on the {extractor.dim} features of "
                f"{extractor.name}: more than {extractor.dim} are needed."
            )
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{len(images)} images have {len(labels)} labels: each image needs one label.")
    images, labels = images[:n], None if labels is None else labels[:n]
    warnings = sanity_warnings(images, data, protocol, refuse=True)
    return _MeasuredSamples(quantize_images(images, data.spec), labels, None, generation, warnings)


def _from_model(
    model: SupportsSampling,
    data: EvaluationData,
    protocol: EvaluationProtocol,
    extractor: Extractor,
    generation: SampleSettings,
    progress: Progress | None,
    chunk_dir: Path | None,
) -> _MeasuredSamples:
    """Draw samples from ``model`` and record their cost."""
    total = protocol.resolve_num_images(data, extractor)
    report = _of_stage(progress, "sampling")
    details: dict[str, Any] = {}
    if protocol.max_half_width is None:
        samples = sample_for_protocol(model, total, data, protocol, report, chunk_dir)
    else:
        samples, details["stopped"] = _sample_until_precise(
            model, total, data, protocol, extractor, report, chunk_dir, protocol.max_half_width
        )
    n = len(samples.images)
    details |= {
        "images_per_second": n / samples.seconds,
        "peak_memory_bytes": samples.peak_memory_bytes,
        "flops_per_sample": flops_per_sample(model, samples, seed=protocol.seed),
    }
    if hasattr(model, "sampling_description"):
        generation = replace(generation, sampler=model.sampling_description())  # type: ignore[attr-defined]
    return _MeasuredSamples(
        images=samples.images,
        labels=samples.labels,
        condition_source=samples.condition_source,
        generation=replace(generation, nfe=samples.nfe, seed=protocol.seed),
        warnings=sanity_warnings(samples.images, data, protocol, refuse=False),
        model=model,
        device=torch.device(getattr(model, "device", "cpu")),
        seconds={"sampling": samples.seconds},
        details=details,
    )


def _sample_until_precise(
    model: SupportsSampling,
    total: int,
    data: EvaluationData,
    protocol: EvaluationProtocol,
    extractor: Extractor,
    progress: Callable[[int, int], None] | None,
    chunk_dir: Path | None,
    max_half_width: float,
) -> tuple[Samples, dict[str, Any]]:
    """Draw samples until the half-width of the primary metric is at most ``max_half_width`` of its value, or ``total``.

    Return the samples and where sampling stopped, with the interval of the confidence sequence.
    """
    device = torch.device(getattr(model, "device", "cpu"))
    reference = load_reference(data, protocol.reference, extractor, device, protocol.cache_dir)
    with TemporaryDirectory() as scratch:
        folder = chunk_dir or Path(scratch)  # each look reads the chunks of the last one

        def samples(first: int) -> Samples:
            return sample_for_protocol(model, total, data, protocol, progress, folder, first=first)

        def features(first: int) -> Tensor:
            return extractor(samples(first).images, device).features

        def is_precise(look: Look) -> bool:
            return all_ranks_true(look.half_width() <= max_half_width * abs(look.estimate.value))

        found = distance_looks(features, reference.gaussian_kernel, total, protocol.chunk_size)
        look = first_look(found, is_precise)
        stopped = {"num_images": look.num_images, "of": total, "interval": look.estimate.interval}
        return samples(look.num_images), stopped


def sample_for_protocol(
    model: SupportsSampling,
    n: int,
    data: EvaluationData,
    protocol: EvaluationProtocol,
    progress: Callable[[int, int], None] | None = None,
    chunk_dir: Path | None = None,
    *,
    first: int | None = None,
) -> Samples:
    """Draw ``n`` samples for measurement, or only the ``first`` of them.

    A class-conditional model gets labels in the same proportions as the reference. A model with other conditions gets
    the conditions of held-out images.
    """
    labels = None
    count = n if first is None else first
    source = choose_conditions(model, data, count, seed=protocol.seed, split=protocol.condition_split)
    if source is None and getattr(model, "conditional", False):
        split = "train" if is_statistics_file(protocol.reference) else protocol.reference
        reference_labels = data.split(split).labels
        if reference_labels is None:
            raise UserError(f"A conditional model needs labels for sampling, but data set '{data.spec.name}' has none.")
        labels = labels_like(reference_labels, n, protocol.seed)[:first]
    return draw_samples(
        model, count, seed=protocol.seed, chunk_size=protocol.chunk_size, labels=labels, condition_source=source,
        compile=protocol.compile, postprocess=quantize_images, spec=data.spec, progress=progress, chunk_dir=chunk_dir,
    )  # fmt: skip


def _model_metrics(
    measured: _MeasuredSamples,
    data: EvaluationData,
    protocol: EvaluationProtocol,
    extractors: Sequence[Extractor],
    progress: Progress | None,
) -> tuple[dict[str, Metric], dict[str, float]]:
    """Return (metrics, seconds) for super-resolution, likelihoods and reconstructions. Both are empty if images were
    evaluated instead of a model."""
    metrics: dict[str, Metric] = {}
    source, model = measured.condition_source, measured.model
    if source is not None:
        metrics |= run_on_rank_zero(lambda: super_resolution(measured.images, source))
    if model is None:
        return metrics, {}
    start = time.perf_counter()
    n, seed = protocol.num_likelihood_images, protocol.seed
    metrics |= bits_per_dim(model, data, n, seed, _of_stage(progress, "likelihood"))
    # The Frechet distance of reconstructions needs more images than features, so use the smallest extractor.
    smallest = min(extractors, key=lambda extractor: extractor.dim)
    metrics |= reconstruction(model, data, n, seed, smallest, measured.device)
    return metrics, {"likelihood": time.perf_counter() - start}


def _result(
    measured: _MeasuredSamples,
    data: EvaluationData,
    protocol: EvaluationProtocol,
    extractor: Extractor,
    progress: Progress | None,
) -> Result:
    """Return the result of one extractor on the samples."""
    start = time.perf_counter()
    metrics, details = _measure(measured, data, protocol, extractor, progress)
    seconds = {"metrics": time.perf_counter() - start}
    reference = load_reference(data, protocol.reference, extractor, measured.device, protocol.cache_dir)
    measurement = Measurement(
        data=data.spec.name,
        num_images=len(measured.images),
        reference=reference.name,
        num_reference_images=reference.n,
        reference_hash=reference.hash,
        extractor=extractor.name,
        extractor_hash=extractor.hash,
        resize=extractor.resize,
        quantization=_quantization(data.spec),
        **measured.conditioning(reference),
        chunk_size=protocol.chunk_size,
    )
    warnings = [*extractor.details.get("warnings", []), *measured.warnings, *details["warnings"]]  # type: ignore[misc]
    return Result(
        measurement=measurement,
        generation=measured.generation,
        metrics=metrics,
        primary_metric=extractor.frechet_name if protocol.ranks_by_frechet(extractor) else extractor.primary,
        created=now(),
        seconds=seconds,
        details=extractor.details | measured.details | details | {"warnings": warnings},
    )


def _measure(
    measured: _MeasuredSamples,
    data: EvaluationData,
    protocol: EvaluationProtocol,
    extractor: Extractor,
    progress: Progress | None,
) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Return (metrics, details) of the samples. All ranks extract features; rank zero computes the metrics."""

    def real(name: str) -> Reference:
        report = _of_stage(progress, f"features of {name}")
        return load_reference(data, name, extractor, measured.device, protocol.cache_dir, report)

    reference = real(protocol.reference)
    train, val, test = (real(name) for name in ("train", "val", "test"))
    held_out = test if reference.name != "test" else val
    features = extractor(measured.images, measured.device, _of_stage(progress, "features"))

    def compute() -> tuple[dict[str, Metric], dict[str, Any]]:
        extra = dict(protocol.metrics)
        real_features = RealFeatures(*(split.features for split in (train, val, test)))  # type: ignore[arg-type]
        baseline = real_data_baseline(held_out, reference, len(features), extractor, extra)
        metrics = compute_metrics(features, reference, extractor, labels=measured.labels, extra_metrics=extra)
        metrics = add_baselines(metrics, baseline.metrics, baseline.note)
        metrics |= memorization_metrics(features.features, real_features)

        warnings = check_features(features.features, baseline.features.features)
        details: dict[str, Any] = {"warnings": warnings}
        if data.spec.num_values != 2:  # points in the plane are not shown as images
            queries = features.features[:NEIGHBOR_QUERIES]
            nearest = nearest_neighbors(queries, real_features.train.features, NEIGHBORS_PER_QUERY)
            details["nearest_training"] = nearest.tolist()
        if {"density", "coverage"} <= metrics.keys():
            density, coverage = (metrics[name].value or 0.0 for name in ("density", "coverage"))
            warning = missing_modes(density, coverage, n=min(len(features), reference.n))
            warnings += [] if warning is None else [warning]
        if (shares := data_class_shares(features, extractor)) is not None:
            details["class_shares"] = shares
            details["class_shares_of_real_images"] = data_class_shares(baseline.features, extractor)
        return metrics, details

    return run_on_rank_zero(compute)


@dataclass(frozen=True)
class RealDataBaseline:
    """Metrics of held-out real images, the values that perfect samples would have."""

    metrics: dict[str, Metric]
    features: Features
    note: str
    """The number of held-out images, in words, if it differs from the number of samples; otherwise empty."""


def real_data_baseline(
    held_out: Reference, reference: Reference, n: int, extractor: Extractor, extra_metrics: ExtraMetrics
) -> RealDataBaseline:
    """Compute the metrics of ``n`` held-out images (all if there are fewer) and cache them for later models."""
    assert held_out.features is not None
    rows = evenly_spaced_indices(held_out.n, n)
    features = held_out.features[rows]
    labels = None if held_out.labels is None else held_out.labels[rows]
    key = (held_out.hash, reference.hash, len(features), extractor.hash, extractor.resize)
    if key not in _BASELINES:
        _BASELINES[key] = compute_metrics(features, reference, extractor, labels=labels, with_intervals=False)
    metrics = dict(_BASELINES[key])
    if reference.features is not None:
        for name, metric in extra_metrics.items():
            metrics[name] = extra_metric(name, metric, features.features, reference.features.features)
    note = "" if len(features) == n else f"real-data baseline from {len(features)} {held_out.name} images"
    return RealDataBaseline(metrics, features, note)


_BASELINES: dict[tuple[str | int, ...], dict[str, Metric]] = {}


def sanity_warnings(images: Tensor, data: EvaluationData, protocol: EvaluationProtocol, *, refuse: bool) -> list[str]:
    """Return the warnings of `check_images` and `check_reference`, computed on rank zero.

    Images are compared with the protocol's reference split, or with the training split if the reference is a statistics
    file. ``refuse`` is true for external images, which are refused if they cannot be samples of the data set.
    """
    name = "train" if is_statistics_file(protocol.reference) else protocol.reference
    real = data.split(name).images
    compared = real[evenly_spaced_indices(len(real), len(images))]  # the images that neighbour metrics use
    found = run_on_rank_zero(lambda: check_images(images, real, data.spec, refuse=refuse))
    if not refuse:
        found = [f"{warning} (or the model is barely trained)" for warning in found]
    return found + run_on_rank_zero(lambda: check_reference(compared, name))


def _quantization(spec: DataSpec) -> str:
    if spec.num_bins is None:
        return "none"
    return "uint8" if spec.num_bins == 256 else f"uint8, {spec.num_bins} levels"


def _of_stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """Return ``progress`` for one stage of the evaluation."""
    return None if progress is None else lambda done, total: progress(stage, done, total)
