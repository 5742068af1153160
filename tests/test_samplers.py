"""Samplers, held against exact truth: on Gaussian data the denoiser is known, and every step of a sampler is affine.

So the mean and the covariance of what a sampler gives are computed without Monte Carlo error: one run carries a row
with no noise at all, a row that starts one unit higher, and one row for each random number, in which that number alone
is 1. What comes out is the affine map from the noise to the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from composing import options
from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.parameterization import Prediction
from gencompare.diffusion.samplers import DDIM, Ancestral, Heun, Sampler, ancestral
from gencompare.diffusion.schedules import CLEAN, BetaTable, LinearBetas, NoiseSchedule
from gencompare.diffusion.times import LogSNRGrid
from gencompare.errors import UserError
from gencompare.seeds import generator
from parts import part

SAMPLERS = options("model/sampler")
MEAN = torch.tensor([0.6, -0.3, 0.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.25, 1.7, 0.04], dtype=torch.float64)
"""Data: three independent Gaussian pixels, none of unit variance."""


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=options("model/schedule"))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return part("schedule", request.param).requires_grad_(False)


@dataclass(frozen=True)
class Truth:
    """The perfect denoiser of the Gaussian data: E[x_0 | x_t] = m + alpha V (x_t - alpha m) / (alpha^2 V + sigma^2)."""

    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        total = alpha**2 * VARIANCE + sigma**2
        x0 = MEAN + alpha * VARIANCE * (x_t - alpha * MEAN) / total
        return Prediction(x0=x0, eps=sigma * (x_t - alpha * MEAN) / total)


def scales(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    if t == CLEAN:
        return torch.tensor(1.0), torch.tensor(0.0)
    log_alpha = schedule.log_alpha(t)
    return log_alpha.exp(), (log_alpha - schedule.log_snr(t) / 2).exp()


class UnitNoise(TorchFunctionMode):
    """In place of random numbers: the k-th draw is 1 in row k + 2 and 0 elsewhere."""

    draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        x = torch.zeros(*args)
        x[self.draws + 2] = 1
        self.draws += 1
        return x


def moments(sampler: Sampler, denoiser: Denoises, times: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and variance, (3,) each, of what comes out when the exact marginal at ``times[0]`` goes in."""
    x = torch.zeros(3 * len(times) + 2, 1, 1, 3)
    x[1] = 1
    with UnitNoise():
        out = sampler.sample(denoiser, x, generator=generator("cpu", 0), times=times)[:, 0, 0]
    gains = out[1:] - out[0]
    alpha, sigma = scales(denoiser.schedule, times[0])
    mean = out[0] + gains[0] * alpha * MEAN
    return mean, gains[0] ** 2 * (alpha**2 * VARIANCE + sigma**2) + gains[1:].square().sum(0)


