"""Laws of every sampler under every schedule, held against exact truth (`gaussian_truth`), and bugs that break them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gaussian_truth import (
    AXES,
    COVARIANCE,
    MEAN,
    SENSIBLE,
    Truth,
    error,
    even_levels,
    inner_times,
    measured_order,
    moments,
    root,
    scales,
    schedule_named,
    times_of,
    true_moments,
    unit_noise,
)
from gencompare.diffusion import samplers as sampler_module
from gencompare.diffusion import sde_samplers
from gencompare.diffusion.denoiser import ClipX0, Cond, DenoiserProtocol
from gencompare.diffusion.discrete_schedules import LinearBetas
from gencompare.diffusion.ode_samplers import RK45, DPMSolverPP2M, Euler, Heun, UniPC
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import DDIM, Ancestral, Sampler
from gencompare.diffusion.schedules import CLEAN, VP, NoiseSchedule, ScheduleValues
from gencompare.diffusion.sde_samplers import AnnealedLangevin, EulerMaruyama, PredictorCorrector, ReverseDiffusion
from gencompare.errors import UserError
from gencompare.rng import generator, normal_like
from parts import part, samplers

SAMPLERS = samplers()
OF_AN_ORDER = [name for name in SAMPLERS if part("sampler", name).order is not None]
AFFINE = [*OF_AN_ORDER, "annealed_langevin", "rk45"]
"""Those whose exact moments can be had. (The Langevin steps of predictor_corrector are as long as x says.)"""


pytestmark = pytest.mark.usefixtures("double")


def calls_a_step(name: str) -> int:
    """Network calls that one more step costs."""
    seen: list[Tensor] = []

    class Counts(Truth):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            seen.append(t)
            return super().__call__(x_t, t, cond)

    counts = []
    for steps in (4, 5):
        seen.clear()
        part("sampler", name, num_steps=steps).sample(
            Counts(LinearBetas()), torch.zeros(1, 1, 1, 3), generator=generator("cpu", 0)
        )
        counts.append(len(seen))
    return counts[1] - counts[0]


def test_there_are_samplers() -> None:
    wanted = "ancestral annealed_langevin ddim dpmpp_2m euler euler_maruyama heun predictor_corrector"
    assert {*wanted.split(), "reverse_diffusion", "rk45", "unipc"} <= set(SAMPLERS)


@pytest.mark.parametrize("name", OF_AN_ORDER)
def test_measured_order_is_the_declared_one(name: str, schedule: NoiseSchedule) -> None:
    sampler = part("sampler", name)
    assert measured_order(sampler, Truth(schedule)) == pytest.approx(sampler.order, abs=0.2)


@pytest.mark.parametrize("name", OF_AN_ORDER)
def test_moments_are_right_in_many_steps(name: str, schedule: NoiseSchedule) -> None:
    """From end to end: the error is small, or still falling as it should at first order."""

    def after(steps: int) -> float:
        sampler = part("sampler", name, num_steps=steps)
        return error(sampler, Truth(schedule), times_of(sampler, schedule))

    fine = after(240)
    assert fine < 0.02 or fine < min(0.7 * after(120), 0.2)


@pytest.mark.parametrize("schedule", SENSIBLE, indirect=True)
@pytest.mark.parametrize("name", AFFINE)
def test_moments_are_near_in_as_many_steps_as_are_usual(name: str, schedule: NoiseSchedule) -> None:
    """From pure noise, with 50 network calls: no step may be so long that the solver leaves the path."""
    sampler = part("sampler", name)
    sampler = part("sampler", name, num_steps=max(sampler.num_steps, 50 // calls_a_step(name)))
    # The levels of Langevin steps are not steps in time, and are meant to fall evenly.
    langevin = name == "annealed_langevin"
    times = even_levels(schedule, sampler.num_steps) if langevin else times_of(sampler, schedule)
    mean, covariance = moments(sampler, Truth(schedule), times)
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.1)
    found, true = (AXES.T @ root(each) @ AXES for each in (covariance, COVARIANCE))
    torch.testing.assert_close(found, true, rtol=0.12, atol=0.06)


def test_the_schedule_that_is_bad_on_purpose_is_bad() -> None:
    """In 50 ancestral steps the standard deviations are further off than under the table it is made from."""
    sampler = part("sampler", "ancestral", num_steps=50)
    steep, linear = (
        error(sampler, Truth(schedule), times_of(sampler, schedule))
        for schedule in (schedule_named("steep"), schedule_named("linear"))
    )
    assert steep > 2 * linear


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_blows_up(name: str, schedule: NoiseSchedule) -> None:
    """In float32, from the schedule's own prior, in ten steps."""
    torch.set_default_dtype(torch.float32)
    schedule, sampler = schedule.float(), part("sampler", name, num_steps=10)
    x = schedule.prior((400, 1, 1, 3), generator("cpu", 1))
    for step in sampler.iterate(
        Truth(schedule), x, generator=generator("cpu", 2), times=times_of(sampler, schedule).float()
    ):
        mean, covariance = true_moments(schedule, step.t)
        assert step.x.dtype == torch.float32
        along = (step.x - mean)[:, 0, 0].double() @ AXES
        assert (along.square().mean(0) < 25 * (AXES.T @ covariance @ AXES).diagonal()).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_come_one_by_one(name: str, schedule: NoiseSchedule) -> None:
    sampler = part("sampler", name, num_steps=5)
    x, source = torch.randn(2, 1, 1, 3, generator=generator("cpu", 1)), generator("cpu", 2)
    steps = list(sampler.iterate(Truth(schedule), x, generator=source))
    assert torch.equal(torch.stack([step.t for step in steps]), sampler.times(schedule)[1:])
    again = sampler.sample(Truth(schedule), x, generator=generator("cpu", 2))
    assert torch.equal(steps[-1].x, again)
    for step in steps:
        assert step.x.shape == x.shape and step.x.dtype == x.dtype


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_a_function_of_the_generator(name: str) -> None:
    sampler, denoiser = part("sampler", name, num_steps=4), Truth(LinearBetas())
    x = torch.randn(2, 1, 1, 3, generator=generator("cpu", 1))
    before = torch.get_rng_state()
    one = sampler.sample(denoiser, x, generator=generator("cpu", 2))
    torch.manual_seed(123)
    two = sampler.sample(denoiser, x, generator=generator("cpu", 2))
    torch.set_rng_state(before)
    assert torch.equal(one, two)
    with unit_noise() as noise:
        sampler.sample(denoiser, torch.zeros(2, 1, 1, 3), generator=generator("cpu", 2))
    other = sampler.sample(denoiser, x, generator=generator("cpu", 3))
    assert torch.equal(one, other) == (noise.draws == 0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "rk45"])
