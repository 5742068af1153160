"""``evaluate``: figures of one model, or of one set of images, under one protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompare.distributed import run_on_first
from gencompare.errors import UserError
from gencompare.evaluation import reference
from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.evaluation.extractors.selection import ExtractorFactory, build_extractors
from gencompare.evaluation.metrics.compute import (
    ExtraMetric,
    RealFeatures,
    add_baselines,
    compute_metrics,
    memorization_metrics,
    shares_of,
)
from gencompare.evaluation.metrics.neighbors import nearest_distances
from gencompare.evaluation.model_metrics import bits_per_dim, reconstruction, super_resolution
from gencompare.evaluation.reference import Reference, as_stored, evenly_spaced_indices, is_file, reference_of
from gencompare.evaluation.sampling import (
    CHUNK,
    ConditionSource,
    Samples,
    choose_conditions,
    draw_samples,
    flops_per_sample,
    labels_like,
)
from gencompare.evaluation.sanity import check_features, check_images, check_reference, missing_modes
from gencompare.generative_model import DataSpec
from gencompare.records import Measurement, Metric, Result, SampleSettings, now

DEFAULT_N = 2_000
"""Samples that are drawn at most where the protocol does not say how many: at this n the primary metric tells apart
what a person can (docs/evaluation.md)."""
MOST_FRECHET = 10_000
MIN_N = 20
PER_FEATURE = 4
"""Samples for each feature that a Frechet distance asks for, where it is the primary metric."""

LOOKED_AT, NEIGHBOURS = 8, 3
"""Of the first so many samples, the rows of so many nearest training images are kept, to be shown beside them. The
first ones: no choice of samples, and the same noise for every model."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class EvaluationProtocol:
    """How samples are measured. Everything that moves a figure is here, or is hashed into its `Measurement`.

    Args:
        extractors: factories ``spec -> Extractor``, all of which measure the same samples; the first one's primary
            metric ranks. None takes the default of the data (`extractors.default_extractors`).
        weights: a file of weights for the first extractor; None takes the published or shipped ones.
        n: samples; None draws as many as there are test images, but at most 2,000 (10,000 where a Frechet distance
            ranks).
        reference: what samples are held against: a split (``train``, ``train+val``, ``test``), or an ``.npz`` file with
            the statistics of others (`reference.read_statistics`).
        conditions: the split of the images whose conditions samples get, where more than a class steers the model.
        chunk: samples drawn from one seed at a time.
        likelihood_n: test images that are scored in bits/dim and reconstructed (some families need a thousand network
            calls for each).
        seed: of sampling.
        metrics: further figures by name, each a function ``(features of samples, features of the reference) -> float``;
            its attribute ``better`` (``lower``, ``higher``, ``one``) says how to rank it, where it has one.
        cache: folder for the features of real images; None keeps them in memory only.
    """

    extractors: Sequence[ExtractorFactory] | None = None
    weights: str | Path | None = None
    n: int | None = None
    reference: str = "train"
    conditions: str = "test"
    chunk: int = CHUNK
    likelihood_n: int = 500
    seed: int = 0
    metrics: ExtraMetric = field(default_factory=dict)
    cache: str | Path | None = None

    def build(self, spec: DataSpec) -> list[Extractor]:
        """The extractors for data of ``spec``, the one that ranks first."""
        return build_extractors(self.extractors, spec, self.weights)

    def check(self, data: reference.EvaluationData) -> list[Extractor]:
        """The extractors, when this protocol can measure ``data``.

        Raises `UserError` where it cannot: weights that are missing, or too few images for the primary metric. With
        n <= d images the d x d covariance is singular, and a Frechet distance depends more on n than on the model.
        """
        if "train" in self.conditions.split("+"):
            raise UserError(
                f"evaluation.protocol.conditions={self.conditions}: a model must not be asked for images that it was"
                " trained on: choose test or val."
            )
        data.split(self.conditions)
        extractors = self.build(data.spec)
        extractor, n = extractors[0], self.size(data, extractors[0])
        if self.chunk < 1 or self.likelihood_n < 1:
            raise UserError("evaluation.protocol: chunk and likelihood_n must be at least 1.")
        if n < MIN_N:
            raise UserError(f"evaluation.n={n} samples measure nothing: give at least {MIN_N}.")
        frechet, dim = self.ranks_by_frechet(extractor), extractor.dim
        if frechet and n <= dim:
            raise UserError(
                f"evaluation.n={n} samples cannot carry a Frechet distance on the {dim} features of {extractor.name}: "
                f"ask for more than {dim} (evaluation.n={PER_FEATURE * dim})."
            )
        if is_file(self.reference):
            # Statistics are of one network's features, so the others have no reference.
            reference_of(data, self.reference, extractor)
            return extractors[:1]
        if frechet and (size := len(data.split(self.reference))) <= dim:
            raise UserError(
                f"The {size} images of the split '{self.reference}' of data '{data.spec.name}' cannot carry a Frechet "
                f"distance on the {dim} features of {extractor.name}: more than {dim} are needed"
                + (", or evaluation=default." if dim > 64 else ".")
            )
        return extractors

    def ranks_by_frechet(self, extractor: Extractor) -> bool:
        """Whether the Frechet distance is the primary metric: with a file of statistics, no other can be computed."""
        return extractor.primary == extractor.frechet_name or is_file(self.reference)

    def size(self, data: reference.EvaluationData, extractor: Extractor) -> int:
        """How many samples are measured."""
        if self.n is not None:
            return self.n
        if not self.ranks_by_frechet(extractor):
            return min(len(data.split("test")), DEFAULT_N)
        return min(max(len(data.split("test")), PER_FEATURE * extractor.dim), MOST_FRECHET)

    @property
    def folder(self) -> Path | None:
        return None if self.cache is None else Path(self.cache)


