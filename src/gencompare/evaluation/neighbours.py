"""Precision, recall, density and coverage: are samples among the real images, and real images among the samples?

Every figure counts points inside balls. The ball of an image reaches to its k-th nearest neighbour in its own set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1000
"""Rows of a distance matrix that are held at a time: 10,000 x 10,000 distances never lie in memory whole."""
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5


@dataclass(frozen=True)
class Neighbourhood:
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


def neighbourhood(features: Tensor, reference: Tensor) -> Neighbourhood:
    """The figures of features (n, d) against (m, d), n and m above 5.

    The two sets should be of one size: balls shrink as a set grows. Distances are Euclidean, in float32, by the product
    form on features centred about the reference's mean (the product form alone loses small distances far from zero).
    """
    centre = reference.mean(0)
    samples, real = (features - centre).float(), (reference - centre).float()
    ks = (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)
    real_near, real_far = radii(real, ks)
    (sample_near,) = radii(samples, (PRECISION_NEIGHBOURS,))
    inside, held = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    nearest = torch.full((len(real),), torch.inf)
    for start in range(0, len(samples), BLOCK):
        distance = distances(samples[start : start + BLOCK], real)
        inside += int((distance <= real_near).any(1).sum())
        held += int((distance < real_far).sum())
        recalled |= (distance <= sample_near[start : start + BLOCK, None]).any(0)
        nearest = torch.minimum(nearest, distance.amin(0))
    return Neighbourhood(
        precision=inside / len(samples),
        recall=float(recalled.double().mean()),
        density=held / (DENSITY_NEIGHBOURS * len(samples)),
        coverage=float((nearest < real_far).double().mean()),
    )


def radii(points: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """For each k, the distance of every point to its k-th nearest neighbour among the others, (n,)."""
    # The nearest of all is the point itself. Distances are the same both ways, so half of the blocks do.
    near = torch.full((len(points), max(ks) + 1), torch.inf)
    for i in range(0, len(points), BLOCK):
        for j in range(i, len(points), BLOCK):
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            distance = distances(points[rows], points[columns])
            near[rows] = smallest(near[rows], distance)
            if j > i:
                near[columns] = smallest(near[columns], distance.T)
    return [near.sort(1).values[:, k] for k in ks]


def smallest(known: Tensor, further: Tensor) -> Tensor:
    """The least values of ``known`` (r, k) and ``further`` (r, c), (r, k), in no order."""
    k = known.shape[1]
    return torch.cat([known, further], 1).topk(k, largest=False, sorted=False).values


def distances(rows: Tensor, points: Tensor) -> Tensor:
    """Euclidean distances (r, n), by the product form."""
    return torch.cdist(rows, points, compute_mode="use_mm_for_euclid_dist")