def test_an_image_does_not_depend_on_those_drawn_with_it(name: str) -> None:
    """(The adaptive solver's steps suit the whole chunk, whose size is fixed.)"""
    x = torch.randn(3, 1, 1, 3, generator=generator("cpu", 1))
    with unit_noise():  # the same for each row, however many there are
        three = part("sampler", name, num_steps=4).sample(Truth(LinearBetas()), x, generator=generator("cpu", 2))
    with unit_noise():
        two = part("sampler", name, num_steps=4).sample(Truth(LinearBetas()), x[:2], generator=generator("cpu", 2))
    torch.testing.assert_close(three[:2], two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_place_of_a_nan_is_named(name: str) -> None:
    broken: list[int] = []
    done: list[int] = []

    @dataclass(frozen=True)
    class Breaks(Truth):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            prediction = super().__call__(x_t, t, cond)
            if t > 0.55:
                return prediction
            broken.append(len(done) + 1)
            return Prediction(prediction.x0 / 0, prediction.eps * torch.nan)

    times = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, CLEAN])
    sampler, x = part("sampler", name), torch.ones(2, 1, 1, 3)
    for _ in sampler.iterate(Breaks(LinearBetas()), x, generator=generator("cpu", 0), times=times):
        done.append(1)
    assert broken[0] in (3, 4)
    with pytest.raises(UserError, match=f"step {broken[0]} of 5 gave NaN"):
        sampler.sample(Breaks(LinearBetas()), x, generator=generator("cpu", 0), times=times)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_clipping_would_hide_is_named_all_the_same(name: str, bad: float) -> None:
    """An infinite image clipped to [-1, 1] looks like any other, and leads on to finite samples."""

    @dataclass(frozen=True)
    class Breaks(Truth):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            prediction = super().__call__(x_t, t, cond)
            return Prediction(prediction.x0 + bad, prediction.eps - bad) if t < 0.55 else prediction

    times, x = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, CLEAN]), torch.ones(2, 1, 1, 3)
    with pytest.raises(UserError, match=r"step [34] of 5 gave NaN or infinite values"):
        part("sampler", name).sample(ClipX0(Breaks(LinearBetas())), x, generator=generator("cpu", 0), times=times)


