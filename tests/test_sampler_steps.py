"""Samplers step by step: the papers' formulas, exactly solvable cases, and invalid input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from gaussian_truth import (
    COVARIANCE,
    MEAN,
    ExactDenoiser,
    even_levels,
    inner_times,
    moments,
    root,
    scales,
    times_of,
    true_moments,
    unit_noise,
)
from gencompare.diffusion.denoiser import Cond
from gencompare.diffusion.discrete_schedules import BetaTable, LinearBetas
from gencompare.diffusion.multistep_samplers import ERSDE, AdamsBashforth, DPMSolverPP2M, SASolver, UniPC
from gencompare.diffusion.ode_samplers import RK45, DPMSolverPP2S, Euler, Heun, Restart
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import DDIM, Ancestral, Sampler
from gencompare.diffusion.schedules import CLEAN, VE, VP, NoiseSchedule, RectifiedFlow
from gencompare.diffusion.sde_samplers import AnnealedLangevin, EulerMaruyama, PredictorCorrector, ReverseDiffusion
from gencompare.errors import UserError
from gencompare.rng import generator, normal_like

pytestmark = pytest.mark.usefixtures("double")


def score(x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """Return the score of the noisy Gaussian data, -(alpha^2 C + sigma^2)^-1 (x - alpha m)."""
    return -(x - alpha * MEAN) @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(3))


# Single steps, with alpha bar and beta as in the papers; index 0 is their t = 1

BETA = np.linspace(1e-4, 0.02, 1000)
BAR = np.cumprod(1 - BETA)


def image(t: float) -> float:
    """Return an image that depends on t, so a step that uses the prediction at its end gives a different result."""
    return 0.5 - 0.4 * t


@dataclass(frozen=True)
class ConstantDenoiser:
    """A denoiser that predicts x_0 = `image` (t) for every x_t, with matching noise."""

    schedule: NoiseSchedule
    variance_fraction: float | None = None

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        variance_fraction = None if self.variance_fraction is None else torch.full_like(x_t, self.variance_fraction)
        x0 = image(float(t))
        return Prediction(torch.full_like(x_t, x0), (x_t - alpha * x0) / sigma, variance_fraction)


def one_step(
    sampler: Sampler,
    times: list[float],
    x: float = 0.7,
    schedule: NoiseSchedule | None = None,
    variance_fraction: float | None = None,
) -> tuple[float, float]:
    """Return the mean and standard deviation of one step from ``x`` with at most one random draw."""
    start = torch.full((3, 1, 1, 1), x)
    with unit_noise() as noise:
        out = sampler.sample(
            ConstantDenoiser(schedule or LinearBetas(), variance_fraction),
            start,
            generator=generator("cpu", 0),
            times=torch.tensor(times),
        ).flatten()
    assert noise.draws <= 1
    return float(out[0]), float(out[2] - out[0])


@pytest.mark.parametrize("i", [2, 10, 500, 1000])
@pytest.mark.parametrize("variance", [0.0, 0.3, 1.0])
def test_ancestral_step_is_that_of_ddpm(i: int, variance: float) -> None:
    """The step is that of Ho et al. (2020), eq. 7 and section 3.2, and of Nichol and Dhariwal (2021), eq. 15."""
    beta, bar, before = BETA[i - 1], BAR[i - 1], BAR[i - 2]
    mean = before**0.5 * beta / (1 - bar) * image(i / 1000) + (1 - beta) ** 0.5 * (1 - before) / (1 - bar) * 0.7
    small = (1 - before) / (1 - bar) * beta
    found = one_step(Ancestral(num_steps=1, variance=variance), [i / 1000, (i - 1) / 1000])
    assert found[0] == pytest.approx(mean, rel=1e-9)
    assert found[1] ** 2 == pytest.approx(beta**variance * small ** (1 - variance), rel=1e-7)
    # A learned variance overrides the setting.
    assert one_step(
        Ancestral(num_steps=1, variance=0.9), [i / 1000, (i - 1) / 1000], variance_fraction=variance
    ) == pytest.approx(found, rel=1e-9)


def test_variance_can_be_learned_elementwise() -> None:
    class Uneven(ConstantDenoiser):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            variance_fraction = torch.tensor([0.0, 1.0]).expand_as(x_t)
            return super().__call__(x_t, t, cond)._replace(variance_fraction=variance_fraction)

    with unit_noise():
        out = Ancestral(num_steps=1).sample(
            Uneven(LinearBetas()),
            torch.full((5, 1, 1, 2), 0.7),
            generator=generator("cpu", 0),
            times=torch.tensor([0.5, 0.499]),
        )[:, 0, 0]
    small, large = (
        one_step(Ancestral(num_steps=1), [0.5, 0.499]),
        one_step(Ancestral(num_steps=1, variance=1), [0.5, 0.499]),
    )
    assert (out[3:] - out[0]).diagonal().tolist() == pytest.approx([small[1], large[1]], rel=1e-9)


@pytest.mark.parametrize(("i", "j"), [(1000, 950), (500, 1), (20, 19)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_that_of_the_paper(i: int, j: int, eta: float) -> None:
    """The step is that of Song et al. (2021), "Denoising Diffusion Implicit Models", eq. 12 and 16."""
    bar, before = BAR[i - 1], BAR[j - 1]
    eps = (0.7 - bar**0.5 * image(i / 1000)) / (1 - bar) ** 0.5
    std = eta * ((1 - before) / (1 - bar)) ** 0.5 * (1 - bar / before) ** 0.5
    mean = before**0.5 * image(i / 1000) + (1 - before - std**2) ** 0.5 * eps
    found = one_step(DDIM(num_steps=1, eta=eta), [i / 1000, j / 1000])
    assert found == (pytest.approx(mean, rel=1e-9), pytest.approx(std, rel=1e-7))


def vp_numbers(t: float) -> tuple[float, float, float]:
    """Return alpha, sigma and beta of the VP SDE (Song et al. 2021, appendix C)."""
    alpha = math.exp(-0.25 * t**2 * 19.9 - 0.05 * t)
    return alpha, (1 - alpha**2) ** 0.5, 0.1 + t * 19.9


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.88), (0.5, 0.45), (0.2, 0.19)])
def test_euler_and_euler_maruyama_steps_are_those_of_the_vp_sde(t: float, s: float) -> None:
    """f = -beta x / 2, g^2 = beta (Song et al. 2021, "Score-Based Generative Modeling", eq. 11, 6 and 13)."""
    alpha, sigma, beta = vp_numbers(t)
    score, h = -(0.7 - image(t) * alpha) / sigma**2, t - s
    euler = one_step(Euler(num_steps=1), [t, s], schedule=VP())
    assert euler == (pytest.approx(0.7 + h * (beta / 2 * 0.7 + beta / 2 * score), rel=1e-9), 0)
    maruyama = one_step(EulerMaruyama(num_steps=1), [t, s], schedule=VP())
    assert maruyama[0] == pytest.approx(0.7 + h * (beta / 2 * 0.7 + beta * score), rel=1e-9)
    assert maruyama[1] == pytest.approx((beta * h) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("i", [10, 500, 1000])
def test_reverse_diffusion_step_is_that_of_the_ddpm_table(i: int) -> None:
    """The step of Song et al. (2021), appendix E and F, is (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z."""
    beta, bar = BETA[i - 1], BAR[i - 1]
    score = -(0.7 - image(i / 1000) * bar**0.5) / (1 - bar)
    found = one_step(ReverseDiffusion(num_steps=1), [i / 1000, (i - 1) / 1000])
    assert found[0] == pytest.approx((2 - (1 - beta) ** 0.5) * 0.7 + beta * score, rel=1e-9)
    assert found[1] == pytest.approx(beta**0.5, rel=1e-7)


def test_first_step_of_a_table_has_a_derivative() -> None:
    """At t = 1, the end of the table, g^2 per unit of time is also about 1000 beta."""
    rise = 1 - BAR[-1] / BAR[-2]
    found = one_step(EulerMaruyama(num_steps=1), [1.0, 0.9999])
    assert found[1] ** 2 == pytest.approx(0.1 * rise, rel=0.02)


def test_reverse_diffusion_step_is_that_of_ve() -> None:
    """The step of Song et al. (2021), algorithm 2, is x + d score + sqrt(d) z with d = sigma_t^2 - sigma_s^2."""
    high, low = 0.02 * 5000**0.5, 0.02 * 5000**0.45
    found = one_step(ReverseDiffusion(num_steps=1), [0.5, 0.45], schedule=VE())
    assert found[0] == pytest.approx(0.7 - (high**2 - low**2) * (0.7 - image(0.5)) / high**2, rel=1e-9)
    assert found[1] == pytest.approx((high**2 - low**2) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(("times", "a"), [([0.5, 0.499], 1 - BETA[499]), ([0.05, 0.049], 1 - BETA[49])])
def test_predictor_corrector_is_algorithm_5(times: list[float], a: float) -> None:
    """Two Langevin steps, whose size depends on the noise and score of each image, are followed by the predictor."""
    x = torch.randn(3, 1, 2, 8, generator=generator("cpu", 1))
    sampler = PredictorCorrector(num_steps=1, num_corrector_steps=2, snr=0.1)
    found = sampler.sample(ConstantDenoiser(LinearBetas()), x, generator=generator("cpu", 2), times=torch.tensor(times))
    source, bar = generator("cpu", 2), BAR[round(times[0] * 1000) - 1]

    def score(x: Tensor) -> Tensor:
        return -(x - image(times[0]) * bar**0.5) / (1 - bar)

    for _ in range(2):
        z, g = normal_like(x, source), score(x)
        size = 2 * a * (0.1 * z.flatten(1).norm(dim=1) / g.flatten(1).norm(dim=1)) ** 2
        size = size[:, None, None, None]
        x = x + size * g + (2 * size) ** 0.5 * z
    z = normal_like(x, source)
    x = (2 - a**0.5) * x + (1 - a) * score(x) + (1 - a) ** 0.5 * z
    torch.testing.assert_close(found, x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("denoise", [True, False])
def test_annealed_langevin_is_algorithm_1(denoise: bool) -> None:
    """The steps are those of Song and Ermon (2019), with their eps and sigma_L, on three levels; the last score
    denoises the image."""
    sigmas, eps = [0.02 * 5000**t for t in (0.5, 0.25, 0.0)], 1e-4
    step_size = eps / sigmas[-1] ** 2
    x = torch.randn(2, 1, 1, 3, generator=generator("cpu", 1))
    sampler = AnnealedLangevin(num_steps=3, num_langevin_steps=4, step_size=step_size, denoise=denoise)
    times = torch.tensor([0.5, 0.25, 0.0, CLEAN])
    found = sampler.sample(ExactDenoiser(VE()), x, generator=generator("cpu", 2), times=times)
    source = generator("cpu", 2)
    for sigma in sigmas:
        for _ in range(4):
            size = eps * sigma**2 / sigmas[-1] ** 2
            x = x + size / 2 * score(x, 1.0, sigma) + size**0.5 * normal_like(x, source)
    if denoise:
        x = x + sigmas[-1] ** 2 * score(x, 1.0, sigmas[-1])
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class Point:
    """The exact denoiser of data that are always 0, so that x is pure noise."""

    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return Prediction(x0=torch.zeros_like(x_t), eps=x_t / scales(self.schedule, t)[1])


@pytest.mark.parametrize(
    ("levels", "num_langevin_steps", "step_size", "lag"),
    [(126, 5, 0.124, 1.062), (68, 5, 0.124, 1.111), (68, 5, 0.3, 1.059), (68, 10, 0.2, 1.037)],
)
def test_annealed_langevin_lags_behind_its_levels(
    levels: int, num_langevin_steps: int, step_size: float, lag: float
) -> None:
    """The noise after the last level exceeds that level by the factor ``lag``, on levels from 2 to 0.02 (see
    docs/diffusion.md).

    With k = step_size / 2, T steps per level and levels a factor g apart, the variance over sigma^2 converges to r = (1
    - k)^(2 T) (g^2 r - b) + b, where b = 1 / (1 - k / 2) is the stationary variance of steps of this size.
    """
    k, kept = step_size / 2, (1 - step_size / 2) ** (2 * num_langevin_steps)
    g = 100 ** (1 / (levels - 1))
    assert ((1 - kept) / (1 - k / 2) / (1 - kept * g**2)) ** 0.5 == pytest.approx(lag, abs=1e-3)

    sampler = AnnealedLangevin(
        num_steps=levels, num_langevin_steps=num_langevin_steps, step_size=step_size, denoise=False
    )
    schedule = VE(sigma_min=0.02, sigma_max=2.0)
    times = torch.cat([torch.linspace(schedule.t_max, schedule.t_min, levels), torch.tensor([CLEAN])])
    x = 2 * torch.randn(1, 1, 1, 20_000, generator=generator("cpu", 1))
    found = sampler.sample(Point(schedule), x, generator=generator("cpu", 2), times=times)
    assert float(found.std()) / 0.02 == pytest.approx(lag, abs=4 * lag / 40_000**0.5)


def test_heun_with_churn_is_algorithm_2() -> None:
    """As in Karras et al. (2022), noise of standard deviation s_noise is added only between s_min and s_max."""
    sigmas = [0.02 * 5000**t for t in (0.6, 0.5, 0.4, 0.3)]
    x = torch.randn(2, 1, 1, 3, generator=generator("cpu", 1)) * sigmas[0]
    sampler = Heun(num_steps=3, s_churn=0.6, s_min=0.3, s_max=2.0, s_noise=1.1)
    times = torch.tensor([0.6, 0.5, 0.4, 0.3])
    found = sampler.sample(ExactDenoiser(VE()), x, generator=generator("cpu", 2), times=times)
    source = generator("cpu", 2)

    def slope(x: Tensor, sigma: float) -> Tensor:
        return -sigma * score(x, 1.0, sigma)

    churned = 0
    for sigma, next_sigma in pairwise(sigmas):
        gamma = min(0.6 / 3, 2**0.5 - 1) if 0.3 <= sigma <= 2.0 else 0.0
        hat = sigma * (1 + gamma)
        if gamma:
            x = x + (hat**2 - sigma**2) ** 0.5 * 1.1 * normal_like(x, source)
            churned += 1
        d = slope(x, hat)
        euler = x + (next_sigma - hat) * d
        x = x + (next_sigma - hat) * (d + slope(euler, next_sigma)) / 2
    assert churned == 2
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_restart_is_algorithm_2() -> None:
    """As in Xu et al. (2023): Heun's method to s_min, then K times noise to s_max and Heun steps back, whose sigmas are
    evenly spaced in sigma^(1/7)."""
    sigmas = [0.02 * 5000**t for t in (0.6, 0.5, 0.4, 0.3)]
    x = torch.randn(2, 1, 1, 3, generator=generator("cpu", 1)) * sigmas[0]
    sampler = Restart(num_steps=3, num_restarts=2, restart_steps=3, s_min=0.55, s_max=2.0)
    times = torch.tensor([0.6, 0.5, 0.4, 0.3])
    found = sampler.sample(ExactDenoiser(VE()), x, generator=generator("cpu", 2), times=times)
    source = generator("cpu", 2)

    def heun(x: Tensor, levels: list[float]) -> Tensor:
        for sigma, lower in pairwise(levels):
            d = -sigma * score(x, 1.0, sigma)
            x = x + (lower - sigma) * (d - lower * score(x + (lower - sigma) * d, 1.0, lower)) / 2
        return x

    x = heun(x, sigmas[:3])
    for _ in range(2):
        x = x + (2.0**2 - sigmas[2] ** 2) ** 0.5 * normal_like(x, source)
        x = heun(x, (np.linspace(2.0 ** (1 / 7), sigmas[2] ** (1 / 7), 4) ** 7).tolist())
    torch.testing.assert_close(found, heun(x, sigmas[2:]), rtol=1e-9, atol=1e-9)


def test_restart_takes_the_denoiser_calls_of_the_paper() -> None:
    """Table 3 of Xu et al. (2023): 18 steps and two restarts of three levels are 2 * 18 - 1 + 2 * 2 * (3 - 1) calls."""
    calls = 0

    class Counted(ConstantDenoiser):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            nonlocal calls
            calls += 1
            return super().__call__(x_t, t, cond)

    Restart(num_steps=18).sample(Counted(VE()), torch.randn(1, 1, 1, 3), generator=generator("cpu", 0))
    assert calls == 43


def test_er_sde_is_the_formula_of_the_paper() -> None:
    """Cui et al. (2023) for two points and alpha = 1: phi = sigma (exp(sigma^0.3) + 10), and

    x_s = r x + (1 - r) x_0 + (s - t + phi_s int_s^t dsigma / phi) (x_0 - x_0') / (t - t') + (s^2 - r^2 t^2)^(1/2) z.
    """

    def phi(sigma: float) -> float:
        return sigma * (math.exp(sigma**0.3) + 10)

    times = [0.5, 0.45, 0.4]
    sigmas = [0.02 * 5000**t for t in times]
    x = torch.randn(2, 1, 1, 3, generator=generator("cpu", 1)) * sigmas[0]
    sampler = ERSDE(num_steps=1, solver_order=2)
    found = sampler.sample(ConstantDenoiser(VE()), x, generator=generator("cpu", 2), times=torch.tensor(times))
    source, before = generator("cpu", 2), None
    for k, (high, low) in enumerate(pairwise(sigmas)):
        r, x0 = phi(low) / phi(high), image(times[k])
        mean = r * x + (1 - r) * x0
        if before is not None:
            integral = quad(lambda sigma: 1 / phi(sigma), low, high)[0]
            mean = mean + (low - high + phi(low) * integral) * (x0 - image(times[k - 1])) / (high - before)
        x, before = mean + (low**2 - r**2 * high**2) ** 0.5 * normal_like(x, source), high
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_churn_preserves_the_moments(schedule: NoiseSchedule) -> None:
    """Churn does not raise the noise beyond the end of the schedule."""
    sampler = Heun(num_steps=100, s_churn=20.0)
    mean, covariance = moments(sampler, ExactDenoiser(schedule), times_of(sampler, schedule))
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(root(covariance), root(COVARIANCE), rtol=0.03, atol=0.02)


# Exactly solvable cases


LAST = [
    Ancestral(num_steps=1),
    Ancestral(num_steps=1, variance=1.0),
    DDIM(num_steps=1, eta=1.0),
    Euler(num_steps=1),
    EulerMaruyama(num_steps=1),
    ReverseDiffusion(num_steps=1),
    Heun(num_steps=1),
    DPMSolverPP2M(num_steps=1),
    DPMSolverPP2M(num_steps=1, eta=1.0),
    DPMSolverPP2S(num_steps=1),
    DPMSolverPP2S(num_steps=1, eta=1.0),
    UniPC(num_steps=1),
    UniPC(num_steps=1, variant="bh1"),
    AdamsBashforth(num_steps=1),
    SASolver(num_steps=1),
    ERSDE(num_steps=1),
    Restart(num_steps=1),
    RK45(num_steps=2),
]


@pytest.mark.parametrize("sampler", LAST, ids=lambda sampler: sampler.describe())
def test_last_step_returns_the_predicted_image(sampler: Sampler) -> None:
    assert one_step(sampler, [0.001, CLEAN]) == (pytest.approx(image(0.001), abs=1e-12), 0)


def test_ddim_with_eta_one_is_ancestral_with_small_variance(schedule: NoiseSchedule) -> None:
    x = torch.randn(4, 1, 1, 3, generator=generator("cpu", 1))
    one, two = (
        sampler.sample(ExactDenoiser(schedule), x, generator=generator("cpu", 2), times=times_of(sampler, schedule))
        for sampler in (DDIM(num_steps=30, eta=1.0), Ancestral(num_steps=30, variance=0.0))
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


SASolver1 = partial(SASolver, num_steps=30, predictor_order=1, corrector_order=0)
SAME: dict[str, tuple[Sampler, Sampler]] = {
    **{f"deis_1 {v}": (DDIM(num_steps=30), AdamsBashforth(num_steps=30, solver_order=1, variable=v))
       for v in AdamsBashforth.VARIABLES},
    "sa_1": (Ancestral(num_steps=30), SASolver1(tau=1.0)),
    "sa_1 ode": (DDIM(num_steps=30), SASolver1(tau=0.0)),
    "dpmpp_2m": (DPMSolverPP2M(num_steps=30), DPMSolverPP2M(num_steps=30, eta=1e-20)),
    "dpmpp_2s": (DPMSolverPP2S(num_steps=30), DPMSolverPP2S(num_steps=30, eta=1e-20)),
    "restart": (Heun(num_steps=30), Restart(num_steps=30, num_restarts=0)),
}  # fmt: skip


@pytest.mark.parametrize("pair", SAME)
@pytest.mark.parametrize("make", [VP, VE, LinearBetas])
def test_samplers_coincide_in_special_cases(pair: str, make: type[NoiseSchedule]) -> None:
    x = torch.randn(4, 1, 1, 3, generator=generator("cpu", 1))
    one, two = (sampler.sample(ExactDenoiser(make()), x, generator=generator("cpu", 2)) for sampler in SAME[pair])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def test_er_sde_with_the_noise_of_the_reverse_sde_is_ancestral(monkeypatch: pytest.MonkeyPatch) -> None:
    """phi = rho^2 is the reverse SDE, which is solved exactly if x_0 is constant."""
    monkeypatch.setattr(ERSDE, "_log_noise", lambda self, rho: rho.log())
    x = torch.randn(4, 1, 1, 3, generator=generator("cpu", 1))
    times = inner_times(VP(), 9)
    one, two = (
        sampler.sample(ExactDenoiser(VP()), x, generator=generator("cpu", 2), times=times)
        for sampler in (Ancestral(num_steps=1), ERSDE(num_steps=1, solver_order=1))
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "sampler",
    [
        DPMSolverPP2M(num_steps=1, eta=0.3),
        DPMSolverPP2S(num_steps=1, eta=0.3),
        SASolver(num_steps=1, tau=1.4),
        ERSDE(num_steps=1),
        Restart(num_steps=1, s_min=0.5, s_max=1.0),
    ],
    ids=lambda sampler: sampler.describe(),
)
@pytest.mark.parametrize("make", [VP, VE])
def test_noise_alone_has_the_exact_variance(sampler: Sampler, make: type[NoiseSchedule]) -> None:
    """If all data are 0, x at time s is noise of standard deviation sigma_s, whatever the length of the steps."""
    schedule = make()
    times = inner_times(schedule, 4)
    x = torch.zeros(40, 1, 1, 1)
    x[1] = scales(schedule, times[0])[1]
    with unit_noise() as noise:
        out = sampler.sample(Point(schedule), x, generator=generator("cpu", 0), times=times).flatten()
    assert 0 < noise.draws < 38
    assert float(out.square().sum().sqrt()) == pytest.approx(float(scales(schedule, times[-1])[1]), rel=1e-9)


def test_ddim_is_euler_in_x_over_alpha(schedule: NoiseSchedule) -> None:
    """DDIM takes Euler steps of d(x / alpha) / d(sigma / alpha) = eps."""
    times = inner_times(schedule, 7)
    x = torch.randn(4, 1, 1, 3, generator=generator("cpu", 1))
    found = DDIM(num_steps=1).sample(ExactDenoiser(schedule), x, generator=generator("cpu", 0), times=times)
    for t, s in pairwise(times):
        (alpha, sigma), (alpha_s, sigma_s) = scales(schedule, t), scales(schedule, s)
        eps = -sigma * score(x, alpha, sigma)
        x = alpha_s * (x / alpha + (sigma_s / alpha_s - sigma / alpha) * eps)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_euler_is_ddim_under_rectified_flow() -> None:
    """Both are equal because alpha and sigma are linear in time."""
    x = torch.randn(4, 1, 1, 3, generator=generator("cpu", 1))
    euler, ddim = (
        sampler.sample(ExactDenoiser(RectifiedFlow()), x, generator=generator("cpu", 0))
        for sampler in (Euler(num_steps=9), DDIM(num_steps=9))
    )
    torch.testing.assert_close(euler, ddim, rtol=1e-9, atol=1e-9)


def test_deterministic_samplers_follow_the_exact_path(schedule: NoiseSchedule) -> None:
    """On Gaussian data the ODE preserves the distance from the mean in standard deviations, along each axis."""
    times = inner_times(schedule, 200)
    x = torch.randn(4, 1, 1, 3, generator=generator("cpu", 1))
    (mean, covariance), (end_mean, end_covariance) = (true_moments(schedule, t) for t in (times[0], times[-1]))
    exact = end_mean + x @ root(end_covariance)
    x = mean + x @ root(covariance)
    solvers = {
        DDIM(num_steps=1): 8e-2,
        Euler(num_steps=1): 8e-2,
        Heun(num_steps=1): 1e-3,
        DPMSolverPP2M(num_steps=1): 1e-3,
    }
    for sampler, tolerance in {
        **solvers,
        UniPC(num_steps=1): 5e-5,
        RK45(num_steps=2, rtol=1e-7, atol=1e-7): 1e-6,
    }.items():
        path = times if not isinstance(sampler, RK45) else times[[0, -1]]
        found = sampler.sample(ExactDenoiser(schedule), x, generator=generator("cpu", 0), times=path)
        assert (found - exact).abs().max() < tolerance


@dataclass(frozen=True)
class Parabola:
    """Predicts x_0 = 0.3 + 0.5 u - 0.2 u^2 for every x, a parabola in u, which is half the log-SNR."""

    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        u = self.schedule.log_snr(t) / 2
        alpha, sigma = scales(self.schedule, t)
        x0 = (0.3 + 0.5 * u - 0.2 * u**2).expand_as(x_t)
        return Prediction(x0, (x_t - alpha * x0) / sigma)


PARABOLA = [
    UniPC(num_steps=1, variant="bh1"),
    UniPC(num_steps=1),
    UniPC(num_steps=1, solver_order=3),
    SASolver(num_steps=1, tau=0.0, corrector_order=0),
]


@pytest.mark.parametrize("sampler", PARABOLA, ids=lambda sampler: sampler.describe())
def test_samplers_with_three_points_are_exact_for_a_parabola(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """d(x / sigma) = e^u x_0(u) du, and e^u (a + b u + c u^2) integrates to e^u (a - b + 2 c + (b - 2 c) u + c u^2)."""
    levels = even_levels(schedule, 40)[10:20]
    (first, *_, last), x = levels, torch.zeros(1, 1, 1, 1)

    def integral(t: Tensor) -> Tensor:
        u = schedule.log_snr(t) / 2
        return u.exp() * (0.3 - 0.5 - 0.4 + (0.5 + 0.4) * u - 0.2 * u**2)

    source = generator("cpu", 0)
    # Starts after the first two steps, which are of lower order.
    steps = list(sampler.iterate(Parabola(schedule), x, generator=source, times=levels))
    start = steps[1].x / scales(schedule, levels[2])[1]
    exact = start + integral(last) - integral(levels[2])
    torch.testing.assert_close(steps[-1].x / scales(schedule, last)[1], exact, rtol=1e-9, atol=1e-9)
    two = DPMSolverPP2M(num_steps=1).sample(Parabola(schedule), x, generator=source, times=levels)
    assert (two - steps[-1].x).abs().max() > 1e-5, "not every solver is exact"
    assert first > last


@dataclass(frozen=True)
class ParabolaEps:
    """Predicts eps = 0.3 + 0.5 v - 0.2 v^2 for every x, a parabola in ``variable``."""

    schedule: NoiseSchedule
    variable: str

    def eps(self, log_rho: float) -> float:
        t = self.schedule.t_from_log_snr(torch.tensor(-2 * log_rho))
        v = {"log_rho": log_rho, "rho": math.exp(log_rho), "t": float(t)}[self.variable]
        return 0.3 + 0.5 * v - 0.2 * v**2

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        eps = torch.full_like(x_t, self.eps(float(-self.schedule.log_snr(t) / 2)))
        return Prediction((x_t - sigma * eps) / alpha, eps)


@pytest.mark.parametrize("variable", ["log_rho", "rho", "t"])
@pytest.mark.parametrize("make", [VP, RectifiedFlow])
def test_adams_bashforth_is_exact_for_a_parabola(variable: str, make: type[NoiseSchedule]) -> None:
    """x / alpha changes by the integral of eps over rho = sigma / alpha."""
    denoiser, levels = ParabolaEps(make(), variable), even_levels(make(), 40)[10:20]
    sampler = AdamsBashforth(num_steps=1, variable=variable)
    x, source = torch.zeros(1, 1, 1, 1), generator("cpu", 0)
    steps = list(sampler.iterate(denoiser, x, generator=source, times=levels))
    start, end = (float(-denoiser.schedule.log_snr(t) / 2) for t in levels[[2, -1]])
    change = quad(lambda w: math.exp(w) * denoiser.eps(w), start, end, epsabs=1e-12, epsrel=1e-12)[0]
    found = (
        steps[-1].x / scales(denoiser.schedule, levels[-1])[0] - steps[1].x / scales(denoiser.schedule, levels[2])[0]
    )
    assert float(found) == pytest.approx(change, rel=1e-8)


def test_multistep_solvers_do_not_extrapolate_over_long_steps() -> None:
    """A step three times as long as the previous one is of first order."""
    denoiser, times, source = Parabola(VE()), torch.tensor([0.5, 0.48, 0.42]), generator("cpu", 0)
    for sampler in (
        DPMSolverPP2M(num_steps=1),
        UniPC(num_steps=1),
        SASolver(num_steps=1, tau=0.0),
        AdamsBashforth(num_steps=1),
    ):
        one, two = sampler.iterate(denoiser, torch.ones(1, 1, 1, 3), generator=source, times=times)
        ddim = DDIM(num_steps=1).sample(denoiser, one.x, generator=source, times=times[1:])
        torch.testing.assert_close(two.x, ddim, rtol=1e-12, atol=1e-12)


# Invalid input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(num_steps=0), "steps=0"),
        (lambda: DDIM(num_steps=-3), "steps=-3"),
        (lambda: DDIM(num_steps=5, eta=1.5), "eta=1.5"),
        (lambda: DDIM(num_steps=5, eta=cast(float, ".nan")), "eta=.nan must be a number"),
        (lambda: Heun(num_steps=5, s_churn=cast(float, "much")), "s_churn=much must be a number"),
        (
            lambda: PredictorCorrector(num_steps=5, num_corrector_steps=cast(int, True)),
            "num_corrector_steps=True must be a number",
        ),
        (lambda: Ancestral(num_steps=5, variance=-0.1), "variance=-0.1"),
        (lambda: DDIM(num_steps=11).times(BetaTable(torch.full((10,), 0.1))), "no more than 10 steps"),
        (lambda: Heun(num_steps=5, s_churn=-1), "s_churn=-1"),
        (lambda: Heun(num_steps=5, s_noise=math.nan), "s_noise=nan"),
        (lambda: Heun(num_steps=5, s_min=2, s_max=1), "s_min=2 is above"),
        (lambda: PredictorCorrector(num_steps=5, num_corrector_steps=0), "num_corrector_steps=0"),
        (lambda: PredictorCorrector(num_steps=5, snr=0), "snr=0"),
        (lambda: AnnealedLangevin(num_steps=5, num_langevin_steps=0), "num_langevin_steps=0"),
        (lambda: AnnealedLangevin(num_steps=5, step_size=4.0), "step_size=4.0"),
        (lambda: AnnealedLangevin(num_steps=5, step_size=-1), "step_size=-1"),
        (lambda: UniPC(num_steps=5, variant="bh3"), "variant=bh3"),
        (lambda: UniPC(num_steps=5, solver_order=5), "solver_order=5 must be an integer from 1 to 4"),
        (lambda: AdamsBashforth(num_steps=5, solver_order=0), "solver_order=0"),
        (lambda: AdamsBashforth(num_steps=5, variable="x"), "variable=x: choose from log_rho, t, rho, step"),
        (lambda: SASolver(num_steps=5, corrector_order=1), "corrector_order=1 must be an integer from 2 to 5"),
        (lambda: SASolver(num_steps=5, tau=-1), "tau=-1"),
        (lambda: ERSDE(num_steps=5, solver_order=4), "solver_order=4"),
        (lambda: DPMSolverPP2M(num_steps=5, eta=math.inf), "eta=inf"),
        (lambda: DPMSolverPP2S(num_steps=5, eta=-0.1), "eta=-0.1"),
        (lambda: Restart(num_steps=5, s_min=2.0, s_max=1.0), "s_min=2.0"),
        (lambda: Restart(num_steps=5, num_restarts=-1), "num_restarts=-1"),
        (lambda: Restart(num_steps=5, restart_steps=0), "restart_steps=0"),
        (lambda: RK45(num_steps=1), "at least 2"),
        (lambda: RK45(num_steps=0), "steps=0"),
        (lambda: RK45(num_steps=5, rtol=0), "rtol=0"),
        (lambda: RK45(num_steps=5, atol=-1e-5), "atol=-1e-05"),
    ],
)
def test_invalid_settings_are_rejected(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("times", [[0.1, 0.5], [0.5, 0.5], [0.5], [1.2, 0.5], [0.5, 0.0], [0.5, CLEAN, CLEAN]])
def test_times_that_do_not_run_from_noise_to_data_are_rejected(times: list[float]) -> None:
    schedule = LinearBetas()
    with pytest.raises(UserError):
        DDIM(num_steps=1).iterate(
            ExactDenoiser(schedule), torch.zeros(1, 1, 1, 3), generator=generator("cpu", 0), times=torch.tensor(times)
        )


def test_adaptive_solver_reports_a_collapsed_step_size() -> None:
    class Jumps(ExactDenoiser):
        """Predicts an eps that changes too abruptly for any step size."""

        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            prediction = super().__call__(x_t, t, cond)
            return prediction._replace(eps=prediction.eps + 50 * torch.sin(1e9 * x_t))

    with pytest.raises(UserError, match="step size collapsed at log-SNR"):
        RK45(num_steps=2).sample(Jumps(LinearBetas()), torch.ones(4, 1, 1, 3), generator=generator("cpu", 0))


DESCRIBED: list[tuple[Sampler, Any]] = [
    (DDIM(num_steps=50), "DDIM, 50 steps, eta 0"),
    (Ancestral(num_steps=1000, variance=1.0), "Ancestral, 1000 steps, variance 1"),
    (Heun(num_steps=18), "Heun, 18 steps"),
    (Heun(num_steps=18, s_churn=40), "Heun, 18 steps, s_churn 40, s_min 0, s_max inf, s_noise 1"),
    (UniPC(num_steps=10), "UniPC, 10 steps, solver_order 2, variant bh2"),
    (RK45(num_steps=2), "RK45, 2 steps, rtol 1e-05, atol 1e-05"),
    (AnnealedLangevin(num_steps=10), "AnnealedLangevin, 10 steps, num_langevin_steps 100, step_size 0.2, denoise True"),
]


@pytest.mark.parametrize(("sampler", "words"), DESCRIBED, ids=str)
def test_descriptions_name_the_settings(sampler: Sampler, words: str) -> None:
    assert sampler.describe() == words
