"""The Frechet distance between two sets of features, its error, and its limit for endless samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import eigvalsh
from scipy.linalg.lapack import dsygst  # type: ignore[attr-defined]
from scipy.stats import t as student
from torch import Tensor

from gencompare.errors import UserError

GROUPS = 10
"""Groups of the jackknife."""
LEVEL = 0.95


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and covariance (d, d) of features, float64, and the number of images behind them (None: unknown)."""

    mean: Tensor
    cov: Tensor
    n: int | None = None

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of features (n, d), n at least 2; the covariance is the unbiased one, over n - 1."""
        made = _statistics(*_sums(features), shift=_centre(features))
        n, d = features.shape
        if n <= d:
            # The features are a root themselves, and a narrow one; to find one of a singular covariance takes seconds.
            made.__dict__["root"] = ((features.double() - made.mean) / math.sqrt(n - 1)).T
        return made

    @property
    def dim(self) -> int:
        return len(self.mean)

    @cached_property
    def root(self) -> Tensor:
        """R with R R^T = cov: the Cholesky factor, or where cov is singular (a constant feature) from eigenvectors."""
        factor, info = torch.linalg.cholesky_ex(self.cov)
        if int(info) == 0:
            return factor
        values, vectors = torch.linalg.eigh(self.cov)
        return vectors * values.clamp_min(0).sqrt()


def frechet_distance(features: Tensor, reference: Tensor | Statistics) -> float:
    """d = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means and covariances (Heusel et al. 2017, eq. 6).

    The plug-in estimate is biased upwards, by about 1/n: compare figures of equal n only, and read them against the
    floor. Raises `UserError` for features that are not finite.
    """
    return between(Statistics.of(features), _reference(reference))


def between(a: Statistics, b: Statistics) -> float:
    """The distance of two Gaussians; never negative.

    With S2 = R R^T the matrix S1 S2 has the eigenvalues of the symmetric R^T S1 R, so tr (S1 S2)^(1/2) is the sum of
    their roots. Rounding can leave equal sets a little off zero, on either side; below zero is returned as zero.
    """
    if a.dim != b.dim:
        raise UserError(f"Features of {a.dim} numbers cannot be held against statistics of {b.dim}.")
    # LAPACK as SciPy calls it takes three quarters of the time of torch's own call.
    values = eigvalsh(_product(b.root, a.cov), lower=True, driver="evd", overwrite_a=True, check_finite=False)
    roots = torch.from_numpy(values).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * roots
    return max(0.0, float(distance))


def _product(root: Tensor, cov: Tensor) -> np.ndarray:
    """The lower triangle of R^T S R; what stands above it is not used.

    For a triangular R it is the step by which LAPACK reduces a generalised eigenvalue problem, at half of the cost of
    two products of matrices.
    """
    if root.shape == cov.shape and torch.equal(root, root.tril()):
        return dsygst(cov.numpy(), np.asfortranarray(root), itype=2, lower=1)[0]
    return (root.T @ cov @ root).numpy()


def jackknife(features: Tensor, reference: Tensor | Statistics, groups: int = GROUPS) -> tuple[float, float]:
    """(low, high): the 95 % interval of the expected distance at this n, by a delete-group jackknife.

        se^2 = (G - 1) / G  sum_g (d_(g) - mean d)^2,      d +- t_{G-1} se

    d_(g) leaves out group g of the images (Shao and Tu 1995, "The Jackknife and Bootstrap", section 5.1.2). A bootstrap
    that draws images with replacement is wrong here: repeated images raise a Frechet distance by themselves. The error
    is that of drawing these samples from this model; the reference is fixed. Where the distance is no more than the
    floor the interval is a little wide, for there the distance is not linear in the sample.
    """
    reference = _reference(reference)
    shift = _centre(features)
    parts = [_sums(part, shift) for part in features.tensor_split(groups)]
    n, first, second = (sum(column) for column in zip(*parts, strict=True))
    own = between(_statistics(n, first, second, shift=shift), reference)  # type: ignore[arg-type]
    left = torch.tensor(
        [between(_statistics(n - m, first - f, second - s, shift=shift), reference) for m, f, s in parts],
        dtype=torch.float64,
    )
    error = math.sqrt((groups - 1) / groups * float((left - left.mean()).square().sum()))
    reach = float(student.ppf((1 + LEVEL) / 2, groups - 1)) * error
    return max(0.0, own - reach), own + reach


def extrapolated(features: Tensor, reference: Tensor | Statistics, points: int = 10) -> float:
    """The distance at n = infinity: a line through distances at ``points`` sizes over 1/n (Chong and Forsyth 2020,
    "Effectively Unbiased FID and Inception Score", section 4).

    Sizes are spread evenly in 1/n from n/2 to n, and each takes the last images of the set (the first of it are left
    out in turn). The reference's own bias stays in it, so figures of one reference alone compare. It may be negative.
    """
    reference = _reference(reference)
    n = len(features)
    sizes = [round(1 / u) for u in torch.linspace(2 / n, 1 / n, points, dtype=torch.float64).tolist()]
    distances = [between(Statistics.of(features[n - size :]), reference) for size in sizes]
    inverse = torch.tensor([[1.0, 1 / size] for size in sizes], dtype=torch.float64)
    line = torch.linalg.lstsq(inverse, torch.tensor(distances, dtype=torch.float64)[:, None]).solution
    return float(line[0])


def _reference(reference: Tensor | Statistics) -> Statistics:
    return reference if isinstance(reference, Statistics) else Statistics.of(reference)


def _centre(features: Tensor) -> Tensor:
    """What is taken off before squares are summed: sums about zero would cancel."""
    if not torch.isfinite(features).all():
        raise UserError("Features hold NaN or infinite values: the extractor's weights or the images are not finite.")
    return features.double().mean(0)


def _sums(features: Tensor, shift: Tensor | None = None) -> tuple[int, Tensor, Tensor]:
    """(n, sum of rows, sum of outer products) about ``shift``, by default the mean."""
    x = features.double() - (_centre(features) if shift is None else shift)
    return len(x), x.sum(0), x.T @ x


def _statistics(n: int, first: Tensor, second: Tensor, *, shift: Tensor) -> Statistics:
    mean = first / n
    return Statistics(shift + mean, (second - n * torch.outer(mean, mean)) / (n - 1), n)
