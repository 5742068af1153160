"""Sampling grids and training times under every schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from composing import options
from gencompare.diffusion.discrete_schedules import BetaTable, LinearBetas
from gencompare.diffusion.learned_schedule import LearnedSchedule
from gencompare.diffusion.samplers import DDIM, check_times
from gencompare.diffusion.schedules import CLEAN, VE, VP, EDMSchedule, NoiseSchedule, RectifiedFlow
from gencompare.diffusion.times import (
    EqualStepsGrid,
    KarrasGrid,
    LogitNormalTimes,
    LogNormalTimes,
    LogSNRGrid,
    QuadraticGrid,
    TimeDistribution,
    TimeGrid,
    UniformGrid,
    UniformTimes,
)
from gencompare.errors import UserError
from gencompare.rng import RandomSource, generator
from parts import part

GRIDS = [name for name in options("model/sampler/grid") if name != "tabulated"]
"""Grids that are defined for every schedule and number of steps, which given times are not."""
IN_TIME = ("uniform", "quadratic", "equal_steps")
LONG_LAST_STEP = ("equal_steps", "consistency")
"""Grids for few steps, whose last step starts before t_min."""
DISTRIBUTIONS = [UniformTimes(), UniformTimes(stratified=False), LogNormalTimes(), LogitNormalTimes()]


pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(params=options("model/schedule"))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return part("schedule", request.param).requires_grad_(False)


def of_the_table(schedule: NoiseSchedule, times: torch.Tensor) -> bool:
    table = schedule.discrete_times
    return table is None or bool(torch.isin(times, table).all())


# Grids


def test_there_are_grids() -> None:
    assert {"uniform", "quadratic", "karras", "log_snr"} <= set(GRIDS)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("name", GRIDS)
def test_grid_runs_from_noise_to_clean_data(name: str, schedule: NoiseSchedule, steps: int) -> None:
    grid, table = part("sampler/grid", name), schedule.discrete_times
    if name in IN_TIME and table is not None and steps > len(table):
        with pytest.raises(
            UserError, match=rf"sampler.num_steps={steps}: .*no more than {len(table)} steps.*grid=log_snr"
        ):
            grid(schedule, steps)
        return
    times = grid(schedule, steps)
    assert len(times) == steps + 1
    assert (times.diff() < 0).all()
    assert times[0] == schedule.t_max
    assert times[-1] == CLEAN
    if steps > 1 and name not in LONG_LAST_STEP:
        assert times[-2] == schedule.t_min
    if name in IN_TIME:
        assert of_the_table(schedule, times[:-1])


@pytest.mark.parametrize("steps", [10, 250])
@pytest.mark.parametrize("name", GRIDS)
def test_float32_grids_are_valid_for_samplers(name: str, schedule: NoiseSchedule, steps: int) -> None:
    torch.set_default_dtype(torch.float32)
    single, table = schedule.float(), schedule.discrete_times
    if name not in IN_TIME or table is None or steps <= len(table):
        times = part("sampler/grid", name)(single, steps)
        assert times.dtype == torch.float32
        check_times(times, single)


def test_uniform_grid_with_all_steps_is_the_discrete_times() -> None:
    schedule = LinearBetas()
    for grid in (UniformGrid(), QuadraticGrid()):
        assert torch.equal(grid(schedule, 1000)[:-1].flip(0), schedule.discrete_times)


def test_uniform_grid_is_even() -> None:
    np.testing.assert_allclose(UniformGrid()(VE(), 5)[:-1], [1, 0.75, 0.5, 0.25, 0], atol=1e-15)
    # On a discrete schedule, times are the nearest steps to 999 k / 4 = 0, 249.75, 499.5, 749.25, 999, counted from 0.
    index = UniformGrid()(LinearBetas(), 5)[:-1] * 1000 - 1
    np.testing.assert_allclose(index, [999, 749, 500, 250, 0], atol=1e-9)


def test_equal_steps_include_the_last_one() -> None:
    np.testing.assert_allclose(EqualStepsGrid()(VE(), 4)[:-1], [1, 0.75, 0.5, 0.25], atol=1e-15)
    np.testing.assert_allclose(EqualStepsGrid()(LinearBetas(), 4)[:-1] * 1000 - 1, [999, 749, 500, 250], atol=1e-9)


def test_quadratic_grid_is_that_of_ddim() -> None:
    """As in Song et al. (2021), "DDIM", appendix D.2, tau_i grows as i^2."""
    times = QuadraticGrid()(RectifiedFlow(), 21)[:-1].numpy()
    ends = math.sqrt(1e-4), math.sqrt(1 - 1e-4)
    np.testing.assert_allclose(times, np.linspace(ends[1], ends[0], 21) ** 2, rtol=1e-12)
    # On a discrete schedule, times are c i^2, rounded; duplicates move to the next free step.
    steps = QuadraticGrid()(LinearBetas(), 50)[:-1].flip(0).numpy() * 1000
    rounded = np.round(np.linspace(1, math.sqrt(1000), 50) ** 2 - 1) + 1
    np.testing.assert_allclose(steps[3:], rounded[3:], atol=1e-9)
    np.testing.assert_allclose(steps[:4], [1, 3, 5, 8], atol=1e-9)
    # 1, 1.62, 2.38, 3.29, 4.35, 5.55, 6.90, 8.39, 10: if two round to the same step, the later one moves up.
    crowded = QuadraticGrid()(BetaTable([0.1] * 10), 9)[:-1].flip(0).numpy() * 10
    np.testing.assert_allclose(crowded, [1, 2, 3, 4, 5, 6, 7, 8, 10], atol=1e-9)


@pytest.mark.parametrize("rho", [7.0, 2.0])
def test_karras_grid_is_that_of_edm(rho: float) -> None:
    """The grid is that of Karras et al. (2022), eq. 5, in sigma / alpha over the schedule's range."""
    n, i = 18, np.arange(18)
    for schedule in (EDMSchedule(), VP(), VE(), RectifiedFlow(), LinearBetas()):
        at = schedule.at(KarrasGrid(rho=rho)(schedule, n)[:-1])
        found = (at.sigma / at.alpha).numpy()
        high, low = found[0] ** (1 / rho), found[-1] ** (1 / rho)
        np.testing.assert_allclose(found, (high + i / (n - 1) * (low - high)) ** rho, rtol=1e-8)
    # Under the schedule of Karras et al., these are the published sigmas at evenly spaced times.
    sigma = EDMSchedule().at(KarrasGrid()(EDMSchedule(), n)[:-1]).sigma.numpy()
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma, expected, rtol=1e-10)
    np.testing.assert_allclose(KarrasGrid()(EDMSchedule(), n), UniformGrid()(EDMSchedule(), n), atol=1e-12)


