"""The distances of one set of features from the reference, and the floor: the same for real images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.evaluation import source
from gencompare.evaluation.features import Extractor, Features
from gencompare.evaluation.metrics import frechet_distance, kernel_distance, precision_recall
from gencompare.evaluation.reference import spaced, split_features


@dataclass(frozen=True)
class Figures:
    """What `distances` finds; None where there are too few images for it, or all are alike."""

    frechet: float | None = None
    kernel: float | None = None
    kernel_spread: float | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class Floor:
    """Figures of real held-out images: how good samples can get."""

    figures: Figures
    features: Features
    note: str
    """What sets it apart from the samples' own n; empty when nothing does."""


def distances(own: Tensor, reference: Tensor) -> Figures:
    """Figures of features ``own`` (n, d) against all of ``reference`` (m, d).

    Precision and recall compare balls, which shrink as a set grows, so they see as many reference images as there are
    samples.
    """
    if len(own) <= own.shape[1] or float(reference.double().var(0).sum()) == 0:
        return Figures()
    kernel, spread = kernel_distance(own, reference)
    precision, recall = precision_recall(own, reference[spaced(len(reference), len(own))])
    return Figures(frechet_distance(own, reference), kernel, spread, precision, recall)


def floor(data: source.Data, reference: str, n: int, extractor: Extractor, device: torch.device) -> Floor:
    """The floor at ``n`` images, or at as many as the test split has. Its figures are kept for the next model."""
    split = "test" if reference != "test" else "val"
    real = split_features(data, split, extractor, device)
    own = real[spaced(len(real), n)]
    key = (data.hash(split), data.hash(reference), len(own), extractor.hash, extractor.resize)
    if key not in _kept:
        whole = split_features(data, reference, extractor, device)
        _kept[key] = distances(own.features, whole.features)
    return Floor(_kept[key], own, "" if len(own) == n else f"floor from {len(own)} {split} images")


_kept: dict[tuple[str | int, ...], Figures] = {}
