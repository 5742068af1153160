"""Bits/dim of diffusion models, compared with exact densities.

The data are three correlated Gaussian values, x = m + Q sqrt(V) z with a rotation Q, or a mixture of two such
Gaussians. The denoiser is exact. Everything is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from composing import compose, options
from gencompare.diffusion import likelihoods
from gencompare.diffusion.data_likelihood import (
    DataLikelihood,
    Decoder,
    GaussianDecoder,
    PosteriorDecoder,
    SoftmaxDecoder,
    discretized_normal_log_prob,
)
from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.discrete_schedules import BetaTable, CosineBetas
from gencompare.diffusion.likelihoods import ODELikelihood, VLBLikelihood
from gencompare.diffusion.objectives import WeightedMSE
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.schedules import VE, NoiseSchedule, RectifiedFlow, VariancePreserving
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.networks.mlp import DenoisingMLP
from gencompare.rng import generator
from parts import part

Q = torch.linalg.qr(torch.randn(3, 3, generator=generator("cpu", 5), dtype=torch.float64))[0]
V = torch.tensor([0.6, 1.7, 0.25], dtype=torch.float64)
SHAPE = (1, 1, 3)
PIXELS = DataLikelihood(None, torch.ones(1, 1, 3), 3)


pytestmark = pytest.mark.usefixtures("double")


class Even(VariancePreserving):
    """A schedule with alpha^2 + sigma^2 = 1 and a log-SNR that is linear in time."""

    t_min = 0.0

    def __init__(self, high: float = 13.0, low: float = -13.0) -> None:
        super().__init__()
        self.high, self.low = high, low

    def log_snr(self, t: Tensor) -> Tensor:
        return self.high + (self.low - self.high) * t


class Straight(RectifiedFlow):
    """Rectified flow with the same end, but more noise at the start."""

    t_min = 1e-3


WIDE: dict[str, Callable[[], NoiseSchedule]] = {
    "even": Even, "straight": Straight, "exploding": partial(VE, 0.002, 200.0), "cosine table": CosineBetas,
}  # fmt: skip
"""Schedules from almost no noise to almost pure noise."""


@pytest.fixture(params=list(WIDE))
def wide(request: pytest.FixtureRequest) -> NoiseSchedule:
    return WIDE[request.param]()


def scales(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma, broadcasting with (n, 3)."""
    log_alpha = schedule.log_alpha(t)
    alpha, sigma = log_alpha.exp(), (log_alpha - schedule.log_snr(t) / 2).exp()
    return (alpha[:, None], sigma[:, None]) if t.ndim else (alpha, sigma)


@dataclass(frozen=True)
class ExactDenoiser:
    """The exact denoiser of a mixture of Gaussians m_k + Q sqrt(V) z with weights w_k."""

    schedule: NoiseSchedule
    means: Tensor = field(default_factory=lambda: torch.zeros(1, 3))
    weights: Tensor = field(default_factory=lambda: torch.ones(1))

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        # In the axes of the covariance, (n, k, 3).
        off = ((x_t.reshape(len(x_t), 3) - 0) @ Q)[:, None] - (alpha * (self.means @ Q)[:, None]).transpose(0, 1)
        total = (alpha**2 * V + sigma**2).expand(len(x_t), 3)[:, None]
        share = torch.softmax(self.weights.log() - (off**2 / total).sum(-1) / 2, 1)
        eps = ((share[..., None] * off / total).sum(1) * sigma) @ Q.T
        eps = eps.view_as(x_t)
        a, s = (v.reshape(-1, 1, 1, 1) for v in (alpha, sigma))
        return Prediction((x_t - s * eps) / a, eps)

    def draw(self, n: int, seed: int = 1) -> Tensor:
        source = generator("cpu", seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=source)
        return (self.means[k] + (torch.randn(n, 3, generator=source) * V.sqrt()) @ Q.T).view(n, *SHAPE)

    def log_density(self, x: Tensor) -> Tensor:
        off = (x.reshape(len(x), 1, 3) - self.means) @ Q
        each = -0.5 * (off**2 / V + torch.log(2 * math.pi * V)).sum(-1)
        return torch.logsumexp(each + self.weights.log(), 1)


