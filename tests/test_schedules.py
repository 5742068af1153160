"""Noise schedules, compared with their papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from composing import options
from gencompare.diffusion.discrete_schedules import BetaTable, CosineBetas, GeometricSigmas, LinearBetas, SigmoidBetas
from gencompare.diffusion.learned_schedule import LearnedSchedule
from gencompare.diffusion.schedules import CLEAN, VE, VP, EDMSchedule, NoiseSchedule, SubVP, VariancePreserving
from gencompare.errors import UserError
from gencompare.rng import generator
from parts import part

SCHEDULES = options("model/schedule")


pytestmark = pytest.mark.usefixtures("double")


def inner_times(schedule: NoiseSchedule, n: int = 400) -> torch.Tensor:
    """Return times inside the range that avoid the nodes of tables with 10, 1000 or 4000 steps."""
    k = torch.linspace(schedule.t_min, schedule.t_max, n + 2)[1:-1]
    return ((k * 1000).floor() + 0.37) / 1000


def test_there_are_schedules() -> None:
    tables = {"linear", "scaled_linear", "cosine", "sigmoid", "betas", "ncsn"}
    assert tables | {"vp", "subvp", "ve", "karras", "rectified", "learned"} <= set(SCHEDULES)


# Properties of all schedules


def test_snr_falls_strictly_and_is_finite(schedule: NoiseSchedule) -> None:
    schedule.check()
    for t in (torch.linspace(schedule.t_min, schedule.t_max, 5001), schedule.discrete_times):
        if t is not None:
            log_snr = schedule.log_snr(t)
            assert torch.isfinite(log_snr).all()
            assert (log_snr.diff() < 0).all()


def test_t_from_log_snr_inverts_log_snr(schedule: NoiseSchedule) -> None:
    t = torch.linspace(schedule.t_min, schedule.t_max, 777)
    torch.testing.assert_close(schedule.t_from_log_snr(schedule.log_snr(t)), t, atol=1e-10, rtol=0)
    # The bisection that schedules without a closed form inherit.
    torch.testing.assert_close(NoiseSchedule.t_from_log_snr(schedule, schedule.log_snr(t)), t, atol=1e-10, rtol=0)


def test_unreachable_snr_maps_to_an_end(schedule: NoiseSchedule) -> None:
    ends = schedule.t_from_log_snr(torch.tensor([1e3, -1e3]))
    torch.testing.assert_close(ends, torch.tensor([schedule.t_min, schedule.t_max]), atol=1e-10, rtol=0)


def test_sde_keeps_the_marginals(schedule: NoiseSchedule) -> None:
    """dx = f x dt + g dw moves the mean by alpha' = f alpha and the variance by (sigma^2)' = 2 f sigma^2 + g^2."""
    t, h = inner_times(schedule), 1e-6
    f, g2 = schedule.sde(t)
    before, here, after = schedule.at(t - h), schedule.at(t), schedule.at(t + h)
    d_alpha = (after.alpha - before.alpha) / (2 * h)
    d_variance = (after.sigma**2 - before.sigma**2) / (2 * h)
    torch.testing.assert_close(f * here.alpha, d_alpha, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(2 * f * here.sigma**2 + g2, d_variance, rtol=1e-6, atol=1e-8)
    assert (g2 > 0).all()


def test_derivatives_are_correct_at_the_ends(schedule: NoiseSchedule) -> None:
    """Drift and diffusion are continuous at t_max, where sampling starts, and at t_min, where it ends."""
    ends = torch.tensor([schedule.t_min, schedule.t_max])
    h = 1e-3 * min(schedule.t_min or 1e-3, 1 - schedule.t_max or 1e-3) * torch.tensor([1.0, -1.0])
    for slope, function in (
        (schedule.at(ends).dlog_snr_dt, schedule.log_snr),
        (schedule.at(ends).dlog_alpha_dt, schedule.log_alpha),
    ):
        torch.testing.assert_close(slope, (function(ends + h) - function(ends)) / h, rtol=2e-3, atol=1e-6)
    assert (schedule.at(ends).dlog_snr_dt < 0).all() and (schedule.sde(ends)[1] > 0).all()


def test_alpha_sigma_and_log_snr_are_consistent(schedule: NoiseSchedule) -> None:
    at = schedule.at(inner_times(schedule))
    torch.testing.assert_close(at.log_snr, 2 * torch.log(at.alpha / at.sigma), rtol=1e-10, atol=1e-10)
    if isinstance(schedule, VariancePreserving):
        torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones_like(at.alpha), rtol=1e-14, atol=0)


def test_variance_preserving_sde_in_closed_form(schedule: NoiseSchedule) -> None:
    """The SDE dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw (Song et al. 2021, eq. 11) has g^2 = -2 f."""
    if isinstance(schedule, VariancePreserving):
        f, g2 = schedule.sde(inner_times(schedule))
        torch.testing.assert_close(g2, -2 * f, rtol=1e-10, atol=0)


def test_clean_data_have_no_noise(schedule: NoiseSchedule) -> None:
    at = schedule.at(torch.tensor([CLEAN, schedule.t_max]), torch.zeros(2, 1, 4, 4))
    assert at.alpha.shape == (2, 1, 1, 1)
    assert (at.alpha[0], at.sigma[0], at.log_snr[0]) == (1, 0, torch.inf)
    assert at.sigma[1] > 0


def test_float32_agrees_with_float64(schedule: NoiseSchedule, request: pytest.FixtureRequest) -> None:
    torch.set_default_dtype(torch.float32)
    single = part("schedule", request.node.callspec.params["schedule"])
    t = torch.cat([inner_times(schedule), torch.tensor([schedule.t_min, schedule.t_max])]).float()
    exact, rounded = schedule.at(t.double()), single.at(t)
    assert rounded.sigma.dtype == torch.float32
    for name in ("alpha", "sigma"):
        torch.testing.assert_close(getattr(rounded, name).double(), getattr(exact, name), rtol=2e-4, atol=0)


def test_float32_represents_the_noise_at_both_ends(schedule: NoiseSchedule) -> None:
    """Rounding x_t to float32 preserves the noise at t_min, and the image at t_max, to 1 % or better.

    An image below a thousandth of the noise need not be preserved.
    """
    source = generator("cpu", 0)
    x0, eps = torch.rand(1000, generator=source) * 2 - 1, torch.randn(1000, generator=source)
    first, last = schedule.at(torch.tensor(schedule.t_min)), schedule.at(torch.tensor(schedule.t_max))
    x_t = (first.alpha * x0 + first.sigma * eps).float().double()
    assert ((x_t - first.alpha * x0) / first.sigma - eps).abs().max() < 0.01
    if last.alpha / last.sigma > 1e-3:
        x_t = (last.alpha * x0 + last.sigma * eps).float().double()
        assert ((x_t - last.sigma * eps) / last.alpha - x0).abs().max() < 0.01


def test_prior_is_the_noise_at_the_end(schedule: NoiseSchedule) -> None:
    x = schedule.prior((4000, 1, 2, 2), generator("cpu", 0))
    at = schedule.at(torch.tensor(schedule.t_max))
    # The published priors are N(0, sigma^2) or, where variance is preserved, N(0, 1).
    expected = 1.0 if isinstance(schedule, VariancePreserving) else float(at.sigma)
    assert abs(float(x.std()) / expected - 1) < 0.02
    assert abs(float(x.mean())) / expected < 0.03
    torch.testing.assert_close(x, schedule.prior((4000, 1, 2, 2), generator("cpu", 0)), rtol=0, atol=0)
    # A grid that starts later starts with the noise of its first time.
    middle = torch.tensor((schedule.t_min + schedule.t_max) / 2)
    expected = 1.0 if isinstance(schedule, VariancePreserving) else float(schedule.at(middle).sigma)
    assert abs(float(schedule.prior((9000,), generator("cpu", 0), t=middle).std()) / expected - 1) < 0.03


# Tables compared with published values


def alpha_bar(schedule: BetaTable) -> np.ndarray:
    at = schedule.at(torch.arange(1, schedule.num_train_timesteps + 1) / schedule.num_train_timesteps)
    return (at.alpha**2).numpy()


def test_linear_betas_are_those_of_ddpm() -> None:
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(alpha_bar(part("schedule", "linear")), expected, rtol=1e-11)
    # Ho et al. (2020), section 4: the chain ends at KL(q(x_T | x_0) || N(0, I)) of about 1e-5 bits per dimension.
    remains = expected[-1]
    kl = 0.5 * (remains * 0.25 + (1 - remains) - 1 - np.log1p(-remains)) / np.log(2)
    assert 3e-6 < kl < 3e-5


def test_scaled_linear_betas_are_those_of_latent_diffusion() -> None:
    expected = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    np.testing.assert_allclose(alpha_bar(part("schedule", "scaled_linear")), expected, rtol=1e-11)


def test_cosine_betas_are_those_of_improved_ddpm() -> None:
    t = np.arange(1001) / 1000
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    found = alpha_bar(part("schedule", "cosine"))
    np.testing.assert_allclose(found[:-1], (f / f[0])[1:-1], rtol=1e-9)
    # f is 0 at T, the only step at which beta is clipped to 0.999.
    np.testing.assert_allclose(found[-1] / found[-2], 1 - 0.999, rtol=1e-9)


def test_sigmoid_betas_are_those_of_geodiff() -> None:
    betas = 1e-4 + (0.02 - 1e-4) / (1 + np.exp(-np.linspace(-6, 6, 1000)))
    np.testing.assert_allclose(alpha_bar(part("schedule", "sigmoid")), np.cumprod(1 - betas), rtol=1e-11)


def test_any_list_of_betas_is_a_schedule() -> None:
    betas = [0.3, 0.1, 0.02]
    np.testing.assert_allclose(alpha_bar(part("schedule", "betas", betas=betas)), [0.7, 0.63, 0.6174], rtol=1e-12)


def test_first_step_adds_the_first_beta() -> None:
    """Time 1 / T is the first step, and neither clean data nor the second step."""
    schedule = BetaTable([0.1, 0.2, 0.3, 0.4])
    at = schedule.at(torch.tensor([0.25, 0.5, 0.75, 1.0]))
    np.testing.assert_allclose(at.sigma.numpy() ** 2, 1 - np.cumprod([0.9, 0.8, 0.7, 0.6]), rtol=1e-12)


def test_tables_are_exact_at_their_steps_in_float32() -> None:
    torch.set_default_dtype(torch.float32)
    for T in (10, 1000, 4000):
        schedule = LinearBetas(num_train_timesteps=T)
        times = schedule.discrete_times
        assert times.dtype == torch.float32
        assert torch.equal(schedule.log_snr(times), schedule.table)


def test_interpolation_lies_between_the_steps() -> None:
    schedule = BetaTable([0.1, 0.2, 0.3, 0.4])
    ends = schedule.log_snr(torch.tensor([0.5, 0.75]))
    middle = schedule.log_snr(torch.tensor(0.625))
    torch.testing.assert_close(middle, ends.mean(), rtol=1e-12, atol=0)


# The score SDEs in closed form (Song et al. 2021, eq. 9, 11, 12 and 29), on times over the whole range

T = torch.tensor([1e-3, 0.01, 0.1, 0.35, 0.5, 0.8, 0.99, 1.0], dtype=torch.float64)
t = T.numpy()


def exactly(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("ends", [(0.1, 20.0), (3.0, 3.0), (0.5, 4.0)])
def test_vp_and_sub_vp_in_closed_form(ends: tuple[float, float]) -> None:
    low, high = ends
    beta = low + t * (high - low)
    exponent = t**2 * (high - low) / 2 + t * low
    for name in ("vp", "subvp"):
        schedule = part("schedule", name, beta_min=low, beta_max=high)
        at, (f, g2) = schedule.at(T), schedule.sde(T)
        exactly(at.alpha, np.exp(-exponent / 2))
        exactly(f, -beta / 2)
        if name == "vp":
            exactly(at.sigma**2, 1 - np.exp(-exponent))
            exactly(g2, beta)
        else:
            exactly(at.sigma, 1 - np.exp(-exponent))
            exactly(g2, beta * (1 - np.exp(-2 * exponent)))


def test_vp_is_the_limit_of_linear_betas() -> None:
    """Since beta_i = beta(i / T) / T (Song et al. 2021, appendix B), ten times as many steps reduce the error
    tenfold."""
    table, limit = LinearBetas(), VP()
    t = torch.linspace(0.1, 1, 10)
    torch.testing.assert_close(table.at(t).alpha, limit.at(t).alpha, rtol=0.06, atol=0)
    finer = LinearBetas(beta_start=1e-5, beta_end=2e-3, num_train_timesteps=10_000)
    torch.testing.assert_close(finer.at(t).alpha, limit.at(t).alpha, rtol=0.006, atol=0)


def test_ve_in_closed_form() -> None:
    schedule = part("schedule", "ve")
    at, (f, g2) = schedule.at(T), schedule.sde(T)
    sigma = 0.02 * (100 / 0.02) ** t
    exactly(at.sigma, sigma)
    exactly(g2, 2 * sigma**2 * np.log(100 / 0.02))
    assert (at.alpha == 1).all() and (f == 0).all()


@pytest.mark.parametrize(
    ("name", "times", "published"),
    [
        ("ve", np.linspace(0, 1, 9), 0.01 * (50 / 0.01) ** np.linspace(0, 1, 9)),
        ("ncsn", np.arange(1, 11) / 10, np.geomspace(0.01, 1, 10)),
    ],
)
def test_noise_in_pixel_units_is_as_published(name: str, times: np.ndarray, published: np.ndarray) -> None:
    """Pixels p in [0, 1] are x = 2 p - 1 here, and adding noise in either range gives the same image."""
    at = part("schedule", name).at(torch.tensor(times))
    p, eps = 0.3, -1.7
    x_t = at.alpha * (2 * p - 1) + at.sigma * eps
    np.testing.assert_allclose((x_t.numpy() + 1) / 2, p + published * eps, rtol=1e-12)
    # In pixel units the noise is half as large, so the log-SNR of an image of size 1 is 2 log 2 higher.
    np.testing.assert_allclose(at.log_snr.numpy() + 2 * np.log(2), -2 * np.log(published), rtol=0, atol=1e-12)


def test_ncsn_level_i_is_time_i_over_l() -> None:
    schedule = part("schedule", "ncsn", num_levels=4, sigma_min=0.1, sigma_max=0.8)
    exactly(schedule.at(torch.tensor([0.25, 0.5, 0.625, 0.75, 1])).sigma, np.array([1, 2, 8**0.5, 4, 8]) / 10)
    assert schedule.discrete_times is not None
    assert torch.equal(schedule.discrete_times, torch.tensor([0.25, 0.5, 0.75, 1.0]))


@pytest.mark.parametrize("rho", [7.0, 3.0, 1.0])
def test_even_times_of_edm_schedule_are_its_grid(rho: float) -> None:
    n, i = 18, np.arange(18)
    low, high = 0.002 ** (1 / rho), 80 ** (1 / rho)
    grid = (high + i / (n - 1) * (low - high)) ** rho
    at = part("schedule", "karras", rho=rho).at(torch.linspace(1, 0, n))
    exactly(at.sigma, grid)
    assert (at.alpha == 1).all()


def test_rectified_flow_is_straight() -> None:
    """For x_t = (1 - t) x_0 + t eps, the velocity is eps - x_0 at all times, f = -1 / (1 - t) and g^2 = 2 t / (1 -
    t)."""
    schedule = part("schedule", "rectified")
    at, (f, g2) = schedule.at(T[:-1]), schedule.sde(T[:-1])
    exactly(at.alpha, 1 - t[:-1])
    exactly(at.sigma, t[:-1])
    exactly(f, -1 / (1 - t[:-1]))
    exactly(g2, 2 * t[:-1] / (1 - t[:-1]))


# The learned schedule


def shaken(seed: int, size: float = 4.0) -> LearnedSchedule:
    """Return a learned schedule with large random weights, few enough that they do not average out."""
    schedule, source = LearnedSchedule(num_features=5), generator("cpu", seed)
    with torch.no_grad():
        for parameter in schedule.interior_parameters():
            parameter += size * torch.randn(parameter.shape, generator=source)
    return schedule


@pytest.mark.parametrize("seed", range(10))
def test_learned_schedule_falls_for_any_weights_between_its_endpoints(seed: int) -> None:
    schedule = shaken(seed)
    schedule.check()
    found = schedule.log_snr(torch.linspace(0, 1, 2001)).detach()
    assert (found.diff() < 0).all()
    assert found[0] == 13.3 and found[-1] == -5
    assert (found - LearnedSchedule().log_snr(torch.linspace(0, 1, 2001)).detach()).abs().max() > 0.05, (
        "the schedule has a different shape"
    )


def test_endpoints_do_not_change_the_shape() -> None:
    t, schedule = torch.linspace(0, 1, 101), shaken(1)
    before = schedule.log_snr(t).detach()
    with torch.no_grad():
        schedule.gamma_min.fill_(-9.0)
        schedule.gamma_max.fill_(2.0)
    after = schedule.log_snr(t).detach()
    torch.testing.assert_close((9 - after) / 11, (13.3 - before) / 18.3, rtol=0, atol=1e-12)


def test_learned_schedule_starts_nearly_straight_for_every_seed() -> None:
    t = torch.linspace(0, 1, 101)
    first, second = part("schedule", "learned").log_snr(t), part("schedule", "learned").log_snr(t)
    assert torch.equal(first, second)
    assert (first - (13.3 - 18.3 * t)).abs().max() < 1


def test_gradients_reach_endpoints_and_interior() -> None:
    schedule = LearnedSchedule(num_features=8)
    named = {id(p) for p in schedule.parameters()}
    parts_of_it = [id(p) for p in [*schedule.endpoint_parameters(), *schedule.interior_parameters()]]
    assert len(parts_of_it) == len(set(parts_of_it)) and set(parts_of_it) == named
    t = torch.tensor([0.2, 0.7])
    # The gradient of a function of lambda and its slope, as in the VDM loss, is compared with finite differences.
    value = lambda: (schedule.at(t).dlog_snr_dt * schedule.at(t).log_snr.sigmoid()).sum()  # noqa: E731
    value().backward()
    for parameter in schedule.parameters():
        assert parameter.grad is not None
        found, flat = parameter.grad.flatten()[0], parameter.detach().view(-1)
        kept = float(flat[0])
        flat[0] = kept + 1e-5
        above = value().item()
        flat[0] = kept - 1e-5
        below = value().item()
        flat[0] = kept
        assert abs(float(found)) > 1e-6
        assert float(found) == pytest.approx((above - below) / 2e-5, rel=1e-5)


def test_interior_does_not_move_the_endpoints() -> None:
    schedule = shaken(2)
    schedule.log_snr(torch.tensor([0.0, 1.0])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs() > 1 for p in schedule.endpoint_parameters())
    assert all(p.grad is not None and (p.grad.abs() < 1e-12).all() for p in schedule.interior_parameters())


def test_learned_schedule_is_not_computed_in_16_bits() -> None:
    torch.set_default_dtype(torch.float32)
    schedule, t = LearnedSchedule(), torch.linspace(0, 1, 50)
    outside = schedule.log_snr(t)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(schedule.log_snr(t), outside, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("parameter", "value", "named"),
    [
        ("gamma_max", -13.3, "not strictly decreasing"),
        ("gamma_max", -14.0, "not strictly decreasing"),
        ("gamma_max", -13.0, "has collapsed"),
        ("gamma_min", torch.nan, "not finite"),
        ("gamma_max", torch.inf, "not finite"),
        ("height", torch.nan, "not finite"),
    ],
)
def test_collapsed_learned_schedule_is_rejected(parameter: str, value: float, named: str) -> None:
    schedule = LearnedSchedule()
    schedule.check()
    with torch.no_grad():
        getattr(schedule, parameter).fill_(value)
    with pytest.raises(UserError, match=f"LearnedSchedule.*{named}"):
        schedule.check()


def test_learned_schedule_that_is_a_step_is_rejected() -> None:
    """If the log-SNR falls at a single time, no time is left for intermediate noise levels."""
    torch.set_default_dtype(torch.float32)
    schedule = LearnedSchedule()
    with torch.no_grad():
        schedule.straight.fill_(-40.0)
        schedule.steepness.fill_(1e5)
        schedule.bias.zero_()
    with pytest.raises(UserError, match="not strictly decreasing"):
        schedule.check()


# Invalid schedules are rejected


class Rising(VariancePreserving):
    t_min = 0.0

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        return 5 * torch.cos(7 * t)


class Infinite(VariancePreserving):
    t_min = 0.0

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.log(t)


def test_rising_or_infinite_snr_is_rejected() -> None:
    with pytest.raises(UserError, match="Rising: the signal-to-noise ratio is not strictly decreasing"):
        Rising().check()
    with pytest.raises(UserError, match="Infinite: log-SNR is not finite at t=0"):
        Infinite().check()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BetaTable([1.0, 0.1]),
        lambda: BetaTable([0.1, 1.1]),
        lambda: BetaTable([*[1 - 1e-15] * 3, 1.0]),
        lambda: BetaTable([0.1, -0.1]),
        lambda: BetaTable([0.1]),
        lambda: LinearBetas(beta_start=0.02, beta_end=1e-4),
        lambda: LinearBetas(power=0),
        lambda: CosineBetas(s=-1),
        lambda: SigmoidBetas(beta_start=0.02, beta_end=1e-4),
        lambda: SigmoidBetas(beta_end=1.0),
        lambda: VP(beta_min=20, beta_max=0.1),
        lambda: VP(beta_min=0),
        lambda: VP(t_min=0),
        lambda: SubVP(t_min=1),
        lambda: VE(sigma_min=1, sigma_max=1),
        lambda: VE(sigma_min=0),
        lambda: VE(sigma_max=float("nan")),
        lambda: GeometricSigmas(sigma_min=2, sigma_max=0.02),
        lambda: GeometricSigmas(num_levels=1),
        lambda: EDMSchedule(sigma_min=-1),
        lambda: EDMSchedule(rho=0),
        lambda: LearnedSchedule(gamma_min=5, gamma_max=-13),
        lambda: LearnedSchedule(gamma_max=float("inf")),
        lambda: LearnedSchedule(num_features=0),
    ],
)
def test_invalid_settings_are_rejected(make) -> None:
    with pytest.raises(UserError):
        make()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_results_have_the_type_and_shape_of_the_times(schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
    t = torch.full(shape, schedule.t_max, dtype=torch.float32)
    at = schedule.float().at(t)
    for value in (at.alpha, at.sigma, at.log_snr, at.dlog_alpha_dt, at.dlog_snr_dt):
        assert value.dtype == torch.float32 and value.shape == shape
