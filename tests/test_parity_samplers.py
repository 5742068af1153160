"""Samplers compared with diffusers: the same network, noise and times give the same trajectory to 1e-4.

Differences in convention:

- Time. A timestep k = 0, ..., 999 of diffusers is the index of a beta. Here it is t = (k + 1) / 1000, and clean data
  have a separate time, `CLEAN`, where diffusers has sigma 0 or alpha bar 1 after the last timestep.
- State. Euler and Heun in diffusers store x / alpha, with noise sigma / alpha, and scale it for the network. Here the
  state is x_t, the network input. The tests therefore compare the network inputs and the final image.
- Names. Euler for diffusion models in diffusers steps in sigma / alpha, which is `DDIM` with eta 0. `Euler` here steps
  in t, like Euler for flow matching in diffusers, whose sigma is the time of `RectifiedFlow`. There the network
  predicts the velocity, and the tests pass our times, because time ends at 1 - 1e-4 here.
- UniPC. diffusers corrects x_s at the start of the next step, and this project before x_s is yielded, with the same
  calls. The bh1 variant of diffusers gives NaN in the step to sigma 0, where the image is not compared.
- Heun. Here a step where sigma / alpha falls more than 100-fold is an Euler step. The cosine table starts with such a
  step, so Heun is compared on other tables. No step of these grids is so long that the multistep solvers fall back.
- LMS. diffusers takes the long step to its first timestep with four points, where this project takes a DDIM step: this
  timestep is not compared.
- UniPC-3. diffusers lowers the order of its last two steps, which are not compared. (With ``lower_order_final=False``
  it fails.) DEIS, LMS and SA-Solver end at a small sigma or extrapolate to 0: their last step is not compared.
- SA-Solver. With two points, diffusers adds a term of third order, the "rescaling" of appendix D of the paper for few
  steps, which makes long steps inaccurate. Here integrals are exact, and the tests remove the term.
- DPM-Solver++(2S). The scheduler of diffusers takes every second grid time as the middle of a step; here, as in the
  paper and in k-diffusion, the middle is half-way in log-SNR.
- Clipping is switched off in diffusers; here it is a wrapper of the denoiser.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from gaussian_truth import ExactDenoiser, inner_times, root, slow_start, true_moments
from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.discrete_schedules import BetaTable, CosineBetas, LinearBetas
from gencompare.diffusion.multistep_samplers import AdamsBashforth, DPMSolverPP2M, SASolver, UniPC
from gencompare.diffusion.ode_samplers import DPMSolverPP2S, Euler, Heun
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import DDIM, Ancestral, Sampler
from gencompare.diffusion.schedules import CLEAN, VP, RectifiedFlow, VariancePreserving
from gencompare.rng import generator, normal_like

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import sampling  # type: ignore[import-not-found]


def network(x: Tensor, k: float) -> Tensor:
    """Return the output of a nonlinear eps network that depends on the timestep."""
    return 0.8 * x + 0.3 * torch.sin(2 * x + x.roll(1, -1) + k / 100)


@dataclass(frozen=True)
class Ours:
    schedule: BetaTable
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.seen.append(x_t)
        at = self.schedule.at(t, x_t)
        eps = network(x_t, float(t) * 1000 - 1)
        return Prediction(x0=(x_t - at.sigma * eps) / at.alpha, eps=eps)


START = torch.randn(2, 3, 4, 4, generator=generator("cpu", 0))
SCALED = {"beta_start": 0.0015, "beta_end": 0.0195}
TABLES = {
    "linear": (LinearBetas, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "cosine": (CosineBetas, {"beta_schedule": "squaredcos_cap_v2"}),
    "scaled": (partial(LinearBetas, 0.0015, 0.0195, power=2), {"beta_schedule": "scaled_linear", **SCALED}),
}


def run_scheduler(scheduler: Any, steps: int) -> tuple[list[Tensor], Tensor]:
    """Return the network inputs of a diffusers scheduler with their times, and the final image."""
    scheduler.set_timesteps(steps)
    # From N(0, 1) noise: some schedulers store x / alpha.
    x = START * scheduler.init_noise_sigma
    if type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"):
        x = START * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    if isinstance(scheduler, ExactSASolver):  # its integrals lose precision in float32
        scheduler.sigmas = scheduler.sigmas.double()
    seen, source = [], generator("cpu", 1)
    for k in scheduler.timesteps:
        seen.append(scheduler.scale_model_input(x, k))
        takes_noise = {} if "generator" not in scheduler.step.__code__.co_varnames else {"generator": source}
        x = scheduler.step(network(seen[-1], float(k)), k, x, **takes_noise).prev_sample
    return seen, x


NOT_LOWER = {"lower_order_final": False}


class ExactSASolver(diffusers.SASolverScheduler):
    """SA-Solver with exact integrals: it cancels the term that diffusers adds with two points."""

    def get_coefficients_fn(self, order: int, start: Any, end: Any, nodes: Any, tau: Any) -> list[Tensor]:
        first, *others = super().get_coefficients_fn(order, start, end, nodes, tau)
        if order != 2:
            return [first, *others]
        h, rate = end - start, 1 + tau**2
        exact = (h * rate - 1 + torch.exp(-rate * h)) / rate**2
        added = torch.exp(rate * end) * (h**2 / 2 - exact) / (nodes[0] - nodes[1])
        return [first - added, others[0] + added]


def sa_solver(predictor_order: int, corrector_order: int, tau: float) -> dict[str, Any]:
    orders = {"predictor_order": predictor_order, "corrector_order": corrector_order}
    return orders | NOT_LOWER | {"tau_func": lambda t: torch.tensor(tau)}


CASES: list[tuple[str, dict[str, Any], Sampler]] = [
    ("DDPMScheduler", {"variance_type": "fixed_small", "clip_sample": False}, Ancestral(num_steps=1)),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}, Ancestral(num_steps=1, variance=1.0)),
    ("DDIMScheduler", {"clip_sample": False}, DDIM(num_steps=1)),
    ("EulerDiscreteScheduler", {}, DDIM(num_steps=1)),
    ("HeunDiscreteScheduler", {}, Heun(num_steps=1)),
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, DPMSolverPP2M(num_steps=1)),
    ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}, UniPC(num_steps=1)),
    ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, UniPC(num_steps=1, variant="bh1")),
    ("UniPCMultistepScheduler", {"solver_order": 3}, UniPC(num_steps=1, solver_order=3)),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, DPMSolverPP2M(num_steps=1, eta=1.0)),
    ("DEISMultistepScheduler", {"solver_order": 3} | NOT_LOWER, AdamsBashforth(num_steps=1)),
    ("LMSDiscreteScheduler", {}, AdamsBashforth(num_steps=1, solver_order=4, variable="rho")),
    ("SASolverScheduler", sa_solver(3, 4, 1.0), SASolver(num_steps=1)),
    ("SASolverScheduler", sa_solver(2, 2, 0.5), SASolver(num_steps=1, predictor_order=2, corrector_order=2, tau=0.5)),
]
NO_IMAGE = ("DEISMultistepScheduler", "LMSDiscreteScheduler", "SASolverScheduler")
"""Schedulers whose last step is not of first order, to clean data."""


@pytest.mark.parametrize(
    ("name", "settings", "sampler", "table"),
    [(*case, table) for case in CASES for table in TABLES if (case[0], table) != ("HeunDiscreteScheduler", "cosine")],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),  # addresses differ between processes
)
@pytest.mark.parametrize("steps", [10, 28])  # 9 and 27 divide 999, so the grids of diffusers consist of whole timesteps
def test_trajectory_equals_diffusers(
    name: str, settings: dict[str, Any], sampler: Sampler, table: str, steps: int
) -> None:
    make, betas = TABLES[table]
    scheduler = {"SASolverScheduler": ExactSASolver}.get(name, getattr(diffusers, name))(**betas, **settings)
    seen, image = run_scheduler(scheduler, steps)
    k = scheduler.timesteps.unique().flip(0).double()  # (Heun of diffusers lists most of them twice)
    times = torch.cat([(k + 1) / 1000, torch.tensor([CLEAN])]).float()
    ours = Ours(make())
    found = sampler.sample(ours, START, generator=generator("cpu", 1), times=times)
    assert len(ours.seen) == len(seen)
    pairs = [*zip(ours.seen, seen, strict=True)]
    if name in NO_IMAGE or settings.get("solver_type") == "bh1":
        del pairs[len(pairs) - (name == "LMSDiscreteScheduler") :]
    elif settings.get("solver_order") == 3:
        pairs.pop()
    else:
        pairs.append((found, image))
    for mine, their in pairs:
        assert (mine - their).abs().max() <= 1e-4 * their.abs().max()


@dataclass(frozen=True)
class Flows:
    """`network` as a velocity network: x_t = (1 - t) x_0 + t eps moves by eps - x_0."""

    schedule: RectifiedFlow
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.seen.append(x_t)
        velocity = network(x_t, float(t) * 1000)
        return Prediction(x0=x_t - t * velocity, eps=x_t + (1 - t) * velocity)


@pytest.mark.parametrize("steps", [10, 28])
def test_flow_trajectory_equals_diffusers(steps: int) -> None:
    ours, sampler = Flows(RectifiedFlow()), Euler(num_steps=steps)
    found = sampler.sample(ours, START, generator=generator("cpu", 1))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sampler.times(ours.schedule)[:-1].tolist())
    x, seen = START, []
    for k in scheduler.timesteps:
        seen.append(x)
        x = scheduler.step(network(x, float(k)), k, x).prev_sample
    assert len(ours.seen) == len(seen) == steps
    for mine, their in zip([*ours.seen, found], [*seen, x], strict=True):
        assert (mine - their).abs().max() <= 1e-4 * their.abs().max()


class Sine(VariancePreserving):
    """The schedule of ``IPNDMScheduler``: alpha = cos(pi t / 2) and sigma = sin(pi t / 2)."""

    t_min = 1e-3

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(torch.tan(torch.pi / 2 * t))


@dataclass(frozen=True)
class PredictsV:
    """`network` as a v network."""

    schedule: Sine
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.seen.append(x_t)
        at, v = self.schedule.at(t, x_t), network(x_t, float(t) * 1000)
        return Prediction(x0=at.alpha * x_t - at.sigma * v, eps=at.sigma * x_t + at.alpha * v)


def test_ipndm_trajectory_equals_diffusers() -> None:
    """The last step, to clean data, is not compared: diffusers extrapolates eps there."""
    times = torch.cat([torch.linspace(0.98, 0.1, 23), torch.tensor([CLEAN])])
    scheduler = diffusers.IPNDMScheduler(trained_betas=torch.sin(torch.pi / 2 * times.clamp(min=0)).tolist())
    scheduler.set_timesteps(23)
    x, seen = START, []
    for t in scheduler.timesteps:
        seen.append(x)
        x = scheduler.step(network(x, float(t) * 1000), t, x).prev_sample
    ours = PredictsV(Sine())
    sampler = AdamsBashforth(num_steps=1, solver_order=4, variable="step")
    sampler.sample(ours, START, generator=generator("cpu", 1), times=times)
    for mine, their in zip(ours.seen, seen, strict=True):
        assert (mine - their).abs().max() <= 1e-4 * their.abs().max()


@dataclass(frozen=True)
class KDiffusion:
    """A model as k-diffusion calls it: the state is x_t / alpha, and it returns the predicted image."""

    ours: DenoiserProtocol

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        t = self.ours.schedule.t_from_log_snr(-2 * sigma[0].log())
        return self.ours(self.ours.schedule.at(t, x).alpha * x, t, {}).x0


def two_draws(source: torch.Generator, x: Tensor, eta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return noise for ``sample_dpmpp_sde``: in the first half of a step, a draw; for the whole step, the sum of this
    noise, damped by the second half, and a second draw."""
    first: list[tuple[Tensor, Tensor]] = []

    def noise(sigma: Tensor, next_sigma: Tensor) -> Tensor:
        z = normal_like(x, source)
        if not first:
            first.append((next_sigma, z))
            return z
        middle, earlier = first.pop()

        def std(high: Tensor, low: Tensor) -> Tensor:
            return low * (1 - (low / high) ** (2 * eta)).sqrt()

        damped = (next_sigma / middle) ** (1 + eta) * std(sigma, middle) * earlier
        return (damped + std(middle, next_sigma) * z) / std(sigma, next_sigma)

    return noise


