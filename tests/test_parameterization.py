"""Parameterisations, the denoiser and objectives: changing the parameterisation never changes the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import diffusers
import pytest
import torch
from torch import Tensor, nn

from composing import options
from gencompare.diffusion.denoiser import ClipX0, Denoiser
from gencompare.diffusion.discrete_schedules import BetaTable, LinearBetas
from gencompare.diffusion.objectives import (
    EDMWeighting,
    LikelihoodWeighting,
    MinSNRWeighting,
    P2Weighting,
    SimpleWeighting,
    UniformVelocityWeighting,
    UniformVWeighting,
    WeightedMSE,
    Weighting,
)
from gencompare.diffusion.parameterizations import (
    EDMPreconditioning,
    Eps,
    LearnedVariance,
    LevelIndexConditioning,
    LogSigmaConditioning,
    LogSNRConditioning,
    Parameterization,
    PosteriorMean,
    Prediction,
    TimeConditioning,
    TimestepConditioning,
    V,
    Velocity,
)
from gencompare.diffusion.schedules import VE, NoiseSchedule, RectifiedFlow
from gencompare.diffusion.times import TimeDistribution
from gencompare.errors import UserError
from gencompare.models.diffusion import Diffusion
from gencompare.rng import RandomSource, generator
from gencompare.tasks.runs.diffusers_scheduler import clipping
from parts import part

PARAMETERIZATIONS = options("model/parameterization")


pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(params=PARAMETERIZATIONS)
def parameterization(request: pytest.FixtureRequest) -> Parameterization:
    return part("parameterization", request.param)


@pytest.fixture
def pair(schedule: NoiseSchedule, parameterization: Parameterization) -> tuple[NoiseSchedule, Parameterization]:
    """Return a schedule and a parameterisation; if it needs discrete steps, the schedule is replaced by a table."""
    try:
        parameterization.check(schedule)
    except UserError:
        assert schedule.discrete_times is None
        schedule = BetaTable(torch.linspace(1e-3, 0.3, 40))
    return schedule, parameterization


def as_output(parameterization: Parameterization, out: Tensor) -> Tensor:
    """Return ``out`` as a network output, with zeros in all further channels."""
    return torch.cat([out, *[torch.zeros_like(out)] * (parameterization.output_multiplier - 1)], 1)


def noisy_batch(schedule: NoiseSchedule, n: int = 40) -> tuple[Tensor, ...]:
    """Return times over the whole range, with x0, eps and x_t in float64."""
    t = torch.linspace(schedule.t_min, schedule.t_max, n)
    source = generator("cpu", 1)
    x0 = torch.rand(n, 2, 3, 3, generator=source) * 2 - 1
    eps = torch.randn(n, 2, 3, 3, generator=source)
    alpha = schedule.log_alpha(t).exp()[:, None, None, None]
    sigma = (schedule.log_alpha(t) - schedule.log_snr(t) / 2).exp()[:, None, None, None]
    return t, x0, eps, alpha * x0 + sigma * eps


# Parameterisations


def test_there_are_parameterizations() -> None:
    assert {"eps", "x0", "v", "score", "velocity", "posterior_mean", "karras"} <= set(PARAMETERIZATIONS)


Pair = tuple[NoiseSchedule, Parameterization]


def test_round_trip(pair: Pair) -> None:
    schedule, parameterization = pair
    t, x0, eps, x_t = noisy_batch(schedule)
    at = schedule.at(t, x_t)
    out = as_output(parameterization, parameterization.target(x0, eps, at))
    assert torch.equal(parameterization.target_channels(out), parameterization.target(x0, eps, at))
    found = parameterization.to_prediction(out, x_t, at)
    recoverable = at.log_snr.flatten() > -15  # at higher noise, x_t contains too little of x0 for float64
    torch.testing.assert_close(found.x0[recoverable], x0[recoverable], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-10)


def test_x0_and_eps_always_compose_x_t(pair: Pair) -> None:
    schedule, parameterization = pair
    t, _, eps, x_t = noisy_batch(schedule)
    at = schedule.at(t, x_t)
    found = parameterization.to_prediction(as_output(parameterization, eps.flip(0)), x_t, at)
    torch.testing.assert_close(at.alpha * found.x0 + at.sigma * found.eps, x_t, rtol=0, atol=1e-11)


def test_eps_jacobian_is_the_derivative_of_eps(pair: Pair) -> None:
    schedule, parameterization = pair
    t, _, eps, x_t = noisy_batch(schedule)
    at = schedule.at(t, x_t)
    outputs = (as_output(parameterization, out) for out in (eps + 1, eps))
    more, less = (parameterization.to_prediction(out, x_t, at).eps for out in outputs)
    rise = more - less
    torch.testing.assert_close(rise.abs(), parameterization.eps_jacobian(at).expand_as(rise), rtol=1e-9, atol=1e-12)


def test_targets_of_eps_x0_and_v() -> None:
    """eps is the noise, x0 the image, v = alpha eps - sigma x_0 (Salimans and Ho 2022, appendix D)."""
    k = torch.arange(0, 1000, 25)
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[k].sqrt()[:, None, None, None]
    _, x0, eps, x_t = noisy_batch(LinearBetas())
    at = LinearBetas().at((k + 1) / 1000, x_t)
    assert torch.equal(part("parameterization", "eps").target(x0, eps, at), eps)
    assert torch.equal(part("parameterization", "x0").target(x0, eps, at), x0)
    v = part("parameterization", "v").target(x0, eps, at)
    torch.testing.assert_close(v, alpha * eps - (1 - alpha**2).sqrt() * x0, rtol=0, atol=1e-12)


def scales(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma, (n, 1, 1, 1)."""
    log_alpha = schedule.log_alpha(t)
    return tuple(v.exp()[:, None, None, None] for v in (log_alpha, log_alpha - schedule.log_snr(t) / 2))  # type: ignore[return-value]