def evaluate(
    sampler_or_images: reference.SupportsSampling | Tensor,
    data: reference.EvaluationData,
    protocol: EvaluationProtocol | None = None,
    *,
    generation: SampleSettings | None = None,
    labels: Tensor | None = None,
    progress: Progress | None = None,
    on_samples: Callable[[Tensor], None] | None = None,
    keep: Path | None = None,
) -> Result:
    """Measure a model, or images, against ``data``.

    Where torch.distributed runs, all processes must call this; they share the work, and all get the same result.

    Args:
        sampler_or_images: anything with ``sample(n, cond, *, generator)``, or images (n, C, H, W): uint8 as on a disk
            (0 to 255, whatever the data's number of levels), or float in [-1, 1]; padded as the data or not. Images of
            a split, which have the data's own levels, are given as ``data.normalize(images)``.
        data: a datamodule of this package, or anything like it (`reference.EvaluationData`).
        protocol: see `EvaluationProtocol`.
        generation: what is known of how the samples came about; what is seen here (network calls, sampler, seed) is
            filled in.
        labels: for given images, the class that each was made for, (n,). A model's labels are chosen here.
        progress: see `Progress`.
        on_samples: called with the images as they were measured, on the first process.
        keep: a folder of this model's own, for chunks that are drawn: an evaluation that was broken off goes on there.

    Returns:
        A `Result` of the first extractor with the metrics of `compute_metrics` and `memorization_metrics`, each
        distance with that of real images; for models that can, ``bpd_<name>``, ``psnr``, ``ssim`` and the distance of
        reconstructions; for super-resolution, `super_resolution.super_resolution`. The other extractors' results on the
        same samples are in its ``also``.

    Raises:
        UserError: too few samples, samples that are not finite, not in [-1, 1] or of another shape, and given images
            that cannot be of these data (`sanity.check_images`; all that it only suspects is in ``details["flags"]``).
    """
    protocol, generation = protocol or EvaluationProtocol(), generation or SampleSettings()
    extractors = protocol.check(data)
    extractor = extractors[0]
    n = protocol.size(data, extractor)
    spec = data.spec
    model: Any = None
    asked: ConditionSource | None = None
    seconds: dict[str, float] = {}
    details: dict[str, Any] = {}
    flags: list[str] = []
    if isinstance(sampler_or_images, Tensor):
        given, labels = given_images(sampler_or_images, labels, n, protocol, extractor)
        flags += sanity_warnings(given, data, protocol, refuse=True)
        images = as_stored(given, spec)
        device = torch.device("cpu")
    else:
        model = sampler_or_images
        drawn = draw_like(model, n, data, protocol, stage(progress, "sampling"), keep)
        images, labels, asked = drawn.images, drawn.labels, drawn.asked
        device = torch.device(getattr(model, "device", "cpu"))
        seconds["sampling"] = drawn.seconds
        details["images_per_second"] = n / drawn.seconds
        details["peak_memory_bytes"] = drawn.peak_memory_bytes
        details["flops_per_sample"] = flops_per_sample(model, drawn, seed=protocol.seed)
        if hasattr(model, "sampling_description"):
            generation = replace(generation, sampler=model.sampling_description())
        generation = replace(generation, nfe=drawn.nfe, seed=protocol.seed)
        flags += sanity_warnings(images, data, protocol, refuse=False)

    if on_samples is not None:
        run_on_first(lambda: on_samples(images))
    extra: dict[str, Metric] = {}
    if asked is not None:
        extra |= run_on_first(lambda: super_resolution(images, asked))
    if model is not None:
        start = time.perf_counter()
        extra |= bits_per_dim(model, data, protocol.likelihood_n, protocol.seed, stage(progress, "likelihood"))
        # The distance of reconstructions needs more images than features, so the smallest extractor measures them.
        smallest = min(extractors, key=lambda each: each.dim)
        extra |= reconstruction(model, data, protocol.likelihood_n, protocol.seed, smallest, device)
        seconds["likelihood"] = time.perf_counter() - start

    results = []
    for each in extractors:
        start = time.perf_counter()
        metrics, more = quality(images, labels, data, protocol, each, device, progress)
        taken = {"metrics": time.perf_counter() - start}
        reference = reference_of(data, protocol.reference, each, device, protocol.folder)
        measurement = Measurement(
            data=spec.name,
            n=len(images),
            reference=reference.name,
            reference_n=reference.n,
            reference_hash=reference.hash,
            extractor=each.name,
            extractor_hash=each.hash,
            resize=each.resize,
            quantization=quantization(spec),
            **condition_names(model, labels, asked, reference),
            chunk=protocol.chunk,
        )
        first = each is extractor
        results.append(
            Result(
                measurement=measurement,
                generation=generation,
                metrics=metrics | (extra if first else {}),
                headline=each.frechet_name if protocol.ranks_by_frechet(each) else each.primary,
                created=now(),
                seconds=(seconds if first else {}) | taken,
                details=each.details | details | more
                | {"flags": [*each.details.get("flags", []), *flags, *more["flags"]]},  # type: ignore[misc]
            )
        )  # fmt: skip
    return replace(results[0], also=results[1:])


