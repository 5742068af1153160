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
- Clipping is switched off in diffusers; here it is a wrapper of the denoiser.
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
from gencompare.diffusion.multistep_samplers import DPMSolverPP2M, UniPC
from gencompare.diffusion.ode_samplers import Euler, Heun
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import DDIM, Ancestral, Sampler
from gencompare.diffusion.schedules import CLEAN, RectifiedFlow
from gencompare.rng import generator


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
@pytest.mark.parametrize("steps", [10, 28])  # 9 and 27 divide 999, so the grids of diffusers consist of whole timesteps
def test_trajectory_equals_diffusers(
    name: str, settings: dict[str, Any], sampler: Sampler, table: str, steps: int
) -> None:
    make, betas = TABLES[table]
    scheduler = getattr(diffusers, name)(**betas, **settings)
    seen, image = run_scheduler(scheduler, steps)
    k = scheduler.timesteps.unique().flip(0).double()  # (Heun of diffusers lists most of them twice)
    times = torch.cat([(k + 1) / 1000, torch.tensor([CLEAN])]).float()
    ours = Ours(make())
    found = sampler.sample(ours, START, generator=generator("cpu", 1), times=times)
    assert len(ours.seen) == len(seen)
    pairs = [*zip(ours.seen, seen, strict=True), *([(found, image)] if settings.get("solver_type") != "bh1" else [])]
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
