"""Squared MMD with a Gaussian kernel: the primary metric, and a further one (``+evaluation/metric=mmd``)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from gencompare.evaluation.intervals import Estimate
from gencompare.evaluation.kernel import Gaussian, KernelReference, kernel_distance

SCALE = 1000


def mmd(features: Tensor, reference: Tensor | KernelReference, kernel: Gaussian | None = None) -> Estimate:
    """1000 times `kernel.kernel_distance` of features (n, d), with its interval; the factor is that of CMMD (Jayasumana
    et al. 2024, "Rethinking FID", section 4, https://arxiv.org/abs/2401.09603)."""
    found = kernel_distance(features, reference, kernel)
    interval = found.interval and (SCALE * found.interval[0], SCALE * found.interval[1])
    return replace(found, value=SCALE * found.value, interval=interval, standard_error=SCALE * found.standard_error)


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
        return mmd(generated, reference, Gaussian(self.bandwidth, normalize=self.normalize))
