"""Failures of plain score matching (Song and Ermon 2019, sections 3.1 and 3.2), and how several noise levels fix them.

These are the claims of docs/score_matching.md, with the training of its figure (`toy_scores`) in fewer steps.
test_sampler_mixture.py checks the weights of a mixture for every sampler and schedule.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gaussian_truth import Mixture
from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import CLEAN, NoiseSchedule
from gencompare.diffusion.sde_samplers import AnnealedLangevin, EulerMaruyama, ReverseDiffusion
from gencompare.rng import generator

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "figures"))

import toy_scores as toy  # type: ignore[import-not-found]

SMALL = 0.02
EXACT = Mixture(toy.SCHEDULE, weights=(0.2, 0.8), means=(-0.5, 0.5), std=0.1)
SAMPLERS = [toy.ANNEALED, EulerMaruyama(num_steps=100), ReverseDiffusion(num_steps=100)]


@pytest.fixture(scope="module")
def one() -> Denoiser:
    return toy.train_at_one_level(toy.two_gaussians, SMALL, steps=300, features=64, depth=2)


@pytest.fixture(scope="module")
def many() -> Denoiser:
    return toy.train_at_many_levels(toy.two_gaussians, steps=600, features=64, depth=2)


# A low-dimensional manifold.


def test_score_matching_is_unbounded_on_a_line_and_bounded_with_noise() -> None:
    """The data are N(0, l^2) along a line, with l = 0.5, and noise of standard deviation n is added in both directions.
    The minimum of the loss is -(1 / (l^2 + n^2) + 1 / n^2) / 2."""
    _, bare = toy.train_by_score_matching(0.0, steps=150)
    _, noisy = toy.train_by_score_matching(0.1, steps=150)
    least = -0.5 * (1 / (0.25 + 0.01) + 1 / 0.01)
    assert sum(noisy[-50:]) / 50 == pytest.approx(least, rel=0.1)
    late = [sum(bare[k - 50 : k]) / 50 for k in (50, 100, 150)]
    assert late[2] < 1.5 * late[1] < 2 * late[0] and late[2] < 4 * least, "the loss falls faster and faster"


def test_score_is_unbounded_off_a_line_but_not_at_noisy_points() -> None:
    """Noise N(0, s^2) perpendicular to the line has the score -d / s^2 at distance d, and s times the score has a mean
    square of 1."""
    learned = toy.train_at_many_levels(toy.line, steps=300, features=64, depth=2)
    source = generator("cpu", 3)
    for sigma in (0.05, 0.1, 0.2, 0.5, 1.0):
        far = toy.mean_normal_score(learned, 1000, sigma, 0.1, source)
        assert far == pytest.approx(0.1 / sigma**2, rel=0.15)
    for sigma in (SMALL, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0):
        assert toy.rms_normal_score(learned, 1000, sigma, source) == pytest.approx(1, abs=0.12)
    # The samples lie on the line up to the noise of the last level, with the spread of the data along it.
    x = toy.draw_samples(dataclasses.replace(toy.ANNEALED, denoise=False), learned, 400).flatten(1)
    assert float((x @ toy.NORMAL).std()) == pytest.approx(SMALL, rel=0.3)
    assert float(x.sum(1).std()) / math.sqrt(2) == pytest.approx(0.5, rel=0.15)


@dataclasses.dataclass(frozen=True)
class LineDenoiser:
    """The exact denoiser of N(0, 1/4) on the line x_1 = x_2: E[x_0 | x_t] is the component along the line / (1 + 4
    sigma^2)."""

    schedule: NoiseSchedule = toy.SCHEDULE

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        sigma = self.schedule.at(t, x_t).sigma
        x0 = x_t.mean(1, keepdim=True).expand_as(x_t) / (1 + 4 * sigma**2)
        return Prediction(x0=x0, eps=(x_t - x0) / sigma)


def test_steps_short_enough_to_stay_on_a_line_mix_slowly_along_it() -> None:
    """The score perpendicular to the line is -d / s^2, so steps have size s^2, and 1000 of them hardly move along the
    line."""
    start = torch.ones(2000, 2, 1, 1)
    ends = []
    for steps, times in ((1, torch.stack([toy.time_of(SMALL), torch.tensor(CLEAN)])), (20, None)):
        sampler = AnnealedLangevin(num_steps=steps, num_langevin_steps=1000 // steps, denoise=False)
        x = sampler.sample(LineDenoiser(), start, generator=generator("cpu", 0), times=times).flatten(1)
        assert float((x @ toy.NORMAL).std()) == pytest.approx(SMALL, rel=0.1)
        ends.append(x.sum(1) / math.sqrt(2))
    # A step of k s^2 times the score, k = 0.1, keeps 1 - k s^2 / v of the position, with v = 1/4 + s^2 along the line.
    v = 0.25 + SMALL**2
    kept = (1 - 0.1 * SMALL**2 / v) ** 1000
    assert kept > 0.8
    assert float(ends[0].mean()) == pytest.approx(kept * math.sqrt(2), abs=0.03)
    assert float(ends[0].std()) == pytest.approx((v * (1 - kept**2)) ** 0.5, rel=0.08)
    assert float(ends[1].mean()) == pytest.approx(0, abs=0.06) and float(ends[1].std()) == pytest.approx(0.5, rel=0.08)


# Regions with little data.


def error(denoiser: Denoiser, x: Tensor, sigma: float) -> float:
    """Return sqrt(E||s - exact s||^2 / E||exact s||^2) for the two Gaussians with noise, where the exact score follows
    from Bayes' rule."""
    variance = 0.1**2 + sigma**2
    flat, mean = x.flatten(1).double(), torch.tensor([0.5, 0.5], dtype=torch.float64)
    log_odds = math.log(0.8 / 0.2) + 2 * flat @ mean / variance
    true = (log_odds.div(2).tanh()[:, None] * mean - flat) / variance
    said = toy.score(denoiser, x, sigma).flatten(1)
    return float(((said - true).square().sum() / true.square().sum()).sqrt())


