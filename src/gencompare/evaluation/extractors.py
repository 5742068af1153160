"""Which extractors measure which data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from gencompare.contract import DataSpec
from gencompare.errors import UserError
from gencompare.evaluation.compact import SHIPPED, compact
from gencompare.evaluation.features import Extractor
from gencompare.evaluation.imagenet import efficientnet_lite0
from gencompare.evaluation.raw import RawValues

Factory = Callable[..., Extractor]
"""``(spec, [weights]) -> Extractor``."""


def default_extractors(spec: DataSpec) -> list[Factory]:
    """What measures data of ``spec`` where a protocol names nothing, the first one ranks.

    Images: EfficientNet-Lite0, chosen by the study in docs/evaluation.md, and beside it the classifier that this
    package ships for the data set, for class metrics and as a second opinion. Points: their own values.
    """
    if spec.num_levels is None:
        return [RawValues]
    return [efficientnet_lite0, *([compact] if (SHIPPED / f"{spec.name}.safetensors").is_file() else [])]


def build_extractors(
    factories: Sequence[Factory] | None, spec: DataSpec, weights: str | os.PathLike[str] | None = None
) -> list[Extractor]:
    """The extractors of ``factories``, or the default ones, for data of ``spec``; ``weights`` are the first one's.

    Raises `UserError` for an empty list, two that are the same, and what an extractor refuses.
    """
    if factories is not None and not factories:
        raise UserError("evaluation.extractors=[] measures nothing: name at least one, or leave it out.")
    built = [
        factory(spec, **({"weights": weights} if weights is not None and k == 0 else {}))
        for k, factory in enumerate(factories or default_extractors(spec))
    ]
    seen = [(extractor.name, extractor.hash, extractor.resize) for extractor in built]
    if len(set(seen)) < len(seen):
        raise UserError(f"evaluation.extractors names one twice: {', '.join(e.name for e in built)}.")
    return built