def condition_names(
    model: Any, labels: Tensor | None, asked: ConditionSource | None, reference: Reference
) -> dict[str, str]:
    """What the model was told of each sample: two fields of a `Measurement`."""
    if asked is not None:
        return {
            "conditioning": asked.describe(model.uses),
            "label_distribution": asked.split if "label" in model.uses else "none",
        }
    if labels is None:
        return {"conditioning": "unconditional", "label_distribution": "none"}
    return {"conditioning": "labels", "label_distribution": reference.name if model is not None else "as given"}


def stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """``progress`` for one part of the work."""
    return None if progress is None else lambda done, total: progress(name, done, total)


def draw_like(
    model: reference.SupportsSampling,
    n: int,
    data: reference.EvaluationData,
    protocol: EvaluationProtocol,
    progress: Callable[[int, int], None] | None = None,
    keep: Path | None = None,
) -> Samples:
    """``n`` samples in the form that extractors take; a conditional model is asked for the reference's classes, and one
    that is told more for what held-out images have."""
    labels, asked = None, choose_conditions(model, data, n, seed=protocol.seed, split=protocol.conditions)
    if asked is None and getattr(model, "conditional", False):
        known = data.split("train" if is_file(protocol.reference) else protocol.reference).labels
        if known is None:
            raise UserError(f"A conditional model needs labels to draw, and data '{data.spec.name}' has none.")
        labels = labels_like(known, n, protocol.seed)
    return draw_samples(
        model, n, seed=protocol.seed, chunk=protocol.chunk, labels=labels, asked=asked, finish=as_stored,
        spec=data.spec, progress=progress, keep=keep,
    )  # fmt: skip