K_DIFFUSION: list[tuple[str, Sampler, dict[str, Any]]] = [
    ("sample_dpmpp_2s_ancestral", DPMSolverPP2S(num_steps=1), {"eta": 0.0}),
    ("sample_dpmpp_sde", DPMSolverPP2S(num_steps=1, eta=1.0), {"eta": 1.0}),
    ("sample_dpmpp_2m_sde", DPMSolverPP2M(num_steps=1, eta=1.0), {"eta": 1.0}),
    ("sample_dpmpp_2m_sde", DPMSolverPP2M(num_steps=1, eta=0.3), {"eta": 0.3}),
    ("sample_lms", AdamsBashforth(num_steps=1, solver_order=4, variable="rho"), {}),
]


@pytest.mark.parametrize(("name", "sampler", "settings"), K_DIFFUSION, ids=str)
def test_samples_equal_k_diffusion(name: str, sampler: Sampler, settings: dict[str, Any]) -> None:
    """From noise to log-SNR 5, in float64. (In its last step, to sigma 0, ``sample_lms`` extrapolates.)"""
    module = sampling.k_diffusion_sampling()
    if module is None:
        pytest.skip("k-diffusion is not installed: pip install -e '.[bench]'")
    schedule = LinearBetas().double()
    times = schedule.t_from_log_snr(torch.linspace(-9, 5, 21, dtype=torch.float64))
    ours, start = Ours(schedule), START.double()
    found = sampler.sample(ours, start, generator=generator("cpu", 1), times=times)
    at, source = schedule.at(times), generator("cpu", 1)
    if name == "sample_dpmpp_sde":
        settings = settings | {"noise_sampler": two_draws(source, start, settings["eta"])}
    elif name != "sample_lms":
        settings = settings | {"noise_sampler": lambda *_: normal_like(start, source)}
    their = getattr(module, name)(
        KDiffusion(Ours(schedule)), start / at.alpha[0], at.sigma / at.alpha, disable=True, **settings
    )
    torch.testing.assert_close(found, at.alpha[-1] * their, rtol=1e-5 if name == "sample_lms" else 1e-9, atol=1e-6)


