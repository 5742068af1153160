"""``evaluate``: figures of one model, or of one set of images, under one protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gencompare.contract import DataSpec
from gencompare.errors import UserError
from gencompare.evaluation import source
from gencompare.evaluation.compact import compact
from gencompare.evaluation.distributed import once
from gencompare.evaluation.features import Extractor, Features
from gencompare.evaluation.figures import Figures, Floor, distances, floor
from gencompare.evaluation.memorization import memorization_ratio
from gencompare.evaluation.metrics import (
    SURE,
    class_shares,
    confident,
    label_accuracy,
)
from gencompare.evaluation.quantize import as_stored
from gencompare.evaluation.reference import split_features
from gencompare.evaluation.sampling import CHUNK, Samples, draw, labels_like
from gencompare.evaluation.scoring import bits_per_dim, reconstruction
from gencompare.protocol import Generation, Measurement
from gencompare.records import Metric, Result, now

MOST = 10_000
"""Samples that are drawn at most where the protocol does not say how many."""
PER_FEATURE = 4
"""Samples that are drawn at least for each feature, where the protocol does not say how many."""


@dataclass(frozen=True)
class Protocol:
    """How samples are measured. Everything that moves a figure is here, or is hashed into its `Measurement`.

    Args:
        extractor: a factory ``spec -> Extractor``.
        n: samples; None draws as many as there are test images, but at least 4 a feature, and at most 10,000.
        reference: the split that samples are held against.
        chunk: samples drawn from one seed at a time.
        likelihood_n: test images that are scored in bits/dim and reconstructed (some families need a thousand network
            calls for each).
        seed: of sampling.
        metrics: further figures by name, each a function ``(features of samples, features of the reference) -> float``;
            its attribute ``better`` (``lower``, ``higher``, ``one``) says how to rank it, where it has one.
    """

    extractor: Callable[[DataSpec], Extractor] = compact
    n: int | None = None
    reference: str = "train"
    chunk: int = CHUNK
    likelihood_n: int = 500
    seed: int = 0
    metrics: Mapping[str, Callable[[Tensor, Tensor], float]] = field(default_factory=dict)

    def check(self, data: source.Data) -> Extractor:
        """The extractor, when this protocol can measure ``data``.

        Raises `UserError` where it cannot: weights that are not there, or too few images for the features. With n <= d
        images the d x d covariance is singular, and a Frechet distance says more of n than of the model.
        """
        extractor = self.extractor(data.spec)
        n, size, dim = self.size(data, extractor), len(data.split(self.reference)), extractor.dim
        if self.chunk < 1 or self.likelihood_n < 1:
            raise UserError("evaluation.protocol: chunk and likelihood_n must be at least 1.")
        if n <= dim:
            raise UserError(
                f"evaluation.n={n} samples cannot carry a Frechet distance on the {dim} features of {extractor.name}: "
                f"ask for more than {dim} (evaluation.n={PER_FEATURE * dim})."
            )
        if size <= dim:
            raise UserError(
                f"The {size} images of the split '{self.reference}' of data '{data.spec.name}' cannot carry a Frechet "
                f"distance on the {dim} features of {extractor.name}: more than {dim} are needed"
                + (", or evaluation=default with its smaller extractor." if dim > 64 else ".")
            )
        return extractor

    def size(self, data: source.Data, extractor: Extractor) -> int:
        """How many samples are measured."""
        return self.n if self.n is not None else min(max(len(data.split("test")), PER_FEATURE * extractor.dim), MOST)


def evaluate(
    sampler_or_images: source.Samples | Tensor,
    data: source.Data,
    protocol: Protocol | None = None,
    *,
    generation: Generation | None = None,
    labels: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_samples: Callable[[Tensor], None] | None = None,
) -> Result:
    """Measure a model, or images, against ``data``.

    Where torch.distributed runs, all processes must call this; they share the sampling, and all get the same result.

    Args:
        sampler_or_images: anything with ``sample(n, cond, *, generator)``, or images (n, C, H, W): uint8 as on a disk
            (0 to 255, whatever the data's number of levels), or float in [-1, 1]; padded as the data or not.
        data: a datamodule of this package, or anything like it (`source.Data`).
        protocol: see `Protocol`.
        generation: what is known of how the samples came about; what is seen here (network calls, sampler, seed) is
            filled in.
        labels: for given images, the class that each was made for, (n,). A model's labels are chosen here.
        progress: called with (samples drawn, n).
        on_samples: called with the images as they were measured, on the first process.

    Returns:
        A `Result` with ``fd_<extractor>`` (``fid`` on the Inception network), kernel distance, precision, recall, the
        memorisation ratio; where the extractor knows the data's classes, ``confident`` and the class shares; for
        models that can, ``bpd_<name>`` and ``psnr``.

    Raises:
        UserError: too few samples, samples that are not finite, not in [-1, 1] or of another shape.
    """
    protocol, generation = protocol or Protocol(), generation or Generation()
    extractor = protocol.check(data)
    n = protocol.size(data, extractor)
    spec = data.spec
    model: Any = None
    seconds: dict[str, float] = {}
    details: dict[str, Any] = dict(extractor.details)
    flags: list[str] = details.setdefault("flags", [])
    if isinstance(sampler_or_images, Tensor):
        given, labels = given_images(sampler_or_images, labels, n, protocol, extractor)
        images = as_stored(given, spec)
        device = torch.device("cpu")
        flags += suspicions(given)
    else:
        model = sampler_or_images
        drawn = draw_like(model, n, data, protocol, progress)
        images, labels = drawn.images, drawn.labels
        device = torch.device(getattr(model, "device", "cpu"))
        seconds["sampling"] = drawn.seconds
        details["images_per_second"] = n / drawn.seconds
        details["peak_memory_bytes"] = drawn.peak_memory_bytes
        if hasattr(model, "sampling_description"):
            generation = replace(generation, sampler=model.sampling_description())
        generation = replace(generation, nfe=drawn.nfe, seed=protocol.seed)

    if on_samples is not None:
        once(lambda: on_samples(images))
    start = time.perf_counter()
    metrics, more = once(lambda: quality(images, labels, data, protocol, extractor, device))
    seconds["metrics"] = time.perf_counter() - start
    flags += more.pop("flags")
    details |= more
    if model is not None:
        start = time.perf_counter()
        metrics |= bits_per_dim(model, data, protocol.likelihood_n, protocol.seed)
        metrics |= reconstruction(model, data, protocol.likelihood_n, protocol.seed)
        seconds["likelihood"] = time.perf_counter() - start

    measurement = Measurement(
        data=spec.name,
        n=len(images),
        reference=protocol.reference,
        reference_n=len(data.split(protocol.reference)),
        reference_hash=data.hash(protocol.reference),
        extractor=extractor.name,
        extractor_hash=extractor.hash,
        resize=extractor.resize,
        quantization=quantization(spec),
        conditioning="unconditional" if labels is None else "labels",
        label_distribution="none" if labels is None else protocol.reference if model is not None else "as given",
        chunk=protocol.chunk,
    )
    return Result(
        measurement=measurement, generation=generation, metrics=metrics, headline=extractor.frechet_name,
        created=now(), seconds=seconds, details=details,
    )  # fmt: skip


def draw_like(
    model: source.Samples,
    n: int,
    data: source.Data,
    protocol: Protocol,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """``n`` samples in the form that extractors take; a conditional model is asked for the reference's classes."""
    labels = None
    if getattr(model, "conditional", False):
        known = data.split(protocol.reference).labels
        if known is None:
            raise UserError(f"A conditional model needs labels to draw, and data '{data.spec.name}' has none.")
        labels = labels_like(known, n, protocol.seed)
    return draw(
        model, n, seed=protocol.seed, chunk=protocol.chunk, labels=labels, finish=as_stored, spec=data.spec,
        progress=progress,
    )  # fmt: skip


def quality(
    images: Tensor,
    labels: Tensor | None,
    data: source.Data,
    protocol: Protocol,
    extractor: Extractor,
    device: torch.device,
) -> tuple[dict[str, Metric], dict[str, Any]]:
    """(metrics, details) of images as `quantize.as_stored` gives them; real images give each its floor."""
    own = extractor(images, device)
    reference = split_features(data, protocol.reference, extractor, device)
    ground = floor(data, protocol.reference, len(images), extractor, device)
    real, note = ground.features, ground.note

    figures = distances(own.features, reference.features)
    metrics = named(figures, ground, extractor)
    for name, further in protocol.metrics.items():
        metrics[name] = Metric(
            further(own.features, reference.features), better=getattr(further, "better", None),
            floor=further(real.features, reference.features), note=note,
        )  # fmt: skip
    details: dict[str, Any] = {"flags": alike(own)}
    splits = {name: split_features(data, name, extractor, device) for name in ("train", "test", "val")}
    ratio = memorization_ratio(own.features, *(splits[name].features for name in ("train", "test", "val")))
    metrics["memorization"] = Metric(
        ratio, better="one", note="nearest training against nearest held-out image; copies give 0"
        if ratio is not None else "a mean distance to held-out images is 0",
    )  # fmt: skip
    if own.logits is not None and real.logits is not None:
        shares, real_shares = class_shares(own.logits), class_shares(real.logits)
        details["class_shares"], details["class_shares_of_floor"] = shares, real_shares
        metrics["confident"] = Metric(
            confident(own.logits),
            better="higher",
            floor=confident(real.logits),
            note=f"classifier at least {SURE} sure",
        )
        metrics["class_share_min"] = Metric(min(shares), better="higher", floor=min(real_shares))
        metrics["class_share_max"] = Metric(max(shares), better="lower", floor=max(real_shares))
        if labels is not None:
            metrics["label_accuracy"] = Metric(
                label_accuracy(own.logits, labels), better="higher", note="the classifier sees the class asked for"
            )
    return metrics, details


def named(own: Figures, ground: Floor, extractor: Extractor) -> dict[str, Metric]:
    """Frechet and kernel distance, precision and recall under their names, each with its floor."""
    real, note = ground.figures, ground.note
    missing = "all reference images are alike" if own.frechet is None else ""
    spread = "" if own.kernel_spread is None else f"subsets +- {own.kernel_spread:.2g}"
    return {
        extractor.frechet_name: Metric(own.frechet, "lower", real.frechet, note=missing or note),
        extractor.kernel_name: Metric(own.kernel, "lower", real.kernel, note="; ".join(filter(None, (spread, note)))),
        "precision": Metric(own.precision, "higher", real.precision, note=note),
        "recall": Metric(own.recall, "higher", real.recall, note=note),
    }


def given_images(
    images: Tensor, labels: Tensor | None, n: int, protocol: Protocol, extractor: Extractor
) -> tuple[Tensor, Tensor | None]:
    """The first ``n`` of given images, or all of fewer where the protocol names no number."""
    if len(images) < n:
        if protocol.n is not None:
            raise UserError(f"The protocol asks for {n} images, and {len(images)} were given.")
        if len(images) <= extractor.dim:
            raise UserError(
                f"{len(images)} images cannot carry a Frechet distance on the {extractor.dim} features of "
                f"{extractor.name}: give more than {extractor.dim}."
            )
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{len(images)} images have {len(labels)} labels: give one for each.")
    return images[:n], None if labels is None else labels[:n]


def suspicions(images: Tensor) -> list[str]:
    """What looks wrong with given images, and is no proof of it."""
    if images.is_floating_point() and images.numel() and images.min() >= 0:
        return ["no value is below 0: images in [0, 1] must be brought to [-1, 1] first"]
    return []


def alike(own: Features) -> list[str]:
    if float(own.features.double().var(0).sum()) == 0:
        return ["all samples have the same features: the model draws one image"]
    return []


def quantization(spec: DataSpec) -> str:
    if spec.num_levels is None:
        return "none"
    return "uint8" if spec.num_levels == 256 else f"uint8, {spec.num_levels} levels"