def true_moments(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = scales(schedule, t)
    return alpha * MEAN, alpha**2 * VARIANCE + sigma**2


def full_grid(sampler: Sampler, schedule: NoiseSchedule) -> Sampler:
    """The sampler, on a grid that goes between the steps of a table that has fewer than it takes."""
    table = schedule.discrete_times
    return sampler if table is None or len(table) >= sampler.steps else replace(sampler, grid=LogSNRGrid())


def error(sampler: Sampler, denoiser: Denoises, times: Tensor) -> float:
    """How far mean and standard deviation are off, over all pixels."""
    mean, variance = moments(sampler, denoiser, times)
    true_mean, true_variance = true_moments(denoiser.schedule, times[-1])
    off = (mean - true_mean).square().sum() + (variance.sqrt() - true_variance.sqrt()).square().sum()
    return float(off.sqrt())


def inner_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """``steps`` equal steps in time that keep off both ends."""
    margin = 0.1 * (schedule.t_max - schedule.t_min)
    return torch.linspace(schedule.t_max - margin, schedule.t_min + margin, steps + 1)


def measured_order(sampler: Sampler, denoiser: Denoises, steps: int = 80) -> float:
    """log2 of what the error is divided by when the steps are halved."""
    coarse, fine = (error(sampler, denoiser, inner_times(denoiser.schedule, n)) for n in (steps, 2 * steps))
    return math.log2(coarse / fine)


# Laws of every sampler, with every schedule


def test_there_are_samplers() -> None:
    assert {"ancestral", "ddim", "heun"} <= set(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_measured_order_is_the_declared_one(name: str, schedule: NoiseSchedule) -> None:
    sampler = part("sampler", name)
    if sampler.order is not None:
        assert measured_order(sampler, Truth(schedule)) == pytest.approx(sampler.order, abs=0.2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_moments_are_right_in_many_steps(name: str, schedule: NoiseSchedule) -> None:
    sampler = full_grid(part("sampler", name, steps=500), schedule)
    if sampler.order is not None:
        mean, variance = moments(sampler, Truth(schedule), sampler.times(schedule).double())
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.02)
        torch.testing.assert_close(variance.sqrt(), VARIANCE.sqrt(), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_moments_are_near_in_as_many_steps_as_are_usual(name: str, schedule: NoiseSchedule) -> None:
    """From pure noise, with 50 network calls: no step may be so long that the solver leaves the path."""
    sampler = part("sampler", name)
    if sampler.order is not None:
        sampler = full_grid(part("sampler", name, steps=max(sampler.steps, 50 // sampler.order)), schedule)
        mean, variance = moments(sampler, Truth(schedule), sampler.times(schedule).double())
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.1)
        torch.testing.assert_close(variance.sqrt(), VARIANCE.sqrt(), rtol=0.12, atol=0.06)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_come_one_by_one(name: str, schedule: NoiseSchedule) -> None:
    sampler = part("sampler", name, steps=5)
    x, source = torch.randn(2, 1, 1, 3, generator=generator("cpu", 1)), generator("cpu", 2)
    steps = list(sampler.iterate(Truth(schedule), x, generator=source))
    assert torch.equal(torch.stack([step.t for step in steps]), sampler.times(schedule)[1:])
    again = sampler.sample(Truth(schedule), x, generator=generator("cpu", 2))
    assert torch.equal(steps[-1].x, again)
    for step in steps:
        assert step.x.shape == x.shape and step.x.dtype == x.dtype


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_a_function_of_the_generator(name: str) -> None:
    sampler, denoiser = part("sampler", name, steps=4), Truth(LinearBetas())
    x = torch.randn(2, 1, 1, 3, generator=generator("cpu", 1))
    before = torch.get_rng_state()
    one = sampler.sample(denoiser, x, generator=generator("cpu", 2))
    torch.manual_seed(123)
    two = sampler.sample(denoiser, x, generator=generator("cpu", 2))
    torch.set_rng_state(before)
    assert torch.equal(one, two)
    with UnitNoise() as mode:
        sampler.sample(denoiser, torch.zeros(40, 1, 1, 3), generator=generator("cpu", 2))
    other = sampler.sample(denoiser, x, generator=generator("cpu", 3))
    assert torch.equal(one, other) == (mode.draws == 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_place_of_a_nan_is_named(name: str) -> None:
    @dataclass(frozen=True)
    class Breaks(Truth):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            prediction = super().__call__(x_t, t, cond)
            return prediction if t > 0.55 else Prediction(prediction.x0 / 0, prediction.eps * torch.nan)

    times = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, CLEAN])
    first = "3" if part("sampler", name).order == 2 else "4"
    with pytest.raises(UserError, match=f"step {first} of 5 gave NaN"):
        part("sampler", name).sample(
            Breaks(LinearBetas()), torch.ones(2, 1, 1, 3), generator=generator("cpu", 0), times=times
        )


# The laws bite


class LateTime(Truth):
    """Bug: the denoiser is told a time a little too late."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return super().__call__(x_t, (t + 0.005).clamp(max=1), cond)


class WrongSign(Truth):
    """Bug: the noise with the wrong sign."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        prediction = super().__call__(x_t, t, cond)
        return prediction._replace(eps=-prediction.eps)


BUGS: list[tuple[str, Sampler, Callable[[NoiseSchedule], Denoises], float]] = [
    ("none", Ancestral(steps=1), Truth, 1.0),
    ("late time", Ancestral(steps=1), LateTime, 1.0),
    ("half the noise", Ancestral(steps=1), Truth, 0.5**0.5),
    ("twice the noise", Ancestral(steps=1), Truth, 2.0**0.5),
    ("none", DDIM(steps=1), Truth, 1.0),
    ("late time", DDIM(steps=1), LateTime, 1.0),
    ("wrong sign", DDIM(steps=1), WrongSign, 1.0),
]


@pytest.mark.parametrize(("bug", "sampler", "denoiser", "noise"), BUGS, ids=str)
def test_a_planted_bug_breaks_the_order(
    bug: str,
    sampler: Sampler,
    denoiser: Callable[[NoiseSchedule], Denoises],
    noise: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = ancestral.normal_like
    monkeypatch.setattr(ancestral, "normal_like", lambda x, source: noise * drawn(x, source))
    order = measured_order(sampler, denoiser(LinearBetas()))
    assert (abs(order - 1) <= 0.2) == (bug == "none")


# Single steps, number by number: alpha bar and beta as in the papers, index 0 is their t = 1

BETA = np.linspace(1e-4, 0.02, 1000)
BAR = np.cumprod(1 - BETA)


@dataclass(frozen=True)
class Says:
    """A denoiser that says the same of everything: x_0 = 0.3, and the noise that goes with it."""

    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        return Prediction(torch.full_like(x_t, 0.3), (x_t - alpha * 0.3) / sigma)


def one_step(sampler: Sampler, times: list[float], x: float = 0.7) -> tuple[float, float]:
    """Mean and standard deviation of one step from ``x``."""
    start = torch.full((3, 1, 1, 1), x)
    with UnitNoise():
        out = sampler.sample(
            Says(LinearBetas()), start, generator=generator("cpu", 0), times=torch.tensor(times, dtype=torch.float64)
        ).flatten()
    return float(out[0]), float(out[2] - out[0])


@pytest.mark.parametrize("i", [2, 10, 500, 1000])
@pytest.mark.parametrize("variance", [0.0, 0.3, 1.0])
def test_ancestral_step_is_ddpms(i: int, variance: float) -> None:
    """Ho et al. (2020), eq. 7, section 3.2; Nichol and Dhariwal (2021), eq. 15."""
    beta, bar, before = BETA[i - 1], BAR[i - 1], BAR[i - 2]
    mean = before**0.5 * beta / (1 - bar) * 0.3 + (1 - beta) ** 0.5 * (1 - before) / (1 - bar) * 0.7
    small = (1 - before) / (1 - bar) * beta
    found = one_step(Ancestral(steps=1, variance=variance), [i / 1000, (i - 1) / 1000])
    assert found[0] == pytest.approx(mean, rel=1e-9)
    assert found[1] ** 2 == pytest.approx(beta**variance * small ** (1 - variance), rel=1e-7)


@pytest.mark.parametrize(("i", "j"), [(1000, 950), (500, 1), (20, 19)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_song_et_als(i: int, j: int, eta: float) -> None:
    """Song et al. (2021), "Denoising Diffusion Implicit Models", eq. 12 and 16."""
    bar, before = BAR[i - 1], BAR[j - 1]
    eps = (0.7 - bar**0.5 * 0.3) / (1 - bar) ** 0.5
    std = eta * ((1 - before) / (1 - bar)) ** 0.5 * (1 - bar / before) ** 0.5
    mean = before**0.5 * 0.3 + (1 - before - std**2) ** 0.5 * eps
    found = one_step(DDIM(steps=1, eta=eta), [i / 1000, j / 1000])
    assert found == (pytest.approx(mean, rel=1e-9), pytest.approx(std, rel=1e-7))


@pytest.mark.parametrize("sampler", [Ancestral(steps=1), Ancestral(steps=1, variance=1.0), DDIM(steps=1, eta=1.0)])
def test_last_step_gives_the_image_without_noise(sampler: Sampler) -> None:
    assert one_step(sampler, [0.001, CLEAN]) == (pytest.approx(0.3, abs=1e-12), 0)


def test_ddim_with_eta_one_is_ancestral_with_small_variance(schedule: NoiseSchedule) -> None:
    x = torch.randn(4, 1, 1, 3, generator=generator("cpu", 1))
    one, two = (
        full_grid(sampler, schedule).sample(Truth(schedule), x, generator=generator("cpu", 2))
        for sampler in (DDIM(steps=30, eta=1.0), Ancestral(steps=30, variance=0.0))
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def test_deterministic_samplers_find_the_exact_path(schedule: NoiseSchedule) -> None:
    """On Gaussian data the ODE keeps every point at its number of standard deviations from the mean."""
    times = inner_times(schedule, 400)
    x = torch.randn(4, 1, 1, 3, generator=generator("cpu", 1))
    (mean, variance), (end_mean, end_variance) = true_moments(schedule, times[0]), true_moments(schedule, times[-1])
    exact = end_mean + (x - mean) * (end_variance / variance).sqrt()
    for sampler, tolerance in ((DDIM(steps=1), 2e-2), (Heun(steps=1), 2e-4)):
        found = sampler.sample(Truth(schedule), x, generator=generator("cpu", 0), times=times)
        assert (found - exact).abs().max() < tolerance


# Bad input


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIM(steps=0),
        lambda: DDIM(steps=-3),
        lambda: DDIM(steps=5, eta=1.5),
        lambda: Ancestral(steps=5, variance=-0.1),
        lambda: DDIM(steps=11).times(BetaTable(torch.full((10,), 0.1))),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError):
        make()


@pytest.mark.parametrize("times", [[0.1, 0.5], [0.5, 0.5], [0.5], [1.2, 0.5], [0.5, 0.0], [0.5, CLEAN, CLEAN]])
def test_times_that_do_not_lead_from_noise_to_data_are_refused(times: list[float]) -> None:
    schedule = LinearBetas()
    with pytest.raises(UserError):
        DDIM(steps=1).iterate(
            Truth(schedule), torch.zeros(1, 1, 1, 3), generator=generator("cpu", 0), times=torch.tensor(times)
        )


def test_descriptions_name_the_settings() -> None:
    assert DDIM(steps=50).describe() == "DDIM, 50 steps, eta 0"
    assert Ancestral(steps=1000, variance=1.0).describe() == "Ancestral, 1000 steps, variance 1"