TWO = (torch.tensor([[0.9, -0.4, 0.3], [-0.6, 0.8, 0.0]], dtype=torch.float64), torch.tensor([0.3, 0.7]).double())


def bits(nats: Tensor) -> Tensor:
    return nats / (3 * math.log(2))


# The probability-flow ODE


def flow_density(schedule: NoiseSchedule, x: Tensor) -> Tensor:
    """Return the log density of x under the exact flow from N(0, prior_std^2), which scales each axis of Gaussian
    data."""
    (a, s), (a_end, s_end) = (scales(schedule, torch.tensor(t)) for t in (schedule.t_min, schedule.t_max))
    stretch = ((a_end**2 * V + s_end**2) / (a**2 * V + s**2)).sqrt()  # of x_t
    std = torch.as_tensor(schedule.prior_std)
    end = stretch * a * (x.reshape(len(x), 3) @ Q)
    return -0.5 * ((end / std) ** 2 + torch.log(2 * math.pi * std**2)).sum(1) + (stretch * a).log().sum()


@pytest.mark.parametrize("name", [*options("model/schedule"), *WIDE])
def test_ode_density_is_that_of_the_flow_under_every_schedule(name: str) -> None:
    schedule = WIDE[name]() if name in WIDE else part("schedule", name)
    x = ExactDenoiser(schedule).draw(8)
    found = ODELikelihood(exact_trace=True)(ExactDenoiser(schedule), x, {}, PIXELS, generator("cpu", 0))
    torch.testing.assert_close(found, -bits(flow_density(schedule, x)), rtol=0, atol=2e-4)


def test_ode_bits_of_gaussian_data_are_exact(wide: NoiseSchedule) -> None:
    truth = ExactDenoiser(wide)
    x = truth.draw(60)
    found = ODELikelihood(exact_trace=True)(truth, x, {}, PIXELS, generator("cpu", 0))
    assert float((found + bits(truth.log_density(x))).abs().mean()) < 1e-3


def test_ode_bits_of_a_mixture_are_exact(wide: NoiseSchedule) -> None:
    truth = ExactDenoiser(wide, *TWO)
    x = truth.draw(60)
    found = ODELikelihood(1e-4, 1e-4, exact_trace=True)(truth, x, {}, PIXELS, generator("cpu", 0))
    off = found + bits(truth.log_density(x))
    assert float(off.abs().mean()) < 2e-3 and abs(float(off.mean())) < 1e-3


@pytest.mark.parametrize("schedule", [Even(), Straight()], ids=str)
def test_hutchinsons_estimate_is_unbiased(schedule: NoiseSchedule) -> None:
    """For one point and 300 random vectors, the mean equals the exact result within the Monte Carlo error."""
    truth, n = ExactDenoiser(schedule, *TWO), 300
    x = truth.draw(1)
    exact = ODELikelihood(1e-4, 1e-4, exact_trace=True)(truth, x, {}, PIXELS, generator("cpu", 0))
    found = ODELikelihood(1e-4, 1e-4)(truth, x.expand(n, *SHAPE), {}, PIXELS, generator("cpu", 1))
    error = float(found.std()) / math.sqrt(n)
    assert 1e-4 < error < 0.03
    assert abs(float(found.mean() - exact)) < 4 * error


