r"""Score matching in the plane with known scores: plain, at one noise level, and at many noise levels.

Points are images with two channels and one pixel, (n, 2, 1, 1). The score is :math:`\nabla_x \log p_\sigma(x)`, with
:math:`p_\sigma` the data with Gaussian noise of standard deviation :math:`\sigma`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gencompare.data.toy2d import DISTRIBUTIONS, GaussianMixture
from gencompare.diffusion.denoiser import Cond, Denoiser, DenoiserProtocol
from gencompare.diffusion.objectives import EDMWeighting, WeightedMSE
from gencompare.diffusion.parameterizations import EDMPreconditioning, Prediction
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import CLEAN, VE, NoiseSchedule
from gencompare.diffusion.sde_samplers import AnnealedLangevin
from gencompare.diffusion.times import TimeDistribution, UniformTimes
from gencompare.networks.mlp import DenoisingMLP
from gencompare.rng import RandomSource, generator

TWO = DISTRIBUTIONS["two_gaussians"]
assert isinstance(TWO, GaussianMixture)
SCHEDULE = VE(sigma_min=0.02, sigma_max=10.0)
LINE_STD = 0.5
"""Standard deviation of the points on the line x_1 = x_2, along it."""

Points = Callable[[int, torch.Generator], Tensor]


def two_gaussians(n: int, source: torch.Generator) -> Tensor:
    """0.2 N((-0.5, -0.5), 0.1^2 I) + 0.8 N((0.5, 0.5), 0.1^2 I): the mixture of Song and Ermon (2019), section 3.2.2,
    scaled by 1/10."""
    return TWO.sample(n, source)[0].float()[..., None, None]


def line(n: int, source: torch.Generator) -> Tensor:
    """Points (a, a) / sqrt(2) with a ~ N(0, `LINE_STD`^2): a one-dimensional manifold."""
    along = LINE_STD * torch.randn(n, 1, generator=source)
    return (along.expand(n, 2) / math.sqrt(2))[..., None, None].contiguous()


@dataclass(frozen=True)
class ExactDenoiser:
    """The optimal denoiser of `two_gaussians` with any mode weights, from the gradient of the density."""

    schedule: NoiseSchedule = SCHEDULE
    weights: tuple[float, float] = (0.2, 0.8)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad log p_sigma(x), with the shape of x."""
        noisy = replace(TWO, weights=self.weights, std=math.hypot(TWO.std, float(sigma)))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(noisy.log_density(x.flatten(1)).sum(), x)[0]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        at = self.schedule.at(t, x_t)
        eps = -at.sigma * self.score(x_t, at.sigma)
        return Prediction(x0=x_t - at.sigma * eps, eps=eps)


@dataclass(frozen=True)
class FixedTime(TimeDistribution):
    """One noise level for all points: denoising score matching as in Vincent (2011)."""

    t: float

    def __call__(self, schedule: NoiseSchedule, rng: RandomSource) -> Tensor:
        return torch.full((len(rng),), self.t)


def train_denoiser(
    points: Points, times: TimeDistribution, *, steps: int = 1500, features: int = 96, depth: int = 3
) -> Denoiser:
    """An MLP trained by denoising score matching on newly sampled points."""
    torch.manual_seed(0)
    source, rows = generator("cpu", "training"), 256
    network = DenoisingMLP((2, 1, 1), 2, width=features, depth=depth)
    denoiser = Denoiser(network, SCHEDULE, EDMPreconditioning())
    objective = WeightedMSE(weighting=EDMWeighting(), times=times)

    def loss() -> Tensor:
        return objective(denoiser, points(rows, source), {}, RandomSource.for_batch(source, rows))["loss"].mean()

    _train(network, steps, loss)
    return denoiser


def train_at_one_level(points: Points, sigma: float, **options: int) -> Denoiser:
    return train_denoiser(points, FixedTime(float(time_of(sigma))), **options)


def train_at_many_levels(points: Points, **options: int) -> Denoiser:
    return train_denoiser(points, UniformTimes(), **options)


