"""Pixel likelihoods: normalisation, samples and means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from composing import options
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.pixel_likelihoods import (
    BernoulliLikelihood,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    GaussianLikelihood,
    PixelLikelihood,
)
from parts import part

OPTIONS = options("model/likelihood")

LOCATIONS = [-3.0, -1.0, -0.96, 0.0, 0.21, 1.0, 1.7]
LOG_SCALES = [-12.0, -4.0, -2.0, 0.0, 2.0]


def levels_of(levels: int) -> Tensor:
    return torch.arange(levels) * 2 / (levels - 1) - 1


def logistic_at(levels: int, location: float, log_scale: float) -> tuple[PixelLikelihood, Tensor, Any]:
    """Return the likelihood of one pixel, the decoder output with these parameters, and the continuous distribution."""
    lowest = math.log(2 / (levels - 1)) - 2.15
    kept = max(log_scale, lowest + 0.01)
    raw = lowest + math.log(math.expm1(kept - lowest))
    h = torch.tensor([location, raw]).reshape(1, 2, 1, 1)
    return (
        DiscretizedLogistic(DataSpec("pixel", (1, 1, 1), num_bins=levels)),
        h,
        stats.logistic(location, math.exp(kept)),
    )


def gaussian_at(levels: int, location: float, log_scale: float) -> tuple[PixelLikelihood, Tensor, Any]:
    likelihood = GaussianLikelihood(DataSpec("pixel", (1, 1, 1), num_bins=levels))
    likelihood.weight.data.fill_(max(log_scale, -9) / likelihood.GAIN)
    return likelihood, torch.full((1, 1, 1, 1), location), stats.norm(location, math.exp(max(log_scale, -9)))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("make", [logistic_at, gaussian_at])
def test_pixel_probabilities_are_bin_masses_and_sum_to_one(make: Callable[..., Any], levels: int) -> None:
    x, delta = levels_of(levels), 2 / (levels - 1)
    for location in LOCATIONS:
        for log_scale in LOG_SCALES:
            likelihood, h, distribution = make(levels, location, log_scale)
            log_p = likelihood.log_prob(h.expand(levels, -1, -1, -1), x.reshape(-1, 1, 1, 1)).detach().double()
            # Bin edges have a rounding error of about 1e-7, which narrow distributions amplify.
            rounding = 2e-6 + 1e-7 / distribution.std()
            assert log_p.exp().sum() == pytest.approx(1, abs=2 * rounding), (location, log_scale)
            edges = torch.cat([torch.tensor([-math.inf]), x[:-1] + delta / 2, torch.tensor([math.inf])]).double()
            mass = torch.tensor(distribution.cdf(edges[1:]) - distribution.cdf(edges[:-1]))
            assert torch.allclose(log_p.exp(), mass, atol=rounding), (location, log_scale)


@pytest.mark.parametrize("make", [logistic_at, gaussian_at])
def test_improbable_pixels_have_finite_log_probability_and_gradient(make: Callable[..., Any]) -> None:
    for location in LOCATIONS:
        for log_scale in LOG_SCALES[1:]:
            likelihood, h, _ = make(17, location, log_scale)
            h = h.expand(17, -1, -1, -1).clone().requires_grad_()
            log_p = likelihood.log_prob(h, levels_of(17).reshape(-1, 1, 1, 1))
            log_p.sum().backward()
            assert torch.isfinite(log_p).all() and torch.isfinite(h.grad).all()
    # Far below the location the log probability has slope 1 / scale: 20 nats per unit at scale 0.05.
    likelihood, h, _ = logistic_at(17, 3.0, math.log(0.05))
    two = likelihood.log_prob(h.expand(2, -1, -1, -1), torch.tensor([-0.5, 0.5]).reshape(2, 1, 1, 1))
    assert (two[1] - two[0]).item() == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("make", [logistic_at, gaussian_at])
def test_sampled_pixels_have_the_stated_probabilities_and_mean(make: Callable[..., Any]) -> None:
    n, x = 20_000, levels_of(17)
    for location, log_scale in [(0.3, -2.0), (-0.9, -1.5), (1.2, -1.0)]:
        likelihood, h, _ = make(17, location, log_scale)
        log_p = likelihood.log_prob(h.expand(17, -1, -1, -1), x.reshape(-1, 1, 1, 1))
        drawn = likelihood.sample(h.expand(n, -1, -1, -1), torch.Generator().manual_seed(0)).flatten()
        counts = torch.bincount(((drawn + 1) * 8).round().long(), minlength=17)
        error = (counts / n - log_p.exp()).abs()
        assert (error < 5 * (log_p.exp() / n).sqrt() + 1e-3).all()
        assert likelihood.mean(h).item() == pytest.approx((log_p.exp() * x).sum().item(), abs=1 / 16)


def test_a_gaussian_on_continuous_data_is_a_density() -> None:
    likelihood = GaussianLikelihood(DataSpec("points", (2, 1, 1), num_bins=None))
    likelihood.weight.data.fill_(-0.07)
    h, x = torch.randn(5, 2, 1, 1), torch.randn(5, 2, 1, 1)
    expected = torch.distributions.Normal(h, math.exp(-0.07 * likelihood.GAIN)).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(likelihood.log_prob(h, x), expected, atol=1e-5)


class Mixture:
    """A mixture of K components for one pixel, with random parameters and probabilities from scipy."""

    def __init__(self, levels: int, channels: int, components: int, seed: int, *, spread: float = 0.6) -> None:
        rng = np.random.default_rng(seed)
        self.levels, self.channels = levels, channels
        self.logits = rng.normal(size=components)
        self.locations = spread * rng.normal(size=(components, channels))
        self.scales = np.exp(rng.uniform(-2.5, -1.0, size=(components, channels)))
        self.slopes = rng.uniform(-0.9, 0.9, size=(components, channels * (channels - 1) // 2))

    def likelihood(self) -> DiscretizedLogisticMixture:
        spec = DataSpec("pixel", (self.channels, 1, 1), num_bins=self.levels)
        return DiscretizedLogisticMixture(spec, num_components=len(self.logits))

    def h(self) -> Tensor:
        """Return the decoder output with these parameters, (1, channels, 1, 1)."""
        k = len(self.logits)
        lowest = math.log(2 / (self.levels - 1)) - 2.15
        raw = lowest + np.log(np.expm1(np.log(self.scales) - lowest))
        offsets = (np.arange(k) + 0.5) * 2 / k - 1
        each = np.concatenate([self.locations - offsets[:, None], raw, np.arctanh(self.slopes)], axis=1)
        return torch.tensor(np.concatenate([self.logits, each.ravel()])).float().reshape(1, -1, 1, 1)

    def colours(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all colours (levels^channels, channels) and their probabilities."""
        values = np.linspace(-1, 1, self.levels)
        found = np.array(list(itertools.product(values, repeat=self.channels)))
        weights, total = np.exp(self.logits) / np.exp(self.logits).sum(), np.zeros(len(found))
        for k, weight in enumerate(weights):
            mass, place = np.ones(len(found)), 0
            for c in range(self.channels):
                location = np.full(len(found), self.locations[k, c])
                for d in range(c):
                    location = location + self.slopes[k, place] * found[:, d]
                    place += 1
                logistic, half = stats.logistic(location, self.scales[k, c]), 1 / (self.levels - 1)
                upper = np.where(found[:, c] > 1 - half, 1.0, logistic.cdf(found[:, c] + half))
                lower = np.where(found[:, c] < -1 + half, 0.0, logistic.cdf(found[:, c] - half))
                mass = mass * (upper - lower)
            total += weight * mass
        return found, total


