"""Samplers against those of diffusers: same network, noise and times, same trajectory to 1e-4.

Where conventions differ:

- Time. Their timestep k = 0, ..., 999 is the index of a beta; here it is t = (k + 1) / 1000, and clean data are a time
  of their own, `CLEAN`, where they have a sigma of 0 or an alpha bar of 1 after the last timestep.
- State. Their Euler and Heun hold x / alpha, whose noise is sigma / alpha, and scale it for the network; here the state
  is x_t, as the network sees it. Compared is therefore what the network is shown at every call, and the image.
- Names. Their Euler of diffusion models steps in sigma / alpha: that is `DDIM` with eta 0 here, as theirs is. `Euler`
  here steps in t, as their Euler of flow matching does, whose sigma is the time of `Rectified`; there the network says
  the velocity, and time ends at 1 - 1e-4 here: they are given our times.
- UniPC. Theirs corrects x_s at the start of the next step, here it is done before x_s is shown: the same calls.
  Their bh1 gives NaN in the step to sigma 0, so there the image is not compared.
- Heun. Here a step in which sigma / alpha falls more than 100-fold is Euler's; the cosine table begins with one, so
  Heun is compared on other tables. No step of these grids is so long that the multistep solvers drop their slope.
- Clipping: theirs is switched off; here it is a wrapping of the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond
from gencompare.diffusion.discrete_schedules import BetaTable, CosineBetas, LinearBetas
from gencompare.diffusion.ode_samplers import DPMSolverPP2M, Euler, Heun, UniPC
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import DDIM, Ancestral, Sampler
from gencompare.diffusion.schedules import CLEAN, RectifiedFlow
from gencompare.rng import generator


def network(x: Tensor, k: float) -> Tensor:
    """Some eps network, neither linear nor the same at any two timesteps."""
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


def theirs(scheduler: Any, steps: int) -> tuple[list[Tensor], Tensor]:
    """What their sampler shows the network, and the times at which; and what comes out."""
    scheduler.set_timesteps(steps)
    # From N(0, 1) noise: some hold x / alpha.
    x = START * scheduler.init_noise_sigma
    if type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        x = START * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    seen, source = [], generator("cpu", 1)
    for k in scheduler.timesteps:
        seen.append(scheduler.scale_model_input(x, k))
        takes_noise = {} if "generator" not in scheduler.step.__code__.co_varnames else {"generator": source}
        x = scheduler.step(network(seen[-1], float(k)), k, x, **takes_noise).prev_sample
    return seen, x


CASES: list[tuple[str, dict[str, Any], Sampler]] = [
    ("DDPMScheduler", {"variance_type": "fixed_small", "clip_sample": False}, Ancestral(num_steps=1)),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}, Ancestral(num_steps=1, variance=1.0)),
    ("DDIMScheduler", {"clip_sample": False}, DDIM(num_steps=1)),
    ("EulerDiscreteScheduler", {}, DDIM(num_steps=1)),
    ("HeunDiscreteScheduler", {}, Heun(num_steps=1)),
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, DPMSolverPP2M(num_steps=1)),
    ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}, UniPC(num_steps=1)),
    ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, UniPC(num_steps=1, variant="bh1")),
]


@pytest.mark.parametrize(
    ("name", "settings", "sampler", "table"),
    [(*case, table) for case in CASES for table in TABLES if (case[0], table) != ("HeunDiscreteScheduler", "cosine")],
    ids=str,
)
@pytest.mark.parametrize("steps", [10, 28])  # 999 divides by 9 and by 27: their grids meet whole timesteps
def test_the_trajectory_is_that_of_diffusers(
    name: str, settings: dict[str, Any], sampler: Sampler, table: str, steps: int
) -> None:
    make, betas = TABLES[table]
    scheduler = getattr(diffusers, name)(**betas, **settings)
    seen, image = theirs(scheduler, steps)
    k = scheduler.timesteps.unique().flip(0).double()  # (their Heun names most of them twice)
    times = torch.cat([(k + 1) / 1000, torch.tensor([CLEAN])]).float()
    ours = Ours(make())
    found = sampler.sample(ours, START, generator=generator("cpu", 1), times=times)
    assert len(ours.seen) == len(seen)
    pairs = [*zip(ours.seen, seen, strict=True), *([(found, image)] if settings.get("solver_type") != "bh1" else [])]
    for mine, their in pairs:
        assert (mine - their).abs().max() <= 1e-4 * their.abs().max()


@dataclass(frozen=True)
class Flows:
    """`network` as a velocity: x_t = (1 - t) x_0 + t eps moves by eps - x_0."""

    schedule: RectifiedFlow
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.seen.append(x_t)
        velocity = network(x_t, float(t) * 1000)
        return Prediction(x0=x_t - t * velocity, eps=x_t + (1 - t) * velocity)


@pytest.mark.parametrize("steps", [10, 28])
def test_the_trajectory_of_a_flow_is_that_of_diffusers(steps: int) -> None:
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
