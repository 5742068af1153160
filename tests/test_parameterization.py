"""Parameterisations, the denoiser and the objectives: crossing them changes what is learned easily, never the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from composing import options
from gencompare.diffusion.denoiser import ClipX0, Denoiser
from gencompare.diffusion.objectives import WeightedMSE
from gencompare.diffusion.parameterization import Eps, LogSNR, Parameterization, Timestep, V
from gencompare.diffusion.schedules import LinearBetas, NoiseSchedule
from gencompare.diffusion.times import TimeDistribution
from gencompare.diffusion.weightings import MinSNR, Simple, UniformV, Weighting
from gencompare.errors import UserError
from gencompare.seeds import Draws, generator
from parts import part

PARAMETERIZATIONS = options("model/parameterization")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=options("model/schedule"))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return part("schedule", request.param)


@pytest.fixture(params=PARAMETERIZATIONS)
def parameterization(request: pytest.FixtureRequest) -> Parameterization:
    return part("parameterization", request.param)


def noised(schedule: NoiseSchedule, n: int = 40) -> tuple[Tensor, ...]:
    """Times over the whole range, with x0, eps and x_t in float64."""
    t = torch.linspace(schedule.t_min, schedule.t_max, n)
    source = generator("cpu", 1)
    x0 = torch.rand(n, 2, 3, 3, generator=source) * 2 - 1
    eps = torch.randn(n, 2, 3, 3, generator=source)
    alpha = schedule.log_alpha(t).exp()[:, None, None, None]
    sigma = (schedule.log_alpha(t) - schedule.log_snr(t) / 2).exp()[:, None, None, None]
    return t, x0, eps, alpha * x0 + sigma * eps


# Parameterisations


def test_there_are_parameterizations() -> None:
    assert {"eps", "x0", "v"} <= set(PARAMETERIZATIONS)


def test_round_trip(schedule: NoiseSchedule, parameterization: Parameterization) -> None:
    t, x0, eps, x_t = noised(schedule)
    at = schedule.at(t, x_t)
    found = parameterization.invert(parameterization.target(x0, eps, at), x_t, at)
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-10)


def test_image_and_noise_always_make_x_t(schedule: NoiseSchedule, parameterization: Parameterization) -> None:
    t, _, eps, x_t = noised(schedule)
    at = schedule.at(t, x_t)
    found = parameterization.invert(eps.flip(0), x_t, at)
    torch.testing.assert_close(at.alpha * found.x0 + at.sigma * found.eps, x_t, rtol=0, atol=1e-11)


def test_eps_gain_is_the_slope_of_eps(schedule: NoiseSchedule, parameterization: Parameterization) -> None:
    t, _, eps, x_t = noised(schedule)
    at = schedule.at(t, x_t)
    rise = parameterization.invert(eps + 1, x_t, at).eps - parameterization.invert(eps, x_t, at).eps
    torch.testing.assert_close(rise.abs(), parameterization.eps_gain(at).expand_as(rise), rtol=1e-9, atol=1e-12)


def test_targets_by_name() -> None:
    """eps is the noise, x0 the image, v = alpha eps - sigma x_0 (Salimans and Ho 2022, appendix D)."""
    k = torch.arange(0, 1000, 25)
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[k].sqrt()[:, None, None, None]
    _, x0, eps, x_t = noised(LinearBetas())
    at = LinearBetas().at((k + 1) / 1000, x_t)
    assert torch.equal(part("parameterization", "eps").target(x0, eps, at), eps)
    assert torch.equal(part("parameterization", "x0").target(x0, eps, at), x0)
    v = part("parameterization", "v").target(x0, eps, at)
    torch.testing.assert_close(v, alpha * eps - (1 - alpha**2).sqrt() * x0, rtol=0, atol=1e-12)


# What the network is told of the noise


def test_timestep_is_the_index_from_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        for steps in (10, 1000, 4000):
            t = torch.arange(1, steps + 1, dtype=dtype) / steps
            told = Timestep(steps)(t, LinearBetas().at(t))
            assert torch.equal(told, torch.arange(steps, dtype=dtype))


def test_log_snr_condition_means_the_same_under_every_schedule(schedule: NoiseSchedule) -> None:
    t = torch.linspace(schedule.t_min, schedule.t_max, 300)
    told = LogSNR(20.0)(t, schedule.at(t, torch.zeros(300, 1, 2, 2)))
    assert told.shape == (300,)
    assert (told.diff() <= 0).all() and told.min() >= 0 and told.max() <= 1000
    log_snr = schedule.log_snr(t).clamp(-20, 20)
    torch.testing.assert_close(told, 500 + 25 * log_snr, rtol=1e-12, atol=1e-9)


class Recorder(nn.Module):
    """Keeps what it was called with, and says nothing but zeros."""

    def forward(self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.seen = x, noise, cond
        return torch.zeros_like(x)


def test_network_sees_x_its_noise_and_the_conditions() -> None:
    network, x = Recorder(), torch.randn(5, 1, 4, 4)
    denoiser = Denoiser(network, LinearBetas(), Eps(noise=Timestep()))
    cond = {"label": torch.arange(5)}
    for t, told in ((0.4, [399.0] * 5), ([0.001, 0.2, 0.4, 0.6, 1], [0.0, 199, 399, 599, 999])):
        denoiser(x, torch.tensor(t), cond)
        seen_x, noise, seen_cond = network.seen
        assert torch.equal(seen_x, x) and seen_cond is cond
        assert torch.equal(noise, torch.tensor(told))


class Half(nn.Module):
    """Speaks bfloat16, as a network under autocast does."""

    def forward(self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return x.bfloat16() * 0.3


def test_arithmetic_stays_in_the_type_of_x(parameterization: Parameterization) -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.randn(3, 1, 2, 2)
    for found in Denoiser(Half(), LinearBetas(), parameterization)(x, torch.tensor(0.5), {})[:2]:
        assert found.dtype == torch.float32


def test_clipping_holds_the_image_in_range_and_the_noise_follows(schedule: NoiseSchedule) -> None:
    t, _, _, x_t = noised(schedule)
    free = Denoiser(Recorder(), schedule, Eps())
    clipped = ClipX0(free)(x_t, t, {})
    at = schedule.at(t, x_t)
    assert free(x_t, t, {}).x0.abs().max() > 1, "there is something to clip"
    assert clipped.x0.abs().max() <= 1
    torch.testing.assert_close(at.alpha * clipped.x0 + at.sigma * clipped.eps, x_t, rtol=0, atol=1e-11)
    inside = free(x_t, t, {}).x0.abs() <= 1
    assert torch.equal(clipped.eps[inside], free(x_t, t, {}).eps[inside]), "what is in range is left alone"


# Objectives


@dataclass(frozen=True)
class Fixed(TimeDistribution):
    """Times from one end of the schedule to the other, no two runs different."""

    n: int = 40

    def __call__(self, schedule: NoiseSchedule, draws: Draws) -> Tensor:
        return torch.linspace(schedule.t_min, schedule.t_max, self.n)


class Guess(nn.Module):
    """A wrong guess of the image, x0 = 0.4 x_t, put into the words of a parameterisation."""

    def __init__(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        super().__init__()
        self.schedule, self.parameterization = schedule, parameterization

    def forward(self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        at = self.schedule.at(torch.linspace(self.schedule.t_min, self.schedule.t_max, len(x)), x)
        return self.parameterization.target(0.4 * x, (x - at.alpha * 0.4 * x) / at.sigma, at)


# Weights on the error of x_0, as the papers give them.
BY_PAPER: list[tuple[Weighting, Callable[[Tensor], Tensor]]] = [
    (Simple(), lambda snr: snr),
    (UniformV(), lambda snr: snr + 1),
    (MinSNR(gamma=5), lambda snr: snr.clamp(max=5)),
    (MinSNR(gamma=1), lambda snr: snr.clamp(max=1)),
]


@pytest.mark.parametrize(("weighting", "paper"), BY_PAPER)
def test_loss_is_the_papers_under_every_parameterization(
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    weighting: Weighting,
    paper: Callable[[Tensor], Tensor],
) -> None:
    denoiser = Denoiser(Guess(schedule, parameterization), schedule, parameterization)
    t, x0, _, _ = noised(schedule)
    loss = WeightedMSE(weighting, Fixed())(denoiser, x0, {}, Draws.whole(generator("cpu", 9), 40))["loss"]

    eps = torch.randn(x0.shape, generator=generator("cpu", 9), dtype=torch.float32).double()
    snr = schedule.log_snr(t).exp()
    alpha, sigma = schedule.log_alpha(t).exp(), (schedule.log_alpha(t) - schedule.log_snr(t) / 2).exp()
    x_t = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    error = (0.4 * x_t - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, paper(snr) * error, rtol=1e-8, atol=0)


def test_uniform_v_is_the_plain_error_of_v() -> None:
    schedule, t = LinearBetas(), torch.linspace(0.001, 1, 40)
    loss = WeightedMSE(UniformV(), Fixed())(
        Denoiser(Recorder(), schedule, V()), torch.zeros(40, 1, 2, 2), {}, Draws.whole(generator("cpu", 2), 40)
    )["loss"]
    eps = torch.randn(40, 1, 2, 2, generator=generator("cpu", 2), dtype=torch.float32).double()
    # The network says 0 and the image is 0, so the error is v = alpha eps.
    expected = schedule.at(t).alpha ** 2 * eps.square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_simple_loss_of_a_silent_network_is_one() -> None:
    """||eps - 0||^2 per value has mean 1."""
    x0 = torch.zeros(4000, 1, 4, 4)
    denoiser = Denoiser(Recorder(), LinearBetas(), Eps())
    loss = WeightedMSE()(denoiser, x0, {}, Draws.whole(generator("cpu", 2), 4000))["loss"]
    assert abs(float(loss.mean()) - 1) < 4 * math.sqrt(2 / (4000 * 16))


def test_each_process_computes_its_own_rows() -> None:
    x0 = torch.rand(8, 1, 2, 2)
    denoiser = Denoiser(Recorder(), LinearBetas(), Eps())
    whole = WeightedMSE()(denoiser, x0, {}, Draws(generator("cpu", 2), 0, 8, 8))["loss"]
    halves = [
        WeightedMSE()(denoiser, x0[k : k + 4], {}, Draws(generator("cpu", 2), k, k + 4, 8))["loss"] for k in (0, 4)
    ]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=0)


def test_every_objective_of_the_conf_tree_builds() -> None:
    for name in options("model/objective"):
        x0 = torch.zeros(4, 1, 2, 2)
        denoiser = Denoiser(Recorder(), LinearBetas(), Eps())
        loss = part("objective", name)(denoiser, x0, {}, Draws.whole(generator("cpu", 0), 4))["loss"]
        assert loss.shape == (4,) and torch.isfinite(loss).all()


@pytest.mark.parametrize("make", [lambda: MinSNR(gamma=0), lambda: LogSNR(limit=-1)])
def test_bad_settings_are_refused(make) -> None:
    with pytest.raises(UserError):
        make()
