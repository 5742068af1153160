"""Points in the plane as images of two channels and one pixel: data with a known distribution."""

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


class Planar(Protocol):
    @property
    def components(self) -> int: ...

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]: ...

    def log_density(self, x: Tensor) -> Tensor | None: ...


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Mixture:
    """p(x) = sum_k w_k N(x; m_k, std^2 I)."""

    weights: tuple[float, ...]
    means: tuple[tuple[float, float], ...]
    std: float

    @property
    def components(self) -> int:
        return len(self.weights)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        labels = torch.multinomial(weights, n, replacement=True, generator=generator)
        return torch.tensor(self.means, dtype=torch.float64)[labels] + self.std * _normal(n, generator), labels

    def log_density(self, x: Tensor) -> Tensor:
        log_weights = x.new_tensor(self.weights).log()
        squares = (x[:, None] - x.new_tensor(self.means)).square().sum(-1)
        return (log_weights - squares / (2 * self.std**2)).logsumexp(-1) - math.log(2 * math.pi * self.std**2)


@dataclass(frozen=True)
class Checkerboard:
    """Uniform on the 8 dark squares of a 4 x 4 board: p(x) = 1 / 2 there and 0 elsewhere."""

    components: int = 8

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(8, (n,), generator=generator)
        row = labels // 2
        column = 2 * (labels % 2) + row % 2
        inside = torch.stack([_uniform(n, generator), _uniform(n, generator)], -1)
        return (torch.stack([column, row], -1) + inside) / 2 - 1, labels

    def log_density(self, x: Tensor) -> Tensor:
        square = ((x + 1) * 2).floor()
        dark = (square.sum(-1) % 2 == 0) & (square >= 0).all(-1) & (square < 4).all(-1)
        return torch.where(dark, -math.log(2), -math.inf).to(x)


@dataclass(frozen=True)
class Moons:
    """Two half circles of radius 1 that reach into each other, at equal weight, with Gaussian noise.

    (cos a, sin a) and (1 - cos a, 1/2 - sin a), a uniform in [0, pi]; then centred and divided by 1.75.
    """

    std: float = 0.03
    components: int = 2

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
    """A spiral, a (cos a, sin a) with a uniform in [1.5 pi, 4.5 pi], brought to radius 0.9, with Gaussian noise."""

    std: float = 0.02
    components: int = 0

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, None]:
        angle = 1.5 * math.pi * (1 + 2 * _uniform(n, generator))
        spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], -1)
        return spiral * (0.9 / (4.5 * math.pi)) + self.std * _normal(n, generator), None

    def log_density(self, x: Tensor) -> None:
        return None


def _ring(n: int, radius: float) -> tuple[tuple[float, float], ...]:
    return tuple((radius * math.cos(2 * math.pi * k / n), radius * math.sin(2 * math.pi * k / n)) for k in range(n))


DISTRIBUTIONS: dict[str, Planar] = {
    "gaussians8": Mixture((0.125,) * 8, _ring(8, 0.75), 0.05),
    # The example of Song and Ermon 2019 ("Generative Modeling by Estimating Gradients of the Data Distribution",
    # section 3.2.2): 1/5 N((-5, -5), I) + 4/5 N((5, 5), I), divided by 10.
    "two_gaussians": Mixture((0.2, 0.8), ((-0.5, -0.5), (0.5, 0.5)), 0.1),
    "checkerboard": Checkerboard(),
    "moons": Moons(),
    "swiss_roll": SwissRoll(),
}


class Toy2D(ImageData):
    """``n`` points a split, (n, 2, 1, 1), drawn from fixed seeds; labels are the parts of a mixture.

    Args:
        name: one of `planar.DISTRIBUTIONS`.
        n: points in each of train, val and test.
    """

    def __init__(self, name: str = "gaussians8", *, n: int = 10_000, **common: Any) -> None:
        super().__init__(**common)
        if name not in DISTRIBUTIONS:
            raise UserError(
                f"There is no distribution '{name}' in data 'toy2d': choose data.name={', '.join(DISTRIBUTIONS)}."
            )
        if n < 1:
            raise UserError(f"data.n={n} must be at least 1 point.")
        self.truth, self.n = DISTRIBUTIONS[name], n
        self.spec = DataSpec(
            name=f"toy2d_{name}",
            shape=(2, 1, 1),
            num_classes=self.truth.components,
            num_levels=None,
        )

    def load(self) -> dict[str, Split]:
        splits = {}
        for split in SPLITS:
            points, labels = self.truth.sample(self.n, generator("cpu", self.spec.name, split))
            splits[split] = Split(points.float()[:, :, None, None], labels)
        return splits

    def log_density(self, x: Tensor) -> Tensor | None:
        """log p of points (n, 2, 1, 1) or (n, 2) in nats, (n,); None where it has no closed form."""
        return self.truth.log_density(x.flatten(1))