def late(truth: ExactDenoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
    return ExactDenoiser.__call__(truth, x_t, (t + 0.02).clamp(max=truth.schedule.t_max), cond)


@pytest.mark.parametrize("bug", ["none", "trace twice", "trace with the wrong sign", "no change of scale", "late"])
def test_deliberate_bugs_make_the_density_wrong(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, trace = ExactDenoiser(Even(), *TWO), likelihoods._exact_trace
    x = truth.draw(50)
    if bug == "trace twice":
        monkeypatch.setattr(likelihoods, "_exact_trace", lambda *args: 2 * trace(*args))
    if bug == "trace with the wrong sign":
        monkeypatch.setattr(likelihoods, "_exact_trace", lambda *args: -trace(*args))
    if bug == "no change of scale":
        truth = ExactDenoiser(Even(high=4.0), *TWO)
        monkeypatch.setattr(likelihoods, "logsigmoid", torch.zeros_like)
    denoiser: Any = truth
    if bug == "late":
        denoiser = type("Late", (), {"schedule": truth.schedule, "__call__": lambda self, *args: late(truth, *args)})()
    found = ODELikelihood(1e-4, 1e-4, exact_trace=True)(denoiser, x, {}, PIXELS, generator("cpu", 0))
    assert (abs(float((found + bits(truth.log_density(x))).mean())) < 1e-3) == (bug == "none")


def test_dequantised_bits_are_those_of_the_bins() -> None:
    """With 256 bins the density is nearly constant over a bin, so the bits are -log2 of the bin's probability."""
    truth, levels, n = ExactDenoiser(Even(15.0, -15.0)), 256, 20
    x = ((truth.draw(1) + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    found = ODELikelihood(1e-4, 1e-4, exact_trace=True)(
        truth, x.expand(n, *SHAPE), {}, DataLikelihood(levels, torch.ones(1, 1, 3), 3), generator("cpu", 3)
    )
    mass = -bits(truth.log_density(x) + 3 * math.log(2 / 255))
    assert abs(float(found.mean() - mass)) < 4 * float(found.std()) / math.sqrt(n) + 1e-3
    # Two of the three values are padding, so the same nats are divided by one value.
    padded = ODELikelihood(1e-4, 1e-4, exact_trace=True)(
        truth, x, {}, DataLikelihood(levels, torch.tensor([[[1.0, 0, 0]]]), 1), generator("cpu", 3)
    )
    whole = ODELikelihood(1e-4, 1e-4, exact_trace=True)(
        truth, x, {}, DataLikelihood(levels, torch.ones(1, 1, 3), 3), generator("cpu", 3)
    )
    torch.testing.assert_close(padded, 3 * whole)


def test_failure_of_the_ode_solver_is_reported() -> None:
    @dataclass(frozen=True)
    class Broken(ExactDenoiser):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            prediction = super().__call__(x_t, t, cond)
            return prediction._replace(eps=prediction.eps * torch.nan)

    with pytest.raises(UserError, match="probability-flow ODE solver failed"):
        ODELikelihood()(Broken(Even()), torch.zeros(2, *SHAPE), {}, PIXELS, generator("cpu", 0))


# The bound


def gap(method: VLBLikelihood, truth: DenoiserProtocol, x: Tensor, log_density: Tensor) -> tuple[float, float]:
    """Return the mean and standard error of the bound minus the exact value, in bits/dim."""
    off = method(truth, x, {}, PIXELS, generator("cpu", 7)) + bits(log_density)
    return float(off.mean()), float(off.std()) / math.sqrt(len(x))


@pytest.mark.parametrize("name", [*options("model/schedule"), *WIDE])
def test_bound_is_never_better_than_the_exact_value(name: str) -> None:
    """The bound holds on average over the data, within two standard errors, which are small if it is tight."""
    small = {"num_features": 8} if name == "learned" else {}  # inverted by bisection
    schedule = WIDE[name]() if name in WIDE else part("schedule", name, **small)
    truth = ExactDenoiser(schedule, *TWO)
    x = truth.draw(4000)
    mean, error = gap(VLBLikelihood(), truth, x, truth.log_density(x))
    assert mean > -2 * error and (error < 0.07 or mean > 1)
    mean, error = gap(VLBLikelihood(num_timesteps=5, num_samples=None), truth, x, truth.log_density(x))
    assert mean > 4 * error


def test_bound_converges_with_many_steps(wide: NoiseSchedule) -> None:
    truth = ExactDenoiser(wide, *TWO)
    x = truth.draw(150)
    few, more, many = (
        gap(VLBLikelihood(num_timesteps=T, num_samples=None), truth, x, truth.log_density(x))[0] for T in (20, 80, 320)
    )  # fmt: skip
    assert few > 3 * more > 9 * many > 0


def test_continuous_bound_of_the_exact_denoiser_is_tight() -> None:
    truth = ExactDenoiser(Even(), *TWO)
    x = truth.draw(10_000)
    mean, error = gap(VLBLikelihood(num_samples=32), truth, x, truth.log_density(x))
    assert error < 0.02 and abs(mean) < 4 * error


def test_each_term_has_its_closed_form() -> None:
    """For data with variance V and T = 4 steps, the mean of each term is computed by hand.

    The exact denoiser has a mean squared error of a^2 V / (a^2 V + s^2) in eps and V s^2 / (a^2 V + s^2) in x_0.
    """
    beta = torch.tensor([0.02, 0.1, 0.3, 0.6])
    schedule, n = BetaTable(beta), 40_000
    found = VLBLikelihood(num_samples=None).terms(
        ExactDenoiser(schedule), ExactDenoiser(schedule).draw(n), {}, PIXELS, generator("cpu", 2)
    )
    a2 = torch.cumprod(1 - beta, 0)[:, None]
    s2 = 1 - a2
    snr = a2 / s2
    in_eps = a2 * V / (a2 * V + s2)
    expected = {
        "prior": 0.5 * (a2[-1] * V + s2[-1] - 1 - s2[-1].log()).sum(),
        "diffusion": 0.5 * ((snr[:-1] / snr[1:] - 1) * in_eps[1:]).sum(),
        "reconstruction": 0.5 * (V / (a2[0] * V + s2[0]) + torch.log(2 * math.pi * s2[0])).sum(),
    }
    for name, value in expected.items():
        error = float(found[name].std()) / math.sqrt(n)
        assert abs(float(found[name].mean() - bits(value))) < 4 * error + 1e-9, name
    assert list(found) == ["prior", "diffusion", "reconstruction"]


def test_learned_variance_counts_in_the_bound() -> None:
    """The terms are KL divergences of Gaussians with the learned variance (Nichol and Dhariwal 2021, eq. 15)."""

    @dataclass(frozen=True)
    class WithVariance(ExactDenoiser):
        share: float = 0.0

        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            prediction = super().__call__(x_t, t, cond)
            return prediction._replace(variance_fraction=torch.full_like(x_t, self.share))

    beta = torch.tensor([0.02, 0.1, 0.3, 0.6])
    schedule, n = BetaTable(beta), 40_000
    x = ExactDenoiser(schedule).draw(n)
    a2 = torch.cumprod(1 - beta, 0)[:, None]
    s2 = 1 - a2
    small = s2[:-1] / s2[1:] * beta[1:, None]
    for share in (0.0, 0.4, 1.0):
        found = VLBLikelihood(num_samples=None).terms(
            WithVariance(schedule, share=share), x, {}, PIXELS, generator("cpu", 2)
        )["diffusion"]
        var = small ** (1 - share) * beta[1:, None] ** share
        # Mean squared distance of the means: (sqrt(a2_s) beta / s2_t)^2 times the squared error in x_0.
        off = (a2[:-1] * (beta[1:, None] / s2[1:]) ** 2) * V * s2[1:] / (a2[1:] * V + s2[1:])
        expected = 0.5 * (torch.log(var / small) + (small + off) / var - 1).sum()
        assert abs(float(found.mean() - bits(expected))) < 4 * float(found.std()) / math.sqrt(n)


def test_random_steps_estimate_the_sum_over_all_steps() -> None:
    schedule = part("schedule", "linear", num_train_timesteps=60, beta_start=0.01, beta_end=0.3)
    truth = ExactDenoiser(schedule, *TWO)
    x = truth.draw(3000)
    every, some = (
        VLBLikelihood(num_samples=k).terms(truth, x, {}, PIXELS, generator("cpu", 2))["diffusion"] for k in (None, 8)
    )
    error = float(some.std()) / math.sqrt(3000)
    assert error < 0.1 and abs(float((some - every).mean())) < 4 * error


@pytest.mark.parametrize("bug", ["none", "twice", "half", "no prior", "no reconstruction", "sign"])
def test_deliberate_bugs_make_the_bound_wrong(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, kl = ExactDenoiser(Even(8.0, 0.0), *TWO), likelihoods.step_kl
    x = truth.draw(3000)
    factor = {"twice": 2.0, "half": 0.5, "sign": -1.0}.get(bug, 1.0)
    monkeypatch.setattr(likelihoods, "step_kl", lambda *args: factor * kl(*args))
    if bug == "no prior":
        monkeypatch.setattr(likelihoods, "prior_kl", lambda schedule, x0: x0.new_zeros(len(x0)))
    if bug == "no reconstruction":
        monkeypatch.setattr(likelihoods, "reconstruction_nll", lambda likelihood, x0, *args: x0.new_zeros(len(x0)))
    mean, error = gap(VLBLikelihood(num_samples=None, num_timesteps=100), truth, x, truth.log_density(x))
    assert error < 0.06
    assert (-4 * error < mean < 0.3) == (bug == "none"), mean


# Discrete pixels


def decoder_log_prob(
    decoder: Decoder, x0: Tensor, levels: int | None, fraction: float | None = None, log_snr: float = 2.0
) -> Tensor:
    """Compute log p(x_0 | x_1) for x_1 = 0.3 and a predicted image of 0.1, where the second log-SNR is lower by 1."""
    at = [schedule.at(x0.new_tensor(t), x0) for schedule in [Even(log_snr, log_snr - 1)] for t in (0.0, 1.0)]
    variance = None if fraction is None else torch.full_like(x0, fraction)
    prediction = Prediction(x0=torch.full_like(x0, 0.1), eps=torch.zeros_like(x0), variance_fraction=variance)
    return DataLikelihood(levels, torch.ones(1, 1, 1), 1, decoder).log_prob(
        x0, torch.full_like(x0, 0.3), prediction, at[0], at[1]
    )


@pytest.mark.parametrize("decoder", [GaussianDecoder(), PosteriorDecoder(), SoftmaxDecoder()], ids=lambda d: d.name)
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_probabilities_of_pixel_values_sum_to_one(decoder: Decoder, levels: int) -> None:
    x = torch.linspace(-1, 1, levels).view(-1, 1, 1, 1)
    for log_snr in (-2.0, 5.0, 13.0):
        assert float(decoder_log_prob(decoder, x, levels, 0.4, log_snr).exp().sum()) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_bin_probabilities_sum_to_one(levels: int, dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, levels, dtype=dtype)
    for mean in (-1.4, -1.0, 0.031, 0.9):
        for std in (0.003, 0.05, 1.0, 7.0):
            moments = (torch.tensor(value, dtype=dtype) for value in (mean, std))
            mass = discretized_normal_log_prob(x, *moments, levels).exp()
            assert float(mass.sum()) == pytest.approx(1, abs=1e-10 if dtype == torch.float64 else 1e-3)


def test_decoders_are_those_of_the_published_codes() -> None:
    """The formulas of DDPM, improved DDPM and VDM, restated with their betas or noise levels."""
    x = torch.tensor([-1.0, 37 / 127.5 - 1, 1.0]).view(-1, 1, 1, 1)
    # Betas and their cumulative products, for log-SNRs of 2 and 1.
    a2 = torch.sigmoid(torch.tensor([2.0, 1.0]))
    beta = torch.stack([1 - a2[0], 1 - a2[1] / a2[0]])
    posterior_variance = beta[1] * (1 - a2[0]) / (1 - a2[1])

    def binned(mean: float, variance: Tensor) -> Tensor:
        cdf = torch.distributions.Normal(mean, variance.sqrt()).cdf
        upper, lower = cdf(x + 1 / 255), cdf(x - 1 / 255)
        return torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower)).log().flatten()

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)

    close(decoder_log_prob(GaussianDecoder(), x, 256), binned(0.1, beta[0]))
    close(decoder_log_prob(PosteriorDecoder(), x, 256), binned(0.1, posterior_variance))
    interpolated = torch.exp(0.3 * beta[0].log() + 0.7 * posterior_variance.log())
    close(decoder_log_prob(PosteriorDecoder(), x, 256, fraction=0.3), binned(0.1, interpolated))
    # VDM: log_softmax of -0.5 exp(-gamma) (z / alpha - value)^2 with gamma = -log-SNR.
    logits = -0.5 * math.exp(2.0) * (0.3 / a2[0].sqrt() - torch.arange(256) / 127.5 + 1).square()
    close(decoder_log_prob(SoftmaxDecoder(), x, 256), logits.log_softmax(0)[[0, 37, 255]])


def test_decoders_train_the_variance_and_the_schedule() -> None:
    x = torch.linspace(-1, 1, 17).view(-1, 1, 1, 1)
    fraction = torch.full_like(x, 0.5).requires_grad_()
    at = [Even(5.0, 4.0).at(x.new_tensor(t), x) for t in (0.0, 1.0)]
    prediction = Prediction(x0=0.9 * x, eps=x, variance_fraction=fraction)
    likelihood = DataLikelihood(17, torch.ones(1, 1, 1), 1, PosteriorDecoder())
    likelihood.log_prob(x, x, prediction, *at).sum().backward()
    assert fraction.grad is not None and bool((fraction.grad != 0).all())

    def nll(log_snr: Tensor) -> Tensor:
        sigma2 = torch.sigmoid(-log_snr)
        at = SimpleNamespace(alpha=(1 - sigma2).sqrt(), sigma=sigma2.sqrt())
        soft = DataLikelihood(17, torch.ones(1, 1, 1), 1, SoftmaxDecoder())
        return soft.log_prob(x, at.alpha * x + at.sigma * 0.7, None, cast("Any", at)).sum()

    assert torch.autograd.gradcheck(nll, torch.tensor(4.0, requires_grad=True))


def test_padding_is_not_reconstructed() -> None:
    mask, x = torch.tensor([[[1.0, 0.0, 1.0]]]), torch.tensor([[[[0.0, -1.0, 1.0]]]])
    at, mean = Even(2.0).at(torch.tensor(0.0), x), torch.full_like(x, 0.2)
    found = DataLikelihood(None, mask, 2).log_prob(x, x, Prediction(mean, x), at)
    normal = torch.distributions.Normal(0.2, at.sigma.flatten())
    expected = normal.log_prob(torch.tensor(0.0)) + normal.log_prob(torch.tensor(1.0))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_bound_on_discrete_data_is_close_to_their_entropy() -> None:
    """The data are a Gaussian rounded to 17 values, with an approximate denoiser, so the bound is slightly above the
    entropy."""
    levels, n = 17, 4000
    x = (ExactDenoiser(Even()).draw(n, seed=8) * 0.35).clamp(-1, 1)
    step = 2 / (levels - 1)
    x = ((x + 1) / step).round() * step - 1

    @dataclass(frozen=True)
    class Narrow:
        schedule: NoiseSchedule

        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in scales(self.schedule, t))
            cov = Q @ torch.diag(V * 0.35**2) @ Q.T + step**2 / 12 * torch.eye(3)
            inner = alpha**2 * cov + sigma**2 * torch.eye(3)
            eps = sigma * torch.linalg.solve(inner.expand(len(x_t), 1, 3, 3), x_t.transpose(2, 3)).transpose(2, 3)
            return Prediction((x_t - sigma * eps) / alpha, eps)

    # The exact probability of each image, from a grid within its bin, given that no value is in an outer bin.
    cov = Q @ torch.diag(V * 0.35**2) @ Q.T
    normal = torch.distributions.MultivariateNormal(torch.zeros(3), cov)
    inside = x[(x.abs() < 1 - step / 4).flatten(1).all(1)]
    off = torch.linspace(-0.4, 0.4, 5) * step
    fine = torch.cartesian_prod(off, off, off)
    mass = torch.logsumexp(normal.log_prob(inside.view(-1, 1, 3) + fine), 1) - math.log(125) + 3 * math.log(step)
    found = VLBLikelihood(num_timesteps=400, num_samples=40)(
        Narrow(Even(5.5, -10.0)), inside, {}, DataLikelihood(levels, torch.ones(1, 1, 3), 3), generator("cpu", 2)
    )
    excess = found + bits(mass - math.log(len(inside) / n))
    error = float(excess.std()) / math.sqrt(len(inside))
    assert error < 0.02 and -4 * error < float(excess.mean()) < 0.15


# In a model


def model(**changes: Any) -> Diffusion:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    parts = {"schedule": "cosine", "parameterization": "eps", "objective": "simple", "sampler": "ddim"}
    built = {group: part(group, changes.pop(group, name)) for group, name in parts.items()}
    spec = changes.pop("spec", DataSpec(name="tiny", shape=(1, 4, 4), num_classes=0, num_bins=17, padding=1))
    return Diffusion(spec, network=partial(DenoisingMLP, width=16, depth=1), **built, **changes)


@pytest.mark.parametrize("name", options("model/likelihoods"))
def test_every_method_uses_only_the_generator(name: str) -> None:
    methods = part("likelihoods", name)
    diffusion = model(likelihoods=methods)
    x = torch.full((3, 1, 4, 4), -1.0)
    x[:, :, 1:3, 1:3] = torch.randint(17, (3, 1, 2, 2)) / 8 - 1
    for method, likelihood in diffusion.likelihoods().items():
        assert method == name and likelihood.kind in ("bound", "estimate")
        with torch.no_grad():
            one, two = (likelihood.bits_per_dim(x, {}, generator("cpu", 3)) for _ in range(2))
        assert one.shape == (3,) and torch.isfinite(one).all() and torch.equal(one, two)
    continuous = DataSpec(name="points", shape=(2, 1, 1), num_bins=None)
    assert model(likelihoods=methods, spec=continuous).likelihoods() == {}


def test_default_method_needs_few_network_calls() -> None:
    cfg = compose("model=ddpm")
    assert list(cfg.model.likelihoods) == ["vlb"]
    diffusion, calls = model(likelihoods=part("likelihoods", "vlb")), []
    diffusion.network.register_forward_hook(lambda *_: calls.append(1))
    diffusion.likelihoods()["vlb"].bits_per_dim(torch.zeros(2, 1, 4, 4), {}, generator("cpu", 0))
    assert len(calls) <= 20


def test_model_passes_the_data_likelihood_to_its_objective() -> None:
    seen: list[DataLikelihood] = []

    class Remembers(WeightedMSE):
        def with_likelihood(self, likelihood: DataLikelihood) -> Any:
            seen.append(likelihood)
            return self

        def __call__(self, denoiser: Any, x0: Tensor, cond: Cond, rng: Any) -> dict[str, Tensor]:
            return {"loss": x0.flatten(1).sum(1)}

    diffusion = model()
    diffusion.objective = Remembers()
    diffusion.losses(torch.zeros(2, 1, 4, 4), {}, None)  # type: ignore[arg-type]
    assert (seen[0].num_bins, seen[0].num_values, float(seen[0].mask.sum())) == (17, 4, 4)


def test_incompatible_parameterisation_is_rejected_before_training() -> None:
    with pytest.raises(UserError, match="continuous-time schedule"):
        Diffusion(
            DataSpec(name="points", shape=(2, 1, 1)), network=partial(DenoisingMLP, width=8, depth=1),
            schedule=Even(), parameterization=part("parameterization", "posterior_mean"),
            objective=part("objective", "simple"), sampler=part("sampler", "ddim"),
        )  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: VLBLikelihood(num_samples=0),
        lambda: VLBLikelihood(num_timesteps=0),
        lambda: ODELikelihood(rtol=0),
        lambda: VLBLikelihood(num_samples=None)(
            ExactDenoiser(Even()), torch.zeros(1, *SHAPE), {}, PIXELS, generator("cpu", 0)
        ),
    ],
)
def test_invalid_settings_are_rejected(make: Callable[[], object]) -> None:
    with pytest.raises(UserError):
        make()
