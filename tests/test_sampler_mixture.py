"""Samplers on a mixture of two Gaussians with a known denoiser give the right weights, means and standard deviations of
the modes.

n = 1500 images of 16 pixels suffice for the Langevin corrector, whose step size depends on the norm of the score, and
there are enough steps for convergence. The weight of a mode then has a standard error of sqrt(0.2 0.8 / n) = 0.01.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gaussian_truth import Mixture, even_levels
from gencompare.diffusion.schedules import VE, VP, NoiseSchedule, RectifiedFlow
from gencompare.rng import generator
from parts import denoiser_samplers, part

N, PIXELS = 1500, 16
STEPS = {"annealed_langevin": 40, "rk45": 2, "heun": 50, "restart": 50, "dpmpp_2s": 50, "predictor_corrector": 100}
STEPS |= dict.fromkeys(["dpmpp_2m", "unipc", "deis", "sa_solver", "er_sde"], 60)
CHANGES = {
    "annealed_langevin": {"num_langevin_steps": 25},
    "predictor_corrector": {"num_corrector_steps": 3},
    "restart": {"restart_steps": 10},
}
SCHEDULES = [VP, VE, RectifiedFlow]
BIAS = {"ancestral": 0.03, "ddim": 0.02, "euler": 0.1, "reverse_diffusion": 0.03} | {
    "annealed_langevin": 0.1, "predictor_corrector": 0.06
}  # fmt: skip
"""Relative tolerance of the standard deviation in addition to the Monte Carlo error; 0 for the other samplers. The
first four are of first order, with 250 steps of about 0.1 in log-SNR. (Euler steps in time; its 0.1 is for VE.)
Langevin steps leave more noise than that of their level: the variance is larger by 1 / (1 - k / 2), and some noise of
the previous level remains."""


pytestmark = pytest.mark.usefixtures("double")


def share_mean_std(x: torch.Tensor) -> tuple[float, float, float, float]:
    """Return the fraction of images nearer to the first mode, the mean pixel of each mode, and the standard
    deviation."""
    first = x.flatten(1).mean(1) < 0
    low, high = x[first].mean(), x[~first].mean()
    spread = torch.cat([(x[first] - low).flatten(), (x[~first] - high).flatten()]).std()
    return float(first.double().mean()), float(low), float(high), float(spread)


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("name", denoiser_samplers())
def test_weights_means_and_widths_of_a_mixture_are_correct(name: str, make: type[NoiseSchedule]) -> None:
    schedule = make()
    sampler = part("sampler", name, num_steps=STEPS.get(name, 250), **CHANGES.get(name, {}))
    times = even_levels(schedule, sampler.num_steps) if sampler.num_steps > 2 else None
    x = schedule.prior((N, 1, 1, PIXELS), generator("cpu", 0)).double()
    out = sampler.sample(Mixture(schedule), x, generator=generator("cpu", 1), times=times)
    share, low, high, std = share_mean_std(out)
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / N) ** 0.5
    for mean, true, weight in ((low, -0.5, 0.2), (high, 0.5, 0.8)):
        assert abs(mean - true) < 4 * 0.2 / (PIXELS * N * weight) ** 0.5
    assert std == pytest.approx(0.2, rel=BIAS.get(name, 0.0) + 4 / (2 * PIXELS * N) ** 0.5)


def test_wrong_weights_are_detected() -> None:
    """With the score of a mixture with equal weights, the samples do not have the weights 0.2 and 0.8."""
    schedule = VP()
    x = schedule.prior((N, 1, 1, PIXELS), generator("cpu", 0)).double()
    wrong = dataclasses.replace(Mixture(schedule), weights=(0.5, 0.5))
    out = part("sampler", "ddim", num_steps=100).sample(wrong, x, generator=generator("cpu", 1))
    assert abs(share_mean_std(out)[0] - 0.2) > 4 * (0.2 * 0.8 / N) ** 0.5
