"""A cheap distance while a model trains: for curves and for the choice of ``best``, never for a result."""

from __future__ import annotations

from torch import Tensor

from gencompare.evaluation import source
from gencompare.evaluation.features import Extractor
from gencompare.evaluation.frechet import frechet_distance
from gencompare.evaluation.quantize import as_stored
from gencompare.evaluation.reference import reference_of


def preview_distance(images: Tensor, data: source.Data, extractor: Extractor, split: str = "val") -> float:
    """Frechet distance between ``images`` and a split that no result is measured against.

    Biased upwards by the small n of both sides; with fewer images than features it is still defined, and still falls
    as samples get better. So it orders the looks of one run, at one n, and nothing else.

    Args:
        images: (n, C, H, W), n at least 2, uint8 or float as `evaluate` takes them.
    """
    device = images.device
    own = extractor(as_stored(images, data.spec), device)
    return frechet_distance(own.features, reference_of(data, split, extractor, device).statistics)