# Those without an order


def rk45_error(denoiser: DenoiserProtocol, tolerance: float) -> float:
    return error(RK45(num_steps=2, rtol=tolerance, atol=tolerance), denoiser, inner_times(denoiser.schedule, 1))


def test_the_adaptive_solver_errs_as_much_as_is_tolerated(schedule: NoiseSchedule) -> None:
    """That is, in each of its many steps, and of x, which is 45 where VE schedules begin: in all 22 times as much."""
    for tolerance in (1e-3, 1e-5, 1e-7):
        assert rk45_error(Truth(schedule), tolerance) < 30 * tolerance


def langevin_error(denoiser: DenoiserProtocol, finer: int) -> float:
    """Of annealed Langevin steps, ``finer`` times as short and ``finer``^2 times as many, at ten even levels."""
    sampler = AnnealedLangevin(num_steps=10, num_langevin_steps=10 * finer**2, step_size=0.8 / finer)
    mean, covariance = moments(sampler, denoiser, even_levels(denoiser.schedule, 10))
    along = AXES.T @ (root(covariance) - root(COVARIANCE)) @ AXES
    return float((mean - MEAN).abs().max() + along.abs().max())


def falls(errors: list[float]) -> bool:
    return errors[2] < 0.85 * errors[1] < 0.85**2 * errors[0] and errors[2] < 0.1


@pytest.mark.parametrize("schedule", SENSIBLE, indirect=True)
def test_the_bias_of_annealed_langevin_falls_with_more_and_shorter_steps(schedule: NoiseSchedule) -> None:
    assert falls([langevin_error(Truth(schedule), finer) for finer in (1, 2, 4)])


@dataclass(frozen=True)
class ManyPixels(Truth):
    """The perfect denoiser of 64 pixels of variance 0.3: enough for the length of the score to be steady.

    Planted bugs: it is told a time ``late``, or says the score with the wrong ``sign``.
    """

    late: float = 0.0
    sign: int = 1

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        told, noise = scales(self.schedule, (t + self.late).clamp(max=self.schedule.t_max))
        eps = self.sign * noise * x_t / (0.3 * told**2 + noise**2)
        return Prediction(x0=(x_t - sigma * eps) / alpha, eps=eps)


def corrected_error(snr: float, num_corrector_steps: int, denoiser: ManyPixels) -> float:
    """Relative error of the variance of 64 pixels of 500 images (Monte Carlo error 0.008), in 25 steps; snr 0 is no
    corrector."""
    schedule, steps = denoiser.schedule, 25
    sampler = (
        PredictorCorrector(num_steps=steps, snr=snr, num_corrector_steps=num_corrector_steps)
        if snr
        else ReverseDiffusion(num_steps=steps)
    )
    x = schedule.prior((500, 1, 1, 64), generator("cpu", 0)).double()
    out = sampler.sample(denoiser, x, generator=generator("cpu", 1), times=even_levels(schedule, steps))
    return abs(float(out.square().mean()) / 0.3 - 1)


def mends(denoiser: ManyPixels) -> bool:
    alone, one, many = (corrected_error(*how, denoiser) for how in ((0.0, 0), (0.16, 1), (0.16, 20)))
    return many < 0.04 and many < one < alone


def test_the_corrector_mends_the_errors_of_the_predictor(schedule: NoiseSchedule) -> None:
    assert mends(ManyPixels(schedule))


# The laws bite


@dataclass(frozen=True)
class LateTime(Truth):
    """Bug: t off by one. The denoiser is told the step of the table that comes next, 1 / T too late."""

    T: int = 1000

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return super().__call__(x_t, (t + 1 / self.T).clamp(max=self.schedule.t_max), cond)


