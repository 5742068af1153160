"""Encoding, interpolation, inpainting and trajectories on Gaussian data, where exact results are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import gaussian_truth
from gaussian_truth import ALONE, MEAN, SENSIBLE, VARIANCE, scales, schedule_named, times_of
from gencompare.diffusion.denoiser import Cond
from gencompare.diffusion.discrete_schedules import LinearBetas
from gencompare.diffusion.editing import (
    NUM_INPAINTINGS,
    NUM_INTERPOLATION_IMAGES,
    NUM_TRAJECTORY_TIMES,
    decode,
    encode,
    inpaint,
    inpainting,
    interpolation,
    normalize_states,
    round_trip,
    slerp,
    trajectory,
    trajectory_rows,
)
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import DDIM
from gencompare.diffusion.schedules import CLEAN, NoiseSchedule
from gencompare.diffusion.times import LogSNRGrid
from gencompare.errors import UserError
from gencompare.rng import generator
from parts import part, samplers

pytestmark = pytest.mark.usefixtures("double")


@dataclass(frozen=True)
class ExactDenoiser(gaussian_truth.ExactDenoiser):
    """The exact denoiser of Gaussian data with independent pixels and class-dependent means. Records its inputs."""

    axes: Tensor = field(default_factory=lambda: ALONE)
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.seen.append(x_t.clone())
        moved = cond["label"][:, None, None, None] / 10 if "label" in cond else torch.tensor(0.0)
        centred = super().__call__(x_t - scales(self.schedule, t)[0] * moved, t, cond)
        return Prediction(x0=centred.x0 + moved, eps=centred.eps)


def images(n: int) -> Tensor:
    return MEAN + VARIANCE.sqrt() * torch.randn(n, 1, 1, 3, generator=generator("cpu", 1))


def carried(schedule: NoiseSchedule, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the exact end point of the probability-flow ODE, which preserves the distance to the mean in standard
    deviations."""
    (alpha, sigma), (alpha_end, sigma_end) = scales(schedule, start), scales(schedule, end)
    stretch = ((alpha_end**2 * VARIANCE + sigma_end**2) / (alpha**2 * VARIANCE + sigma**2)).sqrt()
    return alpha_end * MEAN + stretch * (x - alpha * MEAN)


def inner_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Return increasing times inside the schedule's range."""
    margin = 0.1 * (schedule.t_max - schedule.t_min)
    return torch.linspace(schedule.t_min + margin, schedule.t_max - margin, steps + 1)


# Encoding and decoding


def order(error: Callable[[int], float], steps: int = 80) -> float:
    return math.log2(error(steps) / error(2 * steps))


def test_encoding_follows_the_exact_path_to_second_order(schedule: NoiseSchedule) -> None:
    x = images(6)

    def error(steps: int) -> float:
        times = inner_times(schedule, steps)
        start = carried(schedule, x, torch.tensor(CLEAN), times[0])
        return float(
            (encode(ExactDenoiser(schedule), start, times) - carried(schedule, start, times[0], times[-1])).norm()
        )

    assert order(error) == pytest.approx(2, abs=0.2)


def test_decoding_inverts_encoding_better_with_more_steps(schedule: NoiseSchedule) -> None:
    x = images(6)

    def error(steps: int) -> float:
        times = times_of(part("sampler", "heun", num_steps=steps), schedule)
        noise = encode(ExactDenoiser(schedule), x, times.flip(0))
        return float((decode(ExactDenoiser(schedule), noise, times) - x).abs().max())

    errors = [error(steps) for steps in (10, 40, 160)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0] + 1e-3 and errors[-1] < 0.02


@pytest.mark.parametrize("schedule", SENSIBLE, indirect=True)
def test_images_are_encoded_to_noise(schedule: NoiseSchedule) -> None:
    """Encoding clean data gives noise with the distribution of the prior."""
    x = images(4000)
    times = times_of(part("sampler", "heun", num_steps=100), schedule)
    found = encode(ExactDenoiser(schedule), x, times.flip(0)).flatten(1)
    alpha, sigma = scales(schedule, times[0])
    std = (alpha**2 * VARIANCE + sigma**2).sqrt()
    torch.testing.assert_close(found.mean(0) / std, alpha * MEAN / std, rtol=0, atol=4 / math.sqrt(4000) + 0.01)
    torch.testing.assert_close(found.std(0) / std, torch.ones(3), rtol=0, atol=4 / math.sqrt(8000) + 0.01)


def test_encoding_and_decoding_use_the_conditions() -> None:
    schedule, x = LinearBetas(), images(4)
    times = part("sampler", "heun", num_steps=60).times(schedule)
    one, two = {"label": torch.zeros(4)}, {"label": torch.full((4,), 5.0)}
    noise = encode(ExactDenoiser(schedule), x, times.flip(0), one)
    torch.testing.assert_close(decode(ExactDenoiser(schedule), noise, times, one), x, rtol=0, atol=0.02)
    # With another class, the noise decodes to the image at the same distance from that class's mean.
    torch.testing.assert_close(decode(ExactDenoiser(schedule), noise, times, two), x + 0.5, rtol=0, atol=0.02)