def quality(
    images: Tensor,
    labels: Tensor | None,
    data: reference.EvaluationData,
    protocol: EvaluationProtocol,
    extractor: Extractor,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[dict[str, Metric], dict[str, Any]]:
    """(metrics, details) of images as `quantize.as_stored` gives them; real images give each its floor.

    All processes share the extraction of features; the first one computes the figures from them.
    """

    def real(name: str) -> Reference:
        return reference_of(data, name, extractor, device, protocol.folder, stage(progress, f"features of {name}"))

    reference = real(protocol.reference)
    held = RealFeatures(**{name: real(name).features for name in ("train", "test", "val")})  # type: ignore[arg-type]
    held_out = real("test" if reference.name != "test" else "val")
    own = extractor(images, device, stage(progress, "features"))

    def work() -> tuple[dict[str, Metric], dict[str, Any]]:
        further = dict(protocol.metrics)
        ground = real_data_baseline(held_out, reference, len(own), extractor, further)
        metrics = compute_metrics(own, reference, extractor, labels=labels, further=further)
        metrics = add_baselines(metrics, ground.figures, ground.note) | memorization_metrics(own.features, held)
        details: dict[str, Any] = {"flags": check_features(own.features, ground.features.features)}
        if data.spec.dims != 2:
            looked_at = own.features[:LOOKED_AT]
            details["nearest_training"] = nearest_distances(looked_at, held.train.features, NEIGHBOURS).tolist()
        if {"density", "coverage"} <= metrics.keys():
            n = min(len(own), reference.n)
            said = missing_modes(*(metrics[name].value or 0.0 for name in ("density", "coverage")), n=n)
            details["flags"] += [] if said is None else [said]
        if (shares := shares_of(own, extractor)) is not None:
            details["class_shares"], details["class_shares_of_floor"] = shares, shares_of(ground.features, extractor)
        return metrics, details

    return run_on_first(work)


@dataclass(frozen=True)
class RealDataBaseline:
    """Figures of real held-out images: how good samples can get."""

    figures: dict[str, Metric]
    features: Features
    note: str
    """What sets it apart from the samples' own n; empty when nothing does."""


def real_data_baseline(
    held_out: Reference, reference: Reference, n: int, extractor: Extractor, further: ExtraMetric
) -> RealDataBaseline:
    """The floor at ``n`` of the ``held_out`` images, or at all of them. Its figures are kept for the next model."""
    assert held_out.features is not None
    rows = evenly_spaced_indices(held_out.n, n)
    own = held_out.features[rows]
    labels = None if held_out.labels is None else held_out.labels[rows]
    key = (held_out.hash, reference.hash, len(own), extractor.hash, extractor.resize)
    if key not in _BASELINES:
        _BASELINES[key] = compute_metrics(own, reference, extractor, labels=labels, error=False)
    found = dict(_BASELINES[key])
    if reference.features is not None:
        for name, metric in further.items():
            found[name] = Metric(metric(own.features, reference.features.features))
    return RealDataBaseline(found, own, "" if len(own) == n else f"floor from {len(own)} {held_out.name} images")


_BASELINES: dict[tuple[str | int, ...], dict[str, Metric]] = {}


def given_images(
    images: Tensor, labels: Tensor | None, n: int, protocol: EvaluationProtocol, extractor: Extractor
) -> tuple[Tensor, Tensor | None]:
    """The first ``n`` of given images, or all of fewer where the protocol names no number."""
    if len(images) < n:
        if protocol.n is not None:
            raise UserError(f"The protocol asks for {n} images, and {len(images)} were given.")
        if len(images) < MIN_N:
            raise UserError(f"{len(images)} samples measure nothing: give at least {MIN_N}.")
        if protocol.ranks_by_frechet(extractor) and len(images) <= extractor.dim:
            raise UserError(
                f"{len(images)} images cannot carry a Frechet distance on the {extractor.dim} features of "
                f"{extractor.name}: give more than {extractor.dim}."
            )
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{len(images)} images have {len(labels)} labels: give one for each.")
    return images[:n], None if labels is None else labels[:n]


def sanity_warnings(
    images: Tensor, data: reference.EvaluationData, protocol: EvaluationProtocol, *, refuse: bool
) -> list[str]:
    """`sanity.check_images` and `sanity.check_reference` against the protocol's reference, or the training split where
    that is a file. The first process computes them."""
    name = "train" if is_file(protocol.reference) else protocol.reference
    real = data.split(name).images
    compared = real[evenly_spaced_indices(len(real), len(images))]  # as for the neighbour metrics
    return run_on_first(lambda: check_images(images, real, data.spec, refuse=refuse) + check_reference(compared, name))


def quantization(spec: DataSpec) -> str:
    if spec.num_levels is None:
        return "none"
    return "uint8" if spec.num_levels == 256 else f"uint8, {spec.num_levels} levels"
