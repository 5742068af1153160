"""A further metric, for ``+evaluation/metric=mmd``: squared MMD with a Gaussian kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from gencompare.evaluation.intervals import Estimate
from gencompare.evaluation.kernel import Gaussian, kernel_distance

SCALE = 1000


@dataclass(frozen=True)
class GaussianMMD:
    """1000 times the unbiased squared MMD (`kernel.kernel_distance`) with the kernel exp(-|x - y|^2 / (2 b^2)).

    On CLIP's features scaled to length 1, with b = 10, this is CMMD (Jayasumana et al. 2024, "Rethinking FID", section
    4), in its unbiased form: the authors' code adds the pairs of an image with itself.

    Args:
        bandwidth: b, in units of the features; None takes the median distance of real images.
        normalize: scale each image's features to length 1 first.
    """

    bandwidth: float | None = None
    normalize: bool = False
    better: ClassVar[str] = "lower"

    def __call__(self, generated: Tensor, reference: Tensor) -> float:
        """Features (n, d) and (m, d)."""
        return self.estimate(generated, reference).value

    def estimate(self, generated: Tensor, reference: Tensor) -> Estimate:
        """The same with its interval."""
        found = kernel_distance(generated, reference, Gaussian(self.bandwidth, normalize=self.normalize))
        interval = found.interval and (SCALE * found.interval[0], SCALE * found.interval[1])
        return replace(found, value=SCALE * found.value, interval=interval, standard_error=SCALE * found.standard_error)
