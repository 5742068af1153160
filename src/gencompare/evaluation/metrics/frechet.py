"""The Frechet distance between two sets of features, its interval, and its limit for infinitely many samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import BLOCK_SIZE, check_finite
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.intervals import PAIR_IMAGES, Estimate, Margins, interval_margins


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and covariance (d, d) of features, float64, and the number of images (None if unknown)."""

    mean: Tensor
    cov: Tensor
    n: int | None = None

    @classmethod
    def from_features(cls, features: Tensor) -> Statistics:
        """Compute the statistics of features (n, d), n at least 2, with the unbiased covariance (divided by n - 1).

        Sums are accumulated in float64 over blocks of rows.
        """
        check_finite(features)
        n, d = features.shape
        mean = features.new_zeros(d, dtype=torch.float64)
        for block in features.split(BLOCK_SIZE):
            mean += block.double().sum(0)
        mean /= n
        cov = features.new_zeros(d, d, dtype=torch.float64)
        for x in centered_blocks(features, mean):
            cov.addmm_(x.T, x)
        statistics = cls(mean, cov / (n - 1), n)
        if n <= d:
            # The scaled centred features are a root with few columns. Decomposing the singular covariance would take
            # seconds.
            statistics.__dict__["root"] = torch.cat(list(centered_blocks(features, mean))).T / math.sqrt(n - 1)
        return statistics

    @property
    def dim(self) -> int:
        return len(self.mean)

    @cached_property
    def root(self) -> Tensor:
        r""":math:`R` with :math:`R R^\top = \Sigma`, by Cholesky decomposition, or by eigendecomposition if
        :math:`\Sigma` is singular (as with a constant feature)."""
        factor, info = torch.linalg.cholesky_ex(self.cov)
        if int(info) == 0:
            return factor
        values, vectors = torch.linalg.eigh(self.cov)
        return vectors * values.clamp_min(0).sqrt()


def centered_blocks(features: Tensor, mean: Tensor) -> Iterator[Tensor]:
    """Yield features (n, d) minus ``mean`` (d,) in float64, `BLOCK_SIZE` rows at a time."""
    return (block.double() - mean for block in features.split(BLOCK_SIZE))


def frechet_distance(features: Tensor, reference: Tensor | Statistics) -> float:
    r"""Compute the squared Frechet distance between two Gaussians with the means and covariances of the features:

    .. math:: d = \lVert \mu_1 - \mu_2 \rVert^2
        + \mathrm{tr}\left(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2}\right)

    (Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6, https://arxiv.org/abs/1706.08500). On
    Inception features this is FID. The plug-in estimate is biased upwards by a term of order 1/n, so compare only
    distances of equal n, and read them against the real-data baseline.

    Args:
        features: (n, d) features of samples.
        reference: (m, d) features of real images, or their `Statistics`.

    Raises:
        UserError: features are not finite, or the dimensions differ.
    """
    return gaussian_frechet_distance(Statistics.from_features(features), _statistics_of(reference))


def class_frechet_distance(features: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor) -> float:
    """Compute the `frechet_distance` between samples and real images of each class, averaged over reference classes
    (intra-FID; Miyato and Koyama 2018, "cGANs with Projection Discriminator", section 5,
    https://arxiv.org/abs/1802.05637).

    Args:
        features: (n, d) features of samples.
        labels: (n,) the class that each sample was generated for.
        reference: (m, d) features of real images.
        reference_labels: (m,) classes of the real images.

    Raises:
        UserError: a class has fewer than two samples or real images, or features are not finite.
    """
    pairs = [(features[labels == c], reference[reference_labels == c]) for c in reference_labels.unique()]
    if min(len(side) for pair in pairs for side in pair) < 2:
        raise UserError("Every class of the real images needs at least two samples and two real images.")
    return fmean(frechet_distance(*pair) for pair in pairs)


