"""The cheap distance of a look: few samples against the validation images."""

from __future__ import annotations

from gencompare.contract import GenerativeModel
from gencompare.data.base import ImageData
from gencompare.evaluation.evaluate import Protocol


class Preview:
    """Frechet distance between ``n`` samples and the validation split, in the protocol's features.

    Biased upwards by its small n, and on another reference than a result's: fit to compare one run's looks with each
    other, and nothing else.
    """

    def __init__(self, data: ImageData, protocol: Protocol, *, n: int, seed: int) -> None:
        self.data, self.protocol, self.n, self.seed = data, protocol, n, seed

    def __call__(self, model: GenerativeModel) -> tuple[str, float]:
        raise NotImplementedError
