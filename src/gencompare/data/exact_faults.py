"""Faults of a generative model at graded strengths, whose distance from the true distribution is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from gencompare.data.exact_distributions import (
    AutoregressiveNetwork,
    ExactDistribution,
    ImageDistribution,
    Ising,
    LowRankGaussianMixture,
    MonteCarlo,
)
from gencompare.dequantization import bin_width
from gencompare.rng import generator

WIDER, NARROWER = (1.05, 1.1, 1.25, 1.5, 2.0), (0.95, 0.9, 0.8, 0.65, 0.5)
NOISE_SHARES, COPY_SHARES = (0.01, 0.03, 0.1, 0.2, 0.4), (0.05, 0.1, 0.25, 0.5, 0.75)
DROPPED_MODES, WEIGHT_RATIOS = (1, 2, 4, 6, 8), (1.5, 2.0, 4.0, 8.0, 32.0)
BLURS, SHIFTS, LEVEL_STEPS = (0.05, 0.075, 0.1, 0.15, 0.25), (1.0, 2.0, 4.0, 8.0, 16.0), (4, 8, 16, 32, 64)
FIELDS = (0.005, 0.01, 0.02, 0.05, 0.1)
NUM_DRAWS = 1000
"""Number of draws for a divergence without closed form."""


@dataclass(frozen=True)
class WithNoise(ImageDistribution):
    r"""A distribution contaminated with images of independent uniform levels: :math:`(1 - s)\, p + s\, K^{-d}`."""

    base: ExactDistribution
    share: float

    def __post_init__(self) -> None:
        _copy_format(self, self.base)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, None]:
        x, _ = self.base.sample(n, generator)
        noise = torch.randint(self.num_bins, x.shape, generator=generator).double()
        is_noise = torch.rand(n, generator=generator) < self.share
        return torch.where(is_noise[:, None], noise, x), None

    def log_prob(self, x: Tensor) -> Tensor:
        noise = math.log(self.share) - self.side**2 * math.log(self.num_bins)
        return torch.logaddexp(
            self.base.log_prob(x) + math.log1p(-self.share), torch.tensor(noise, dtype=torch.float64)
        )


@dataclass(frozen=True)
class WithCopies(ImageDistribution):
    r"""A distribution of which a share s are copies of training images ``train`` (N, d):
    :math:`(1 - s)\, p + \frac{s}{N} \sum_i \delta_{x_i}`."""

    base: ExactDistribution
    train: Tensor
    share: float

    def __post_init__(self) -> None:
        _copy_format(self, self.base)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, None]:
        x, _ = self.base.sample(n, generator)
        copies = self.train[torch.randint(len(self.train), (n,), generator=generator)]
        is_copy = torch.rand(n, generator=generator) < self.share
        return torch.where(is_copy[:, None], copies.double(), x), None


@dataclass(frozen=True)
class FewLevels(ImageDistribution):
    """A distribution whose levels are rounded to multiples of ``step``."""

    base: ExactDistribution
    step: int

    def __post_init__(self) -> None:
        _copy_format(self, self.base)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, None]:
        x, _ = self.base.sample(n, generator)
        return self.rounded(x), None

    def rounded(self, x: Tensor) -> Tensor:
        """Round levels to the nearest multiple of ``step`` up to ``num_bins`` - 1."""
        top = (self.num_bins - 1) // self.step * self.step
        return (x / self.step).round().mul(self.step).clamp(0, top)


def _copy_format(target: ImageDistribution, base: ImageDistribution) -> None:
    for name in ("side", "num_bins"):
        object.__setattr__(target, name, getattr(base, name))


@dataclass(frozen=True)
class Fault:
    """One kind of fault at one strength."""

    family: str
    strength: float
    model: ImageDistribution
    """The distribution with the fault."""


@dataclass(frozen=True)
class Truth:
    """Known distances between the data p and a model q; None where they are infinite or unknown."""

    kl_data_model: MonteCarlo | None
    """KL(p || q) in nats."""
    kl_model_data: MonteCarlo | None
    """KL(q || p) in nats."""
    total_variation: MonteCarlo | None
    """Half the L1 distance of the probabilities."""
    wasserstein: float | None = None
    """Wasserstein-2 distance of the images with pixels in [-1, 1], where it has a closed form."""

    @property
    def distance(self) -> float:
        """The distance that grades a family: KL(p || q), or the Wasserstein-2 distance if there are no densities."""
        found = self.wasserstein if self.kl_data_model is None else self.kl_data_model.value
        assert found is not None
        return found


def faults(distribution: ExactDistribution, train: Tensor) -> Iterator[Fault]:
    """Yield all faults of ``distribution``, each family from weak to strong. ``train`` (N, d) are the training images
    that a model may memorise."""
    families: dict[str, tuple[tuple[float, ...], Callable[[float], ImageDistribution]]] = {
        "noise images": (NOISE_SHARES, lambda share: WithNoise(distribution, share)),
        "training images": (COPY_SHARES, lambda share: WithCopies(distribution, train, share)),
    }
    if isinstance(distribution, LowRankGaussianMixture):
        mixture = distribution
        families |= {
            "dropped modes": (DROPPED_MODES, lambda count: without_modes(mixture, round(count))),
            "unequal modes": (WEIGHT_RATIOS, lambda ratio: with_unequal_weights(mixture, ratio)),
            "narrow modes": (NARROWER, lambda factor: scaled(mixture, factor)),
            "wide modes": (WIDER, lambda factor: scaled(mixture, factor)),
            "blurred modes": (BLURS, lambda sigma: blurred(mixture, sigma * mixture.side)),
            "brightness": (SHIFTS, lambda levels: replace(mixture, means=mixture.means + levels * bin_width(256))),
            "few levels": (LEVEL_STEPS, lambda step: FewLevels(mixture, round(step))),
        }
    elif isinstance(distribution, Ising):
        ising = distribution
        families |= {
            "too hot": (NARROWER, lambda factor: replace(ising, coupling=factor * ising.coupling)),
            "too cold": (WIDER, lambda factor: replace(ising, coupling=factor * ising.coupling)),
            "field": (FIELDS, lambda field: replace(ising, field=field)),
        }
    elif isinstance(distribution, AutoregressiveNetwork):
        network = distribution
        families |= {
            "too hot": (WIDER, lambda factor: replace(network, temperature=factor)),
            "too cold": (NARROWER, lambda factor: replace(network, temperature=factor)),
        }
    for family, (strengths, build) in families.items():
        for strength in strengths:
            yield Fault(family, strength, build(strength))


def without_modes(mixture: LowRankGaussianMixture, count: int) -> LowRankGaussianMixture:
    """Remove the first ``count`` components."""
    weights = mixture.weights.clone()
    weights[:count] = 0
    return replace(mixture, weights=weights / weights.sum())


def with_unequal_weights(mixture: LowRankGaussianMixture, ratio: float) -> LowRankGaussianMixture:
    """Multiply the weights by a geometric sequence from 1 to 1 / ``ratio``."""
    weights = mixture.weights * ratio ** -torch.linspace(0, 1, len(mixture.weights), dtype=torch.float64)
    return replace(mixture, weights=weights / weights.sum())


def scaled(mixture: LowRankGaussianMixture, factor: float) -> LowRankGaussianMixture:
    """Multiply the deviations from the mean of each component by ``factor``."""
    return replace(mixture, loadings=factor * mixture.loadings, stds=factor * mixture.stds)


def blurred(mixture: LowRankGaussianMixture, sigma: float) -> LowRankGaussianMixture:
    """Blur the means and loadings with a Gaussian of ``sigma`` pixels. The noise stays sharp."""

    def blur(maps: Tensor) -> Tensor:
        images = maps.reshape(-1, mixture.side, mixture.side).numpy()
        return torch.from_numpy(gaussian_filter(images, (0, sigma, sigma))).reshape(maps.shape)

    return replace(mixture, means=blur(mixture.means), loadings=blur(mixture.loadings))


def truth(data: ExactDistribution, fault: Fault, n: int = NUM_DRAWS) -> Truth:
    r"""Compute the distances of a fault, in closed form where possible, else from ``n`` draws.

    - Divergences between densities are averages of exact log ratios over draws. The total variation is
      :math:`\mathbb{E}_p \max(0, 1 - q(x) / p(x))`. Those between Ising models are exact.
    - With a share s of copies of N training images, which have practically no probability under p:
      :math:`\mathrm{KL}(p \,\|\, q) = -\log(1 - s)`, total variation s, and :math:`\mathrm{KL}(q \,\|\, p) =
      (1 - s) \log(1 - s) + s\, (\log(s / N) - \overline{\log p(x_i)})`.
    - A shift by t has the Wasserstein-2 distance :math:`\lVert t \rVert`. Rounding is a projection to the nearest
      possible image, so it is the optimal transport and the distance is the root mean square error.
    """
    model, source = fault.model, generator("cpu", "truth", fault.family)
    if isinstance(model, FewLevels):
        x, _ = data.sample(n, source)
        squares = (model.rounded(x) - x).mul(bin_width(data.num_bins)).square().sum(1)
        return Truth(None, None, None, math.sqrt(float(squares.mean())))
    if isinstance(model, WithCopies):
        s, surprise = model.share, -float(data.log_prob(model.train.double()).mean())
        backward = (1 - s) * math.log1p(-s) + s * (math.log(s / len(model.train)) + surprise)
        return Truth(MonteCarlo(-math.log1p(-s)), MonteCarlo(backward), MonteCarlo(s))
    assert isinstance(model, ExactDistribution | WithNoise)
    x, y = data.sample(n, source)[0], model.sample(n, source)[0]
    ratio = model.log_prob(x) - data.log_prob(x)
    forward, backward = MonteCarlo.mean(-ratio), MonteCarlo.mean(model.log_prob(y) - data.log_prob(y))
    if isinstance(data, Ising) and isinstance(model, Ising):
        forward, backward = MonteCarlo(data.kl(model)), MonteCarlo(model.kl(data))
    wasserstein = fault.strength * bin_width(256) * data.side if fault.family == "brightness" else None
    return Truth(forward, backward, MonteCarlo.mean((-ratio.expm1()).clamp_min(0)), wasserstein)