def test_score_is_the_gradient_of_the_log_density(schedule: NoiseSchedule) -> None:
    """Given x_0, p(x_t) = N(alpha x_0, sigma^2), whose score is (alpha x_0 - x_t) / sigma^2."""
    t, x0, eps, x_t = noisy_batch(schedule)
    alpha, sigma = scales(schedule, t)
    said = part("parameterization", "score").target(x0, eps, schedule.at(t, x_t))
    torch.testing.assert_close(said, (alpha * x0 - x_t) / sigma**2, rtol=1e-8, atol=1e-8)


def test_velocity_is_the_derivative_of_the_path(schedule: NoiseSchedule) -> None:
    margin, h = 0.05 * (schedule.t_max - schedule.t_min), 1e-6
    t = ((torch.linspace(schedule.t_min + margin, schedule.t_max - margin, 40) * 1000).floor() + 0.37) / 1000
    _, x0, eps, x_t = noisy_batch(schedule)
    (alpha, sigma), (later_alpha, later_sigma) = scales(schedule, t - h), scales(schedule, t + h)
    path = (later_alpha * x0 + later_sigma * eps - alpha * x0 - sigma * eps) / (2 * h)
    torch.testing.assert_close(Velocity().target(x0, eps, schedule.at(t, x_t)), path, rtol=1e-5, atol=1e-5)


def test_velocity_of_rectified_flow_is_eps_minus_x0() -> None:
    t, x0, eps, x_t = noisy_batch(RectifiedFlow())
    torch.testing.assert_close(Velocity().target(x0, eps, RectifiedFlow().at(t, x_t)), eps - x0, rtol=0, atol=1e-10)


