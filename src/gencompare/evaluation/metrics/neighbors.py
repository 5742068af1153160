"""Nearest-neighbour metrics: precision, recall, density, coverage, authenticity and memorisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import check_finite

BLOCK_SIZE = 1000
"""Number of rows, and of columns, of a distance matrix that are in memory at a time."""
PRECISION_K, DENSITY_K = 3, 5
"""Number k of neighbours that defines a ball, for precision and recall, and for density and coverage (as published)."""
COPY_TOLERANCE = 1e-3
"""Largest distance between copies, relative to a point's distance from the mean."""
EXPECTED_COVERAGE = 1 - 2.0**-DENSITY_K
"""Expected coverage of n real images by n other real images, for any data. Each of the k nearest neighbours of an image
comes from either set with equal probability, and the image is covered unless all k come from its own set (Naeem et al.
2020, https://arxiv.org/abs/2002.09797, derive the value for finite sets)."""
MIN_COVERAGE_IMAGES = 100
"""Smallest number of samples and real images for which density and coverage can show a mode collapse. With fewer, the
ball around an image spans much of the real images, and samples far from all real images fall into a few balls. Four
kinds of noise (uniform, normal, faint, smooth) were measured 40 times each against digits, MNIST, Fashion-MNIST and
CIFAR-10 (640 sets, bundled classifiers). At n = 20, 25 % were wrongly reported as a collapse, 28 % at 50, 0.8 % at 100,
and none at 150 to 400."""
LOW_FACTOR = 0.5
"""Coverage is low if it is below this fraction of the coverage by real images, and density is at least
`NEAR_DENSITY`."""
NEAR_DENSITY = 0.8
"""Lowest density at which samples are about as close to real images as other real images are."""
VERY_LOW_FACTOR, HALF_DENSITY = 0.1, 0.5
"""Coverage is also low if it is below this smaller fraction and density is at least 0.5. Imperfect samples without a
visible collapse crowd in the balls of isolated real images (docs/results/fashion_mnist), so they need a lower limit."""


@dataclass(frozen=True)
class PRDC:
    """Precision, recall, density and coverage. Each is about 1 for samples that are as good and diverse as real images.

    The ball of an image extends to its k-th nearest neighbour among the images of its own set.
    """

    precision: float
    """Fraction of samples inside the ball of a real image, k = 3 (Kynkaanniemi et al. 2019, "Improved Precision and
    Recall Metric", eqs. 1 and 2, https://arxiv.org/abs/1904.06991)."""
    recall: float
    """Fraction of real images inside the ball of a sample, k = 3 (the same paper)."""
    density: float
    """Mean number of real-image balls that contain a sample, divided by k = 5 (Naeem et al. 2020, "Reliable Fidelity
    and Diversity Metrics", eq. 3, https://arxiv.org/abs/2002.09797). It may exceed 1."""
    coverage: float
    """Fraction of real images whose ball, k = 5, contains a sample (Naeem et al. 2020, eq. 4)."""
    zero_radii: float = 0.0
    """Fraction of samples whose ball, k = 3, has radius 0 because they are repeated. Recall is then too low."""
    zero_radii_reference: float = 0.0
    """Fraction of real images whose ball, k = 5, has radius 0. Density and coverage are then too low or
    mostly noise."""


def compute_prdc(features: Tensor, reference: Tensor) -> PRDC:
    """Compute precision, recall, density and coverage of features (n, d) against (m, d), n and m at least 6.

    The two sets should have equal sizes, because balls shrink as a set grows. Euclidean distances are computed in
    float32 from scalar products of features centred about the reference mean, since small distances would lose
    precision far from zero.

    Raises:
        UserError: there are too few features, or they are not finite (their distances would still look plausible).
    """
    for side in (features, reference):
        check_finite(side)
        if len(side) <= DENSITY_K:
            raise UserError(f"Neighbour metrics need at least {DENSITY_K + 1} samples and real images.")
    center = reference.mean(0)
    samples, real = Centered(features, center), Centered(reference, center)
    real_precision_radii, real_density_radii = _radii(real, (PRECISION_K, DENSITY_K))
    (sample_radii,) = _radii(samples, (PRECISION_K,))
    num_precise, num_balls = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    nearest_sample = torch.full((len(real),), torch.inf)
    for rows, block in samples.blocks():
        is_precise = torch.zeros(len(block), dtype=torch.bool)
        for columns, others in real.blocks():
            distance = _pairwise_distances(block, others)
            is_precise |= (distance <= real_precision_radii[columns]).any(1)
            num_balls += int((distance < real_density_radii[columns]).sum())
            recalled[columns] |= (distance <= sample_radii[rows, None]).any(0)
            nearest_sample[columns] = torch.minimum(nearest_sample[columns], distance.amin(0))
        num_precise += int(is_precise.sum())
    return PRDC(
        precision=num_precise / len(samples),
        recall=float(recalled.double().mean()),
        density=num_balls / (DENSITY_K * len(samples)),
        coverage=float((nearest_sample < real_density_radii).double().mean()),
        zero_radii=_share_of_zeros(sample_radii, samples),
        zero_radii_reference=_share_of_zeros(real_density_radii, real),
    )


