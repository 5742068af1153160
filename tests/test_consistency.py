"""Consistency models: exact functions on Gaussian data, the loss against its published formula, and settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from composing import compose
from gaussian_truth import (
    MEAN,
    VARIANCE,
    ExactDenoiser,
    GivenNoise,
    GivenTimes,
    cubature,
    error,
    scales,
    schedule_named,
)
from gencompare.diffusion import consistency
from gencompare.diffusion.consistency import ConsistencyTraining, MultistepConsistency
from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.ode_samplers import RK45
from gencompare.diffusion.parameterizations import EDMPreconditioning, Prediction
from gencompare.diffusion.schedules import EDMSchedule, NoiseSchedule
from gencompare.diffusion.times import LogSNRGrid
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.rng import RandomSource, generator
from gencompare.tasks.export import write_pipeline
from gencompare.tasks.runs.build import build_data, build_model
from parts import part

pytestmark = pytest.mark.usefixtures("double")

KINDS = {"karras": "karras", "vp": "v", "cosine": "eps", "rectified": "velocity"}
"""Schedules with a parameterisation for which a consistency model is possible."""


@dataclass(frozen=True)
class ExactConsistency(ExactDenoiser):
    """The consistency function of Gaussian data. Along each axis of the data, of variance V, the probability-flow ODE
    keeps (x / alpha - m) / sqrt(V + (sigma / alpha)^2)."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = scales(self.schedule, t)
        gain = (VARIANCE / (VARIANCE + (sigma / alpha) ** 2)).sqrt()
        x0 = MEAN + (x_t / alpha - MEAN) @ (self.axes * gain) @ self.axes.T
        return Prediction(x0=x0, eps=(x_t - alpha * x0) / sigma)


@pytest.mark.parametrize("name", KINDS)
def test_all_points_of_a_trajectory_have_the_same_image(name: str) -> None:
    schedule = schedule_named(name)
    function = ExactConsistency(schedule)
    times = LogSNRGrid(log_snr_start=-4.0, log_snr_end=4.0)(schedule, 4)[:-1]
    x = schedule.prior((5, 1, 1, 3), generator("cpu", 1), t=times[0])
    solver = RK45(num_steps=3, rtol=1e-8, atol=1e-8)
    steps = solver.iterate(ExactDenoiser(schedule), x, generator=generator("cpu", 0), times=times)
    for step in steps:
        torch.testing.assert_close(function(step.x, step.t, {}).x0, function(x, times[0], {}).x0, rtol=0, atol=1e-6)


# Sampling


@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_samples_of_the_exact_function_are_exact(calls: int, name: str) -> None:
    schedule = schedule_named(name)
    sampler = MultistepConsistency(num_steps=calls, grid=LogSNRGrid(log_snr_end=0.394))
    times = sampler.times(schedule).double()
    assert error(sampler, ExactConsistency(schedule), times) < 1e-8
    assert error(sampler, ExactDenoiser(schedule), times) > 0.1, "those of a denoiser are not"


def test_two_steps_use_the_published_noise_levels() -> None:
    grid = part("sampler/grid", "consistency")
    for calls, expected in ((1, [80.0]), (2, [80.0, 0.821])):
        levels = torch.exp(-EDMSchedule().log_snr(grid(EDMSchedule(), calls)[:-1]) / 2)
        torch.testing.assert_close(levels, torch.tensor(expected), rtol=3e-4, atol=0)


# The loss


class Function:
    """A consistency function of images of one pixel, theta f(x, s), with a trainable theta of 1.

    Args:
        schedule: the schedule.
        gain: factor of x / alpha - m, for data N(m, V), as a function of V and s^2.
    """

    mean, variance = 0.4, 0.3

    def __init__(self, schedule: NoiseSchedule, gain: Callable[[float, Tensor], Tensor]) -> None:
        self.schedule, self.gain, self.theta = schedule, gain, torch.ones((), requires_grad=True)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        at = self.schedule.at(t, x_t)
        gain = self.gain(self.variance, torch.exp(-at.log_snr))
        x0 = self.theta * (self.mean + gain * (x_t / at.alpha - self.mean))
        return Prediction(x0, x0)


def trajectory_gain(variance: float, s2: Tensor) -> Tensor:
    return (variance / (variance + s2)).sqrt()


def posterior_gain(variance: float, s2: Tensor) -> Tensor:
    return variance / (variance + s2)


