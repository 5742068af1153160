"""Noise schedules and times, held against what their papers say of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from composing import options
from gencompare.diffusion.schedules import (
    CLEAN,
    BetaTable,
    CosineBetas,
    LinearBetas,
    NoiseSchedule,
    VariancePreserving,
)
from gencompare.diffusion.times import UniformGrid, UniformTimes
from gencompare.errors import UserError
from gencompare.seeds import Draws, generator
from parts import part

SCHEDULES = options("model/schedule")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return part("schedule", request.param).requires_grad_(False)


def inner_times(schedule: NoiseSchedule, n: int = 400) -> torch.Tensor:
    """Times inside the range that keep off the nodes of any table of 10, 1000 or 4000 steps."""
    k = torch.linspace(schedule.t_min, schedule.t_max, n + 2)[1:-1]
    return ((k * 1000).floor() + 0.37) / 1000


def test_there_are_schedules() -> None:
    tables = {"linear", "scaled_linear", "cosine", "sigmoid", "betas", "ncsn"}
    assert tables | {"vp", "subvp", "ve", "karras", "rectified", "learned"} <= set(SCHEDULES)


# Laws of every schedule


def test_snr_falls_strictly_and_is_finite(schedule: NoiseSchedule) -> None:
    schedule.check()
    for t in (torch.linspace(schedule.t_min, schedule.t_max, 5001), schedule.discrete_times):
        if t is not None:
            log_snr = schedule.log_snr(t)
            assert torch.isfinite(log_snr).all()
            assert (log_snr.diff() < 0).all()


def test_time_follows_from_log_snr(schedule: NoiseSchedule) -> None:
    t = torch.linspace(schedule.t_min, schedule.t_max, 777)
    torch.testing.assert_close(schedule.t_from_log_snr(schedule.log_snr(t)), t, atol=1e-10, rtol=0)
    # The bisection that a schedule without a closed form inherits.
    torch.testing.assert_close(NoiseSchedule.t_from_log_snr(schedule, schedule.log_snr(t)), t, atol=1e-10, rtol=0)


def test_time_of_an_snr_out_of_reach_is_an_end(schedule: NoiseSchedule) -> None:
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


def test_alpha_sigma_and_log_snr_agree(schedule: NoiseSchedule) -> None:
    at = schedule.at(inner_times(schedule))
    torch.testing.assert_close(at.log_snr, 2 * torch.log(at.alpha / at.sigma), rtol=1e-10, atol=1e-10)
    if isinstance(schedule, VariancePreserving):
        torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones_like(at.alpha), rtol=1e-14, atol=0)


def test_variance_preserving_sde_in_closed_form(schedule: NoiseSchedule) -> None:
    """dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw (Song et al. 2021, eq. 11): g^2 = -2 f."""
    if isinstance(schedule, VariancePreserving):
        f, g2 = schedule.sde(inner_times(schedule))
        torch.testing.assert_close(g2, -2 * f, rtol=1e-10, atol=0)


def test_clean_data_have_no_noise(schedule: NoiseSchedule) -> None:
    at = schedule.at(torch.tensor([CLEAN, schedule.t_max]), torch.zeros(2, 1, 4, 4))
    assert at.alpha.shape == (2, 1, 1, 1)
    assert (at.alpha[0], at.sigma[0], at.log_snr[0]) == (1, 0, torch.inf)
    assert at.sigma[1] > 0


def test_float32_keeps_what_float64_knows(schedule: NoiseSchedule, request: pytest.FixtureRequest) -> None:
    torch.set_default_dtype(torch.float32)
    single = part("schedule", request.node.callspec.params["schedule"])
    t = inner_times(schedule).float()
    exact, rounded = schedule.at(t.double()), single.at(t)
    assert rounded.sigma.dtype == torch.float32
    for name in ("alpha", "sigma"):
        torch.testing.assert_close(getattr(rounded, name).double(), getattr(exact, name), rtol=2e-4, atol=0)


def test_prior_is_the_noise_at_the_end(schedule: NoiseSchedule) -> None:
    x = schedule.prior((4000, 1, 2, 2), generator("cpu", 0))
    at = schedule.at(torch.tensor(schedule.t_max))
    # The published priors are N(0, sigma^2) or, where variance is preserved, N(0, 1).
    expected = 1.0 if isinstance(schedule, VariancePreserving) else float(at.sigma)
    assert abs(float(x.std()) / expected - 1) < 0.02
    assert abs(float(x.mean())) / expected < 0.03
    torch.testing.assert_close(x, schedule.prior((4000, 1, 2, 2), generator("cpu", 0)), rtol=0, atol=0)


# The tables, number by number


def alpha_bar(schedule: BetaTable) -> np.ndarray:
    at = schedule.at(torch.arange(1, schedule.T + 1) / schedule.T)
    return (at.alpha**2).numpy()


def test_linear_table_is_ddpms() -> None:
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(alpha_bar(part("schedule", "linear")), expected, rtol=1e-11)
    # Ho et al. (2020), section 4: the chain ends at KL(q(x_T | x_0) || N(0, I)) of about 1e-5 bits a dimension.
    remains = expected[-1]
    kl = 0.5 * (remains * 0.25 + (1 - remains) - 1 - np.log1p(-remains)) / np.log(2)
    assert 3e-6 < kl < 3e-5


def test_scaled_linear_table_is_latent_diffusions() -> None:
    expected = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    np.testing.assert_allclose(alpha_bar(part("schedule", "scaled_linear")), expected, rtol=1e-11)


def test_cosine_table_is_improved_ddpms() -> None:
    t = np.arange(1001) / 1000
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    found = alpha_bar(part("schedule", "cosine"))
    np.testing.assert_allclose(found[:-1], (f / f[0])[1:-1], rtol=1e-9)
    # f is 0 at T: there alone a beta is cut down to 0.999.
    np.testing.assert_allclose(found[-1] / found[-2], 1 - 0.999, rtol=1e-9)


def test_first_step_adds_the_first_beta() -> None:
    """Time 1 / T is the first step, not the clean image and not the second step."""
    schedule = BetaTable([0.1, 0.2, 0.3, 0.4])
    at = schedule.at(torch.tensor([0.25, 0.5, 0.75, 1.0]))
    np.testing.assert_allclose(at.sigma.numpy() ** 2, 1 - np.cumprod([0.9, 0.8, 0.7, 0.6]), rtol=1e-12)


def test_tables_are_exact_at_their_steps_in_float32() -> None:
    torch.set_default_dtype(torch.float32)
    for T in (10, 1000, 4000):
        schedule = LinearBetas(T=T)
        times = schedule.discrete_times
        assert times.dtype == torch.float32
        assert torch.equal(schedule.log_snr(times), schedule.table)


def test_interpolation_lies_between_the_steps() -> None:
    schedule = BetaTable([0.1, 0.2, 0.3, 0.4])
    ends = schedule.log_snr(torch.tensor([0.5, 0.75]))
    middle = schedule.log_snr(torch.tensor(0.625))
    torch.testing.assert_close(middle, ends.mean(), rtol=1e-12, atol=0)


# Bad schedules are refused


class Rising(VariancePreserving):
    t_min = 0.0

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        return 5 * torch.cos(7 * t)


class Infinite(VariancePreserving):
    t_min = 0.0

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.log(t)


def test_a_rising_or_infinite_snr_is_refused() -> None:
    with pytest.raises(UserError, match="Rising: the signal-to-noise ratio does not fall"):
        Rising().check()
    with pytest.raises(UserError, match="Infinite: log-SNR is not finite at t=0"):
        Infinite().check()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BetaTable([0.1, 1.0]),
        lambda: BetaTable([0.1, -0.1]),
        lambda: BetaTable([0.1]),
        lambda: LinearBetas(first=0.02, last=1e-4),
        lambda: LinearBetas(power=0),
        lambda: CosineBetas(s=-1),
    ],
)
def test_bad_tables_are_refused(make) -> None:
    with pytest.raises(UserError):
        make()


# Times


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_grid_leads_from_noise_to_clean_data(schedule: NoiseSchedule, steps: int) -> None:
    times = UniformGrid()(schedule, steps)
    assert len(times) == steps + 1
    assert (times.diff() < 0).all()
    assert times[0] == pytest.approx(schedule.t_max, abs=1e-12)
    assert times[-1] == CLEAN
    if steps > 1:
        assert times[-2] == pytest.approx(schedule.t_min, abs=1e-12)
    if schedule.discrete_times is not None:
        assert torch.isin(times[:-1], schedule.discrete_times).all()


def test_grid_with_all_steps_is_the_table() -> None:
    schedule = LinearBetas()
    assert torch.equal(UniformGrid()(schedule, 1000)[:-1].flip(0), schedule.discrete_times)
    with pytest.raises(UserError, match="no more than 1000 steps"):
        UniformGrid()(schedule, 1001)


def test_stratified_times_visit_each_step_once() -> None:
    schedule = LinearBetas(T=250)
    t = UniformTimes(stratified=True)(schedule, Draws.whole(generator("cpu", 3), 250))
    assert torch.equal(t.sort().values, schedule.discrete_times)


@pytest.mark.parametrize("stratified", [True, False])
def test_training_times_are_uniform(schedule: NoiseSchedule, stratified: bool) -> None:
    source, n = generator("cpu", 5), 500
    draws = [UniformTimes(stratified)(schedule, Draws.whole(source, n)) for _ in range(60)]
    t = torch.cat(draws)
    span = schedule.t_max - schedule.t_min
    assert t.min() >= schedule.t_min - 1e-6 and t.max() <= schedule.t_max + 1e-6
    assert abs(float(t.double().mean()) - (schedule.t_max + schedule.t_min) / 2) < 0.01 * span
    assert abs(float(t.double().var()) - span**2 / 12) < 0.005 * span**2
    # The mean of a batch scatters by sqrt(1 / 12 n) = 0.013 when times are independent, and far less when they are not.
    scatter = float(torch.stack([d.double().mean() for d in draws]).std()) / span
    assert (scatter < 0.002) if stratified else (0.009 < scatter < 0.018)


def test_training_times_do_not_depend_on_the_number_of_processes(schedule: NoiseSchedule) -> None:
    whole = UniformTimes()(schedule, Draws(generator("cpu", 1), 0, 8, 8))
    halves = [UniformTimes()(schedule, Draws(generator("cpu", 1), k, k + 4, 8)) for k in (0, 4)]
    assert torch.equal(torch.cat(halves), whole)
