"""Kernel distances: the unbiased squared maximum mean discrepancy (MMD) between samples and a fixed reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import check_finite
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.intervals import LEVEL, PAIR_IMAGES, Estimate, estimate, student_estimate

BLOCK_SIZE = 1000
"""Number of rows and columns of a kernel matrix block that is in memory at a time."""
MAX_REFERENCE_IMAGES = 10_000
BANDWIDTH_IMAGES = 2000
"""Number of reference images that the median bandwidth is computed from."""
MIN_EXPONENT = -80.0
"""Smallest exponent. For smaller values, exp() returns denormal numbers, which are a hundred times slower on a CPU."""
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020
"""Number, size and seed of the subsets, as in torch-fidelity."""
MMD_SCALE = 1000


class Kernel(Protocol):
    """A positive definite kernel."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute k(x_i, y_j) for all pairs of rows of x (n, d) and y (m, d), as (n, m) in the same precision."""
        ...

    def fit(self, reference: Tensor) -> Kernel:
        """Return a kernel whose data-dependent parameters are fitted to the reference features (n, d)."""
        ...


@dataclass(frozen=True)
class CubicKernel:
    r""":math:`k(x, y) = (x^\top y / d + 1)^3`, the kernel of KID (Binkowski et al. 2018, "Demystifying MMD GANs",
    section 4, https://arxiv.org/abs/1801.01401).

    It is unbounded. For samples with few finite moments, k(x, x') has no finite variance, and no interval is reliable.
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        k = (x @ y.T).div_(x.shape[1]).add_(1)
        return k * k * k

    def fit(self, reference: Tensor) -> CubicKernel:
        return self


@dataclass(frozen=True)
class GaussianKernel:
    r""":math:`k(x, y) = \exp(-\lVert x - y \rVert^2 / (2 b^2))`. It is bounded, so intervals also hold for heavy tails.

    On CLIP features with ``normalize`` and b = 10, 1000 times the distance is CMMD (Jayasumana et al. 2024, "Rethinking
    FID", section 4, https://arxiv.org/abs/2401.09603).

    Args:
        bandwidth: b, in units of the features. None uses ``median_factor`` times the median distance between reference
            images.
        median_factor: see ``bandwidth``.
        normalize: scale each image's features to unit length first.
        center: mean of the reference features, set by `fit`. It is subtracted from all features, because distances
            computed from scalar products lose precision far from zero.
    """

    bandwidth: float | None = None
    median_factor: float = 1.0
    normalize: bool = False
    center: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("bandwidth", "median_factor"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} of the Gaussian kernel must be positive, not {value}.")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.bandwidth is not None, "call fit first"
        x, y = self._prepare(x), self._prepare(y)
        square = torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1, keepdim=True)).clamp_min_(0)
        return square.mul_(-1 / (2 * self.bandwidth**2)).clamp_min_(MIN_EXPONENT).exp_()

    def fit(self, reference: Tensor) -> GaussianKernel:
        centered = replace(self, center=replace(self, center=None)._prepare(reference).mean(0))
        if self.bandwidth is not None:
            return centered
        subset = centered._prepare(reference[evenly_spaced_indices(len(reference), BANDWIDTH_IMAGES)])
        median = float(torch.pdist(subset).median()) if len(subset) > 1 else 0.0
        # If all reference images are identical, any bandwidth will do.
        return replace(centered, bandwidth=self.median_factor * (median or 1.0))

    def _prepare(self, x: Tensor) -> Tensor:
        if self.normalize:
            x = torch.nn.functional.normalize(x, dim=1)
        return x if self.center is None else x - self.center.to(x.dtype)


@dataclass(frozen=True)
class KernelReference:
    """The terms of a kernel distance that depend only on the reference, computed once."""

    features: Tensor
    """Features of the reference images, (m, d)."""
    kernel: Kernel
    """The kernel, fitted to the features."""
    mean: float
    """Mean of k(y_i, y_j) over pairs of different reference images."""

    @classmethod
    def from_features(cls, features: Tensor, kernel: Kernel, limit: int = MAX_REFERENCE_IMAGES) -> KernelReference:
        """Use at most ``limit`` evenly spaced images of the reference features (n, d).

        Raises:
            UserError: features are not finite, or there are fewer than 2.
        """
        check_finite(features)
        if len(features) < 2:
            raise UserError("A kernel distance needs at least 2 reference images.")
        rows = features[evenly_spaced_indices(len(features), limit)]
        fitted = kernel.fit(rows)
        m = len(rows)
        return cls(rows, fitted, float(_row_sums(rows, fitted).sum()) / (m * (m - 1)))


def kernel_distance(features: Tensor, reference: Tensor | KernelReference, kernel: Kernel | None = None) -> Estimate:
    r"""Compute the unbiased squared MMD between samples and a reference, zero in expectation for equal distributions:

    .. math:: T = \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
        - \frac{2}{nm} \sum_{i,j} k(x_i, y_j)

    (Gretton et al. 2012, "A Kernel Two-Sample Test", Lemma 6, https://jmlr.org/papers/v13/gretton12a.html). Its
    interval covers the expectation over fresh samples with the reference fixed. T is a U-statistic, so its delete-one
    values follow from row sums. The interval also holds near P = Q, where the first-order part vanishes
    (`interval_margins`).

    Args:
        features: (n, d), n at least 3, float32 or float64. Sums are computed in float64.
        reference: (m, d), or its `KernelReference`.
        kernel: the kernel, used if ``reference`` is a tensor; None uses a Gaussian kernel of median bandwidth.

    Raises:
        UserError: features are not finite or too few, or the dimensions differ.
    """
    if isinstance(reference, Tensor):
        reference = KernelReference.from_features(reference, kernel or GaussianKernel())
    sums = KernelSums(reference)
    sums.add(features)
    return sums.distance()


class KernelSums:
    """The sums of `kernel_distance` for samples that arrive in chunks, so that each pair is evaluated once."""

    def __init__(self, reference: KernelReference) -> None:
        self.reference = reference
        self.features = reference.features[:0]
        """Features of the samples, (n, d)."""
        self._xx = torch.zeros(0, dtype=torch.float64)
        self._xy = torch.zeros(0, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.features)

    def add(self, features: Tensor) -> None:
        """Add samples (n, d).

        Raises:
            UserError: features are not finite, or of another dimension than the reference.
        """
        check_finite(features)
        if features.shape[1] != self.reference.features.shape[1]:
            raise UserError(
                f"Features of dimension {features.shape[1]} cannot be compared with a reference of dimension "
                f"{self.reference.features.shape[1]}."
            )
        k = self.reference.kernel
        xx = _row_sums(features, k)
        for i, rows in _blocks(features):
            for j, columns in _blocks(self.features):
                block = k(rows, columns)
                xx[i : i + len(rows)] += _sum(block, 1)
                self._xx[j : j + len(columns)] += _sum(block, 0)
        xy = torch.cat([_sum(k(rows, self.reference.features), 1) for rows in features.split(BLOCK_SIZE)])
        self._xx = torch.cat([self._xx, xx])
        self._xy = torch.cat([self._xy, xy / len(self.reference.features)])
        self.features = torch.cat([self.features, features]) if len(self.features) else features

    def distance(self, level: float = LEVEL) -> Estimate:
        """Return the distance of all samples so far, with its interval.

        Raises:
            UserError: there are fewer than 3 samples.
        """
        value, delete_one = self._value_and_delete_one()
        return estimate(value, delete_one, *self._second_order(), level)

    def difference(self, other: KernelSums, level: float = LEVEL) -> Estimate:
        r"""Return the distance of these samples minus that of as many ``other`` samples, with its interval.

        Both have the same reference, whose own term cancels. Pair i, a sample of each, is left out together, so samples
        that are drawn from the same noise, and are therefore correlated, have the narrower interval that they deserve:

        .. math:: D \pm t\, \sqrt{\frac{n - 1}{n} \sum_i (D_{(i)} - \bar D_{()})^2}.

        The delete-one jackknife counts the variance of the second-order part twice. `interval_margins` corrects this
        and lets the variance depend on the value; for differences that are tested several times, its intervals are too
        narrow (benchmarks/sequential.py).

        Raises:
            UserError: the numbers of samples differ, or there are fewer than 3.
        """
        n = len(self)
        if n != len(other):
            raise UserError(f"A paired difference needs equally many samples, not {n} and {len(other)}.")
        (value, delete_one), (other_value, other_delete_one) = (
            self._value_and_delete_one(), other._value_and_delete_one()
        )  # fmt: skip
        error = float((delete_one - other_delete_one).var()) ** 0.5 * (n - 1) / n**0.5
        return student_estimate(value - other_value, error, n, level)

    def _value_and_delete_one(self) -> tuple[float, Tensor]:
        n, xx, xy = len(self), self._xx, self._xy
        if n < 3:
            raise UserError(f"A kernel distance needs at least 3 samples, not {n}.")
        value = xx.sum() / (n * (n - 1)) - 2 * xy.mean() + self.reference.mean
        delete_one = (xx.sum() - 2 * xx) / ((n - 1) * (n - 2))
        delete_one += self.reference.mean - 2 * (xy.sum() - xy) / (n - 1)
        return float(value), delete_one

    def _second_order(self) -> tuple[Tensor, Tensor]:
        """Return the second-order terms of a subset of the samples, and its indices (`interval_margins`)."""
        rows = evenly_spaced_indices(len(self), PAIR_IMAGES)
        return 2 * self.reference.kernel(self.features[rows], self.features[rows]).double(), rows


def mmd(features: Tensor, reference: Tensor | KernelReference, kernel: GaussianKernel | None = None) -> Estimate:
    """Compute 1000 times `kernel_distance`, by default with the Gaussian kernel. CMMD has the same factor (Jayasumana
    et al. 2024, "Rethinking FID", section 4, https://arxiv.org/abs/2401.09603)."""
    return scaled(kernel_distance(features, reference, kernel))


def scaled(found: Estimate) -> Estimate:
    """Return 1000 times an estimate, the scale of `mmd`."""
    interval = found.interval and (MMD_SCALE * found.interval[0], MMD_SCALE * found.interval[1])
    return replace(
        found, value=MMD_SCALE * found.value, interval=interval, standard_error=MMD_SCALE * found.standard_error
    )


@dataclass(frozen=True)
class GaussianMMD:
    r"""1000 times the unbiased squared MMD (`kernel_distance`) with the kernel
    :math:`\exp(-\lVert x - y \rVert^2 / (2 b^2))`, as an extra metric of a protocol.

    On CLIP features scaled to unit length, with b = 10, this is CMMD (Jayasumana et al. 2024, "Rethinking FID",
    section 4, https://arxiv.org/abs/2401.09603) in its unbiased form. The authors' code also includes the pairs of each
    image with itself.

    Args:
        bandwidth: b, in units of the features; None uses the median distance between real images.
        normalize: scale each image's features to unit length first.
    """

    bandwidth: float | None = None
    normalize: bool = False
    higher_is_better: ClassVar[bool] = False

    def __call__(self, generated: Tensor, reference: Tensor) -> float:
        """Compute the metric of features (n, d) against the reference (m, d)."""
        return self.estimate(generated, reference).value

    def estimate(self, generated: Tensor, reference: Tensor) -> Estimate:
        """Compute the metric with its interval."""
        return mmd(generated, reference, GaussianKernel(self.bandwidth, normalize=self.normalize))


def kid(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Compute KID as published: (mean, spread) over 100 subsets of the squared MMD with the cubic kernel (Binkowski et
    al. 2018, "Demystifying MMD GANs", section 4, https://arxiv.org/abs/1801.01401).

    A subset contains 1,000 samples and 1,000 real images, or fewer if one of the sets is smaller. The subsets are drawn
    as in torch-fidelity, so the result is the same. The spread is the standard deviation over subsets, not the standard
    error of the mean. If each subset contains all samples, the spread is the standard error of the U-statistic instead,
    since the subsets would not show the variation of the samples.
    """
    check_finite(features)
    check_finite(reference)
    size = min(KID_SUBSET_SIZE, len(features), len(reference))
    random = np.random.RandomState(KID_SEED)
    kernel = CubicKernel()
    values = []
    for _ in range(KID_SUBSETS):
        x = features[torch.from_numpy(random.choice(len(features), size, replace=False))]
        y = reference[torch.from_numpy(random.choice(len(reference), size, replace=False))]
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        within = _sum(xx) - _sum(xx.diagonal()) + _sum(yy) - _sum(yy.diagonal())
        values.append(float(within / (size * (size - 1)) - 2 * _sum(xy) / size**2))
        if size == len(features) == len(reference):
            break  # every subset is the whole set
    if size < len(features):
        return float(np.mean(values)), float(np.std(values))
    return float(np.mean(values)), kernel_distance(features, reference, kernel).standard_error


def _row_sums(x: Tensor, kernel: Kernel) -> Tensor:
    """Compute sum_{j != i} k(x_i, x_j) for all i, (n,), float64. Blocks above the diagonal are used twice."""
    sums = torch.zeros(len(x), dtype=torch.float64)
    for i, rows in _blocks(x):
        for j, columns in _blocks(x[i:]):
            k = kernel(rows, columns)
            if j == 0:
                k.fill_diagonal_(0)
            sums[i : i + len(rows)] += _sum(k, 1)
            if j > 0:
                sums[i + j : i + j + len(columns)] += _sum(k, 0)
    return sums


def _blocks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    return ((start, x[start : start + BLOCK_SIZE]) for start in range(0, len(x), BLOCK_SIZE))


def _sum(values: Tensor, dim: int | None = None) -> Tensor:
    """Sum in float64."""
    return values.sum(dtype=torch.float64) if dim is None else values.sum(dim, dtype=torch.float64)