def expected_gradient(name: str, gain: Any, distance: float) -> float:
    """Return the expected gradient of theta if s_r = (1 - distance) s_t, with the squared distance (a large c)."""
    function = Function(schedule_named(name), gain)
    x0, eps = cubature(function.mean, function.variance)
    t = function.schedule.t_from_log_snr(torch.full((4,), -2 * math.log(0.8)))
    objective = ConsistencyTraining(times=GivenTimes(t), q=1 / distance, num_stages=1, k=0.0, c=1e4)
    objective(function, x0, {}, GivenNoise.of(eps))["loss"].mean().backward()  # type: ignore[arg-type]
    assert function.theta.grad is not None
    return abs(float(function.theta.grad)) * 1e4


def orders(name: str, gain: Any) -> float:
    return math.log2(expected_gradient(name, gain, 0.02) / expected_gradient(name, gain, 0.01))


@pytest.mark.parametrize("name", ["karras", "vp", "rectified"])
def test_the_consistency_function_is_the_fixed_point_of_close_levels(name: str) -> None:
    """Divided by the distance of the levels, the gradient vanishes for the consistency function, but not for a
    denoiser."""
    assert orders(name, trajectory_gain) == pytest.approx(1, abs=0.1)
    assert expected_gradient(name, trajectory_gain, 1e-3) < 1e-3
    assert expected_gradient(name, posterior_gain, 1e-3) > 0.02


def test_images_of_a_single_point_have_no_loss() -> None:
    function = Function(EDMSchedule(), lambda variance, s2: torch.zeros_like(s2))
    x0, eps = torch.full((6, 1, 1, 1), function.mean), torch.randn(6, 1, 1, 1, generator=generator("cpu", 1))
    t = torch.linspace(0, 1, 6)
    loss = ConsistencyTraining(times=GivenTimes(t))(function, x0, {}, GivenNoise.of(eps))["loss"]  # type: ignore[arg-type]
    assert (loss == 0).all()


