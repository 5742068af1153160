"""Numbers that change while a model trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from gencompare.errors import UserError


@dataclass(frozen=True)
class CosineRamp:
    """first + (last - first) (1 - cos(pi min(1, s / images))) / 2 after s images; ``last`` from then on.

    Args:
        images: training images over which the number changes.
    """

    first: float
    last: float
    images: int

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"A ramp over images={self.images} has no length: give at least 1.")

    def __call__(self, seen: Tensor) -> Tensor:
        """The number after ``seen`` images (a tensor, so that no device is waited for)."""
        share = (seen / self.images).clamp(max=1)
        return self.first + (self.last - self.first) * (1 - (math.pi * share).cos()) / 2
