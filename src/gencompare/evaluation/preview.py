"""Cheap figures while a model trains: for curves and for the choice of ``best``, never for a result."""

from __future__ import annotations

from torch import Tensor

from gencompare.evaluation import source
from gencompare.evaluation.features import Extractor
from gencompare.evaluation.figures import neighbours
from gencompare.evaluation.frechet import frechet_distance
from gencompare.evaluation.mmd import mmd
from gencompare.evaluation.quantize import as_stored
from gencompare.evaluation.reference import reference_of


def preview_figures(images: Tensor, data: source.Data, extractor: Extractor, split: str = "val") -> dict[str, float]:
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
    near = neighbours(own, reference.features.features)
    return {extractor.primary: distance} | {
        name: near[name].value
        for name in ("density", "coverage")
        if name in near  # type: ignore[misc]
    }