def test_three_points_give_third_order_here_and_second_order_in_k_diffusion() -> None:
    """``sample_dpmpp_3m_sde`` takes half of the second derivative. The errors are those of the ODE for Gaussian data,
    in 160 and 320 steps.
    """
    module = sampling.k_diffusion_sampling()
    if module is None:
        pytest.skip("k-diffusion is not installed: pip install -e '.[bench]'")
    denoiser = ExactDenoiser(VP())
    sampler = SASolver(num_steps=1, predictor_order=3, corrector_order=0, tau=0.0)
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for steps in (160, 320):
        times = slow_start(inner_times(denoiser.schedule, steps).double())
        (mean, covariance), (end_mean, end_covariance) = (true_moments(denoiser.schedule, t) for t in times[[0, -1]])
        z = torch.randn(5, 1, 1, 3, generator=generator("cpu", 1), dtype=torch.float64)
        start, exact = mean + z @ root(covariance), end_mean + z @ root(end_covariance)
        at = denoiser.schedule.at(times)
        found = {
            "ours": sampler.sample(denoiser, start, generator=generator("cpu", 0), times=times),
            "theirs": at.alpha[-1]
            * module.sample_dpmpp_3m_sde(
                KDiffusion(denoiser), start / at.alpha[0], at.sigma / at.alpha, disable=True, eta=0.0
            ),
        }
        for name, x in found.items():
            errors[name].append(float((x - exact).abs().max()))
    orders = {name: math.log2(coarse / fine) for name, (coarse, fine) in errors.items()}
    assert orders == {"ours": pytest.approx(3, abs=0.1), "theirs": pytest.approx(2, abs=0.1)}
