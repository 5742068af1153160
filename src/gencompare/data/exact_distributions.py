"""Image distributions whose probabilities, entropy and samples are exact: a Gaussian mixture, an Ising model and an
autoregressive network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.data.digits import read_digits
from gencompare.dequantization import bin_width, log_bin_volume
from gencompare.errors import UserError
from gencompare.rng import draw_categorical, generator


@dataclass(frozen=True)
class MonteCarlo:
    """A value and the standard error of its estimate, 0 if it is exact."""

    value: float
    standard_error: float = 0.0

    @classmethod
    def mean(cls, values: Tensor) -> MonteCarlo:
        """Average independent draws (n,)."""
        return cls(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


class ImageDistribution(ABC):
    """A distribution of greyscale images of ``side`` x ``side`` pixels, d in all, with ``num_bins`` levels each."""

    side: int
    num_bins: int
    num_components: int = 0
    """Number of mixture components; 0 if samples have no labels."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw points (n, d) float64 and return them with their components, (n,) int64 or None. The points are levels
        0 to ``num_bins`` - 1, before rounding if the distribution is continuous."""

    def images(self, x: Tensor) -> Tensor:
        """Convert points (n, d) to the stored images, (n, 1, side, side) uint8."""
        return x.round().clamp(0, self.num_bins - 1).to(torch.uint8).reshape(-1, 1, self.side, self.side)


class ExactDistribution(ImageDistribution):
    """A distribution whose probabilities and entropy are known."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the log probability of levels (n, d) in nats, (n,)."""

    @abstractmethod
    def entropy(self, n: int = 512) -> MonteCarlo:
        """Compute the entropy in nats, from ``n`` draws if there is no closed form."""


# Gaussian mixture

RANK, CONTRAST = 8, 0.35
"""Number of factors of a component, and the fraction of the grey levels that the digits are scaled to. With this
contrast, fewer than one value in 10,000 is clipped to the range of uint8."""