class Linear(nn.Module):
    """Outputs a x + b ln(sigma) / 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        return self.a * x + self.b * noise.view(-1, 1, 1, 1)


def edm(network: nn.Module) -> Denoiser:
    conditioning = part("parameterization", "karras", noise_conditioning={"_target_": LOG_SIGMA}).noise_conditioning
    return Denoiser(network, EDMSchedule(), EDMPreconditioning(conditioning))


LOG_SIGMA = "gencompare.diffusion.parameterizations.LogSigmaConditioning"
STAGES = [(0.0, 0), (0.12, 0), (0.13, 1), (0.55, 4), (0.9, 7), (1.0, 7)]


@pytest.mark.parametrize(("progress", "stage"), STAGES)
@pytest.mark.parametrize("c", [1e-8, 0.06])
def test_loss_and_gradient_are_those_of_the_published_code(progress: float, stage: int, c: float) -> None:
    """Restated from locuslab/ect, training/loss.py, whose stages count from 0, and EDM's preconditioning."""
    network, source = Linear(), generator("cpu", 3)
    sigma = np.array([0.01, 0.3, 1.7, 9.0, 60.0])
    y, eps = (torch.randn(5, 1, 2, 2, generator=source) for _ in range(2))
    t = EDMSchedule().t_from_log_snr(torch.from_numpy(-2 * np.log(sigma)))
    objective = part("objective", "consistency", c=c / 2).at_progress(progress)  # the root of 4 values
    objective = ConsistencyTraining(**{**vars(objective), "times": GivenTimes(t)})
    found = objective(edm(network), y, {}, GivenNoise.of(eps))["loss"]
    found.sum().backward()

    def denoise(noisy: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the denoised image, and its derivatives with respect to a and b."""
        s = s.reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in = 0.25 / (s**2 + 0.25), 0.5 * s / np.sqrt(s**2 + 0.25), 1 / np.sqrt(s**2 + 0.25)
        d_a, d_b = c_out * c_in * noisy, c_out * np.log(np.maximum(s, 1e-30)) / 4 * np.ones_like(noisy)
        return c_skip * noisy + 0.7 * d_a - 0.3 * d_b, d_a, d_b

    images, noise = y.numpy(), eps.numpy()
    r = np.maximum(0, sigma * (1 - (1 + 8 / (1 + np.exp(sigma))) / 2 ** (stage + 1)))
    noisy_t, noisy_r = (images + s.reshape(-1, 1, 1, 1) * noise for s in (sigma, r))
    denoised, d_a, d_b = denoise(noisy_t, sigma)
    target = np.where((r > 0.002).reshape(-1, 1, 1, 1), denoise(noisy_r, r)[0], images)
    r = np.where(r > 0.002, r, 0)
    norm = np.sqrt(((denoised - target) ** 2).sum((1, 2, 3)) + c**2)
    loss = (norm - c) / (sigma - r) / 2  # the root of 4 values
    np.testing.assert_allclose(found.detach().numpy(), loss, rtol=1e-6, atol=1e-8)
    for parameter, derivative in ((network.a, d_a), (network.b, d_b)):
        expected = (((denoised - target) * derivative).sum((1, 2, 3)) / norm / (sigma - r) / 2).sum()
        assert parameter.grad is not None
        assert float(parameter.grad) == pytest.approx(expected, rel=1e-6), "no gradient flows through the target"


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        return self.drop(x + 1)


def distance_with_dropout() -> float:
    """Return the mean distance of predictions at nearly the same level."""
    torch.manual_seed(0)
    objective = ConsistencyTraining(q=1e6, num_stages=1)
    x0 = torch.randn(6, 1, 4, 4)
    return float(
        objective(edm(WithDropout()), x0, {}, RandomSource.for_batch(generator("cpu", 2), 6))["distance"].mean()
    )


def test_both_predictions_have_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distance_with_dropout() < 1e-3
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randn(6, 1, 4, 4), WithDropout()(torch.zeros(6, 1, 4, 4), torch.zeros(6), {})
    assert torch.equal(after, torch.get_rng_state()), "each prediction draws masks once"

    @contextmanager
    def other_masks(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(consistency, "from_state", other_masks)
    assert distance_with_dropout() > 0.05


# Settings

SPEC = DataSpec("points", (1, 2, 2), num_bins=None)


def model(schedule: str = "karras", parameterization: str = "karras", **changes: Any) -> Diffusion:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "network": part("network", "mlp", width=16, depth=1), "schedule": part("schedule", schedule),
        "parameterization": part("parameterization", parameterization), "objective": part("objective", "consistency"),
        "sampler": MultistepConsistency(num_steps=2),
    }  # fmt: skip
    return Diffusion(SPEC, **arguments | changes)


@pytest.mark.parametrize("schedule", KINDS)
def test_schedules_and_parameterisations_can_be_combined(schedule: str) -> None:
    trained = model(schedule, KINDS[schedule]).train()
    x = torch.rand(4, *SPEC.shape, generator=generator("cpu", 1)) * 2 - 1
    loss = trained.losses(x, {}, RandomSource.for_batch(generator("cpu", 2), 4))["loss"]
    loss.mean().backward()
    assert loss.isfinite().all() and all(p.grad is not None and p.grad.isfinite().all() for p in trained.parameters())


def test_levels_approach_each_other_in_training_only() -> None:
    seen: list[float] = []

    class Objective(ConsistencyTraining):
        def __call__(self, *args: Any) -> Any:
            seen.append(self.progress)
            return super().__call__(*args)

    trained, x = model(objective=Objective()).train(), torch.zeros(2, *SPEC.shape)
    trained.progress = 0.4
    for training in (True, False):
        trained.train(training).losses(x, {}, RandomSource.for_batch(generator("cpu", 2), 2))
    assert seen == [0.4, 1.0]
    level = torch.tensor(1e6)  # where n = 1
    gaps = [1 - part("objective", "consistency").at_progress(p).lower_level(level) / level for p in (0, 0.5, 1)]
    assert gaps == [0.5, 2.0**-5, 2.0**-8]


def test_visualisation_leaves_out_what_needs_a_denoiser() -> None:
    images = model().eval().visualize(torch.zeros(4, *SPEC.shape), {}, generator=generator("cpu", 1))
    assert images.keys() == {"inpainting", "trajectory"}
    assert model().likelihoods() == {}


def test_export_to_diffusers_is_refused(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    cfg = compose("model=ddpm", "model/objective=consistency", "model/sampler=consistency", "data=digits")
    with pytest.raises(UserError, match="format=diffusers does not support consistency models"):
        write_pipeline(cfg, build_model(cfg, build_data(cfg)), tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(parameterization="x0"), "must leave an image without noise as it is.*karras, velocity or v"),
        (lambda: model(sampler=part("sampler", "heun")), r"Heun needs a denoiser.*model/sampler=consistency"),
        (lambda: ConsistencyTraining(q=1.0), r"objective\.q=1\.0 must be above 1"),
        (lambda: ConsistencyTraining(num_stages=0), r"objective\.num_stages=0"),
        (lambda: ConsistencyTraining(c=0.0), r"objective\.c=0\.0"),
        (
            lambda: model(guidance=SimpleNamespace(guides=dict, needs_label=False)),
            "changes the score, which a consistency model does not predict",
        ),
        (lambda: model(patches=part("patches", "random")), "ConsistencyTraining is a loss of whole images"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