@pytest.mark.parametrize("times", [[0.5, 0.1], [0.1, 0.1], [0.1, 1.5], [0.5]])
def test_encoding_rejects_times_that_do_not_rise_within_the_schedule(times: list[float]) -> None:
    with pytest.raises(UserError):
        encode(ExactDenoiser(LinearBetas()), images(1), torch.tensor(times))


# Interpolation


def test_slerp_has_constant_speed_on_an_arc() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for share in (0.0, 0.25, 0.5, 0.9, 1.0):
        found = slerp(a, b, torch.tensor([share]))
        angle = share * math.pi / 2
        torch.testing.assert_close(found, torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)]]))
    same = torch.randn(3, 2, 2, generator=generator("cpu", 0))
    torch.testing.assert_close(slerp(same, same, torch.tensor([0.0, 0.3, 1.0])), same, rtol=0, atol=1e-5)


def test_slerp_preserves_the_norm_of_noise() -> None:
    a, b = torch.randn(2, 5, 3, 16, 16, generator=generator("cpu", 0))
    middle = slerp(a, b, torch.full((5,), 0.5))
    assert (middle.flatten(1).std(1) - 1).abs().max() < 0.1
    assert ((a + b) / 2).std() < 0.75, "linear interpolation does not preserve the norm"


def test_interpolation_starts_and_ends_at_the_images() -> None:
    schedule, x = LinearBetas(), images(4)
    found = interpolation(ExactDenoiser(schedule), x, {"label": torch.tensor([0.0, 5.0, 3.0, 3.0])})
    assert found.shape == (2, NUM_INTERPOLATION_IMAGES, 1, 1, 3)
    torch.testing.assert_close(found[:, 0], x[[0, 2]], rtol=0, atol=0.02)
    torch.testing.assert_close(found[:, -1], x[[1, 3]], rtol=0, atol=0.02)


# Inpainting

KNOWN = torch.tensor([True, False, True])


@pytest.mark.parametrize("name", samplers())
def test_inpainting_keeps_known_pixels_and_samples_the_others(name: str) -> None:
    """With independent pixels, the unknown pixels must have the distribution of the data."""
    schedule, n = LinearBetas(), 2000
    sampler = part("sampler", name, num_steps=100)
    image = images(1).expand(n, 1, 1, 3)
    found = inpaint(sampler, ExactDenoiser(schedule), image, KNOWN, generator=generator("cpu", 2))
    assert torch.equal(found[..., KNOWN], image[..., KNOWN])
    if sampler.order is not None:
        unknown = found[..., ~KNOWN].flatten()
        mean, std = float(MEAN[1]), float(VARIANCE[1].sqrt())
        assert abs(float(unknown.mean()) - mean) < 4 * std / math.sqrt(n) + 0.05
        assert abs(float(unknown.std()) - std) < 4 * std / math.sqrt(2 * n) + 0.1


@pytest.mark.parametrize("name", samplers())
def test_samplers_continue_from_the_state_that_they_yield(name: str) -> None:
    """Inpainting changes the yielded state in place."""
    truth, sampler = ExactDenoiser(LinearBetas()), part("sampler", name, num_steps=5)
    x = torch.randn(2, 1, 1, 3, generator=generator("cpu", 0))
    steps = sampler.iterate(truth, x, generator=generator("cpu", 1))
    next(steps).x.add_(100)
    seen = len(truth.seen)
    next(steps)
    assert truth.seen[seen].min() > 15  # a stochastic sampler forgets part of it


@pytest.mark.parametrize("name", ["ancestral", "ddim", "heun"])
def test_known_pixels_have_the_noise_of_their_time(name: str) -> None:
    schedule, n = LinearBetas(), 2000
    sampler, truth = part("sampler", name, num_steps=5), ExactDenoiser(schedule)
    image = images(1).expand(n, 1, 1, 3)
    inpaint(sampler, truth, image, KNOWN, generator=generator("cpu", 2))
    for t in sampler.times(schedule)[:-1]:
        alpha, sigma = scales(schedule, t)
        assert any(
            abs(x[..., 0].mean() - alpha * image[0, 0, 0, 0]) < 5 * sigma / math.sqrt(n)
            and abs(x[..., 0].std() - sigma) < 5 * sigma / math.sqrt(2 * n)
            for x in truth.seen
        ), f"at t = {float(t):.3g}"


def test_inpainting_starts_at_the_first_time_of_the_grid() -> None:
    """If the grid starts after the noisiest time, inpainting starts from the noise of the grid's first time."""
    truth = ExactDenoiser(schedule_named("ve"))
    sampler = DDIM(num_steps=5, grid=LogSNRGrid(log_snr_start=-2.0))
    inpaint(sampler, truth, images(1).expand(2000, 1, 1, 3), KNOWN, generator=generator("cpu", 2))
    assert float(truth.seen[0][..., ~KNOWN].std()) == pytest.approx(math.exp(1), rel=0.25)