def test_log_snr_grid_is_even_in_log_snr(schedule: NoiseSchedule) -> None:
    log_snr = schedule.log_snr(LogSNRGrid()(schedule, 30)[:-1]).numpy()
    np.testing.assert_allclose(log_snr, np.linspace(log_snr[0], log_snr[-1], 30), atol=1e-7)


@pytest.mark.parametrize(
    "grid", [LogSNRGrid(log_snr_start=-4.5, log_snr_end=5.5), KarrasGrid(log_snr_start=-4.5, log_snr_end=5.5)]
)
def test_log_snr_ends_give_the_same_levels_under_every_schedule(grid: TimeGrid) -> None:
    found = []
    for name in options("model/schedule"):
        if name != "ncsn":  # its noise ends at log-SNR -1.4
            schedule = part("schedule", name).requires_grad_(False)
            times = grid(schedule, 20)
            check_times(times, schedule)
            found.append(schedule.log_snr(times[:-1]).numpy())
    assert len(found) > 10
    for other in found:
        np.testing.assert_allclose(other, found[0], atol=1e-7)
    np.testing.assert_allclose(found[0][[0, -1]], [-4.5, 5.5], atol=1e-7)


def test_one_end_can_be_that_of_the_schedule() -> None:
    times = LogSNRGrid(log_snr_end=3.0)(VE(), 5)
    assert times[0] == 1
    np.testing.assert_allclose(VE().log_snr(times[-2]), 3, atol=1e-9)
    times = KarrasGrid(log_snr_start=-3.0)(VE(), 5)
    assert times[-2] == 0
    np.testing.assert_allclose(VE().log_snr(times[0]), -3, atol=1e-9)


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        (LogSNRGrid(log_snr_start=-12.0), r"grid.log_snr_start=-12.0: .* from -9.21 to 7.824"),
        (LogSNRGrid(log_snr_end=8.0), r"grid.log_snr_end=8.0: .* from -9.21 to 7.824"),
        (KarrasGrid(log_snr_start=9.0), "grid.log_snr_start=9.0"),
        (LogSNRGrid(log_snr_start=float("nan")), "grid.log_snr_start=nan"),
    ],
)
def test_grids_outside_of_the_schedule_are_rejected(grid: TimeGrid, named: str) -> None:
    with pytest.raises(UserError, match=named):
        DDIM(num_steps=5, grid=grid).times(VE())