@dataclass(frozen=True)
class WrongSign(Truth):
    """Bug: the score with the wrong sign, and the image that goes with it."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        eps = -super().__call__(x_t, t, cond).eps
        return Prediction(x0=(x_t - sigma * eps) / alpha, eps=eps)


SOLVERS: list[Sampler] = [
    Ancestral(num_steps=1),
    DDIM(num_steps=1),
    Euler(num_steps=1),
    Heun(num_steps=1),
    EulerMaruyama(num_steps=1),
    ReverseDiffusion(num_steps=1),
    DPMSolverPP2M(num_steps=1),
    UniPC(num_steps=1),
]
RANDOM = [sampler for sampler in SOLVERS if isinstance(sampler, (Ancestral, EulerMaruyama, ReverseDiffusion))]
SLOPED = [sampler for sampler in SOLVERS if isinstance(sampler, (Euler, EulerMaruyama))]


def keeps_its_order(sampler: Sampler, denoiser: DenoiserProtocol, coarse: Tensor | None = None) -> bool:
    assert sampler.order is not None
    return abs(measured_order(sampler, denoiser, coarse) - sampler.order) <= 0.2


@pytest.mark.parametrize("sampler", SOLVERS, ids=lambda sampler: sampler.describe())
def test_late_times_and_wrong_signs_break_the_order(sampler: Sampler) -> None:
    """In the 1,000 steps of DDPM, of which the 150th to the 50th are taken two by two and one by one.

    (In continuous time for solvers that go by the slope, which a table has of its steps alone, itself 1 / T off.)
    """
    schedule = VP() if sampler in SLOPED else LinearBetas()
    coarse = torch.linspace(0.15, 0.05, 51)
    assert keeps_its_order(sampler, Truth(schedule), coarse)
    assert not keeps_its_order(sampler, LateTime(schedule), coarse)
    assert not keeps_its_order(sampler, WrongSign(schedule), coarse)


@pytest.mark.parametrize("sampler", RANDOM, ids=lambda sampler: sampler.describe())
def test_one_random_number_for_all_pixels_breaks_the_order(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance of each pixel is right, and their covariance is not."""
    for module in (sampler_module, sde_samplers):
        monkeypatch.setattr(module, "normal_like", lambda x, source: normal_like(x, source)[..., :1].expand_as(x))
    assert not keeps_its_order(sampler, Truth(LinearBetas()))


@pytest.mark.parametrize("sampler", RANDOM, ids=lambda sampler: sampler.describe())
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_half_or_twice_the_variance_of_the_noise_breaks_the_order(
    sampler: Sampler, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sampler_module, sde_samplers):
        monkeypatch.setattr(module, "normal_like", lambda x, source: factor**0.5 * normal_like(x, source))
    assert not keeps_its_order(sampler, Truth(LinearBetas()))


@pytest.mark.parametrize("sampler", SLOPED, ids=lambda sampler: sampler.describe())
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_half_or_twice_g2_breaks_the_order(sampler: Sampler, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """g^2 is -sigma^2 times the slope of the log-SNR."""
    slope = property(lambda self: factor * self._values.dlog_snr_dt[self._index])
    monkeypatch.setattr(sampler_module._ValuesAtIndex, "dlog_snr_dt", slope)
    assert not keeps_its_order(sampler, Truth(LinearBetas()))


@pytest.mark.parametrize("denoiser", [LateTime, WrongSign])
def test_late_times_and_wrong_signs_break_the_law_of_the_adaptive_solver(denoiser: type[Truth]) -> None:
    assert rk45_error(Truth(LinearBetas()), 1e-5) < 1e-3 < rk45_error(denoiser(LinearBetas()), 1e-5)


def test_late_times_and_wrong_signs_break_the_law_of_annealed_langevin() -> None:
    """By a step of 25, of which its ten levels are more than two apart."""
    for denoiser in (LateTime(LinearBetas(), T=25), WrongSign(LinearBetas())):
        assert not falls([langevin_error(denoiser, finer) for finer in (1, 2, 4)])


@pytest.mark.parametrize("bug", [{"late": 1 / 200}, {"sign": -1}], ids=str)
def test_late_times_and_wrong_signs_break_the_law_of_the_corrector(bug: dict[str, Any]) -> None:
    """By a step of 200: one of 1,000 is not much more than the Monte Carlo error."""
    assert not mends(ManyPixels(LinearBetas(), **bug))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_half_or_twice_the_noise_breaks_the_laws_of_langevin_steps(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The missing factor 2: x + k score + sqrt(k) z."""

    def wrong(x: Tensor, prediction: Prediction, at: ScheduleValues, k: Tensor | float, z: Tensor) -> Tensor:
        return x - k * at.sigma * prediction.eps + (2 * factor * k) ** 0.5 * at.sigma * z

    monkeypatch.setattr(sde_samplers, "langevin_step", wrong)
    assert not falls([langevin_error(Truth(LinearBetas()), finer) for finer in (1, 2, 4)])
    assert corrected_error(0.16, 20, ManyPixels(LinearBetas())) > 0.1