def test_edm_preconditioning_is_that_of_the_paper() -> None:
    """If alpha = 1, the prediction is D = c_skip x + c_out F of Karras et al. (2022), table 1."""
    t, x0, eps, x = noisy_batch(VE())
    sigma, d = 0.02 * 5000 ** t[:, None, None, None], 0.7
    c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
    at, karras = VE().at(t, x), EDMPreconditioning(sigma_data=d)
    seen, noise_cond = karras.network_input(x, t, at)
    torch.testing.assert_close(seen, x / (sigma**2 + d**2).sqrt(), rtol=1e-11, atol=0)
    torch.testing.assert_close(noise_cond, sigma.flatten().log() / 4, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(karras.target(x0, eps, at), (x0 - c_skip * x) / c_out, rtol=0, atol=1e-8)
    torch.testing.assert_close(karras.to_prediction(eps, x, at).x0, c_skip * x + c_out * eps, rtol=1e-11, atol=1e-12)


def test_edm_preconditioning_works_on_x_over_alpha(schedule: NoiseSchedule) -> None:
    t, _, eps, x_t = noisy_batch(schedule)
    alpha, sigma = scales(schedule, t)
    y, s, d = x_t / alpha, sigma / alpha, 0.5
    at, karras = schedule.at(t, x_t), EDMPreconditioning()
    torch.testing.assert_close(karras.network_input(x_t, t, at)[0], y / (s**2 + d**2).sqrt(), rtol=1e-9, atol=1e-12)
    expected = d**2 / (s**2 + d**2) * y + s * d / (s**2 + d**2).sqrt() * eps
    torch.testing.assert_close(karras.to_prediction(eps, x_t, at).x0, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_mean_is_that_of_ddpm(dtype: torch.dtype) -> None:
    """The posterior mean is that of Ho et al. (2020), eq. 7; at their t = 1 it is the image."""
    beta = torch.linspace(1e-4, 0.02, 1000)
    bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1), bar[:-1]])
    i = torch.tensor([0, 1, 2, 500, 998, 999])
    _, x0, eps, _ = noisy_batch(LinearBetas(), 6)
    bar_t, bar_s, beta = (v[i][:, None, None, None] for v in (bar, before, beta))
    x_t = bar_t.sqrt() * x0 + (1 - bar_t).sqrt() * eps
    mean = bar_s.sqrt() * beta / (1 - bar_t) * x0 + (1 - beta).sqrt() * (1 - bar_s) / (1 - bar_t) * x_t
    at = LinearBetas().at(((i + 1) / 1000).to(dtype), x_t.to(dtype))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    found = PosteriorMean().target(x0.to(dtype), eps.to(dtype), at)
    torch.testing.assert_close(found.double(), mean, rtol=0, atol=tolerance)


def test_posterior_mean_needs_a_discrete_schedule() -> None:
    with pytest.raises(UserError, match="VE is a continuous-time schedule"):
        PosteriorMean().check(VE())
    with pytest.raises(UserError, match="VE is a continuous-time schedule"):
        LearnedVariance(inner=PosteriorMean()).check(VE())
    PosteriorMean().check(LinearBetas())


def test_learned_variance_adds_a_fraction_to_the_inner_prediction(schedule: NoiseSchedule) -> None:
    """In Nichol and Dhariwal (2021), eq. 15, an output from -1 to 1 is a fraction from 0 to 1."""
    t, x0, eps, x_t = noisy_batch(schedule)
    at = schedule.at(t, x_t)
    w = torch.linspace(-1.5, 1.5, 40)[:, None, None, None].expand_as(x_t).clone().requires_grad_()
    inner = V()
    found = LearnedVariance(inner=inner).to_prediction(torch.cat([inner.target(x0, eps, at), w], 1), x_t, at)
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=1e-10)
    assert found.variance_fraction is not None
    torch.testing.assert_close(found.variance_fraction, ((w + 1) / 2).clamp(0, 1), rtol=0, atol=1e-15)
    found.variance_fraction.sum().backward()
    assert w.grad is not None and (w.grad == 0.5).all(), "the gradient does not vanish outside of [0, 1]"


# Noise conditioning


def test_timestep_is_the_index_from_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        for steps in (10, 1000, 4000):
            t = torch.arange(1, steps + 1, dtype=dtype) / steps
            noise_cond = TimestepConditioning(steps)(t, LinearBetas().at(t))
            assert torch.equal(noise_cond, torch.arange(steps, dtype=dtype))