def test_coinciding_steps_are_rejected() -> None:
    torch.set_default_dtype(torch.float32)
    with pytest.raises(UserError, match=r"sampler.num_steps=500: .*duplicate times"):
        LogSNRGrid(log_snr_start=-9.0, log_snr_end=-8.9999)(RectifiedFlow(), 500)


@pytest.mark.parametrize("make", [lambda: LogSNRGrid(log_snr_start=2, log_snr_end=-2), lambda: KarrasGrid(rho=0)])
def test_invalid_grids_are_rejected(make) -> None:
    with pytest.raises(UserError):
        make()


def test_sampler_description_includes_the_grid() -> None:
    described = [DDIM(num_steps=5, grid=part("sampler/grid", name)).describe() for name in GRIDS]
    assert len(set(described)) == len(GRIDS), "grids in a comparison must have different descriptions"
    assert DDIM(num_steps=5, grid=UniformGrid()).describe() == "DDIM, 5 steps, eta 0"
    assert (
        DDIM(num_steps=5, grid=KarrasGrid(log_snr_end=6.5)).describe()
        == "DDIM, 5 steps, KarrasGrid log_snr_end 6.5 rho 7, eta 0"
    )


# Training times


N = 20_000
MOMENTS = ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5))
"""Moments of the standard normal: order, value, and the standard deviation of the estimate from one sample."""


def assert_standard_normal(z: torch.Tensor) -> None:
    for moment, expected, spread in MOMENTS:
        # Four standard errors, plus the rounding of a table of 1000 steps.
        assert abs(float((z**moment).mean()) - expected) < 4 * spread / len(z) ** 0.5 + 0.005


def many(times: TimeDistribution, schedule: NoiseSchedule, n: int = N) -> torch.Tensor:
    return times(schedule, RandomSource.for_batch(generator("cpu", 4), n)).double()


def test_stratified_times_visit_each_step_once() -> None:
    schedule = LinearBetas(num_train_timesteps=250)
    t = UniformTimes(stratified=True)(schedule, RandomSource.for_batch(generator("cpu", 3), 250))
    assert torch.equal(t.sort().values, schedule.discrete_times)


