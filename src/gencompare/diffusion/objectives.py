"""Training objectives: per-sample losses of a denoiser."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.parameterizations import Parameterization
from gencompare.diffusion.schedules import NoiseSchedule, ScheduleValues
from gencompare.diffusion.times import TimeDistribution, UniformTimes
from gencompare.errors import UserError
from gencompare.rng import RandomSource


@dataclass(frozen=True, eq=False)
class Pixels:
    """The pixels of images in [-1, 1]."""

    levels: int | None
    """How many values, evenly spaced from -1 to 1, a pixel can take; None for continuous data."""
    mask: Tensor
    """(1, H, W): 1 on real pixels, 0 on padding."""
    dims: int
    """Real values in an image: the divisor of bits/dim."""

    def log_prob(self, x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """log p(x_0) in nats, (n,), summed over real pixels, each N(mean, std^2): the mass of the level that the pixel
        has, or the density where it is continuous."""
        found = log_normal(x0, mean, std) if self.levels is None else log_normal_level(x0, mean, std, self.levels)
        return (found * self.mask.to(x0)).flatten(1).sum(1)

    def bits(self, nats: Tensor) -> Tensor:
        """Nats an image to bits a real value."""
        return nats / (self.dims * math.log(2))


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2), value by value."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def log_normal_level(x: Tensor, mean: Tensor, std: Tensor, levels: int) -> Tensor:
    r"""log of the mass of N(mean, std^2) in the bin of x, value by value; x takes ``levels`` values from -1 to 1.

    Phi((x + Delta/2 - mean) / std) - Phi((x - Delta/2 - mean) / std), Delta = 2 / (levels - 1); the lowest bin reaches
    down to -inf and the highest up to +inf (Ho et al. 2020, eq. 13).
    """
    half, inverse, distance = 1 / (levels - 1), 1 / std, x - mean
    # The mass between two edges is that of its mirror image: on the left of the mean no digits are lost.
    upper = torch.special.log_ndtr(-(distance.abs() - half) * inverse)
    lower = torch.special.log_ndtr(-(distance.abs() + half) * inverse)
    inner = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-7)))
    lowest, highest = x < -1 + half, x > 1 - half
    outer = torch.special.log_ndtr((half + torch.where(lowest, distance, -distance)) * inverse)
    return torch.where(lowest | highest, outer, inner)


class Coupling(ABC):
    """Pairs the images of a batch with its noise."""

    @abstractmethod
    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The rows of ``eps`` (n, C, H, W) in the order in which they go with ``x0`` (n, C, H, W)."""


@dataclass(frozen=True)
class IndependentCoupling(Coupling):
    """Any noise with any image: q(x_0) N(eps; 0, I)."""

    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps


@dataclass(frozen=True)
class MinibatchOT(Coupling):
    r"""The pairing of least sum ||x_0 - eps||^2 within the batch, found exactly.

    Tong et al. (2023), "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport",
    section 3.2. Paths from noise to image then cross less, and few sampling steps go further. The score of such a model
    is no longer that of p(x_t): sample it with deterministic samplers. Each process pairs its own rows, so what is
    trained depends on the number of processes. O(n^3) on the CPU: some 10 ms for 256 images.
    """

    @torch.no_grad()
    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        # ||x_0||^2 and ||eps||^2 add up to the same whatever the pairing.
        cost = -(x0.flatten(1).double() @ eps.flatten(1).double().T)
        _, column = linear_sum_assignment(cost.cpu().numpy())
        return eps[torch.as_tensor(column, device=eps.device)]


class Weighting(ABC):
    """The weight w >= 0 of the squared error *in eps* at a noise level, whatever the network predicts.

    As SNR ||x_0 error||^2 = ||eps error||^2, a weight on the error of x_0 is w SNR, and, for alpha^2 + sigma^2 = 1,
    one on the error of v is w SNR / (1 + SNR). So a change of parameterisation alone never changes the loss.
    """

    @abstractmethod
    def __call__(self, at: ScheduleValues) -> Tensor:
        """w, shaped as what ``at`` gives."""


@dataclass(frozen=True)
class SimpleWeighting(Weighting):
    """w = 1: L_simple (Ho et al. 2020, eq. 14)."""

    def __call__(self, at: ScheduleValues) -> Tensor:
        return torch.ones_like(at.log_snr)


@dataclass(frozen=True)
class UniformVWeighting(Weighting):
    """w = 1 + 1 / SNR: the plain squared error in v ("SNR + 1" on x_0; Salimans and Ho 2022, section 4)."""

    def __call__(self, at: ScheduleValues) -> Tensor:
        return 1 + torch.exp(-at.log_snr)