def gaussian_frechet_distance(a: Statistics, b: Statistics) -> float:
    r"""Compute the squared Frechet distance between two Gaussians.

    With :math:`\Sigma_2 = R R^\top`, the matrix :math:`\Sigma_1 \Sigma_2` has the eigenvalues of the symmetric
    :math:`R^\top \Sigma_1 R`, so :math:`\mathrm{tr}\, (\Sigma_1 \Sigma_2)^{1/2}` is the sum of their square roots.
    Rounding can make the distance of equal sets slightly negative; the result is then zero.
    """
    if a.dim != b.dim:
        raise UserError(f"Features of dimension {a.dim} cannot be compared with statistics of dimension {b.dim}.")
    root_trace = torch.linalg.eigvalsh(b.root.T @ a.cov @ b.root).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root_trace
    return max(0.0, float(distance))


class Jackknife:
    r"""The Frechet distance and its delete-one values :math:`d_{(i)}`, without recomputing it for each image.

    Deleting image i shifts the mean and changes the covariance by a matrix of rank one. Let
    :math:`z_i = x_i - \mu_1`, :math:`\Sigma_2 = R R^\top`, the eigenvalues :math:`\lambda` and eigenvectors :math:`U`
    of :math:`R^\top \Sigma_1 R`, and :math:`w_i = U^\top R^\top z_i`. Then

    .. math::
        \Sigma_{(i)} &= a (\Sigma_1 - b z_i z_i^\top), \quad a = \tfrac{n - 1}{n - 2}, \quad b = \tfrac{n}{(n - 1)^2} \\
        \mathrm{tr}\, (\Sigma_{(i)} \Sigma_2)^{1/2} &= \sqrt{a} \left[ \sum_j \sqrt{\lambda_j} + \frac{1}{\pi}
            \int_0^\infty \log\Big(1 - b \sum_j \frac{w_{ij}^2}{\lambda_j + t^2}\Big) dt \right]

    This follows from :math:`\mathrm{tr} A^{1/2} = \frac{1}{\pi} \int_0^\infty \log \det(I + A / t^2)\, dt` and the
    matrix determinant lemma. The integral is evaluated by a trapezoidal rule in :math:`\log t`, so all n distances cost
    one eigendecomposition and a few matrix products.

    A bootstrap that draws images with replacement would be wrong, because repeated images increase a Frechet distance.

    Args:
        features: (n, d), n at least 3.
        reference: features or statistics of real images. The interval does not include its error.

    Raises:
        UserError: features are not finite.
    """

    def __init__(self, features: Tensor, reference: Tensor | Statistics) -> None:
        reference, statistics = _statistics_of(reference), Statistics.from_features(features)
        n, mean, cov = len(features), statistics.mean, statistics.cov
        eigenvalues, vectors = torch.linalg.eigh(reference.root.T @ cov @ reference.root)
        positive = eigenvalues > 1e-12 * eigenvalues[-1]
        self.roots = eigenvalues[positive].sqrt()
        self.projection = reference.root @ vectors[:, positive]
        """:math:`R U`, which maps :math:`z_i` to :math:`w_i`."""
        gap = mean - reference.mean
        traces = float(cov.trace()), float(reference.cov.trace())
        self.value = max(0.0, float(gap.square().sum()) + sum(traces) - 2 * float(self.roots.sum()))
        a = (n - 1) / (n - 2)

        def delete_each(z: Tensor) -> Tensor:
            norms = z.square().sum(1)
            shifted_gap = gap.square().sum() - 2 / (n - 1) * (z @ gap) + norms / (n - 1) ** 2
            trace = a * traces[0] - n / ((n - 1) * (n - 2)) * norms
            return shifted_gap + trace + traces[1] - 2 * math.sqrt(a) * self._root_traces(z, n / (n - 1) ** 2)

        self.delete_one = torch.cat([delete_each(z) for z in centered_blocks(features, mean)])
        """The delete-one distances, (n,)."""
        self.rows = evenly_spaced_indices(n, PAIR_IMAGES)
        self.pairs = features[self.rows].double() - mean
        """:math:`z_i` of the images in ``rows``, whose pairs give the second-order terms."""

    def _root_traces(self, z: Tensor, b: float) -> Tensor:
        r"""Compute :math:`\mathrm{tr}\, (R^\top (\Sigma_1 - b z_i z_i^\top) R)^{1/2}` for z (m, d), as (m,)."""
        if not len(self.roots):
            return torch.zeros(len(z), dtype=torch.float64)
        squares = (z @ self.projection).square()
        t = _log_grid(self.roots, below=7, above=7, step=0.5)
        share = (b * (squares @ (1 / (self.roots[:, None] ** 2 + t**2)))).clamp_max(1 - 1e-12)
        # The first-order part of the logarithm is integrated in closed form, and the remainder decays as t^-4.
        # Below the first node the integrand is constant.
        weights = 0.5 * t
        weights[0] *= 0.5 + 1 / 0.5
        remainder = (torch.log1p(-share) + share) @ weights / math.pi
        return self.roots.sum() - b / 2 * (squares @ (1 / self.roots)) + remainder

    @cached_property
    def margins(self) -> Margins | None:
        """Margins of the 95 % interval; None for too few images."""
        return interval_margins(self.delete_one, self._second_order(), self.rows)

    def _second_order(self) -> Tensor:
        r"""Compute the second-order kernel of the distance for the pairs of ``rows``, (p, p):

        .. math:: 2 z^\top z' + \sum_{ab} \frac{w_a w_b w'_a w'_b}{s_a s_b (s_a + s_b)}, \qquad s_a = \sqrt{\lambda_a}

        With :math:`1 / (s_a + s_b) = \int_0^\infty e^{-t (s_a + s_b)} dt` the sum becomes a few squared Gram matrices.
        """
        z, w = self.pairs, self.pairs @ self.projection
        kernel = 2 * z @ z.T
        if not len(self.roots):
            return kernel
        for t in _log_grid(1 / self.roots, below=6, above=2.5, step=1):
            kernel += t * ((w * ((-t * self.roots).exp() / self.roots)) @ w.T).square()
        return kernel

    @property
    def distance(self) -> Estimate:
        """The distance at the given sample size n, with an interval for its expectation at that n."""
        return self._with_interval(self.value)

    @property
    def infinity(self) -> Estimate:
        r"""The distance at :math:`n = \infty`, where the jackknife has removed a bias :math:`c / n`:

        .. math:: d_\infty = n d - (n - 1) \frac{1}{n} \sum_i d_{(i)}

        (Quenouille 1956, "Notes on bias in estimation"). It uses all images. Extrapolating a line through distances at
        sizes between n/2 and n (Chong and Forsyth 2020, "Effectively Unbiased FID and Inception Score",
        section 4, https://arxiv.org/abs/1911.07023) has the same aim, but twice the standard deviation and more
        remaining bias. The bias that remains here is negative and of order :math:`(d / n)^2`: less than half of the
        interval's margin for :math:`n \ge 5 d`, and as large as the margin for :math:`n < 2 d`. The bias of the
        reference is not corrected, so only distances from one reference are comparable. The value may be negative.
        """
        return self._with_interval(self.value_at_infinity, low=-math.inf)

    @property
    def value_at_infinity(self) -> float:
        """The value of `infinity`."""
        n = len(self.delete_one)
        return n * self.value - (n - 1) * float(self.delete_one.mean())

    def _with_interval(self, value: float, low: float = 0.0) -> Estimate:
        return Estimate(value, None) if self.margins is None else self.margins.around(value, low)


def _log_grid(values: Tensor, *, below: float, above: float, step: float) -> Tensor:
    """Return points evenly spaced in log t, from exp(-below) min(values) to about exp(above) max(values)."""
    first, last = math.log(float(values.min())) - below, math.log(float(values.max())) + above
    return torch.arange(first, last + step, step, dtype=torch.float64).exp()


def _statistics_of(reference: Tensor | Statistics) -> Statistics:
    return reference if isinstance(reference, Statistics) else Statistics.from_features(reference)
