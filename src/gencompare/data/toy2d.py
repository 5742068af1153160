"""Toy data from known distributions: points in the plane, stored as two-channel images of one pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gencompare.data.datamodule import SPLITS, ImageData, Split
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.rng import generator


class PlanarDistribution(Protocol):
    """A distribution of points in the plane, most of them in [-1, 1]^2."""

    @property
    def num_components(self) -> int:
        """Number of mixture components; 0 if samples have no labels."""
        ...

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw points (n, 2) float64 and return them with their mixture components, (n,) int64 or None."""
        ...

    def log_density(self, x: Tensor) -> Tensor | None:
        """Compute the log density (n,) of points (n, 2). Return None if there is no closed form."""
        ...


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class GaussianMixture:
    r"""Isotropic Gaussians: :math:`p(x) = \sum_k w_k \mathcal{N}(x; \mu_k, \sigma^2 I)`."""

    weights: tuple[float, ...]
    means: tuple[tuple[float, float], ...]
    std: float

    @property
    def num_components(self) -> int:
        return len(self.weights)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        labels = torch.multinomial(weights, n, replacement=True, generator=generator)
        return torch.tensor(self.means, dtype=torch.float64)[labels] + self.std * _normal(n, generator), labels

    def log_density(self, x: Tensor) -> Tensor:
        log_weights = x.new_tensor(self.weights).log()
        squared_distances = (x[:, None] - x.new_tensor(self.means)).square().sum(-1)
        exponents = log_weights - squared_distances / (2 * self.std**2)
        return exponents.logsumexp(-1) - math.log(2 * math.pi * self.std**2)


@dataclass(frozen=True)
class Checkerboard:
    """The uniform distribution on the 8 dark squares of a 4x4 checkerboard, where the density is 1/2."""

    num_components: int = 8

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(8, (n,), generator=generator)
        row = labels // 2
        column = 2 * (labels % 2) + row % 2
        within_square = torch.stack([_uniform(n, generator), _uniform(n, generator)], -1)
        return (torch.stack([column, row], -1) + within_square) / 2 - 1, labels

    def log_density(self, x: Tensor) -> Tensor:
        square = ((x + 1) * 2).floor()
        dark = (square.sum(-1) % 2 == 0) & (square >= 0).all(-1) & (square < 4).all(-1)
        return torch.where(dark, -math.log(2), -math.inf).to(x)


@dataclass(frozen=True)
class Moons:
    r"""Two interleaving half circles of equal weight, with Gaussian noise.

    :math:`(\cos a, \sin a)` and :math:`(1 - \cos a, 1/2 - \sin a)` for :math:`a` uniform in :math:`[0, \pi]`, centred
    and divided by 1.75.
    """

    std: float = 0.03
    num_components: int = 2

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(2, (n,), generator=generator)
        angle = math.pi * _uniform(n, generator)
        upper = torch.stack([angle.cos(), angle.sin()], -1)
        points = torch.where(labels[:, None] == 0, upper, upper.new_tensor([1.0, 0.5]) - upper)
        return (points - points.new_tensor([0.5, 0.25])) / 1.75 + self.std * _normal(n, generator), labels

    def log_density(self, x: Tensor) -> None:
        return None


@dataclass(frozen=True)
class SwissRoll:
    r"""A spiral with Gaussian noise.

    :math:`a (\cos a, \sin a)` for :math:`a` uniform in :math:`[1.5 \pi, 4.5 \pi]`, scaled to an outer radius of 0.9.
    """

    std: float = 0.02
    num_components: int = 0

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, None]:
        angle = 1.5 * math.pi * (1 + 2 * _uniform(n, generator))
        spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], -1)
        return spiral * (0.9 / (4.5 * math.pi)) + self.std * _normal(n, generator), None

    def log_density(self, x: Tensor) -> None:
        return None


def _ring(n: int, radius: float) -> tuple[tuple[float, float], ...]:
    return tuple((radius * math.cos(2 * math.pi * k / n), radius * math.sin(2 * math.pi * k / n)) for k in range(n))


DISTRIBUTIONS: dict[str, PlanarDistribution] = {
    "gaussians8": GaussianMixture((0.125,) * 8, _ring(8, 0.75), 0.05),
    # Song and Ermon 2019 ("Generative Modeling by Estimating Gradients of the Data Distribution", section 3.2.2):
    # 1/5 N((-5, -5), I) + 4/5 N((5, 5), I), here divided by 10.
    "two_gaussians": GaussianMixture((0.2, 0.8), ((-0.5, -0.5), (0.5, 0.5)), 0.1),
    "checkerboard": Checkerboard(),
    "moons": Moons(),
    "swiss_roll": SwissRoll(),
}


class Toy2D(ImageData):
    """Points (n, 2, 1, 1) sampled with fixed seeds; the labels are the mixture components.

    Args:
        distribution: a key of `DISTRIBUTIONS`.
        num_points: number of points in each split.
        common: arguments of `ImageData`.
    """

    def __init__(self, distribution: str = "gaussians8", *, num_points: int = 10_000, **common: Any) -> None:
        super().__init__(**common)
        if distribution not in DISTRIBUTIONS:
            raise UserError(
                f"There is no distribution '{distribution}' in data set 'toy2d':"
                f" set data.distribution to one of {', '.join(DISTRIBUTIONS)}."
            )
        if num_points < 1:
            raise UserError(f"data.num_points={num_points} must be at least 1.")
        self.distribution, self.num_points = DISTRIBUTIONS[distribution], num_points
        self.spec = DataSpec(
            name=f"toy2d_{distribution}",
            shape=(2, 1, 1),
            num_classes=self.distribution.num_components,
            num_bins=None,
        )

    def load(self) -> dict[str, Split]:
        splits = {}
        for split in SPLITS:
            points, labels = self.distribution.sample(self.num_points, generator("cpu", self.spec.name, split))
            splits[split] = Split(points.float()[:, :, None, None], labels)
        return splits

    def log_density(self, x: Tensor) -> Tensor | None:
        """Compute the log density in nats, (n,), of points (n, 2, 1, 1) or (n, 2); None if there is no closed form."""
        return self.distribution.log_density(x.flatten(1))