@dataclass(frozen=True)
class LowRankGaussianMixture(ExactDistribution):
    r"""Gaussians with a covariance of low rank plus noise:
    :math:`p(x) = \sum_k w_k \mathcal{N}(x;\, \mu_k,\, W_k^\top W_k + \sigma_k^2 I)` on pixels in [-1, 1].

    Each component is a probabilistic PCA model (Tipping and Bishop 1999, "Probabilistic Principal Component Analysis",
    section 3.2, https://doi.org/10.1111/1467-9868.00196).

    Images are stored as 256 levels, of width :math:`\delta = 2 / 255`. `log_prob` is the log density times the volume
    :math:`\delta^d` of a bin. So the entropy is :math:`h - d \log \delta` with the differential entropy h, which is a
    lower bound on the entropy of unclipped images; the excess is about :math:`\delta^2 / 24\; \mathbb{E}
    \lVert \nabla \log p \rVert^2 \le d\, \delta^2 / (24\, \sigma^2)`.

    Args:
        side: height and width of the images.
        weights: w, (K,) float64.
        means: :math:`\mu`, (K, d).
        loadings: W, (K, q, d).
        stds: :math:`\sigma`, (K,).
    """

    side: int
    weights: Tensor
    means: Tensor
    loadings: Tensor
    stds: Tensor
    num_bins: int = 256

    @classmethod
    def of_digits(cls, side: int) -> LowRankGaussianMixture:
        """Fit a component of `RANK` factors to each class of scikit-learn's digits, resized to ``side`` pixels.

        Bicubic interpolation resizes, and the grey levels are scaled to the middle of [-1, 1].
        """
        table = torch.from_numpy(read_digits())
        labels = table[:, -1].long()
        images = (table[:, :-1] / 8 - 1).reshape(-1, 1, 8, 8)
        if side != 8:
            images = F.interpolate(images, (side, side), mode="bicubic")
        x = CONTRAST * images.flatten(1)
        fits = [probabilistic_pca(x[labels == k], RANK) for k in range(int(labels.max()) + 1)]
        weights = torch.bincount(labels).double() / len(labels)
        means, loadings, stds = (torch.stack(parts) for parts in zip(*fits, strict=True))
        return cls(side, weights, means, loadings, stds)

    @property
    def num_components(self) -> int:  # type: ignore[override]
        return len(self.weights)

    def covariance(self, k: int) -> Tensor:
        """Return the covariance (d, d) of component k. `gaussian_frechet_distance` of two components is the squared
        Wasserstein-2 distance between them."""
        identity = torch.eye(self.means.shape[1], dtype=torch.float64)
        return self.loadings[k].T @ self.loadings[k] + self.stds[k].square() * identity

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        num_factors, d = self.loadings.shape[1:]
        labels = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        factors = torch.randn(n, num_factors, generator=generator, dtype=torch.float64)
        x = torch.randn(n, d, generator=generator, dtype=torch.float64).mul_(self.stds[labels, None])
        for k in range(self.num_components):
            rows = labels == k
            x[rows] += self.means[k] + factors[rows] @ self.loadings[k]
        return (x + 1) / bin_width(self.num_bins), labels

    def component_log_prob(self, x: Tensor) -> Tensor:
        """Compute :math:`\\log p(x \\mid k)` of levels (n, d), (n, K)."""
        x = x * bin_width(self.num_bins) - 1
        return torch.stack([self._log_density(x, k) for k in range(self.num_components)], 1) + log_bin_volume(
            self.num_bins, x.shape[1]
        )

    def _log_density(self, x: Tensor, k: int) -> Tensor:
        """Compute the log density of component k by the Woodbury identity, whose inverse is only (q, q)."""
        loadings, centred = self.loadings[k], x - self.means[k]
        projected = torch.linalg.solve_triangular(self._inner(k), loadings @ centred.T, upper=False)
        quadratic = (centred.square().sum(1) - projected.square().sum(0)) / self.stds[k].square()
        return -0.5 * (quadratic + self._log_det(k) + centred.shape[1] * math.log(2 * math.pi))

    def _log_det(self, k: int) -> Tensor:
        num_factors, d = self.loadings[k].shape
        return 2 * (self._inner(k).diagonal().log().sum() + (d - num_factors) * self.stds[k].log())

    def _inner(self, k: int) -> Tensor:
        r"""Return the Cholesky factor of :math:`\sigma^2 I + W W^\top`, (q, q)."""
        loadings = self.loadings[k]
        identity = torch.eye(len(loadings), dtype=loadings.dtype)
        return torch.linalg.cholesky(self.stds[k].square() * identity + loadings @ loadings.T)

    def log_prob(self, x: Tensor) -> Tensor:
        return (self.component_log_prob(x) + self.weights.log()).logsumexp(1)

    def posterior(self, x: Tensor) -> Tensor:
        """Compute the probability of each component given levels (n, d), (n, K)."""
        return (self.component_log_prob(x) + self.weights.log()).softmax(1)

    def entropy(self, n: int = 512) -> MonteCarlo:
        r"""Compute :math:`H(w) + \sum_k w_k h_k - \mathbb{E}\, H(k \mid x)`. Only the last term, which is small for
        separate components, is averaged over draws."""
        d = self.means.shape[1]
        components = [
            0.5 * float(self._log_det(k) + d * math.log(2 * math.pi * math.e)) for k in range(len(self.weights))
        ]
        closed = float(categorical_entropy(self.weights) + self.weights @ torch.tensor(components, dtype=torch.float64))
        x, _ = self.sample(n, generator("cpu", "entropy"))
        rest = MonteCarlo.mean(categorical_entropy(self.posterior(x)))
        return MonteCarlo(closed - log_bin_volume(self.num_bins, d) - rest.value, rest.standard_error)


