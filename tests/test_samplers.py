"""Properties of every sampler under every schedule, compared with exact results, and bugs that break them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gaussian_truth import (
    AXES,
    COVARIANCE,
    MEAN,
    SENSIBLE,
    ExactDenoiser,
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
from gencompare.diffusion import multistep_samplers, ode_samplers, sde_samplers
from gencompare.diffusion import samplers as sampler_module
from gencompare.diffusion.denoiser import ClipX0, Cond, Denoiser, DenoiserProtocol
from gencompare.diffusion.discrete_schedules import LinearBetas
from gencompare.diffusion.multistep_samplers import ERSDE, AdamsBashforth, DPMSolverPP2M, SASolver, UniPC
from gencompare.diffusion.ode_samplers import RK45, DPMSolverPP2S, Euler, Heun, Restart
from gencompare.diffusion.parameterizations import Prediction, V
from gencompare.diffusion.samplers import DDIM, Ancestral, Sampler, steps_between
from gencompare.diffusion.schedules import CLEAN, VP, NoiseSchedule, RectifiedFlow, ScheduleValues
from gencompare.diffusion.sde_samplers import AnnealedLangevin, EulerMaruyama, PredictorCorrector, ReverseDiffusion
from gencompare.errors import UserError
from gencompare.rng import generator, normal_like
from parts import part, samplers

SAMPLERS = samplers()
WITH_ORDER = [name for name in SAMPLERS if part("sampler", name).order is not None]
AFFINE = [*WITH_ORDER, "annealed_langevin", "restart", "rk45"]
"""Samplers that are affine, with exact moments. (The size of predictor_corrector's Langevin steps depends on x.)"""


pytestmark = pytest.mark.usefixtures("double")


def calls_per_step(name: str) -> int:
    """Return the number of network calls of one additional step."""
    seen: list[Tensor] = []

    class Counts(ExactDenoiser):
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
    wanted += " reverse_diffusion rk45 unipc deis dpmpp_2s er_sde restart sa_solver"
    assert set(wanted.split()) <= set(SAMPLERS)


@pytest.mark.parametrize("name", WITH_ORDER)
def test_measured_order_is_the_declared_order(name: str, schedule: NoiseSchedule) -> None:
    """With three points, the noise of ER-SDE is so small that the error of the polynomial dominates, which is of order
    3."""
    sampler = part("sampler", name, **({"solver_order": 2} if name == "er_sde" else {}))
    assert measured_order(sampler, ExactDenoiser(schedule)) == pytest.approx(sampler.order, abs=0.2)


@pytest.mark.parametrize("make", [VP, RectifiedFlow])
@pytest.mark.parametrize(
    "sampler",
    [
        UniPC(num_steps=1, solver_order=1),
        UniPC(num_steps=1, solver_order=3),
        SASolver(num_steps=1, tau=0.0),
        SASolver(num_steps=1, predictor_order=1, corrector_order=2),
        SASolver(num_steps=1, corrector_order=0, tau=0.0),
        AdamsBashforth(num_steps=1, variable="t"),
        AdamsBashforth(num_steps=1, variable="rho"),
        AdamsBashforth(num_steps=1, variable="step"),
        AdamsBashforth(num_steps=1, variable="step", solver_order=4),
    ],
    ids=lambda sampler: sampler.describe(),
)
def test_measured_order_of_other_settings_is_the_declared_order(sampler: Sampler, make: type[NoiseSchedule]) -> None:
    schedule = make()
    found = measured_order(sampler, ExactDenoiser(schedule), inner_times(schedule, 160))
    assert found == pytest.approx(sampler.order, abs=0.2)


@pytest.mark.parametrize("name", WITH_ORDER)
def test_moments_are_accurate_with_many_steps(name: str, schedule: NoiseSchedule) -> None:
    """Over the whole schedule, the error is small or still falls at first order."""

    def after(steps: int) -> float:
        sampler = part("sampler", name, num_steps=steps)
        return error(sampler, ExactDenoiser(schedule), times_of(sampler, schedule))

    many = 240 if part("sampler", name).order == 1 else 120
    fine = after(many)
    assert fine < 0.02 or fine < min(0.7 * after(many // 2), 0.2)


@pytest.mark.parametrize("schedule", SENSIBLE, indirect=True)
@pytest.mark.parametrize("name", AFFINE)
def test_moments_are_close_with_the_usual_number_of_steps(name: str, schedule: NoiseSchedule) -> None:
    """The samples start from pure noise and take 50 network calls, so no step may be so long that it leaves the
    path."""
    sampler = part("sampler", name)
    sampler = part("sampler", name, num_steps=max(sampler.num_steps, 50 // calls_per_step(name)))
    # Noise levels of Langevin dynamics are not steps in time, and should be geometric.
    langevin = name == "annealed_langevin"
    times = even_levels(schedule, sampler.num_steps) if langevin else times_of(sampler, schedule)
    mean, covariance = moments(sampler, ExactDenoiser(schedule), times)
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.1)
    found, true = (AXES.T @ root(each) @ AXES for each in (covariance, COVARIANCE))
    torch.testing.assert_close(found, true, rtol=0.12, atol=0.06)


def test_steep_schedule_is_bad() -> None:
    """With 50 ancestral steps, the error of the steep schedule is larger than that of linear betas."""
    sampler = part("sampler", "ancestral", num_steps=50)
    steep, linear = (
        error(sampler, ExactDenoiser(schedule), times_of(sampler, schedule))
        for schedule in (schedule_named("steep"), schedule_named("linear"))
    )
    assert steep > 2 * linear


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_diverges(name: str, schedule: NoiseSchedule) -> None:
    """The samples are float32, start from the schedule's prior and take ten steps."""
    torch.set_default_dtype(torch.float32)
    schedule, sampler = schedule.float(), part("sampler", name, num_steps=10)
    x = schedule.prior((400, 1, 1, 3), generator("cpu", 1))
    for step in sampler.iterate(
        ExactDenoiser(schedule), x, generator=generator("cpu", 2), times=times_of(sampler, schedule).float()
    ):
        mean, covariance = true_moments(schedule, step.t)
        assert step.x.dtype == torch.float32
        along = (step.x - mean)[:, 0, 0].double() @ AXES
        assert (along.square().mean(0) < 25 * (AXES.T @ covariance @ AXES).diagonal()).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_iterate_yields_every_step(name: str, schedule: NoiseSchedule) -> None:
    sampler = part("sampler", name, num_steps=5)
    x, source = torch.randn(2, 1, 1, 3, generator=generator("cpu", 1)), generator("cpu", 2)
    steps = list(sampler.iterate(ExactDenoiser(schedule), x, generator=source))
    assert torch.equal(torch.stack([step.t for step in steps]), sampler.times(schedule)[1:])
    again = sampler.sample(ExactDenoiser(schedule), x, generator=generator("cpu", 2))
    assert torch.equal(steps[-1].x, again)
    for step in steps:
        assert step.x.shape == x.shape and step.x.dtype == x.dtype


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_a_function_of_the_generator(name: str) -> None:
    sampler, denoiser = part("sampler", name, num_steps=4), ExactDenoiser(LinearBetas())
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
def test_an_image_does_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    """The adaptive solver is excluded, since it has one step size for the whole batch."""
    x = torch.randn(3, 1, 1, 3, generator=generator("cpu", 1))
    with unit_noise():  # the same for each image, whatever the batch size
        three = part("sampler", name, num_steps=4).sample(
            ExactDenoiser(LinearBetas()), x, generator=generator("cpu", 2)
        )
    with unit_noise():
        two = part("sampler", name, num_steps=4).sample(
            ExactDenoiser(LinearBetas()), x[:2], generator=generator("cpu", 2)
        )
    torch.testing.assert_close(three[:2], two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_step_of_a_nan_is_reported(name: str) -> None:
    broken: list[int] = []
    done: list[int] = []

    @dataclass(frozen=True)
    class Breaks(ExactDenoiser):
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
def test_values_hidden_by_clipping_are_reported(name: str, bad: float) -> None:
    """An infinite image clipped to [-1, 1] is finite, and so are the following samples."""

    @dataclass(frozen=True)
    class Breaks(ExactDenoiser):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            prediction = super().__call__(x_t, t, cond)
            return Prediction(prediction.x0 + bad, prediction.eps - bad) if t < 0.55 else prediction

    times, x = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, CLEAN]), torch.ones(2, 1, 1, 3)
    with pytest.raises(UserError, match=r"step [34] of 5 gave NaN or infinite values"):
        part("sampler", name).sample(ClipX0(Breaks(LinearBetas())), x, generator=generator("cpu", 0), times=times)


# Samplers without an order


def rk45_error(denoiser: DenoiserProtocol, tolerance: float) -> float:
    return error(RK45(num_steps=2, rtol=tolerance, atol=tolerance), denoiser, inner_times(denoiser.schedule, 1))


def test_error_of_the_adaptive_solver_matches_its_tolerance(schedule: NoiseSchedule) -> None:
    """The tolerance applies to each step, relative to x, which starts at 45 under VE, so the overall error is 22 times
    as large."""
    for tolerance in (1e-3, 1e-5, 1e-7):
        assert rk45_error(ExactDenoiser(schedule), tolerance) < 30 * tolerance


def langevin_error(denoiser: DenoiserProtocol, finer: int) -> float:
    """Compute the error of annealed Langevin at ten levels, with steps shorter by a factor of ``finer`` and ``finer``^2
    times as many steps."""
    sampler = AnnealedLangevin(num_steps=10, num_langevin_steps=10 * finer**2, step_size=0.8 / finer)
    mean, covariance = moments(sampler, denoiser, even_levels(denoiser.schedule, 10))
    along = AXES.T @ (root(covariance) - root(COVARIANCE)) @ AXES
    return float((mean - MEAN).abs().max() + along.abs().max())


def falls(errors: list[float]) -> bool:
    return errors[2] < 0.85 * errors[1] < 0.85**2 * errors[0] and errors[2] < 0.1


@pytest.mark.parametrize("schedule", SENSIBLE, indirect=True)
def test_bias_of_annealed_langevin_falls_with_more_and_shorter_steps(schedule: NoiseSchedule) -> None:
    assert falls([langevin_error(ExactDenoiser(schedule), finer) for finer in (1, 2, 4)])


@dataclass(frozen=True)
class ManyPixels(ExactDenoiser):
    """The exact denoiser of 64 pixels of variance 0.3, enough for a stable norm of the score.

    Deliberate bugs: a time that is ``late``, or a score with the wrong ``sign``.
    """

    late: float = 0.0
    sign: int = 1

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        late_alpha, late_sigma = scales(self.schedule, (t + self.late).clamp(max=self.schedule.t_max))
        eps = self.sign * late_sigma * x_t / (0.3 * late_alpha**2 + late_sigma**2)
        return Prediction(x0=(x_t - sigma * eps) / alpha, eps=eps)


def corrected_error(snr: float, num_corrector_steps: int, denoiser: ManyPixels) -> float:
    """Return the relative error of the variance over 64 pixels of 500 images (Monte Carlo error 0.008). If snr is 0, no
    corrector is used."""
    schedule, steps = denoiser.schedule, 25
    sampler = (
        PredictorCorrector(num_steps=steps, snr=snr, num_corrector_steps=num_corrector_steps)
        if snr
        else ReverseDiffusion(num_steps=steps)
    )
    x = schedule.prior((500, 1, 1, 64), generator("cpu", 0)).double()
    out = sampler.sample(denoiser, x, generator=generator("cpu", 1), times=even_levels(schedule, steps))
    return abs(float(out.square().mean()) / 0.3 - 1)


def corrects(denoiser: ManyPixels) -> bool:
    alone, one, many = (corrected_error(*how, denoiser) for how in ((0.0, 0), (0.16, 1), (0.16, 20)))
    return many < 0.04 and many < one < alone


def test_corrector_reduces_the_error_of_the_predictor(schedule: NoiseSchedule) -> None:
    assert corrects(ManyPixels(schedule))


# Deliberate bugs


@dataclass(frozen=True)
class LateTime(ExactDenoiser):
    """Bug: t is off by one. The denoiser receives a time one step of the table, 1 / T, too late."""

    T: int = 1000

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return super().__call__(x_t, (t + 1 / self.T).clamp(max=self.schedule.t_max), cond)


@dataclass(frozen=True)
class WrongSign(ExactDenoiser):
    """Bug: the score has the wrong sign, and x_0 matches it."""

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
    DPMSolverPP2M(num_steps=1, eta=1.0),
    DPMSolverPP2S(num_steps=1),
    DPMSolverPP2S(num_steps=1, eta=1.0),
    UniPC(num_steps=1),
    AdamsBashforth(num_steps=1),
    ERSDE(num_steps=1, solver_order=2),
    SASolver(num_steps=1),
]
RANDOM = [
    sampler
    for sampler in SOLVERS
    if isinstance(sampler, (Ancestral, EulerMaruyama, ReverseDiffusion, ERSDE, SASolver)) or getattr(sampler, "eta", 0)
]
NOISE_MODULES = (sampler_module, sde_samplers, ode_samplers, multistep_samplers)
SLOPED = [sampler for sampler in SOLVERS if isinstance(sampler, (Euler, EulerMaruyama))]


def keeps_its_order(sampler: Sampler, denoiser: DenoiserProtocol, coarse: Tensor | None = None) -> bool:
    assert sampler.order is not None
    return abs(measured_order(sampler, denoiser, coarse) - sampler.order) <= 0.2


@pytest.mark.parametrize("sampler", SOLVERS, ids=lambda sampler: sampler.describe())
def test_late_times_and_wrong_signs_break_the_order(sampler: Sampler) -> None:
    """The order is measured between steps 150 and 50 of DDPM's 1,000. Each sampler step spans two of them, then one.

    Solvers that use derivatives run in continuous time, because a table has only finite differences, off by 1 / T.
    """
    schedule = VP() if sampler in SLOPED else LinearBetas()
    coarse = torch.linspace(0.15, 0.05, 51)
    assert keeps_its_order(sampler, ExactDenoiser(schedule), coarse)
    assert not keeps_its_order(sampler, LateTime(schedule), coarse)
    assert not keeps_its_order(sampler, WrongSign(schedule), coarse)


@pytest.mark.parametrize("sampler", RANDOM, ids=lambda sampler: sampler.describe())
def test_shared_noise_for_all_pixels_breaks_the_order(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance of each pixel is correct, but not their covariance."""
    for module in NOISE_MODULES:
        monkeypatch.setattr(module, "normal_like", lambda x, source: normal_like(x, source)[..., :1].expand_as(x))
    assert not keeps_its_order(sampler, ExactDenoiser(LinearBetas()))


@pytest.mark.parametrize("sampler", RANDOM, ids=lambda sampler: sampler.describe())
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_half_or_twice_the_variance_of_the_noise_breaks_the_order(
    sampler: Sampler, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in NOISE_MODULES:
        monkeypatch.setattr(module, "normal_like", lambda x, source: factor**0.5 * normal_like(x, source))
    assert not keeps_its_order(sampler, ExactDenoiser(LinearBetas()))


@pytest.mark.parametrize("sampler", SLOPED, ids=lambda sampler: sampler.describe())
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_half_or_twice_g2_breaks_the_order(sampler: Sampler, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """g^2 is -sigma^2 times the derivative of the log-SNR."""
    slope = property(lambda self: factor * ScheduleValues.dlog_snr_dt.func(self))
    monkeypatch.setattr(sampler_module.GridValues, "dlog_snr_dt", slope)
    assert not keeps_its_order(sampler, ExactDenoiser(LinearBetas()))


@pytest.mark.parametrize("denoiser", [LateTime, WrongSign])
def test_late_times_and_wrong_signs_break_the_adaptive_solver(denoiser: type[ExactDenoiser]) -> None:
    assert rk45_error(ExactDenoiser(LinearBetas()), 1e-5) < 1e-3 < rk45_error(denoiser(LinearBetas()), 1e-5)


def test_late_times_and_wrong_signs_break_annealed_langevin() -> None:
    """The time is late by one step of 25; the ten levels are more than two steps apart."""
    for denoiser in (LateTime(LinearBetas(), T=25), WrongSign(LinearBetas())):
        assert not falls([langevin_error(denoiser, finer) for finer in (1, 2, 4)])


@pytest.mark.parametrize("bug", [{"late": 1 / 200}, {"sign": -1}], ids=str)
def test_late_times_and_wrong_signs_break_the_corrector(bug: dict[str, Any]) -> None:
    """The time is late by one step of 200, because one step of 1,000 hardly exceeds the Monte Carlo error."""
    assert not corrects(ManyPixels(LinearBetas(), **bug))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_half_or_twice_the_noise_breaks_langevin_steps(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise term is sqrt(2 k) sigma z; half or twice its variance must be detected."""

    def wrong(x: Tensor, prediction: Prediction, at: ScheduleValues, k: Tensor | float, z: Tensor) -> Tensor:
        return x - k * at.sigma * prediction.eps + (2 * factor * k) ** 0.5 * at.sigma * z

    monkeypatch.setattr(sde_samplers, "langevin_step", wrong)
    assert not falls([langevin_error(ExactDenoiser(LinearBetas()), finer) for finer in (1, 2, 4)])
    assert corrected_error(0.16, 20, ManyPixels(LinearBetas())) > 0.1


# Cost of a step beyond the network


class HostReads(TorchDispatchMode):
    """Counts how often the host reads a number from a tensor, which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads(sampler: Sampler) -> int:
    denoiser = ClipX0(Denoiser(ZeroNetwork(), LinearBetas(), V()))
    with HostReads() as reads:
        sampler.sample(denoiser, torch.randn(2, 1, 4, 4), generator=torch.Generator())
    return reads.count


class ZeroNetwork(nn.Module):
    def forward(self, x: Tensor, noise_cond: Tensor, cond: Cond) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral, partial(DDIM, eta=0.5), Euler, Heun, DPMSolverPP2M, UniPC, EulerMaruyama, ReverseDiffusion,
        PredictorCorrector, partial(AnnealedLangevin, num_langevin_steps=2), partial(DPMSolverPP2S, eta=1.0),
        AdamsBashforth, partial(AdamsBashforth, variable="t"), SASolver, ERSDE, Restart,
    ],
    ids=lambda each: getattr(each, "func", each).__name__,
)  # fmt: skip
def test_no_step_waits_for_the_device(sampler: Callable[..., Sampler]) -> None:
    few, many = (host_reads(sampler(num_steps=n)) for n in (4, 12))
    assert 0 < few == many


def test_values_of_a_running_sampler_are_looked_up() -> None:
    schedule, x = LinearBetas(), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    times = DDIM(num_steps=5).times(schedule)
    for t, s, at_t, at_s in steps_between(times, schedule, x):
        assert schedule.at(t, x) is at_t and schedule.at(s, x) is at_s
        for time, at in ((t.clone(), at_t), (s.clone(), at_s)):
            computed = schedule.at(time, x)
            assert computed is not at
            for name in ("alpha", "sigma", "log_snr", "dlog_alpha_dt", "dlog_snr_dt"):
                assert torch.equal(getattr(at, name), getattr(computed, name)), name
                assert getattr(at, name).dtype == x.dtype and getattr(at, name).shape == ()
            assert at.derive(lambda at: at.alpha * at.sigma) == computed.alpha * computed.sigma
        assert schedule.at(t, x.float()) is not at_t, "of another dtype"
    assert not schedule._tabulated, "nothing is kept"
