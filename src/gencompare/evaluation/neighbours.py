"""Precision, recall, density and coverage: are samples among the real images, and real images among the samples?

Each metric counts points inside balls. The ball of an image reaches to its k-th nearest neighbour in its own set.

Two known weaknesses. Precision and density *increase* with blur: blurred samples move towards the centre of the
features, where balls of real images are large and overlap, so they lie in more of them than real images do. Read them
with recall, coverage or a distance. Raisa et al. 2025 ("Position: All Current Generative Fidelity and Diversity Metrics
are Flawed", ICML) find that each of these metrics fails many of their sanity checks. And a set with more than k equal
images has balls of radius zero, which hold nothing but copies: see `Neighbourhood.zero_radii`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.features import check_finite

BLOCK = 1000
"""Rows of a distance matrix that are held at a time: 10,000 x 10,000 distances never lie in memory whole."""
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
COPY = 1e-3
"""Distance of copies at most, over a point's distance from the mean."""


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
    zero_radii: float = 0.0
    """Share of samples whose ball, k = 3, has radius 0, because they are repeated: recall is then too low."""
    zero_radii_reference: float = 0.0
    """Share of real images whose ball, k = 5, has radius 0: density and coverage are then too low, or noise."""


def neighbourhood(features: Tensor, reference: Tensor) -> Neighbourhood:
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