@dataclass(frozen=True)
class MinSNRWeighting(Weighting):
    """w = min(1, gamma / SNR): the error of x_0 weighed by the SNR, up to gamma.

    Hang et al. (2023), "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise UserError(f"weighting.gamma={self.gamma}: give a positive number.")

    def __call__(self, at: ScheduleValues) -> Tensor:
        return (self.gamma * torch.exp(-at.log_snr)).clamp(max=1.0)


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    """w = 1 + 1 / (d^2 SNR), d = ``sigma_data``: (sigma^2 + d^2) / (sigma d)^2 on x_0, where alpha = 1.

    Karras et al. (2022), "Elucidating the Design Space", table 1: the plain squared error of a network with their
    preconditioning. With d = 1 it is `UniformVWeighting`.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise UserError(f"weighting.sigma_data={self.sigma_data}: give a positive number.")

    def __call__(self, at: ScheduleValues) -> Tensor:
        return 1 + torch.exp(-at.log_snr) / self.sigma_data**2


@dataclass(frozen=True)
class P2Weighting(Weighting):
    """w = 1 / (k + SNR)^gamma (Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", eq. 8)."""

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.k <= 0:
            raise UserError(f"weighting.gamma={self.gamma}, weighting.k={self.k}: neither may be negative, nor k be 0.")

    def __call__(self, at: ScheduleValues) -> Tensor:
        return (self.k + torch.exp(at.log_snr)) ** -self.gamma


@dataclass(frozen=True)
class UniformVelocityWeighting(Weighting):
    r"""w = (sigma lambda' / 2)^2: the plain squared error in the velocity alpha' x_0 + sigma' eps.

    Lipman et al. (2023), "Flow Matching", eq. 9; with rectified flow (1 + sigma / alpha)^2.
    """

    def __call__(self, at: ScheduleValues) -> Tensor:
        return (0.5 * at.sigma * at.log_snr_slope) ** 2


@dataclass(frozen=True)
class LikelihoodWeighting(Weighting):
    """w = g^2 / sigma^2 = -lambda': with uniform times, a bound on the likelihood.

    Song et al. (2021), "Maximum Likelihood Training of Score-Based Diffusion Models", eq. 7 and theorem 1: g^2 on the
    squared error of the score. Large near t_min, so the loss scatters more than others'.
    """

    def __call__(self, at: ScheduleValues) -> Tensor:
        return -at.log_snr_slope


class Objective(ABC):
    """A training loss."""

    trains_schedule: ClassVar[bool] = False
    """Whether a schedule with weights may follow its gradient. Only a bound on the likelihood may be lowered so: any
    other loss is lowest where there is nothing but noise, or next to none."""
    trains_variance: ClassVar[bool] = False
    """Whether its gradient reaches a reverse variance that the network says. In an error of image or noise there is
    none."""

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:  # noqa: B027
        """Raises `UserError` where the objective cannot train a network of ``parameterization`` under ``schedule``."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """Figures of each image, (n,), of which ``loss`` is minimised."""

    def bound_to(self, pixels: Pixels) -> Objective:
        """The same objective for images of such pixels, where that makes a difference."""
        return self


@dataclass(frozen=True)
class NoisyBatch:
    """x_t = alpha x_0 + sigma eps, and what it was made of."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    at: ScheduleValues
    x_t: Tensor

    @classmethod
    def make(cls, x0: Tensor, eps: Tensor, t: Tensor, at: ScheduleValues) -> NoisyBatch:
        return cls(x0, eps, t, at, at.alpha * x0 + at.sigma * eps)

    def eps_error(self, denoiser: Denoiser, out: Tensor) -> Tensor:
        """(eps - eps_theta)^2 of each value, like x_0, from the network's output.

        It is taken where it is well conditioned, in what the network predicts, and carried over to eps.
        """
        parameterization = denoiser.parameterization
        error = parameterization.targeted(out) - parameterization.target(self.x0, self.eps, self.at)
        return (error * parameterization.eps_gain(self.at)).square()


@dataclass(frozen=True)
class WeightedMSE(Objective):
    r"""E w(lambda) ||eps - eps_theta(x_t)||^2 per value, with x_t = alpha x_0 + sigma eps and eps ~ N(0, I).

    The error is taken where it is well conditioned, in what the network predicts, and w is carried over to there.

    Args:
        weighting: w.
        times: distribution of t.
        coupling: which noise goes with which image.
    """

    weighting: Weighting = field(default_factory=SimpleWeighting)
    times: TimeDistribution = field(default_factory=UniformTimes)
    coupling: Coupling = field(default_factory=IndependentCoupling)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        t = self.times(denoiser.schedule, draws)
        eps = self.coupling(x0, draws.normal(x0.shape[1:]).to(x0.dtype))
        noised = NoisyBatch.make(x0, eps, t, denoiser.schedule.at(t, x0))
        out = denoiser.output(noised.x_t, t, noised.at, cond)
        eps_mse = noised.eps_error(denoiser, out).flatten(1).mean(1)
        return {"loss": self.weighting(noised.at).flatten() * eps_mse, "eps_mse": eps_mse.detach()}