@pytest.mark.parametrize(("levels", "channels", "components"), [(256, 1, 10), (256, 1, 1), (17, 2, 3), (5, 3, 10)])
def test_a_mixture_factorises_over_channels_and_sums_to_one(levels: int, channels: int, components: int) -> None:
    for seed in range(5):
        mixture = Mixture(levels, channels, components, seed)
        colours, expected = mixture.colours()
        x = torch.tensor(colours).float()[:, :, None, None]
        p = mixture.likelihood().log_prob(mixture.h().expand(len(x), -1, -1, -1), x).double().exp().numpy()
        assert p.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(p, expected, atol=2e-6)


def test_colours_sampled_from_a_mixture_have_their_probabilities() -> None:
    """A chi-squared test of all 125 colours (five levels per channel); neighbouring pixels are independent."""
    mixture, n = Mixture(5, 3, 4, seed=1), 20_000
    _, p = mixture.colours()
    h = mixture.h().expand(n, -1, 1, 2)
    drawn = mixture.likelihood().sample(h, torch.Generator().manual_seed(0))
    steps = ((drawn + 1) * 2).numpy()
    np.testing.assert_allclose(steps, steps.round(), atol=1e-6)
    index = (steps.round() * np.array([25, 5, 1])[None, :, None, None]).sum(1).astype(int)
    counts = np.bincount(index.ravel(), minlength=125)
    often = 2 * n * p > 10
    observed, expected = [np.append(each[often], each[~often].sum()) for each in (counts, 2 * n * p)]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
    left, right = index[:, 0, 0], index[:, 0, 1]
    assert abs(np.corrcoef(left, right)[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(steps[:, 0, 0, 0], steps[:, 1, 0, 0])[0, 1]) > 0.1, (
        "channels of a pixel depend on each other"
    )


def test_the_mean_of_a_mixture_is_the_mean_colour() -> None:
    for seed in range(5):
        one = Mixture(256, 1, 10, seed, spread=1.5)
        colours, p = one.colours()
        assert one.likelihood().mean(one.h()).item() == pytest.approx(p @ colours[:, 0], abs=1 / 255)
        # Several channels, well within [-1, 1], so that nothing is clipped.
        three = Mixture(17, 3, 4, seed)
        three.locations, three.scales = np.clip(three.locations / 5, -0.3, 0.3), np.full_like(three.scales, 0.05)
        colours, p = three.colours()
        np.testing.assert_allclose(three.likelihood().mean(three.h()).flatten(), p @ colours, atol=2e-3)


def test_components_with_equal_inputs_have_different_gradients() -> None:
    likelihood = DiscretizedLogisticMixture(DataSpec("pixel", (3, 1, 1)), num_components=4)
    h = torch.zeros(1, likelihood.decoder_channels, 1, 1, requires_grad=True)
    likelihood.log_prob(h, torch.tensor([0.7, -0.2, 0.1]).reshape(1, 3, 1, 1)).sum().backward()
    locations = h.grad.flatten()[4:].unflatten(0, (4, -1))[:, :3]  # type: ignore[union-attr]
    assert (locations[1:] - locations[:-1]).abs().min() > 1e-3


def test_bernoulli_is_the_probability_of_a_binary_pixel() -> None:
    likelihood = BernoulliLikelihood(DataSpec("binary", (1, 1, 1), num_bins=2))
    h = torch.linspace(-30, 30, 13).reshape(-1, 1, 1, 1)
    ones = torch.ones_like(h)
    expected = stats.logistic.cdf(h.double().flatten().numpy())
    np.testing.assert_allclose(likelihood.log_prob(h, ones).exp(), expected, rtol=1e-5)
    np.testing.assert_allclose(likelihood.log_prob(h, -ones).exp(), 1 - expected, rtol=1e-4, atol=1e-7)
    assert likelihood.is_data_likelihood
    h = torch.full((10_000, 1, 1, 1), 0.8)
    drawn = likelihood.sample(h, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {-1.0, 1.0}
    assert (drawn > 0).float().mean().item() == pytest.approx(stats.logistic.cdf(0.8), abs=0.02)
    assert likelihood.mean(h[:1]).item() == pytest.approx(2 * stats.logistic.cdf(0.8) - 1, abs=1e-6)


def test_bernoulli_scores_grey_images_as_expected_binary_images() -> None:
    likelihood = BernoulliLikelihood(DataSpec("grey", (1, 1, 3), num_bins=17))
    x, h = torch.tensor([-0.5, 0.25, 1.0]), torch.tensor([0.3, -1.2, 2.0])
    y, p = (x.numpy() + 1) / 2, stats.logistic.cdf(h.numpy())
    expected = 0.0
    for bits in itertools.product([0, 1], repeat=3):
        drawn = np.prod(np.where(bits, y, 1 - y))
        expected += drawn * np.log(np.where(bits, p, 1 - p)).sum()
    assert likelihood.log_prob(h.reshape(1, 1, 1, 3), x.reshape(1, 1, 1, 3)).item() == pytest.approx(expected, rel=1e-5)
    assert not likelihood.is_data_likelihood
    pixel = BernoulliLikelihood(DataSpec("grey", (1, 1, 1), num_bins=17))
    total = pixel.log_prob(torch.zeros(17, 1, 1, 1), levels_of(17).reshape(-1, 1, 1, 1)).exp().sum()
    assert total > 8, "not normalised over the values"


@pytest.mark.parametrize("option", OPTIONS)
def test_padding_is_not_scored(option: str) -> None:
    padded = part("likelihood", option)(DataSpec("padded", (3, 8, 8), num_bins=17, padding=2))
    bare = part("likelihood", option)(DataSpec("bare", (3, 4, 4), num_bins=17))
    torch.manual_seed(0)
    h, x = torch.randn(2, padded.decoder_channels, 8, 8), torch.randint(17, (2, 3, 8, 8)) / 8 - 1
    inner = bare.log_prob(h[..., 2:-2, 2:-2], x[..., 2:-2, 2:-2])
    assert torch.allclose(padded.log_prob(h, x), inner, atol=1e-3) and inner.shape == (2,)


@pytest.mark.parametrize("option", OPTIONS)
def test_samples_are_valid_match_the_mean_and_all_inputs_matter(option: str) -> None:
    spec = DataSpec("colours", (3, 4, 4), num_bins=17)
    likelihood = part("likelihood", option)(spec)
    torch.manual_seed(0)
    h = torch.randn(5, likelihood.decoder_channels, 4, 4, requires_grad=True)
    drawn = likelihood.sample(h.detach(), torch.Generator().manual_seed(0))
    assert drawn.shape == (5, 3, 4, 4) and drawn.abs().max() <= 1
    assert torch.allclose(drawn * 8, (drawn * 8).round(), atol=1e-5)
    mean = likelihood.mean(h)
    assert mean.shape == (5, 3, 4, 4) and mean.abs().max() <= 1
    many = torch.stack([likelihood.sample(h.detach(), torch.Generator().manual_seed(k)) for k in range(400)])
    assert (many.mean(0) - mean).abs().max() < 6 / math.sqrt(400) + 1 / 16
    likelihood.log_prob(h, drawn).sum().backward()
    assert torch.isfinite(h.grad).all() and (h.grad != 0).any(0).all()  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("option", ["bernoulli", "discretized_logistic", "discretized_logistic_mixture"])
def test_discrete_likelihoods_reject_continuous_data(option: str) -> None:
    with pytest.raises(UserError, match=f"model/likelihood={option} .*use model/likelihood=gaussian"):
        part("likelihood", option)(DataSpec("points", (2, 1, 1), num_bins=None))


@pytest.mark.parametrize("option", ["discretized_logistic", "discretized_logistic_mixture", "gaussian"])
def test_extreme_parameters_give_finite_results(option: str) -> None:
    likelihood = part("likelihood", option)(DataSpec("images", (1, 4, 4)))
    x = torch.rand(8, 1, 4, 4).mul(255).round() * 2 / 255 - 1
    for size in (1.0, 30.0, 1000.0):
        for parameter in likelihood.parameters():
            torch.nn.init.constant_(parameter, -size)
        reach = 1.0 if option == "gaussian" else size  # the decoder output of a Gaussian is its mean
        h = (reach * torch.randn(8, likelihood.decoder_channels, 4, 4)).requires_grad_()
        found = likelihood.log_prob(h, x)
        (gradient,) = torch.autograd.grad(found.sum(), h)
        assert torch.isfinite(found).all() and torch.isfinite(gradient).all(), size
        for images in (likelihood.mean(h), likelihood.sample(h, torch.Generator())):
            assert torch.isfinite(images).all(), size


def test_a_mixture_without_components_raises_an_error() -> None:
    with pytest.raises(UserError, match="num_components=0"):
        DiscretizedLogisticMixture(DataSpec("pixel", (1, 1, 1)), num_components=0)