def probabilistic_pca(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the mean (d,), loadings (q, d) and noise standard deviation of x (n, d) by maximum likelihood."""
    mean = x.mean(0)
    _, values, axes = torch.linalg.svd(x - mean, full_matrices=False)
    variances = values.square() / len(x)
    noise = variances[rank:].sum() / (x.shape[1] - rank)
    axes = axes[:rank]
    # An axis has no sign of its own; fix it, so that samples do not depend on the linear algebra library.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return mean, axes * (variances[:rank, None] - noise).sqrt(), noise.sqrt()


def categorical_entropy(p: Tensor) -> Tensor:
    """Compute the entropy of probabilities (..., k) in nats, (...)."""
    return torch.special.entr(p).sum(-1)


# Ising model

COUPLING, MAX_ISING_SIDE = 0.42, 16
"""Coupling, slightly below the critical one of the infinite lattice, log(1 + sqrt(2)) / 2 = 0.4407; and the largest
side, whose transfer matrix has 2^16 states."""


@dataclass(frozen=True)
class Ising(ExactDistribution):
    r"""The Ising model on a square lattice with free boundaries, for spins s = -1 and 1, stored as levels 0 and 1:

    .. math:: p(s) = \frac{1}{Z} \exp\Big(J \sum_{i \sim j} s_i s_j + h \sum_i s_i\Big)

    The transfer matrix method adds one spin at a time to a table of all states of the last ``side`` spins (Kramers and
    Wannier 1941, "Statistics of the Two-Dimensional Ferromagnet. Part I", https://doi.org/10.1103/PhysRev.60.252), in
    time :math:`O(d\, 2^\text{side})`. It gives Z; drawing the spins in reverse order gives independent exact samples.

    Args:
        side: height and width of the images, at most 16.
        coupling: J.
        field: h.
    """

    side: int
    coupling: float = COUPLING
    field: float = 0.0
    num_bins: int = 2

    def __post_init__(self) -> None:
        if self.side > MAX_ISING_SIDE:
            raise UserError(
                f"The Ising model of {self.side}x{self.side} spins is not tractable: its transfer matrix has"
                f" 2^{self.side} states. Set data.side to 8 or 16."
            )

    def _partial_sums(self, coupling: Tensor, field: Tensor) -> list[Tensor]:
        """Return log sums over all but the last ``side`` spins, (2^side,), after each spin. Bit j of a state is the
        spin in column j."""
        states = torch.arange(2**self.side)
        spins = [2.0 * (states >> j & 1).double() - 1 for j in range(self.side)]
        # Before the first row there are no spins: all bits are 0, and vertical bonds have no weight.
        sums = torch.where(states == 0, 0.0, -math.inf).double()
        found = []
        for t in range(self.side**2):
            j = t % self.side
            weight = field * spins[j] + (coupling * spins[j] * spins[j - 1] if j else 0)
            if t < self.side:
                sums = sums[states & ~(1 << j)] + weight
            else:
                above = coupling * spins[j]
                sums = weight + torch.logaddexp(sums[states | 1 << j] + above, sums[states & ~(1 << j)] - above)
            found.append(sums)
        return found

    @cached_property
    def _sums(self) -> list[Tensor]:
        return self._partial_sums(*torch.tensor([self.coupling, self.field], dtype=torch.float64))

    @cached_property
    def log_partition(self) -> float:
        """log Z."""
        return float(self._sums[-1].logsumexp(0))

    @cached_property
    def mean_statistics(self) -> tuple[float, float]:
        """Expectations of the sum over bonds and of the sum of spins, the derivatives of log Z by J and h."""
        parameters = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (self.coupling, self.field)]
        log_partition = self._partial_sums(*parameters)[-1].logsumexp(0)
        bonds, spins = torch.autograd.grad(log_partition, parameters)
        return float(bonds), float(spins)

    def log_prob(self, x: Tensor) -> Tensor:
        s = 2 * x.double().reshape(-1, self.side, self.side) - 1
        bonds = (s[:, 1:] * s[:, :-1]).sum((1, 2)) + (s[:, :, 1:] * s[:, :, :-1]).sum((1, 2))
        return self.coupling * bonds + self.field * s.sum((1, 2)) - self.log_partition

    def entropy(self, n: int = 0) -> MonteCarlo:
        bonds, spins = self.mean_statistics
        return MonteCarlo(self.log_partition - self.coupling * bonds - self.field * spins)

    def kl(self, other: Ising) -> float:
        r"""Compute :math:`\mathrm{KL}(p \,\|\, q)` to another Ising model in nats: for exponential families,
        :math:`A(\eta') - A(\eta) - (\eta' - \eta)^\top \nabla A(\eta)` with :math:`A = \log Z`."""
        bonds, spins = self.mean_statistics
        gap = (other.coupling - self.coupling) * bonds + (other.field - self.field) * spins
        return other.log_partition - self.log_partition - gap

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, None]:
        last = (self._sums[-1] - self.log_partition).exp().cumsum(0)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        state = torch.searchsorted(last, uniform * last[-1]).clamp_max(len(last) - 1)
        x = torch.empty(n, self.side**2, dtype=torch.float64)
        for j in range(self.side):
            x[:, -self.side + j] = state >> j & 1
        for t in range(self.side**2 - 1, self.side - 1, -1):
            j = t % self.side
            spin = 2 * (state >> j & 1) - 1
            up, down = state | 1 << j, state & ~(1 << j)
            log_odds = self._sums[t - 1][up] - self._sums[t - 1][down] + 2 * self.coupling * spin
            drawn = torch.rand(n, generator=generator, dtype=torch.float64) < log_odds.sigmoid()
            x[:, t - self.side] = drawn.double()
            state = torch.where(drawn, up, down)
        return x, None


# Autoregressive network

LEVELS, HIDDEN, REACH, GAIN = 4, 32, 2, 3.0
"""Grey levels, hidden units, pixels that the context reaches in each direction, and the scale of the logits."""


@dataclass(frozen=True)
class AutoregressiveNetwork(ExactDistribution):
    r"""A causal network with fixed random weights: :math:`p(x) = \prod_i p(x_i \mid \text{context of } i)`.

    The context are the pixels of earlier rows and of the same row to the left, at most two pixels away; those outside
    the image count as 0. A hidden layer with tanh gives the logits of the four levels, which are divided by
    ``temperature``.

    Args:
        side: height and width of the images.
        temperature: divisor of the logits.
    """

    side: int
    temperature: float = 1.0
    num_bins: int = LEVELS

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the hidden layer (contexts, 32), its bias (32,), and output weights (32, 4)."""
        source = generator("cpu", "autoregressive network")
        first = torch.randn(len(self.offsets), HIDDEN, generator=source, dtype=torch.float64)
        bias = torch.randn(HIDDEN, generator=source, dtype=torch.float64)
        second = torch.randn(HIDDEN, LEVELS, generator=source, dtype=torch.float64)
        return first * (2 / len(self.offsets) ** 0.5), 0.3 * bias, second * (GAIN / HIDDEN**0.5)

    @cached_property
    def offsets(self) -> list[tuple[int, int]]:
        """Offsets (rows, columns) of the context."""
        window = range(-REACH, REACH + 1)
        return [(dy, dx) for dy in range(-REACH, 1) for dx in window if dy < 0 or dx < 0]

    def logits(self, context: Tensor) -> Tensor:
        """Compute logits (..., 4) from context pixels (..., contexts), scaled to [-1, 1]."""
        first, bias, second = self.weights
        return (context @ first + bias).tanh() @ second / self.temperature

    def _padded(self, x: Tensor) -> Tensor:
        scaled = x.double().reshape(-1, self.side, self.side) * (2 / (LEVELS - 1)) - 1
        return F.pad(scaled, (REACH, REACH, REACH, 0))

    def _all_logits(self, x: Tensor) -> Tensor:
        """Compute the logits of each pixel of levels (n, d) given its context, (n, d, 4)."""
        padded, side = self._padded(x), self.side
        shifted = [padded[:, REACH + dy : REACH + dy + side, REACH + dx : REACH + dx + side] for dy, dx in self.offsets]
        return self.logits(torch.stack(shifted, -1).flatten(1, 2))

    def log_prob(self, x: Tensor) -> Tensor:
        levels = x.reshape(len(x), -1).long()
        return self._all_logits(x).log_softmax(-1).gather(2, levels[..., None]).sum((1, 2))

    def entropy(self, n: int = 512) -> MonteCarlo:
        r"""Average :math:`\sum_i H(x_i \mid \text{context of } i)` over draws, which varies less than
        :math:`-\log p(x)`."""
        x, _ = self.sample(n, generator("cpu", "entropy"))
        return MonteCarlo.mean(categorical_entropy(self._all_logits(x).softmax(-1)).sum(1))

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, None]:
        padded = torch.zeros(n, self.side + REACH, self.side + 2 * REACH, dtype=torch.float64)
        x = torch.empty(n, self.side, self.side, dtype=torch.float64)
        for row in range(self.side):
            for column in range(self.side):
                context = torch.stack([padded[:, REACH + row + dy, REACH + column + dx] for dy, dx in self.offsets], -1)
                level = draw_categorical(self.logits(context), generator, -1).double()
                x[:, row, column] = level
                padded[:, REACH + row, REACH + column] = level * (2 / (LEVELS - 1)) - 1
        return x.flatten(1), None