@dataclass(frozen=True)
class Centered:
    """Points (n, d) minus ``center`` (d,) in float32. Rows are subtracted when they are read, so that no second copy of
    all points is in memory."""

    points: Tensor
    center: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return (self.points[rows] - self.center).float()

    def blocks(self, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, points) for blocks of `BLOCK_SIZE` rows, from row ``first`` on."""
        for start in range(first, len(self), BLOCK_SIZE):
            rows = slice(start, start + BLOCK_SIZE)
            yield rows, self[rows]


def _radii(points: Centered, ks: tuple[int, ...]) -> list[Tensor]:
    """For each k, compute the distance of every point to its k-th nearest neighbour among the other points, (n,)."""
    # The smallest distance is the one to the point itself. The matrix is symmetric, so half of the blocks suffice.
    smallest = torch.full((len(points), max(ks) + 1), torch.inf)
    for rows, block in points.blocks():
        for columns, others in points.blocks(rows.start):
            distance = _pairwise_distances(block, others)
            smallest[rows] = _merge_smallest(smallest[rows], distance)
            if columns != rows:
                smallest[columns] = _merge_smallest(smallest[columns], distance.T)
    return [smallest.sort(1).values[:, k] for k in ks]


def _merge_smallest(smallest: Tensor, distance: Tensor) -> Tensor:
    """Return the k smallest values of ``smallest`` (r, k) and ``distance`` (r, c) in each row, (r, k), unordered."""
    k = smallest.shape[1]
    return torch.cat([smallest, distance], 1).topk(k, largest=False, sorted=False).values


def _pairwise_distances(rows: Tensor, points: Tensor) -> Tensor:
    """Compute Euclidean distances (r, n) from scalar products."""
    return torch.cdist(rows, points, compute_mode="use_mm_for_euclid_dist")


def _share_of_zeros(radius: Tensor, points: Centered) -> float:
    """Return the fraction of radii (n,) of points that are 0 up to rounding (`COPY_TOLERANCE` of a point's norm)."""
    norms = torch.cat([block.norm(dim=1) for _, block in points.blocks()])
    return float((radius <= COPY_TOLERANCE * norms).double().mean())


def missing_modes(
    density: float, coverage: float, best_coverage: float = 0.0, *, n: int = MIN_COVERAGE_IMAGES
) -> str | None:
    """Return a warning if samples cover few of the real images, else None.

    Samples are concentrated in a few places if they lie near real images (density is at least 0.8, compared with 1 for
    real images) but their coverage is less than half that of real images. For imperfect samples (density at least 0.5),
    the limit is a tenth. The cause is a mode collapse, or samples that are too smooth, since blurred images crowd
    around the mean of their class. Bad samples, in contrast, are far from all real images. Modes were lost if coverage
    falls below half of ``best_coverage``, provided that ``best_coverage`` was at least half the coverage of real
    images.

    Args:
        density: density of n samples against n real images, see `PRDC`.
        coverage: coverage of the same real images by the same samples.
        best_coverage: the highest coverage in earlier evaluations of the same model.
        n: number of samples; fewer than `MIN_COVERAGE_IMAGES` give no warning.
    """
    if n < MIN_COVERAGE_IMAGES:
        return None
    low = LOW_FACTOR * EXPECTED_COVERAGE
    very_low = VERY_LOW_FACTOR * EXPECTED_COVERAGE
    if (density >= NEAR_DENSITY and coverage < low) or (density >= HALF_DENSITY and coverage < very_low):
        return (
            f"low coverage: samples lie near real images but cover only {coverage:.0%} of them (real images cover"
            f" {EXPECTED_COVERAGE:.0%}); modes are missing, or samples are too smooth"
        )
    if best_coverage >= low and coverage < LOW_FACTOR * best_coverage:
        return f"modes were lost: samples cover {coverage:.0%} of the real images, after {best_coverage:.0%} earlier"
    return None


def nearest_neighbor(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return (distance (n,), index (n,)) of the nearest row of ``keys`` for each row of ``queries``, Euclidean.

    Neighbours are found with fast scalar products of centred features. Their distances are then computed from
    differences, so the distance of a copy is exactly 0.
    """
    center = keys.mean(0)
    centered = Centered(keys, center)
    found = [_nearest(block, centered) for _, block in Centered(queries, center).blocks()]
    return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])


def _nearest(queries: Tensor, keys: Centered, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (distance (n,), index (n,)) of the nearest of ``keys`` other than ``excluded`` (n,), for a few queries."""
    smallest = torch.full((len(queries),), torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for columns, others in keys.blocks():
        distance = _pairwise_distances(queries, others)
        if excluded is not None:
            inside = ((excluded >= columns.start) & (excluded < columns.stop)).nonzero().flatten()
            distance[inside, excluded[inside] - columns.start] = torch.inf
        values, places = distance.min(1)
        index = torch.where(values < smallest, places + columns.start, index)
        smallest = torch.minimum(smallest, values)
    return (queries - keys[index]).norm(dim=1), index


def nearest_neighbors(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Return the indices (n, k) of the ``k`` nearest ``keys`` of each of a few queries, nearest first, Euclidean."""
    center = keys.mean(0)
    distance = torch.cdist(queries - center, keys - center, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(min(k, len(keys)), largest=False).indices


def _distance_to_nearest_other(rows: Tensor, keys: Tensor) -> Tensor:
    """Return the distance (r,) from each of ``keys[rows]`` to the nearest other key."""
    centered = Centered(keys, keys.mean(0))
    return torch.cat([_nearest(centered[block], centered, excluded=block)[0] for block in rows.split(BLOCK_SIZE)])


def memorization_ratio(samples: Tensor, train: Tensor, test: Tensor, val: Tensor) -> float | None:
    r"""Measure how much closer samples are to training than to held-out images, relative to real images:

    .. math:: r = \frac{d(\text{samples}, \text{train}) / d(\text{samples}, \text{test})}
        {d(\text{val}, \text{train}) / d(\text{val}, \text{test})}

    where :math:`d(a, b)` is the mean distance from images of a to their nearest neighbour in b. Any image is closer to
    a larger set, so the denominator corrects for the size of the training set. It uses validation images, which are
    real images in neither ``train`` nor ``test``. So r is about 1 without memorisation, about 1 - s if a fraction s of
    the samples are copies of training images, and 0 if all are copies. (Comparing with training subsets of the size of
    the test set would miss most copies, since each copy is found in only one subset.)

    Distances are between features, because in pixel space a low-contrast image is close to everything.

    Args:
        samples: features of samples, (n, d).
        train: features of training images.
        test: features of test images.
        val: features of validation images.

    Returns:
        The ratio; None if a mean distance is 0, which makes it meaningless.
    """
    d = {
        (i, j): float(nearest_neighbor(a, b)[0].double().mean())
        for i, a in enumerate((samples, val))
        for j, b in enumerate((train, test))
    }
    if not (d[0, 1] and d[1, 0] and d[1, 1]):
        return None
    return (d[0, 0] / d[0, 1]) / (d[1, 0] / d[1, 1])


def authenticity(samples: Tensor, train: Tensor) -> float:
    """Return the fraction of samples that are authentic, which means that they are not near copies of a training image.

    A sample is authentic if it is farther from its nearest training image than that image is from its own nearest
    neighbour. Alaa et al. (2022), "How Faithful is your Synthetic Data?", section 3.3,
    https://arxiv.org/abs/2102.08921. Copies give 0. Fresh images of the same distribution give less than 1, so compare
    the value with the real-data baseline, the value of test images.
    """
    distance, index = nearest_neighbor(samples, train)
    rows, place = index.unique(return_inverse=True)
    return float((distance > _distance_to_nearest_other(rows, train)[place]).double().mean())