def train_by_score_matching(noise: float, *, steps: int = 1000) -> tuple[nn.Module, list[float]]:
    r"""An MLP s trained by score matching on `line` with noise of this standard deviation, and its losses.

    The loss is :math:`E[\|s(x)\|^2 / 2 + \nabla \cdot s(x)]` (Hyvarinen 2005, theorem 1). If the data have a density p,
    it equals :math:`E\|s - \nabla \log p\|^2 / 2` up to a constant, and its minimum is
    :math:`-E\|\nabla \log p\|^2 / 2`.
    """
    torch.manual_seed(0)
    source = generator("cpu", "plain")
    network = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    losses: list[float] = []

    def loss() -> Tensor:
        x = line(256, source).flatten(1)
        x = (x + noise * torch.randn(x.shape, generator=source)).requires_grad_()
        s = network(x)
        rows = [torch.autograd.grad(s[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(2)]
        value = (s.square().sum(1) / 2 + torch.stack(rows).sum(0)).mean()
        losses.append(float(value.detach()))
        return value

    # A constant learning rate: if the loss levels off, it has found a minimum.
    _train(network, steps, loss, final_lr=3e-3)
    return network, losses


def minimal_loss(noise: float) -> float:
    """The minimum of that loss: the score of N(0, diag(l, n)) has E||score||^2 = 1 / l + 1 / n."""
    return -0.5 * (1 / (LINE_STD**2 + noise**2) + 1 / noise**2)


def _train(network: nn.Module, steps: int, loss: Callable[[], Tensor], *, final_lr: float = 0.0) -> None:
    """Minimise ``loss`` by Adam with a learning rate that falls linearly from 0.003 to ``final_lr``."""
    initial_lr = 3e-3
    optimizer = torch.optim.Adam(network.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = initial_lr + (final_lr - initial_lr) * step / steps
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def time_of(sigma: float) -> Tensor:
    """The time at which `SCHEDULE` has the noise level ``sigma``."""
    return SCHEDULE.t_from_log_snr(torch.tensor(-2 * math.log(sigma)))


@torch.no_grad()
def score(denoiser: DenoiserProtocol, x: Tensor, sigma: float) -> Tensor:
    """The score of a denoiser at noise level ``sigma``, with the shape of x."""
    return -denoiser(x, time_of(sigma).expand(len(x)), {}).eps / sigma


def relative_error(denoiser: DenoiserProtocol, x: Tensor, sigma: float) -> float:
    """sqrt(E||s - grad log p_sigma||^2 / E||grad log p_sigma||^2) over points x, for `two_gaussians`.

    0 is exact, and s = 0 gives 1.
    """
    truth = ExactDenoiser().score(x, sigma)
    return float(((score(denoiser, x, sigma) - truth).square().sum() / truth.square().sum()).sqrt())


def square(n: int, source: torch.Generator) -> Tensor:
    """Uniform points in [-1, 1]^2, mostly where there are no data."""
    return (2 * torch.rand(n, 2, generator=source) - 1)[..., None, None]


NORMAL = torch.tensor([1.0, -1.0]) / math.sqrt(2)
"""The unit normal of the line."""


def mean_normal_score(
    denoiser: DenoiserProtocol, n: int, sigma: float, distance: float, source: torch.Generator
) -> float:
    """Mean normal component of the score towards `line` at points off it; exactly distance / sigma^2."""
    x = line(n, source) + distance * NORMAL[:, None, None]
    return -float((score(denoiser, x, sigma).flatten(1) @ NORMAL).mean())


def rms_normal_score(denoiser: DenoiserProtocol, n: int, sigma: float, source: torch.Generator) -> float:
    """sigma times the root mean square of the normal component over p_sigma; exactly 1 at every noise level."""
    across = score(denoiser, add_noise(line, n, sigma, source), sigma).flatten(1) @ NORMAL
    return sigma * float(across.square().mean().sqrt())


def add_noise(points: Points, n: int, sigma: float, source: torch.Generator) -> Tensor:
    return points(n, source) + sigma * torch.randn(n, 2, 1, 1, generator=source)


ANNEALED = AnnealedLangevin(num_steps=20, num_langevin_steps=50)


@torch.no_grad()
def draw_samples(sampler: Sampler, denoiser: DenoiserProtocol, n: int) -> Tensor:
    """n points from a sampler, started at the prior of the schedule."""
    x = SCHEDULE.prior((n, 2, 1, 1), generator("cpu", "prior"))
    return sampler.sample(denoiser, x, generator=generator("cpu", "sampler"))


@torch.no_grad()
def langevin_at_one_level(denoiser: DenoiserProtocol, sigma: float, n: int, *, denoise: bool = True) -> Tensor:
    """n points from Langevin dynamics at one noise level, with the total number of steps of `ANNEALED`.

    The starting points are uniform in the `square`, half of them nearer to either mode.
    """
    sampler = AnnealedLangevin(
        num_steps=1, num_langevin_steps=ANNEALED.num_steps * ANNEALED.num_langevin_steps, denoise=denoise
    )
    times = torch.stack([time_of(sigma), torch.tensor(CLEAN)])
    return sampler.sample(denoiser, square(n, generator("cpu", "start")), generator=generator("cpu"), times=times)


def small_mode_weight(x: Tensor) -> float:
    """The fraction of points on the side of the smaller mode; exactly 0.2."""
    return float((x.flatten(1).sum(1) < 0).float().mean())


def mode_std(x: Tensor) -> float:
    """The standard deviation per coordinate about the nearer mode; exactly 0.1."""
    side = x.flatten(1).sum(1, keepdim=True).sign() / 2
    return float((x.flatten(1) - side).square().mean().sqrt())
