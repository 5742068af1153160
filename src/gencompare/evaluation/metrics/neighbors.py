"""Nearest-neighbour metrics: precision, recall, density, coverage, authenticity and memorisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import check_finite

BLOCK = 1000
"""Rows of a distance matrix that are held at a time: 10,000 x 10,000 distances never lie in memory whole."""
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
COPY = 1e-3
"""Distance of copies at most, over a point's distance from the mean."""


@dataclass(frozen=True)
class NeighborBalls:
    """The four figures, each about 1 for samples that are as good and as varied as real images."""

    precision: float
    """Share of samples in some real image's ball, k = 3 (Kynkaanniemi et al. 2019, "Improved Precision and Recall
    Metric", eqs. 1 and 2)."""
    recall: float
    """Share of real images in some sample's ball, k = 3 (the same)."""
    density: float
    """How many real images' balls a sample lies in, over k = 5 (Naeem et al. 2020, "Reliable Fidelity and Diversity
    Metrics", eq. 3). It may exceed 1."""
    coverage: float
    """Share of real images whose ball, k = 5, holds a sample (the same, eq. 4)."""
    zero_radii: float = 0.0
    """Share of samples whose ball, k = 3, has radius 0, because they are repeated: recall is then too low."""
    zero_radii_reference: float = 0.0
    """Share of real images whose ball, k = 5, has radius 0: density and coverage are then too low, or noise."""


def neighbor_balls(features: Tensor, reference: Tensor) -> NeighborBalls:
    """The figures of features (n, d) against (m, d), n and m above 5.

    The two sets should be of one size: balls shrink as a set grows. Distances are Euclidean, in float32, by the product
    form on features centred about the reference's mean (the product form alone loses small distances far from zero).

    Raises:
        UserError: features that are not finite, whose distances would still give plausible numbers, or too few.
    """
    for side in (features, reference):
        check_finite(side)
        if len(side) <= DENSITY_NEIGHBOURS:
            raise UserError(f"Neighbour metrics need at least {DENSITY_NEIGHBOURS + 1} images of each side.")
    centre = reference.mean(0)
    samples, real = (features - centre).float(), (reference - centre).float()
    ks = (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)
    real_near, real_far = radii(real, ks)
    (sample_near,) = radii(samples, (PRECISION_NEIGHBOURS,))
    inside, held = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    nearest = torch.full((len(real),), torch.inf)
    for start in range(0, len(samples), BLOCK):
        distance = pairwise_distances(samples[start : start + BLOCK], real)
        inside += int((distance <= real_near).any(1).sum())
        held += int((distance < real_far).sum())
        recalled |= (distance <= sample_near[start : start + BLOCK, None]).any(0)
        nearest = torch.minimum(nearest, distance.amin(0))
    return NeighborBalls(
        precision=inside / len(samples),
        recall=float(recalled.double().mean()),
        density=held / (DENSITY_NEIGHBOURS * len(samples)),
        coverage=float((nearest < real_far).double().mean()),
        zero_radii=share_of_zeros(sample_near, samples),
        zero_radii_reference=share_of_zeros(real_far, real),
    )


def share_of_zeros(radius: Tensor, points: Tensor) -> float:
    """Share of radii (n,) of centred points (n, d) that are zero but for rounding, which the product form makes about
    5e-4 of a point's norm."""
    return float((radius <= COPY * points.norm(dim=1)).double().mean())


def radii(points: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """For each k, the distance of every point to its k-th nearest neighbour among the others, (n,)."""
    # The nearest of all is the point itself. Distances are the same both ways, so half of the blocks do.
    near = torch.full((len(points), max(ks) + 1), torch.inf)
    for i in range(0, len(points), BLOCK):
        for j in range(i, len(points), BLOCK):
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            distance = pairwise_distances(points[rows], points[columns])
            near[rows] = smallest_distances(near[rows], distance)
            if j > i:
                near[columns] = smallest_distances(near[columns], distance.T)
    return [near.sort(1).values[:, k] for k in ks]


def smallest_distances(known: Tensor, further: Tensor) -> Tensor:
    """The least values of ``known`` (r, k) and ``further`` (r, c), (r, k), in no order."""
    k = known.shape[1]
    return torch.cat([known, further], 1).topk(k, largest=False, sorted=False).values


def pairwise_distances(rows: Tensor, points: Tensor) -> Tensor:
    """Euclidean distances (r, n), by the product form."""
    return torch.cdist(rows, points, compute_mode="use_mm_for_euclid_dist")


MEMORY_BLOCK = 2000


def nearest(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(distance (n,), index (n,)) of the nearest row of ``keys`` for each row of ``queries``, Euclidean.

    Neighbours are found by the fast product form, on centred features, and their distances are then computed from the
    rows themselves: the product form loses small ones to rounding, and a copy must be at 0.
    """
    centre = keys.mean(0)
    queries, keys = queries - centre, keys - centre
    index = torch.cat(
        [
            torch.cdist(block, keys, compute_mode="use_mm_for_euclid_dist").argmin(1)
            for block in queries.split(MEMORY_BLOCK)
        ]
    )
    return (queries - keys[index]).norm(dim=1), index


def nearest_distances(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Rows (n, k) of the ``k`` nearest ``keys`` of each query, nearest first, Euclidean; for few queries."""
    centre = keys.mean(0)
    distance = torch.cdist(queries - centre, keys - centre, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(min(k, len(keys)), largest=False).indices


def nearest_other(rows: Tensor, keys: Tensor) -> Tensor:
    """Distance (r,) from ``keys[rows]`` to the nearest key that is another row."""
    keys = keys - keys.mean(0)
    found = []
    for part in rows.split(MEMORY_BLOCK):
        distance = torch.cdist(keys[part], keys, compute_mode="use_mm_for_euclid_dist")
        distance[torch.arange(len(part)), part] = torch.inf
        found.append((keys[part] - keys[distance.argmin(1)]).norm(dim=1))
    return torch.cat(found)


def memorization_ratio(samples: Tensor, train: Tensor, test: Tensor, val: Tensor) -> float | None:
    """How much closer samples are to training than to held-out images, in units of what real images show.

        r = [d(samples, train) / d(samples, test)] / [d(val, train) / d(val, test)],   d(a, b) = mean nearest distance

    A training set is larger than a test set, so anything is closer to it. The second factor takes that out: validation
    images are real, and neither in ``train`` nor in ``test``. So r is about 1 for samples that know no training image
    from a fresh one, 1 - s when a share s of them are copies, and 0 for copies alone. (Equal sets by taking parts of
    the training set in turn would miss most copies: a copy is found in one part only.)

    Features are those of the distance: pixels would call a dull image near to everything.

    Args: features, each (n, d). Returns None where a mean distance is 0 and the ratio means nothing.
    """
    d = {
        (i, j): float(nearest(a, b)[0].double().mean())
        for i, a in enumerate((samples, val))
        for j, b in enumerate((train, test))
    }
    if not (d[0, 1] and d[1, 0] and d[1, 1]):
        return None
    return (d[0, 0] / d[0, 1]) / (d[1, 0] / d[1, 1])


def authenticity(samples: Tensor, train: Tensor) -> float:
    """Share of samples that lie further from their nearest training image than that image lies from any other one.

    Alaa et al. (2022), "How Faithful is your Synthetic Data?", section 3.3. Copies give 0. Fresh images of the same
    distribution give one half to three quarters, not 1: read it beside the floor, the same share of test images.
    """
    distance, index = nearest(samples, train)
    rows, place = index.unique(return_inverse=True)
    return float((distance > nearest_other(rows, train)[place]).double().mean())