@pytest.mark.parametrize("stratified", [True, False])
def test_training_times_are_uniform(schedule: NoiseSchedule, stratified: bool) -> None:
    source, n = generator("cpu", 5), 500
    draws = [UniformTimes(stratified)(schedule, RandomSource.for_batch(source, n)) for _ in range(60)]
    t = torch.cat(draws)
    span = schedule.t_max - schedule.t_min
    assert t.min() >= schedule.t_min - 1e-6 and t.max() <= schedule.t_max + 1e-6
    assert of_the_table(schedule, t)
    assert abs(float(t.double().mean()) - (schedule.t_max + schedule.t_min) / 2) < 0.01 * span
    # For T steps from end to end, the variance is span^2 (T + 1) / 12 (T - 1).
    table = schedule.discrete_times
    variance = span**2 / 12 * (1 if table is None else (len(table) + 1) / (len(table) - 1))
    assert abs(float(t.double().var()) - variance) < 0.005 * span**2
    # The mean of a batch has std sqrt(1 / 12 n) = 0.013 for independent times, and much less for stratified ones.
    scatter = float(torch.stack([d.double().mean() for d in draws]).std()) / span
    assert (scatter < 0.002) if stratified else (0.009 < scatter < 0.018)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 0.7), (0.0, 0.5)])
def test_log_sigma_is_normal(schedule: NoiseSchedule, mean: float, std: float) -> None:
    """ln(sigma / alpha) ~ N(mean, std^2), except for the range and the rounding of a discrete schedule."""
    table = schedule.discrete_times
    if table is None or len(table) >= 1000:
        n = 1000 if isinstance(schedule, LearnedSchedule) else N  # bisection is slow
        at = schedule.at(many(LogNormalTimes(mean, std), schedule, n))
        assert_standard_normal((torch.log(at.sigma / at.alpha) - mean) / std)


def test_log_normal_times_are_those_of_edm() -> None:
    sigma = EDMSchedule().at(many(LogNormalTimes(), EDMSchedule())).sigma
    assert abs(float(sigma.log().mean()) + 1.2) < 0.03 and abs(float(sigma.log().std()) - 1.2) < 0.03


def test_unreachable_noise_levels_become_an_end(schedule: NoiseSchedule) -> None:
    for mean, end in ((-40.0, schedule.t_min), (40.0, schedule.t_max)):
        t = many(LogNormalTimes(mean=mean), schedule, n=10)
        torch.testing.assert_close(t, torch.full((10,), end), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_of_the_time_is_normal(mean: float, std: float) -> None:
    for schedule in (RectifiedFlow(), VP(), LinearBetas(num_train_timesteps=4000)):
        u = (many(LogitNormalTimes(mean, std), schedule) - schedule.t_min) / (schedule.t_max - schedule.t_min)
        assert_standard_normal((torch.logit(u) - mean) / std)


@pytest.mark.parametrize("times", DISTRIBUTIONS, ids=str)
def test_training_times_do_not_depend_on_the_number_of_processes(
    schedule: NoiseSchedule, times: TimeDistribution
) -> None:
    whole = times(schedule, RandomSource(generator("cpu", 1), 0, 8, 8))
    halves = [times(schedule, RandomSource(generator("cpu", 1), k, k + 4, 8)) for k in (0, 4)]
    assert torch.equal(torch.cat(halves), whole)
    assert whole.shape == (8,) and len(whole.unique()) > 1
    assert whole.min() >= schedule.t_min - 1e-7 and whole.max() <= schedule.t_max + 1e-7
    assert of_the_table(schedule, whole)


def test_training_times_of_a_batch_are_independent() -> None:
    for times in (LogNormalTimes(), LogitNormalTimes()):
        means = torch.stack([times(VP(), RandomSource.for_batch(generator("cpu", k), 400)).mean() for k in range(60)])
        alone = times(VP(), RandomSource.for_batch(generator("cpu", 99), 4000)).std() / 20
        assert 0.75 < float(means.std() / alone) < 1.3


@pytest.mark.parametrize("kind", [LogNormalTimes, LogitNormalTimes])
@pytest.mark.parametrize("std", [0.0, -1.0])
def test_invalid_stds_are_rejected(kind, std: float) -> None:
    with pytest.raises(UserError, match="std"):
        kind(std=std)
