"""The Frechet distance between two sets of features, its interval, and its limit for infinitely many samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import check_finite
from gencompare.evaluation.metrics.intervals import Estimate, Margins, margins, pair_rows


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and covariance (d, d) of features, float64, and the number of images behind them (None: unknown)."""

    mean: Tensor
    cov: Tensor
    n: int | None = None

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of features (n, d), n at least 2; the covariance is the unbiased one, over n - 1."""
        check_finite(features)
        n, d = features.shape
        mean = features.double().mean(0)
        x = features.double() - mean
        made = cls(mean, x.T @ x / (n - 1), n)
        if n <= d:
            # The features are a root themselves, and a narrow one; to find one of a singular covariance takes seconds.
            made.__dict__["root"] = (x / math.sqrt(n - 1)).T
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

    The plug-in estimate is biased upwards, by about 1/n: compare distances of equal n only, and read them against the
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
    roots = torch.linalg.eigvalsh(b.root.T @ a.cov @ b.root).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * roots
    return max(0.0, float(distance))


class Jackknife:
    """The Frechet distance with one image left out at a time, exactly and in closed form.

    Leaving out image i changes the mean by a vector and the covariance by a matrix of rank one. With z_i = x_i - m,
    S2 = R R^T, and lambda, U the eigenvalues and eigenvectors of R^T S1 R, w_i = U^T R^T z_i,

        S_(i) = a (S1 - b z_i z_i^T),   a = (n - 1) / (n - 2),   b = n / (n - 1)^2
        tr (S_(i) S2)^(1/2) = sqrt(a) [sum_j sqrt(lambda_j)
                                       + 1/pi int_0^inf log(1 - b sum_j w_ij^2 / (lambda_j + t^2)) dt]

    (from tr A^(1/2) = 1/pi int log det(1 + A / t^2) dt and the matrix determinant lemma). The integral takes a
    trapezoidal rule in log t, so all n distances cost one eigendecomposition and a few products of matrices.

    A bootstrap that draws images with replacement is wrong here: repeated images raise a Frechet distance by
    themselves.

    Args:
        features: (n, d), n at least 3.
        reference: its error is not part of the interval.

    Raises:
        UserError: features that are not finite.
    """

    def __init__(self, features: Tensor, reference: Tensor | Statistics) -> None:
        reference = _reference(reference)
        check_finite(features)
        centre = features.double().mean(0)
        self.z = features.double() - centre
        n = len(self.z)
        cov = self.z.T @ self.z / (n - 1)
        eigenvalues, vectors = torch.linalg.eigh(reference.root.T @ cov @ reference.root)
        positive = eigenvalues > 1e-12 * eigenvalues[-1]
        self.roots = eigenvalues[positive].sqrt()
        self.w = self.z @ (reference.root @ vectors[:, positive])
        gap, norms = centre - reference.mean, self.z.square().sum(1)
        traces = float(cov.trace()), float(reference.cov.trace())
        self.value = max(0.0, float(gap.square().sum()) + sum(traces) - 2 * float(self.roots.sum()))
        a = (n - 1) / (n - 2)
        shifted = gap.square().sum() - 2 / (n - 1) * (self.z @ gap) + norms / (n - 1) ** 2
        trace = a * traces[0] - n / ((n - 1) * (n - 2)) * norms
        self.left_out = shifted + trace + traces[1] - 2 * math.sqrt(a) * self._cross_traces(n / (n - 1) ** 2)
        """d_(i), (n,)."""

    def _cross_traces(self, b: float) -> Tensor:
        """tr (R^T (S1 - b z_i z_i^T) R)^(1/2), (n,)."""
        squares = self.w.square()
        if not len(self.roots):
            return torch.zeros(len(squares), dtype=torch.float64)
        t = _log_grid(self.roots, below=7, above=7, step=0.5)
        share = (b * (squares @ (1 / (self.roots[:, None] ** 2 + t**2)))).clamp_max(1 - 1e-12)
        # The first-order part has an integral in closed form, and what is left falls off as t^-4. Below the first node
        # the integrand is constant.
        weights = 0.5 * t
        weights[0] *= 0.5 + 1 / 0.5
        rest = (torch.log1p(-share) + share) @ weights / math.pi
        return self.roots.sum() - b / 2 * (squares @ (1 / self.roots)) + rest

    @cached_property
    def margins(self) -> Margins | None:
        rows = pair_rows(len(self.z))
        return margins(self.left_out, self._second_order(rows), rows)

    def _second_order(self, rows: Tensor) -> Tensor:
        """Second-order kernel of the distance for pairs of images, (p, p):

            2 z z' + sum_ab w_a w_b w'_a w'_b / (s_a s_b (s_a + s_b)),   s_a = sqrt(lambda_a)

        with 1 / (s_a + s_b) = int_0^inf exp(-t (s_a + s_b)) dt, by which the sum is a few squares of Gram matrices.
        """
        z, w = self.z[rows], self.w[rows]
        found = 2 * z @ z.T
        if not len(self.roots):
            return found
        for t in _log_grid(1 / self.roots, below=6, above=2.5, step=1):
            found += t * ((w * ((-t * self.roots).exp() / self.roots)) @ w.T).square()
        return found

    @property
    def distance(self) -> Estimate:
        """The distance at this n, whose interval is of its expectation at this n."""
        return self._with_interval(self.value)

    @property
    def infinity(self) -> Estimate:
        """The distance at n = infinity: n d - (n - 1) mean d_(i), the jackknife's correction of a bias c / n
        (Quenouille 1956, "Notes on bias in estimation").

        It uses all images at both sizes. A line through distances at sizes between n/2 and n (Chong and Forsyth 2020,
        "Effectively Unbiased FID and Inception Score", section 4) has the same aim, twice the standard deviation and
        more bias left. What is left here is negative and of order (d/n)^2: under half of the margin for n of 5 d and
        more, as large as the margin for n below 2 d. The reference's own bias stays in it, so only distances to one
        reference compare. It may be negative.
        """
        return self._with_interval(self.value_at_infinity, low=-math.inf)

    @property
    def value_at_infinity(self) -> float:
        n = len(self.left_out)
        return n * self.value - (n - 1) * float(self.left_out.mean())

    def _with_interval(self, value: float, low: float = 0.0) -> Estimate:
        return Estimate(value, None) if self.margins is None else self.margins.around(value, low)


def _log_grid(values: Tensor, *, below: float, above: float, step: float) -> Tensor:
    """Points evenly spaced in log t, from exp(-below) of the least value to exp(above) of the largest."""
    first, last = math.log(float(values.min())) - below, math.log(float(values.max())) + above
    return torch.arange(first, last + step, step, dtype=torch.float64).exp()


def _reference(reference: Tensor | Statistics) -> Statistics:
    return reference if isinstance(reference, Statistics) else Statistics.of(reference)
