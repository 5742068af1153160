"""Points in the plane as images of two channels and one pixel: data whose truth is known."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gencompare.contract import DataSpec
from gencompare.data.base import SPLITS, ImageData, Split
from gencompare.data.planar import DISTRIBUTIONS
from gencompare.errors import UserError
from gencompare.seeds import generator


class Toy2D(ImageData):
    """``n`` points a split, (n, 2, 1, 1), drawn from fixed seeds; labels are the parts of a mixture.

    Args:
        name: one of `planar.DISTRIBUTIONS`.
        n: points in each of train, val and test.
    """

    def __init__(self, name: str = "gaussians8", *, n: int = 10_000, **common: Any) -> None:
        super().__init__(**common)
        if name not in DISTRIBUTIONS:
            raise UserError(
                f"There is no distribution '{name}' in data 'toy2d': choose data.name={', '.join(DISTRIBUTIONS)}."
            )
        if n < 1:
            raise UserError(f"data.n={n} must be at least 1 point.")
        self.truth, self.n = DISTRIBUTIONS[name], n
        self.spec = DataSpec(
            name=f"toy2d_{name}",
            shape=(2, 1, 1),
            num_classes=self.truth.components,
            num_levels=None,
        )

    def load(self) -> dict[str, Split]:
        splits = {}
        for split in SPLITS:
            points, labels = self.truth.sample(self.n, generator("cpu", self.spec.name, split))
            splits[split] = Split(points.float()[:, :, None, None], labels)
        return splits

    def log_density(self, x: Tensor) -> Tensor | None:
        """log p of points (n, 2, 1, 1) or (n, 2) in nats, (n,); None where it has no closed form."""
        return self.truth.log_density(x.flatten(1))