def test_log_snr_conditioning_does_not_depend_on_the_schedule(schedule: NoiseSchedule) -> None:
    t = torch.linspace(schedule.t_min, schedule.t_max, 300)
    noise_cond = LogSNRConditioning(20.0)(t, schedule.at(t, torch.zeros(300, 1, 2, 2)))
    assert noise_cond.shape == (300,)
    assert (noise_cond.diff() <= 0).all() and noise_cond.min() >= 0 and noise_cond.max() <= 1000
    log_snr = schedule.log_snr(t).clamp(-20, 20)
    torch.testing.assert_close(noise_cond, 500 + 25 * log_snr, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_level_index_counts_from_the_noisiest(dtype: torch.dtype) -> None:
    for schedule in (LinearBetas(num_train_timesteps=10, beta_end=0.5), LinearBetas()):
        T = len(schedule.require_discrete_times())
        t = torch.arange(1, T + 1, dtype=dtype) / T
        assert torch.equal(LevelIndexConditioning()(t, schedule.at(t)), torch.arange(T - 1, -1, -1, dtype=dtype))
        assert LevelIndexConditioning()(t[3] - 0.4 / T, schedule.at(t)) == T - 4, "the noisier of two levels is used"
    with pytest.raises(UserError, match="continuous-time schedule"):
        Eps(noise_conditioning=LevelIndexConditioning()).check(RectifiedFlow())


def test_noise_conditionings_are_those_of_the_papers() -> None:
    """EDM's c_noise is ln(sigma) / 4; VE models receive ln sigma, VP models 999 t (Song et al. 2021)."""
    t = torch.linspace(0, 1, 7)
    sigma = 0.02 * 5000**t
    at = VE().at(t, torch.zeros(7, 1, 2, 2))
    torch.testing.assert_close(LogSigmaConditioning()(t, at), sigma.log() / 4, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(LogSigmaConditioning(factor=1)(t, at), sigma.log(), rtol=1e-12, atol=1e-12)
    assert torch.equal(TimeConditioning()(t, at), 999 * t)


class Recorder(nn.Module):
    """Records its inputs and outputs zeros."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.seen = x, noise, cond
        return torch.zeros_like(x).repeat(1, self.outputs, 1, 1)


def test_network_receives_x_noise_condition_and_conditions() -> None:
    network, x = Recorder(), torch.randn(5, 1, 4, 4)
    denoiser = Denoiser(network, LinearBetas(), Eps(noise_conditioning=TimestepConditioning()))
    cond = {"label": torch.arange(5)}
    for t, noise_cond in ((0.4, [399.0] * 5), ([0.001, 0.2, 0.4, 0.6, 1], [0.0, 199, 399, 599, 999])):
        denoiser(x, torch.tensor(t), cond)
        seen_x, noise, seen_cond = network.seen
        assert torch.equal(seen_x, x) and seen_cond is cond
        assert torch.equal(noise, torch.tensor(noise_cond))


class Half(Recorder):
    """Outputs bfloat16, like a network under autocast."""

    def forward(self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return x.bfloat16().repeat(1, self.outputs, 1, 1) * 0.3


def test_predictions_have_the_type_of_x(parameterization: Parameterization) -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.randn(3, 1, 2, 2)
    denoiser = Denoiser(Half(parameterization.output_multiplier), LinearBetas(), parameterization)
    for found in denoiser(x, torch.tensor(0.5), {}):
        assert found is None or found.dtype == torch.float32


def test_clipping_bounds_x0_and_adjusts_eps(schedule: NoiseSchedule) -> None:
    t, _, _, x_t = noisy_batch(schedule)
    free = Denoiser(Recorder(), schedule, Eps())
    clipped = ClipX0(free)(x_t, t, {})
    at = schedule.at(t, x_t)
    assert free(x_t, t, {}).x0.abs().max() > 1, "something is clipped"
    assert clipped.x0.abs().max() <= 1
    torch.testing.assert_close(at.alpha * clipped.x0 + at.sigma * clipped.eps, x_t, rtol=0, atol=1e-11)
    inside = free(x_t, t, {}).x0.abs() <= 1
    assert torch.equal(clipped.eps[inside], free(x_t, t, {}).eps[inside]), "values in range are unchanged"


def test_dynamic_thresholding_is_that_of_diffusers() -> None:
    """Images within [-1, 1] and images whose quantile is below 1 are clipped as without it."""
    torch.set_default_dtype(torch.float64)
    x0 = torch.randn(4, 3, 5, 5) * torch.tensor([0.1, 0.35, 1.0, 3.0]).view(4, 1, 1, 1)

    @dataclass(frozen=True)
    class Constant:
        schedule: NoiseSchedule

        def __call__(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Prediction:
            at = self.schedule.at(t, x_t)
            return Prediction(x0, (x_t - at.alpha * x0) / at.sigma)

    x_t, t = torch.randn_like(x0), torch.tensor(0.7)
    denoiser = Constant(LinearBetas())
    found = ClipX0(denoiser, 0.95)(x_t, t, {})
    scheduler = diffusers.DDPMScheduler(**clipping(cast(Diffusion, SimpleNamespace(dynamic_threshold=0.95))))
    torch.testing.assert_close(found.x0, scheduler._threshold_sample(x0), rtol=1e-9, atol=1e-9)
    at = denoiser.schedule.at(t, x_t)
    torch.testing.assert_close(at.alpha * found.x0 + at.sigma * found.eps, x_t, rtol=0, atol=1e-11)
    assert torch.equal(found.x0[:2], x0[:2].clamp(-1, 1)) and not torch.equal(found.x0[2:], x0[2:].clamp(-1, 1))


# Objectives


@dataclass(frozen=True)
class Fixed(TimeDistribution):
    """Fixed times over the whole schedule."""

    n: int = 40

    def __call__(self, schedule: NoiseSchedule, rng: RandomSource) -> Tensor:
        return torch.linspace(schedule.t_min, schedule.t_max, self.n)


class Guess(nn.Module):
    """Outputs the wrong prediction x0 = 0.4 x_t, expressed in a parameterisation."""

    def __init__(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        super().__init__()
        self.schedule, self.parameterization = schedule, parameterization

    def forward(self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        t = torch.linspace(self.schedule.t_min, self.schedule.t_max, len(x))
        at = self.schedule.at(t, x)
        x = x / self.parameterization.network_input(torch.ones_like(x), t, at)[0]  # undo the input scaling
        x0 = 0.4 * x
        return as_output(self.parameterization, self.parameterization.target(x0, (x - at.alpha * x0) / at.sigma, at))


# Weights of the error of x_0, as in the papers.
BY_PAPER: list[tuple[Weighting, Callable[[Tensor], Tensor]]] = [
    (SimpleWeighting(), lambda snr: snr),
    (UniformVWeighting(), lambda snr: snr + 1),
    (MinSNRWeighting(gamma=5), lambda snr: snr.clamp(max=5)),
    (MinSNRWeighting(gamma=1), lambda snr: snr.clamp(max=1)),
    # Karras et al. (2022), table 1, sigma being 1 / sqrt(snr): (sigma^2 + d^2) / (sigma d)^2.
    (EDMWeighting(sigma_data=0.5), lambda snr: (1 / snr + 0.25) / (0.25 / snr)),
    # Choi et al. (2022), eq. 8: L_simple's weight over (k + snr)^gamma.
    (P2Weighting(), lambda snr: snr / (1 + snr)),
    (P2Weighting(gamma=0.5, k=2), lambda snr: snr / (2 + snr).sqrt()),
]


@pytest.mark.parametrize(("weighting", "paper"), BY_PAPER)
def test_loss_is_that_of_the_paper_for_every_parameterization(
    pair: Pair, weighting: Weighting, paper: Callable[[Tensor], Tensor]
) -> None:
    schedule, parameterization = pair
    denoiser = Denoiser(Guess(schedule, parameterization), schedule, parameterization)
    t, x0, _, _ = noisy_batch(schedule)
    loss = WeightedMSE(weighting, Fixed())(denoiser, x0, {}, RandomSource.for_batch(generator("cpu", 9), 40))["loss"]

    eps = torch.randn(x0.shape, generator=generator("cpu", 9), dtype=torch.float32).double()
    snr = schedule.log_snr(t).exp()
    alpha, sigma = scales(schedule, t)
    error = (0.4 * (alpha * x0 + sigma * eps) - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, paper(snr) * error, rtol=1e-8, atol=0)


def test_uniform_velocity_weighting_is_the_mse_of_the_velocity(schedule: NoiseSchedule) -> None:
    """The weighting is the same whatever the network predicts. On a straight line it is flow matching: w = (1 + sigma /
    alpha)^2."""
    weighting, x0 = UniformVelocityWeighting(), noisy_batch(schedule)[1]
    losses = []
    for parameterization in (Velocity(), V()):
        denoiser = Denoiser(Guess(schedule, parameterization), schedule, parameterization)
        losses.append(
            WeightedMSE(weighting, Fixed())(denoiser, x0, {}, RandomSource.for_batch(generator("cpu", 9), 40))["loss"]
        )
    t = noisy_batch(schedule)[0]
    eps = torch.randn(x0.shape, generator=generator("cpu", 9), dtype=torch.float32).double()
    alpha, sigma = scales(schedule, t)
    x_t = alpha * x0 + sigma * eps
    at = schedule.at(t, x_t)
    f, slope = at.dlog_alpha_dt, at.dlog_snr_dt
    # The path through (x_0, eps) has the derivative alpha' x_0 + sigma' eps.
    guess = f * alpha * 0.4 * x_t + (f - slope / 2) * (x_t - alpha * 0.4 * x_t)
    path = f * alpha * x0 + (f - slope / 2) * sigma * eps
    for loss in losses:
        torch.testing.assert_close(loss, (guess - path).square().mean((1, 2, 3)), rtol=1e-7, atol=0)
    t = torch.linspace(0.01, 0.99, 30)
    torch.testing.assert_close(weighting(RectifiedFlow().at(t)), (1 + t / (1 - t)) ** 2, rtol=1e-10, atol=0)


def test_likelihood_weighting_is_g2_over_sigma2(schedule: NoiseSchedule) -> None:
    """The error of the score has the weight g^2 (Song et al. 2021, "Maximum Likelihood Training", eq. 7)."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 50)
    g2, sigma = schedule.sde(t)[1], scales(schedule, t)[1].flatten()
    torch.testing.assert_close(LikelihoodWeighting()(schedule.at(t)), g2 / sigma**2, rtol=1e-9, atol=0)
    # VE: g^2 = d sigma^2 / dt.
    torch.testing.assert_close(
        LikelihoodWeighting()(VE().at(t)), torch.full((50,), 2 * math.log(5000)), rtol=1e-12, atol=0
    )


def test_uniform_v_weighting_is_the_mse_of_v() -> None:
    schedule, t = LinearBetas(), torch.linspace(0.001, 1, 40)
    loss = WeightedMSE(UniformVWeighting(), Fixed())(
        Denoiser(Recorder(), schedule, V()),
        torch.zeros(40, 1, 2, 2),
        {},
        RandomSource.for_batch(generator("cpu", 2), 40),
    )["loss"]
    eps = torch.randn(40, 1, 2, 2, generator=generator("cpu", 2), dtype=torch.float32).double()
    # Output and image are 0, so the error is v = alpha eps.
    expected = schedule.at(t).alpha ** 2 * eps.square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_simple_loss_of_a_zero_network_is_one() -> None:
    """The mean of ||eps - 0||^2 per value is 1."""
    x0 = torch.zeros(4000, 1, 4, 4)
    denoiser = Denoiser(Recorder(), LinearBetas(), Eps())
    loss = WeightedMSE()(denoiser, x0, {}, RandomSource.for_batch(generator("cpu", 2), 4000))["loss"]
    assert abs(float(loss.mean()) - 1) < 4 * math.sqrt(2 / (4000 * 16))


def test_each_process_computes_its_rows() -> None:
    x0 = torch.rand(8, 1, 2, 2)
    denoiser = Denoiser(Recorder(), LinearBetas(), Eps())
    whole = WeightedMSE()(denoiser, x0, {}, RandomSource(generator("cpu", 2), 0, 8, 8))["loss"]
    halves = [
        WeightedMSE()(denoiser, x0[k : k + 4], {}, RandomSource(generator("cpu", 2), k, k + 4, 8))["loss"]
        for k in (0, 4)
    ]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MinSNRWeighting(gamma=0),
        lambda: LogSNRConditioning(limit=-1),
        lambda: EDMPreconditioning(sigma_data=0),
        lambda: EDMWeighting(sigma_data=-1),
        lambda: P2Weighting(k=0),
        lambda: P2Weighting(gamma=-1),
    ],
)
def test_invalid_settings_are_rejected(make) -> None:
    with pytest.raises(UserError):
        make()
