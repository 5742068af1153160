"""The cheap figures of a look: few samples against the validation images."""

from __future__ import annotations

from dataclasses import replace

from gencompare.contract import GenerativeModel
from gencompare.data.base import ImageData
from gencompare.evaluation.evaluate import Protocol, draw_like
from gencompare.evaluation.preview import preview_figures


class Preview:
    """Frechet distance, density and coverage of ``n`` samples and the validation split, in the protocol's features.

    Biased upwards by its small n, and on another reference than a result's: fit to compare one run's looks with each
    other, and nothing else. All processes share the sampling.
    """

    def __init__(self, data: ImageData, protocol: Protocol, *, n: int) -> None:
        self.data, self.n = data, n
        # A seed of its own: the samples that a result is measured on choose no checkpoint.
        self.protocol = replace(
            protocol, seed=protocol.seed + 1_000_003, chunk=min(protocol.chunk, n), conditions="val"
        )
        self.extractor = protocol.build(data.spec)[0]

    @property
    def images(self) -> int:
        """Images on each side of density and coverage."""
        return min(self.n, len(self.data.split("val")))

    def __call__(self, model: GenerativeModel) -> dict[str, float]:
        """The figures by name, the distance first."""
        images = draw_like(model, self.n, self.data, self.protocol).images
        return preview_figures(images, self.data, self.extractor)
