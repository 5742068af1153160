"""Kernel distances: the unbiased squared maximum mean discrepancy between samples and a fixed reference."""

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
from gencompare.evaluation.metrics.intervals import Estimate, estimate, pair_rows

BLOCK = 1000
"""Rows of a kernel matrix that are held at a time."""
REFERENCE_LIMIT = 10_000
BANDWIDTH_ROWS = 2000
UNDERFLOW = -80.0
"""Smallest exponent. Below it exp() gives denormal numbers, which take a processor a hundred times as long."""
SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020


class Kernel(Protocol):
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """k for all pairs of rows of x (n, d) and y (m, d), (n, m), in their precision."""
        ...

    def fitted(self, reference: Tensor) -> Kernel:
        """The kernel with what depends on the reference images (n, d) filled in."""
        ...


@dataclass(frozen=True)
class CubicKernel:
    """(x y / d + 1)^3, the kernel of KID (Binkowski et al. 2018, "Demystifying MMD GANs", section 4).

    It is unbounded: k(x, x') of samples with few finite moments has no variance, and then no interval is reliable.
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        k = (x @ y.T).div_(x.shape[1]).add_(1)
        return k * k * k

    def fitted(self, reference: Tensor) -> CubicKernel:
        return self


@dataclass(frozen=True)
class GaussianKernel:
    """exp(-|x - y|^2 / (2 b^2)), bounded, so that intervals hold for heavy tails too.

    On CLIP's features with normalize and b = 10, 1000 times the distance is CMMD (Jayasumana et al. 2024, "Rethinking
    FID", section 4).

    Args:
        bandwidth: b, in units of the features; None takes ``median_factor`` times the median distance between
            reference images.
        median_factor: see ``bandwidth``.
        normalize: scale each image's features to length 1 first.
    """

    bandwidth: float | None = None
    median_factor: float = 1.0
    normalize: bool = False
    centre: Tensor | None = None
    """Mean of the reference, taken off both sides: the product form of distances cancels far from zero."""

    def __post_init__(self) -> None:
        for name in ("bandwidth", "median_factor"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} of the Gaussian kernel must be above 0, not {value}.")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.bandwidth is not None, "call fitted first"
        x, y = self.prepared(x), self.prepared(y)
        square = torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1, keepdim=True)).clamp_min_(0)
        return square.mul_(-1 / (2 * self.bandwidth**2)).clamp_min_(UNDERFLOW).exp_()

    def prepared(self, x: Tensor) -> Tensor:
        if self.normalize:
            x = torch.nn.functional.normalize(x, dim=1)
        return x if self.centre is None else x - self.centre.to(x.dtype)

    def fitted(self, reference: Tensor) -> GaussianKernel:
        centred = replace(self, centre=replace(self, centre=None).prepared(reference).mean(0))
        if self.bandwidth is not None:
            return centred
        some = centred.prepared(reference[evenly_spaced_rows(len(reference), BANDWIDTH_ROWS)])
        # All reference images alike: any bandwidth will do.
        median = float(torch.pdist(some).median()) if len(some) > 1 else 0.0
        return replace(centred, bandwidth=self.median_factor * (median or 1.0))


@dataclass(frozen=True)
class KernelReference:
    """The reference's side of a kernel distance, computed once: rows, fitted kernel and mean of k(y, y')."""

    features: Tensor
    """(m, d)."""
    kernel: Kernel
    within: float
    """Mean of k over pairs of different reference images."""

    @classmethod
    def of(cls, features: Tensor, kernel: Kernel, limit: int = REFERENCE_LIMIT) -> KernelReference:
        """Of reference features (n, d), at least 2: ``limit`` of them, evenly spaced.

        Raises:
            UserError: features that are not finite, or fewer than 2.
        """
        check_finite(features)
        if len(features) < 2:
            raise UserError("A kernel distance needs at least 2 reference images.")
        rows = features[evenly_spaced_rows(len(features), limit)]
        fitted = kernel.fitted(rows)
        m = len(rows)
        return cls(rows, fitted, float(row_sums(rows, fitted).sum()) / (m * (m - 1)))


def kernel_distance(features: Tensor, reference: Tensor | KernelReference, kernel: Kernel | None = None) -> Estimate:
    """Squared MMD of samples (n, d) from a reference, unbiased, so near zero on either side for equal distributions:

        T = sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 mean_ij k(x_i, y_j)

    Its interval covers the expectation over fresh samples, with the reference fixed, from delete-one values in closed
    form: T is a U-statistic, whose values without image i follow from sums over rows. It holds near P = Q as well,
    where the first-order part vanishes (`intervals.margins`).

    Args:
        features: (n, d), n at least 3; float32 or float64, sums are in float64.
        reference: (m, d), or its `KernelReference`.
        kernel: with reference features; by default the Gaussian one with the median bandwidth.

    Raises:
        UserError: features that are not finite or too few.
    """
    check_finite(features)
    n = len(features)
    if n < 3:
        raise UserError(f"A kernel distance needs at least 3 samples, not {n}.")
    if isinstance(reference, Tensor):
        reference = KernelReference.of(reference, kernel or GaussianKernel())
    if features.shape[1] != reference.features.shape[1]:
        raise UserError(
            f"Features of {features.shape[1]} numbers cannot be compared with a reference of "
            f"{reference.features.shape[1]}."
        )
    k = reference.kernel
    within = row_sums(features, k)
    between = torch.cat([total(k(rows, reference.features), 1) for rows in features.split(BLOCK)])
    between /= len(reference.features)
    value = within.sum() / (n * (n - 1)) - 2 * between.mean() + reference.within
    left_out = (within.sum() - 2 * within) / ((n - 1) * (n - 2))
    left_out += reference.within - 2 * (between.sum() - between) / (n - 1)
    rows = pair_rows(n)
    return estimate(float(value), left_out, 2 * k(features[rows], features[rows]).double(), rows)


def kid(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """(mean, spread) over 100 subsets of the squared MMD with the cubic kernel: KID as it is published.

    Subsets have 1,000 images of each side, or as many as the smaller side has. They are those of torch-fidelity, and
    the result agrees with its own. The spread is the standard deviation over subsets, not the error of the mean. Where
    each subset would hold all samples, that says nothing about them, and the spread is the standard error of the
    U-statistic.
    """
    check_finite(features)
    check_finite(reference)
    size = min(SUBSET_SIZE, len(features), len(reference))
    source = np.random.RandomState(SEED)
    kernel = CubicKernel()
    values = []
    for _ in range(SUBSETS):
        x = features[torch.from_numpy(source.choice(len(features), size, replace=False))]
        y = reference[torch.from_numpy(source.choice(len(reference), size, replace=False))]
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        within = total(xx) - total(xx.diagonal()) + total(yy) - total(yy.diagonal())
        values.append(float(within / (size * (size - 1)) - 2 * total(xy) / size**2))
        if size == len(features) == len(reference):
            break  # all subsets are the whole sets
    if size < len(features):
        return float(np.mean(values)), float(np.std(values))
    return float(np.mean(values)), kernel_distance(features, reference, kernel).standard_error


def row_sums(x: Tensor, kernel: Kernel) -> Tensor:
    """sum_{j != i} k(x_i, x_j) for all i, (n,), float64; each pair is computed once."""
    sums = torch.zeros(len(x), dtype=torch.float64)
    for i, rows in _blocks(x):
        for j, columns in _blocks(x[i:]):
            k = kernel(rows, columns)
            if j == 0:
                k.fill_diagonal_(0)
            sums[i : i + len(rows)] += total(k, 1)
            if j > 0:
                sums[i + j : i + j + len(columns)] += total(k, 0)
    return sums


def _blocks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    return ((start, x[start : start + BLOCK]) for start in range(0, len(x), BLOCK))


def total(values: Tensor, dim: int | None = None) -> Tensor:
    return values.sum(dtype=torch.float64) if dim is None else values.sum(dim, dtype=torch.float64)


def evenly_spaced_rows(n: int, limit: int) -> Tensor:
    """At most ``limit`` row numbers, evenly spaced over n."""
    p = min(n, limit)
    return torch.arange(p) * n // p


SCALE = 1000


def mmd(features: Tensor, reference: Tensor | KernelReference, kernel: GaussianKernel | None = None) -> Estimate:
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
        return mmd(generated, reference, GaussianKernel(self.bandwidth, normalize=self.normalize))