def test_score_errors_of_the_figure_match_the_formula(many: Denoiser) -> None:
    x = toy.square(500, generator("cpu", 1))
    for sigma in (SMALL, 0.3, 5.0):
        assert toy.relative_error(many, x, sigma) == pytest.approx(error(many, x, sigma), rel=1e-3)


def test_score_of_one_small_level_is_accurate_only_at_its_points(one: Denoiser) -> None:
    source = generator("cpu", 5)
    assert error(one, toy.add_noise(toy.two_gaussians, 2000, SMALL, source), SMALL) < 0.2
    assert error(one, toy.square(2000, source), SMALL) > 0.4


def test_many_levels_learn_the_score_everywhere_at_high_noise(many: Denoiser) -> None:
    source = generator("cpu", 5)
    for sigma in (0.5, 1.0, 2.0, 5.0, 10.0):
        assert error(many, toy.square(2000, source), sigma) < 0.15
    for sigma in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        assert error(many, toy.add_noise(toy.two_gaussians, 2000, sigma, source), sigma) < 0.2
    assert error(many, toy.square(2000, source), SMALL) > 0.4, "there are no training points at low noise"


# Weights of modes.


def test_langevin_at_one_small_level_ignores_the_weights() -> None:
    """With the exact score and the same random numbers, nearly every point ends in the same place for different
    weights."""
    ends = [
        toy.langevin_at_one_level(dataclasses.replace(EXACT, weights=weights), SMALL, 1000)
        for weights in ((0.2, 0.8), (0.5, 0.5), (0.8, 0.2))
    ]
    for x in ends:
        assert toy.small_mode_weight(x) == pytest.approx(0.5, abs=0.05)
        assert toy.mode_std(x) == pytest.approx(0.1, rel=0.1)
    same = (ends[0] - ends[2]).flatten(1).norm(dim=1) < 0.05
    assert same.float().mean() > 0.95
    # With the same number of steps at 20 levels, the sampled weights differ by as much as the true ones.
    annealed = [toy.small_mode_weight(toy.draw_samples(toy.ANNEALED, dataclasses.replace(EXACT, weights=w), 1000))
                for w in ((0.2, 0.8), (0.8, 0.2))]  # fmt: skip
    assert annealed[1] - annealed[0] == pytest.approx(0.6, abs=0.08)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_no_single_level_gives_both_weights_and_widths(sigma: float) -> None:
    x = toy.langevin_at_one_level(EXACT, sigma, 1000, denoise=False)
    assert abs(toy.small_mode_weight(x) - 0.2) > 0.08 or toy.mode_std(x) > 0.25


def test_langevin_with_one_learned_level_loses_the_weights(one: Denoiser) -> None:
    assert toy.small_mode_weight(toy.langevin_at_one_level(one, SMALL, 200)) > 0.4


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_samplers_with_many_learned_levels_find_the_weights(many: Denoiser, sampler: Sampler) -> None:
    n = 300 if isinstance(sampler, AnnealedLangevin) else 1500
    x = toy.draw_samples(sampler, many, n)
    assert abs(toy.small_mode_weight(x) - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n)
    assert toy.mode_std(x) == pytest.approx(0.1, rel=0.2)