def test_non_finite_results_are_reported() -> None:
    class Breaks(ExactDenoiser):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            return Prediction(x_t * torch.nan, x_t * torch.nan)

    broken, x, ddim = Breaks(LinearBetas()), images(2), part("sampler", "ddim", num_steps=4)
    for doing in (
        lambda: inpaint(ddim, broken, x, KNOWN, generator=generator("cpu", 0)),
        lambda: trajectory(ddim, broken, x, count=2, generator=generator("cpu", 0)),
        lambda: encode(broken, x, ddim.times(broken.schedule).flip(0)),
    ):
        with pytest.raises(UserError, match="NaN or infinite"):
            doing()


def test_known_must_be_boolean() -> None:
    with pytest.raises(UserError, match="bool"):
        inpaint(
            part("sampler", "ddim"),
            ExactDenoiser(LinearBetas()),
            images(1),
            KNOWN.double(),
            generator=generator("cpu", 0),
        )


# Trajectories


@pytest.mark.parametrize("name", samplers())
def test_trajectory_is_that_of_the_sampler(name: str) -> None:
    schedule = LinearBetas()
    sampler, noise = part("sampler", name, num_steps=9), torch.randn(2, 1, 1, 3, generator=generator("cpu", 0))
    steps = list(sampler.iterate(ExactDenoiser(schedule), noise, generator=generator("cpu", 1)))
    found = trajectory(sampler, ExactDenoiser(schedule), noise, count=4, generator=generator("cpu", 1))
    places = [round(k * (len(steps) - 1) / 3) for k in range(4)]
    assert torch.equal(found.times, torch.stack([steps[k].t for k in places]))
    assert torch.equal(found.states, torch.stack([steps[k].x for k in places]))
    assert torch.equal(found.x0, torch.stack([steps[k].prediction.x0 for k in places]))
    every = trajectory(sampler, ExactDenoiser(schedule), noise, count=10**6, generator=generator("cpu", 1))
    assert len(every.times) == len(steps)
    assert torch.equal(every.states[-1], sampler.sample(ExactDenoiser(schedule), noise, generator=generator("cpu", 1)))


def test_states_are_normalised_for_display() -> None:
    class Exploding(NoiseSchedule):
        t_min = 0.0

        def log_alpha(self, t: Tensor) -> Tensor:
            return 0 * t

        def log_snr(self, t: Tensor) -> Tensor:
            return 2 - 10 * t

    times = torch.tensor([1.0, 0.2, CLEAN])
    states = torch.ones(3, 2, 1, 1, 3)
    found = normalize_states(states, times, Exploding())[:, 0, 0, 0, 0]
    expected = [(1 + math.exp(8)) ** -0.5, 0.5**0.5, 1.0]
    torch.testing.assert_close(found, torch.tensor(expected))


# Image rows


def test_image_rows_have_the_documented_layout() -> None:
    schedule, x = LinearBetas(), images(5)
    heun, label = part("sampler", "heun", num_steps=40), {"label": torch.arange(5.0)}
    there = round_trip(ExactDenoiser(schedule), x, label)
    assert torch.equal(there[0], x) and there.shape == (3, 5, 1, 1, 3)
    torch.testing.assert_close(there[2], x, rtol=0, atol=0.05)
    filled = inpainting(heun, ExactDenoiser(schedule), x, label, generator("cpu", 0))
    assert filled.shape == (5, 2 + NUM_INPAINTINGS, 1, 1, 3) and torch.equal(filled[:, 0], x)
    shown = trajectory_rows(heun, ExactDenoiser(schedule), x, label, generator("cpu", 0))
    assert shown.shape == (8, NUM_TRAJECTORY_TIMES, 1, 1, 3)
    # The last predicted image is the sample.
    torch.testing.assert_close(shown[0::2, -1], shown[1::2, -1], rtol=0, atol=1e-12)


def test_visualize_task_writes_images_of_a_run(cli: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    torch.set_default_dtype(torch.float32)
    quick = [
        "data=digits", "trainer=cpu", "logger=none", "trainer.global_batch_size=16", "budget.images=null",
        "budget.steps=1", "callbacks.evaluation.num_evaluations=0", "callbacks.progress_bar=null",
        "evaluation.checkpoints=[]",
    ]  # fmt: skip
    small = ["model/network=mlp", "model.network.width=16", "model.conditional=true", "model/sampler=ddim"]
    assert cli(*quick, *small, "model.sampler.num_steps=3", "hydra.run.dir=run") == 0
    capsys.readouterr()
    assert cli("task=visualize", "run_dir=run", "task.num_images=4") == 0
    output = capsys.readouterr().out
    for name in ("interpolation", "inpainting", "round_trip", "trajectory"):
        path = Path("run", "visualize", f"{name}.png")
        assert str(path) in output
        assert np.asarray(Image.open(path)).std() > 10
    assert cli("task=visualize", "run_dir=run", "task.num_images=1") == 1
    assert "at least 2" in capsys.readouterr().err
    assert cli("model=gaussian", *quick, "hydra.run.dir=other") == 0
    assert cli("task=visualize", "run_dir=other") == 1
    assert "has no visualisations" in capsys.readouterr().err
