r"""Score matching in the plane, where the true score is known: plain, at one noise level, and at many.

Points are images of two channels and one pixel, (n, 2, 1, 1). The score is grad log p(x); of p_sigma, the data with
noise of standard deviation sigma, unless another is named.
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
"""Of the points on the line x_1 = x_2, along it."""

Points = Callable[[int, torch.Generator], Tensor]


def two_gaussians(n: int, source: torch.Generator) -> Tensor:
    """0.2 N((-0.5, -0.5), 0.1^2 I) + 0.8 N((0.5, 0.5), 0.1^2 I): Song and Ermon's (2019) of section 3.2.2, over 10."""
    return TWO.sample(n, source)[0].float()[..., None, None]


def line(n: int, source: torch.Generator) -> Tensor:
    """Points (a, a) / sqrt(2), a ~ N(0, `LINE_STD`^2): a manifold of one dimension."""
    along = LINE_STD * torch.randn(n, 1, generator=source)
    return (along.expand(n, 2) / math.sqrt(2))[..., None, None].contiguous()


@dataclass(frozen=True)
class Exact:
    """The perfect denoiser of `two_gaussians`, by the gradient of the density, with any weights."""

    schedule: NoiseSchedule = SCHEDULE
    weights: tuple[float, float] = (0.2, 0.8)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad log p_sigma(x), like x."""
        noisy = replace(TWO, weights=self.weights, std=math.hypot(TWO.std, float(sigma)))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(noisy.log_density(x.flatten(1)).sum(), x)[0]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        at = self.schedule.at(t, x_t)
        eps = -at.sigma * self.score(x_t, at.sigma)
        return Prediction(x0=x_t - at.sigma * eps, eps=eps)


@dataclass(frozen=True)
class OneTime(TimeDistribution):
    """The same noise level for every point: denoising score matching as Vincent (2011) has it."""

    t: float

    def __call__(self, schedule: NoiseSchedule, draws: RandomSource) -> Tensor:
        return torch.full((len(draws),), self.t)


def trained(
    points: Points, times: TimeDistribution, *, steps: int = 1500, features: int = 96, depth: int = 3
) -> Denoiser:
    """A perceptron trained by denoising score matching; every batch is of fresh points."""
    torch.manual_seed(0)
    source, rows = generator("cpu", "training"), 256
    network = DenoisingMLP((2, 1, 1), 2, width=features, depth=depth)
    denoiser = Denoiser(network, SCHEDULE, EDMPreconditioning())
    objective = WeightedMSE(weighting=EDMWeighting(), times=times)

    def loss() -> Tensor:
        return objective(denoiser, points(rows, source), {}, RandomSource.whole(source, rows))["loss"].mean()

    _descend(network, steps, loss)
    return denoiser


def one_level(points: Points, sigma: float, **options: int) -> Denoiser:
    return trained(points, OneTime(float(time_of(sigma))), **options)


def many_levels(points: Points, **options: int) -> Denoiser:
    return trained(points, UniformTimes(), **options)


def plain_score_matching(noise: float, *, steps: int = 1000) -> tuple[nn.Module, list[float]]:
    r"""A perceptron s trained on `line` with noise of this standard deviation, and its loss at each step.

    The loss is E[||s(x)||^2 / 2 + div s(x)] (Hyvarinen 2005, theorem 1), which is E||s - grad log p||^2 / 2 up to a
    constant, where p has a density. Its least value is then -E||grad log p||^2 / 2.
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

    # At a constant rate: a loss that levels off has then found a minimum.
    _descend(network, steps, loss, last=3e-3)
    return network, losses


def least_loss(noise: float) -> float:
    """The least value of that loss: the score of N(0, diag(l, n)) has E||score||^2 = 1 / l + 1 / n."""
    return -0.5 * (1 / (LINE_STD**2 + noise**2) + 1 / noise**2)


