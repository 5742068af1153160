"""Faults of exact distributions: their distances are graded, and agree with enumeration and closed forms."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gencompare.data.exact_distributions import (
    AutoregressiveNetwork,
    ExactDistribution,
    Ising,
    LowRankGaussianMixture,
    MonteCarlo,
)
from gencompare.data.exact_faults import Fault, FewLevels, WithCopies, WithNoise, faults, scaled, truth
from gencompare.dequantization import bin_width
from gencompare.rng import generator


def all_images(distribution: ExactDistribution) -> Tensor:
    levels = range(distribution.num_bins)
    return torch.tensor(list(itertools.product(levels, repeat=distribution.side**2)), dtype=torch.float64)


def agrees(estimate: MonteCarlo | None, expected: float) -> bool:
    assert estimate is not None
    return abs(estimate.value - expected) < 4 * estimate.standard_error + 1e-6


def training_images(distribution: ExactDistribution, n: int = 50) -> Tensor:
    return distribution.images(distribution.sample(n, generator("cpu", "train"))[0]).flatten(1)


def distributions() -> list[ExactDistribution]:
    return [
        *(LowRankGaussianMixture.of_digits(side) for side in (8, 16, 32)),
        *(Ising(side) for side in (8, 16)),
        *(AutoregressiveNetwork(side) for side in (8, 16, 32)),
    ]


def test_there_are_more_than_200_faults() -> None:
    count = sum(len(list(faults(p, torch.zeros(1, p.side**2, dtype=torch.uint8)))) for p in distributions())
    assert count > 200


@pytest.mark.parametrize("k", [0, 3, 5])
def test_distances_of_a_family_increase_with_its_strength(k: int) -> None:
    data = distributions()[k]
    families: dict[str, list[float]] = {}
    for fault in faults(data, training_images(data)):
        found = truth(data, fault, 100)
        families.setdefault(fault.family, []).append(found.distance)
        if found.total_variation is not None:
            assert 0 <= found.total_variation.value <= 1
    for family, distances in families.items():
        assert len(distances) == 5 and distances == sorted(set(distances)), family
        assert distances[0] > 0 or family in ("unequal modes", "too hot", "noise images"), family


@pytest.mark.parametrize(
    "model",
    [WithNoise(AutoregressiveNetwork(2), 0.3), AutoregressiveNetwork(2, 1.5), AutoregressiveNetwork(2, 0.6)],
    ids=["noise", "hot", "cold"],
)
def test_divergences_agree_with_enumeration(model: WithNoise | AutoregressiveNetwork) -> None:
    data = AutoregressiveNetwork(2)
    everything = all_images(data)
    log_p, log_q = data.log_prob(everything), model.log_prob(everything)
    assert float(log_q.logsumexp(0)) == pytest.approx(0, abs=1e-9)
    found = truth(data, Fault("test", 1, model), 4000)
    assert agrees(found.kl_data_model, float(log_p.exp() @ (log_p - log_q)))
    assert agrees(found.kl_model_data, float(log_q.exp() @ (log_q - log_p)))
    assert agrees(found.total_variation, float((log_p.exp() - log_q.exp()).abs().sum() / 2))


def test_divergences_of_gaussians_have_their_closed_form() -> None:
    ten = LowRankGaussianMixture.of_digits(8)
    one = torch.ones(1, dtype=torch.float64)
    data = LowRankGaussianMixture(8, one, ten.means[:1], ten.loadings[:1], ten.stds[:1])
    f, d = 1.2, 64
    found = truth(data, Fault("wide modes", f, scaled(data, f)), 4000)
    assert agrees(found.kl_data_model, d / 2 * (1 / f**2 - 1 + 2 * math.log(f)))
    assert agrees(found.kl_model_data, d / 2 * (f**2 - 1 - 2 * math.log(f)))
    shift = torch.full((d,), 6 * bin_width(256), dtype=torch.float64)
    found = truth(data, Fault("brightness", 6, replace(data, means=data.means + shift)), 4000)
    expected = float(shift @ torch.linalg.solve(data.covariance(0), shift)) / 2
    assert agrees(found.kl_data_model, expected) and agrees(found.kl_model_data, expected)
    assert found.wasserstein == pytest.approx(float(shift.norm()))


def test_divergences_of_copies_agree_with_draws() -> None:
    data, share = Ising(6), 0.3
    train = training_images(data)
    model = WithCopies(data, train, share)
    found = truth(data, Fault("training images", share, model))
    y, _ = model.sample(20_000, generator("cpu", "test"))
    copies = (y[:, None] == train).all(2).double().sum(1)
    log_p = data.log_prob(y)
    log_q = torch.logaddexp(log_p + math.log1p(-share), (share * copies / len(train)).log())
    assert agrees(MonteCarlo.mean(log_q - log_p), found.kl_model_data.value)  # type: ignore[union-attr]
    assert agrees(MonteCarlo.mean((copies > 0).double()), share)


def test_rounding_costs_the_variance_of_a_uniform_error() -> None:
    data = LowRankGaussianMixture.of_digits(8)
    for step in (4, 8):
        found = truth(data, Fault("few levels", step, FewLevels(data, step)))
        assert found.wasserstein == pytest.approx(8 * step * bin_width(256) / math.sqrt(12), rel=0.02)
        assert found.kl_data_model is None
    x = FewLevels(data, 64).sample(100, generator("cpu", "test"))[0]
    assert set(x.unique().tolist()) <= {0, 64, 128, 192}


def test_a_share_of_the_samples_are_noise() -> None:
    x, _ = WithNoise(Ising(8, 3.0), 0.25).sample(4000, generator("cpu", "test"))
    mixed = (x.mean(1) - 0.5).abs() < 0.4
    assert float(mixed.double().mean()) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000) + 0.01)
