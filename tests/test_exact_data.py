"""Exact distributions: probabilities, samples and entropies agree with enumeration and independent references."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from gencompare.data.exact import ExactAutoregressive, ExactData, ExactIsing, ExactMixture
from gencompare.data.exact_distributions import (
    AutoregressiveNetwork,
    ExactDistribution,
    Ising,
    LowRankGaussianMixture,
    probabilistic_pca,
)
from gencompare.dequantization import bin_width
from gencompare.errors import UserError
from gencompare.models.gaussian import GaussianBaseline
from gencompare.rng import generator

DISCRETE = [Ising(3), Ising(4, 0.6, 0.2), AutoregressiveNetwork(2), AutoregressiveNetwork(2, 0.5)]


def all_images(distribution: ExactDistribution) -> Tensor:
    levels = range(distribution.num_bins)
    return torch.tensor(list(itertools.product(levels, repeat=distribution.side**2)), dtype=torch.float64)


def in_standard_errors(values: Tensor, expected: float) -> float:
    return abs(float(values.mean()) - expected) / (float(values.std()) / math.sqrt(len(values)))


@pytest.mark.parametrize("distribution", DISCRETE, ids=repr)
def test_probabilities_sum_to_one_and_give_the_entropy(distribution: ExactDistribution) -> None:
    log_p = distribution.log_prob(all_images(distribution))
    assert float(log_p.logsumexp(0)) == pytest.approx(0, abs=1e-9)
    entropy = distribution.entropy()
    expected = -float((log_p.exp() * log_p).sum())
    assert abs(entropy.value - expected) < 4 * entropy.standard_error + 1e-9


@pytest.mark.parametrize("distribution", [Ising(2), Ising(2, 0.6, 0.3), AutoregressiveNetwork(2)], ids=repr)
def test_frequencies_of_samples_agree_with_probabilities(distribution: ExactDistribution) -> None:
    n, everything = 100_000, all_images(distribution)
    x, labels = distribution.sample(n, generator("cpu", "test"))
    assert labels is None
    place = distribution.num_bins ** torch.arange(everything.shape[1] - 1, -1, -1)
    counts = torch.bincount((x.long() * place).sum(1), minlength=len(everything)).double()
    expected = n * distribution.log_prob(everything).exp()
    chi_square = float(((counts - expected).square() / expected).sum())
    freedom = len(everything) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("side", [3, 4])
def test_ising_agrees_with_brute_force(side: int) -> None:
    model = Ising(side, 0.5, -0.1)
    s = 2 * all_images(model).reshape(-1, side, side) - 1
    bonds = sum((s * s.roll(-1, axis)).narrow(axis, 0, side - 1).sum((1, 2)) for axis in (1, 2))
    assert isinstance(bonds, Tensor)
    energies = model.coupling * bonds + model.field * s.sum((1, 2))
    assert model.log_partition == pytest.approx(float(energies.logsumexp(0)), rel=1e-12)
    p = energies.softmax(0)
    assert model.mean_statistics == pytest.approx((float(p @ bonds), float(p @ s.sum((1, 2)))), rel=1e-9)
    other = Ising(side, 0.3, 0.2)
    log_ratio = model.log_prob(all_images(model)) - other.log_prob(all_images(model))
    assert model.kl(other) == pytest.approx(float(p @ log_ratio), rel=1e-9)
    assert model.kl(model) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("distribution", [Ising(8), Ising(5, 0.7), AutoregressiveNetwork(8)], ids=repr)
def test_samples_have_the_entropy_of_their_distribution(distribution: ExactDistribution) -> None:
    x, _ = distribution.sample(4000, generator("cpu", "test"))
    assert in_standard_errors(-distribution.log_prob(x), distribution.entropy().value) < 4


def test_ising_samples_have_the_exact_mean_statistics() -> None:
    model = Ising(8, 0.42, 0.01)
    x, _ = model.sample(8000, generator("cpu", "test"))
    s = 2 * x.reshape(-1, 8, 8) - 1
    bonds = (s[:, 1:] * s[:, :-1]).sum((1, 2)) + (s[:, :, 1:] * s[:, :, :-1]).sum((1, 2))
    for values, expected in zip((bonds, s.sum((1, 2))), model.mean_statistics, strict=True):
        assert in_standard_errors(values, expected) < 4


def test_mixture_density_and_samples_agree_with_scipy() -> None:
    mixture = LowRankGaussianMixture.of_digits(8)
    x, labels = mixture.sample(2000, generator("cpu", "test"))
    scaled = (x * bin_width(256) - 1).numpy()
    components = [
        multivariate_normal.logpdf(scaled, mixture.means[k].numpy(), mixture.covariance(k).numpy())  # type: ignore[arg-type]
        for k in range(10)
    ]
    expected = np.logaddexp.reduce(np.stack(components) + mixture.weights.log().numpy()[:, None])
    np.testing.assert_allclose(mixture.log_prob(x), expected + 64 * math.log(bin_width(256)), rtol=1e-9)
    assert in_standard_errors(-mixture.log_prob(x), mixture.entropy().value) < 4
    counts = torch.bincount(labels, minlength=10).double()
    assert float(((counts - 2000 * mixture.weights).square() / (2000 * mixture.weights)).sum()) < 9 + 4 * math.sqrt(18)
    assert float((mixture.posterior(x).argmax(1) == labels).double().mean()) > 0.999, "the modes are separate"


def test_entropy_of_overlapping_components_is_that_of_one() -> None:
    mixture = LowRankGaussianMixture.of_digits(8)
    first = LowRankGaussianMixture(
        8, torch.ones(1, dtype=torch.float64), mixture.means[:1], mixture.loadings[:1], mixture.stds[:1]
    )
    parts = (part[:1].expand(3, *part.shape[1:]) for part in (mixture.means, mixture.loadings, mixture.stds))
    means, loadings, stds = parts
    three = LowRankGaussianMixture(8, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), means, loadings, stds)
    gaussian = multivariate_normal.entropy(mixture.means[0].numpy(), mixture.covariance(0).numpy())  # type: ignore[arg-type]
    for model in (first, three):
        assert model.entropy().value == pytest.approx(gaussian - 64 * math.log(bin_width(256)), rel=1e-9)


def test_probabilistic_pca_recovers_its_covariance() -> None:
    x = torch.randn(50, 12, dtype=torch.float64, generator=generator("cpu", "test"))
    mean, loadings, std = probabilistic_pca(x, 11)
    np.testing.assert_allclose(mean, x.mean(0))
    full = loadings.T @ loadings + std.square() * torch.eye(12, dtype=torch.float64)
    np.testing.assert_allclose(full, np.cov(x.numpy().T, bias=True), atol=1e-12)
    few = probabilistic_pca(x, 3)[1:]
    assert float((few[0].T @ few[0] + few[1].square() * torch.eye(12, dtype=torch.float64)).trace()) == pytest.approx(
        float(full.trace())
    )


@pytest.mark.parametrize(
    ("kind", "sides"), [(ExactMixture, (8, 16, 32)), (ExactAutoregressive, (8, 32)), (ExactIsing, (8, 16))]
)
def test_stored_images_keep_the_probabilities(kind: type[ExactData], sides: tuple[int, ...]) -> None:
    for side in sides:
        data = kind(side=side, num_images=200)
        images = data.split("test").images
        assert data.spec.name.endswith(f"_{side}") and images.shape == (200, 1, side, side)
        entropy = data.bits_per_dim.value * side**2 * math.log(2)
        log_p = data.log_prob(images)
        # Rounding the mixture adds its 1e-3 bits of Fisher information.
        assert in_standard_errors(-log_p, entropy) < 4 + (kind is ExactMixture)
    assert kind(num_images=5).hash("train") == kind(num_images=5, seed=3).hash("train")


def test_few_values_of_the_mixture_are_clipped() -> None:
    for side in (8, 16, 32):
        x, _ = LowRankGaussianMixture.of_digits(side).sample(1000, generator("cpu", "test"))
        assert float(((x < -0.5) | (x > 255.5)).double().mean()) < 1e-4


@pytest.mark.parametrize("kind", [ExactMixture, ExactIsing, ExactAutoregressive])
def test_no_fitted_model_beats_the_entropy(kind: type[ExactData]) -> None:
    data = kind(num_images=4000)
    model = GaussianBaseline(data.spec).fit(data.batches("train"), data.batches("val"))
    bits = torch.cat([model.bits_per_dim(x, cond) for x, cond in data.batches("test")])
    own = -data.log_prob(data.split("test").images) / (64 * math.log(2))
    gap = bits - own
    assert float(gap.mean()) > 4 * float(gap.std()) / math.sqrt(len(gap)) > 0
    if kind is ExactMixture:
        assert float(gap.mean()) < 0.1, "the baseline is a mixture of Gaussians, too"


def test_impossible_sides_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"data\.side=12 must be one of 8, 16, 32"):
        ExactMixture(side=12)
    with pytest.raises(UserError, match=r"32x32 spins is not tractable.*data\.side to 8 or 16"):
        ExactIsing(side=32)
    with pytest.raises(UserError, match=r"data\.num_images=0"):
        ExactIsing(num_images=0)