def _descend(network: nn.Module, steps: int, loss: Callable[[], Tensor], *, last: float = 0.0) -> None:
    """Adam at a rate that falls linearly from 0.003 to ``last``."""
    first = 3e-3
    optimizer = torch.optim.Adam(network.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = first + (last - first) * step / steps
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def time_of(sigma: float) -> Tensor:
    """The time at which `SCHEDULE` has this noise."""
    return SCHEDULE.t_from_log_snr(torch.tensor(-2 * math.log(sigma)))


@torch.no_grad()
def score(denoiser: DenoiserProtocol, x: Tensor, sigma: float) -> Tensor:
    """The score that a denoiser knows of x at this noise, like x."""
    return -denoiser(x, time_of(sigma).expand(len(x)), {}).eps / sigma


def relative_error(denoiser: DenoiserProtocol, x: Tensor, sigma: float) -> float:
    """Root of E||s - grad log p_sigma||^2 / E||grad log p_sigma||^2 over points x of `two_gaussians`' plane: 0 is
    perfect, 1 is what s = 0 gets."""
    truth = Exact().score(x, sigma)
    return float(((score(denoiser, x, sigma) - truth).square().sum() / truth.square().sum()).sqrt())


def square(n: int, source: torch.Generator) -> Tensor:
    """Points spread evenly over [-1, 1]^2, most of them where there are no data."""
    return (2 * torch.rand(n, 2, generator=source) - 1)[..., None, None]


ACROSS = torch.tensor([1.0, -1.0]) / math.sqrt(2)
"""The unit vector across the line."""


def pull(denoiser: DenoiserProtocol, n: int, sigma: float, distance: float, source: torch.Generator) -> float:
    """Mean length of the score's part towards `line`, at points so far off it: distance / sigma^2 in truth."""
    x = line(n, source) + distance * ACROSS[:, None, None]
    return -float((score(denoiser, x, sigma).flatten(1) @ ACROSS).mean())


def pull_at_the_level(denoiser: DenoiserProtocol, n: int, sigma: float, source: torch.Generator) -> float:
    """sigma times the root mean square of that part over p_sigma: 1 in truth, at every level."""
    across = score(denoiser, noisy(line, n, sigma, source), sigma).flatten(1) @ ACROSS
    return sigma * float(across.square().mean().sqrt())


def noisy(points: Points, n: int, sigma: float, source: torch.Generator) -> Tensor:
    return points(n, source) + sigma * torch.randn(n, 2, 1, 1, generator=source)


ANNEALED = AnnealedLangevin(num_steps=20, num_langevin_steps=50)


@torch.no_grad()
def sampled(sampler: Sampler, denoiser: DenoiserProtocol, n: int) -> Tensor:
    """n points of a sampler, from the schedule's own noise."""
    x = SCHEDULE.prior((n, 2, 1, 1), generator("cpu", "prior"))
    return sampler.sample(denoiser, x, generator=generator("cpu", "sampler"))


@torch.no_grad()
def langevin_at(denoiser: DenoiserProtocol, sigma: float, n: int, *, denoise: bool = True) -> Tensor:
    """n points by Langevin steps at one noise level alone, as many as `ANNEALED` takes at all of its levels, started
    evenly over the `square`: half of them nearer to either mode."""
    sampler = AnnealedLangevin(
        num_steps=1, num_langevin_steps=ANNEALED.num_steps * ANNEALED.num_langevin_steps, denoise=denoise
    )
    times = torch.stack([time_of(sigma), torch.tensor(CLEAN)])
    return sampler.sample(denoiser, square(n, generator("cpu", "start")), generator=generator("cpu"), times=times)


def share(x: Tensor) -> float:
    """The share of points on the side of the smaller mode: 0.2 in truth."""
    return float((x.flatten(1).sum(1) < 0).float().mean())


def width(x: Tensor) -> float:
    """Standard deviation, a coordinate, about the nearer mode: 0.1 in truth."""
    side = x.flatten(1).sum(1, keepdim=True).sign() / 2
    return float((x.flatten(1) - side).square().mean().sqrt())
