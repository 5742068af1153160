"""Metrics against closed forms, and their invariants."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.evaluation.extractors.shipped_classifiers import shipped_classifier
from gencompare.evaluation.metrics.class_metrics import class_shares, classifier_score, confident_share, label_accuracy
from gencompare.evaluation.metrics.compute import distance_metric
from gencompare.evaluation.metrics.frechet import Jackknife, Statistics, frechet_distance, gaussian_frechet_distance
from gencompare.evaluation.metrics.kernel import CubicKernel, GaussianKernel, KernelReference, kernel_distance, kid
from gencompare.evaluation.metrics.neighbors import authenticity, compute_prdc, memorization_ratio, nearest_neighbor
from gencompare.evaluation.reference import quantize_images, quantize_split, to_uint8
from gencompare.generative_model import DataSpec
from gencompare.resources import flops_per_image


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DISTANCES: dict[str, Any] = {
    "frechet": frechet_distance,
    "kid": lambda a, b: kid(a, b)[0],
    "cubic": lambda a, b: kernel_distance(a, b, CubicKernel()).value,
    "gaussian": lambda a, b: kernel_distance(a, b, GaussianKernel(4.0)).value,
}


def test_frechet_distance_tends_to_the_closed_form() -> None:
    """The closed form |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2)) uses scipy's matrix root."""
    mix = [normal(4, 4, seed=1).numpy(), normal(4, 4, seed=2).numpy()]
    means = [np.zeros(4), np.array([1.0, -0.5, 0.0, 0.25])]
    covariances = [m @ m.T for m in mix]
    root = np.asarray(sqrtm(covariances[0]))
    cross = np.real(np.asarray(sqrtm(root @ covariances[1] @ root)))
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * cross)
    errors = []
    for n in (1_000, 100_000):
        sets = [normal(n, 4, seed=3 + k) @ torch.tensor(mix[k]).T + torch.tensor(means[k]).float() for k in range(2)]
        errors.append(abs(frechet_distance(*sets) / expected - 1))
    assert errors[1] < 0.01


def test_frechet_bias_is_proportional_to_one_over_n() -> None:
    """For two sets of n images from one distribution, the distance is about c / n, so 16 times the images give about a
    sixteenth."""
    few, many = (
        np.mean([frechet_distance(normal(n, 8, seed=10 + i), normal(n, 8, seed=50 + i)) for i in range(10)])
        for n in (200, 3_200)
    )
    assert 12 < few / many < 21


def test_distances_are_zero_on_equal_sets_and_ignore_the_order() -> None:
    a, b = normal(200, 16), normal(200, 16, seed=1) * 1.2 + 0.3
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    for name, distance in DISTANCES.items():
        assert distance(a[order], b) == pytest.approx(distance(a, b), rel=1e-4), name
        assert distance(a, b[order]) == pytest.approx(distance(a, b), rel=1e-4), name
        assert distance(b, a) == pytest.approx(distance(a, b), rel=1e-4), f"{name} must be symmetric"
    assert compute_prdc(a[order], b) == compute_prdc(a, b)
    same = compute_prdc(a, a)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_rise_with_noise(name: str) -> None:
    real, base = normal(2000, 16), normal(300, 16, seed=1)
    noise = normal(300, 16, seed=2)
    values = [DISTANCES[name](base + s * noise, real) for s in (0.3, 0.6, 1.0, 2.0)]
    assert values == sorted(values) and values[0] > DISTANCES[name](base, real)


KERNELS: dict[str, tuple[Any, Any]] = {
    "cubic": (CubicKernel(), lambda p, q: float((p @ q / 5 + 1) ** 3)),
    "gaussian": (GaussianKernel(2.0), lambda p, q: math.exp(-float((p - q).square().sum()) / 8)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_distance_is_the_unbiased_mmd(name: str) -> None:
    """The value equals the double sums over pairs."""
    a, b = normal(30, 5).double(), normal(40, 5, seed=1).double() + 0.5
    kernel, exact = KERNELS[name]
    expected = 0.0
    for x in (a, b):
        pairs = [exact(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j]
        expected += sum(pairs) / len(pairs)
    expected -= 2 * float(np.mean([exact(p, q) for p in a for q in b]))
    assert kernel_distance(a, b, kernel).value == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(a.float(), b.float(), kernel).value == pytest.approx(expected, rel=1e-4)
    if name == "cubic":
        assert kid(a[:30], b[:30])[0] == pytest.approx(kernel_distance(a, b[:30], kernel).value, rel=1e-6)


@pytest.mark.parametrize("kernel", [CubicKernel(), GaussianKernel(3.0), GaussianKernel(10.0, normalize=True)])
def test_kernel_distance_does_not_depend_on_blocks(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(250, 8).double(), 1.2 * normal(330, 8, seed=1).double()
    whole = kernel_distance(a, b, kernel)
    monkeypatch.setattr("gencompare.evaluation.metrics.kernel.BLOCK_SIZE", 70)
    parts = kernel_distance(a, b, kernel)
    assert parts.value == pytest.approx(whole.value, rel=1e-10)
    assert parts.interval == pytest.approx(whole.interval, rel=1e-10)


def gaussian_kernel_mean(variance: float, gap: float, bandwidth: float, dim: int) -> float:
    """Return E exp(-|D|^2 / (2 b^2)) for D ~ N(gap 1, variance I) in ``dim`` dimensions."""
    s = bandwidth**2 + variance
    return (bandwidth**2 / s) ** (dim / 2) * math.exp(-dim * gap**2 / (2 * s))


def test_gaussian_kernel_distance_has_the_mean_of_the_closed_form() -> None:
    """Averaged over samples and references, the estimated distance equals the closed form, even with 20 samples."""
    d, b = 4, 1.5
    expected = gaussian_kernel_mean(2 * 1.69, 0, b, d) + gaussian_kernel_mean(2, 0, b, d)
    expected -= 2 * gaussian_kernel_mean(1 + 1.69, 0.3, b, d)
    values = np.array(
        [
            kernel_distance(0.3 + 1.3 * normal(20, d, seed=k), normal(30, d, seed=9000 + k), GaussianKernel(b)).value
            for k in range(2000)
        ]
    )
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - expected) < 3.5 * error < 0.2 * expected


def test_the_bandwidth_is_the_median_distance_of_the_reference() -> None:
    real = 3 * normal(500, 6) + 100
    kernel = KernelReference.from_features(real, GaussianKernel()).kernel
    assert isinstance(kernel, GaussianKernel)
    assert kernel.bandwidth == pytest.approx(float(torch.pdist(real).median()), rel=1e-4)
    wide = KernelReference.from_features(real, GaussianKernel(median_factor=2.0)).kernel
    assert isinstance(wide, GaussianKernel) and wide.bandwidth == pytest.approx(2 * kernel.bandwidth)
    far = kernel_distance(real[:200] + 1e4, real + 1e4).value
    assert far == pytest.approx(kernel_distance(real[:200], real).value, abs=1e-4), "it is translation invariant"


def test_kid_agrees_with_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(1100, 24), normal(1150, 24, seed=1) * 1.1
    theirs = kid_features_to_metric(a, b, kid_subsets=100, kid_subset_size=1000, verbose=False)
    mean, deviation = kid(a, b)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)


def test_kid_of_few_samples_has_the_spread_of_fresh_samples() -> None:
    """Each subset contains all samples, so the subsets' own spread would be 0."""
    real = normal(200, 8)
    found = [kid(1.1 * normal(200, 8, seed=1 + k), real) for k in range(100)]
    spread = np.std([value for value, _ in found], ddof=1)
    assert 0.75 * spread < np.mean([error for _, error in found]) < 1.25 * spread


def test_precision_detects_outliers_and_recall_lost_modes() -> None:
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    real = centres[torch.arange(600) % 2] + normal(600, 2)
    one_mode = centres[0] + normal(600, 2, seed=1)
    found = compute_prdc(one_mode, real)
    assert found.precision > 0.97 and found.density > 0.9
    assert found.recall == pytest.approx(0.5, abs=0.02) and found.coverage == pytest.approx(0.5, abs=0.03)
    odd = torch.cat([real[:300] + 0.01, centres[0] + torch.tensor([0.0, 500.0]) + 30 * normal(300, 2, seed=2)])
    assert compute_prdc(odd, real).precision == pytest.approx(0.5, abs=0.02)
    assert compute_prdc(odd, real).density < 0.6


def test_frechet_distance_of_singular_covariances() -> None:
    """With a constant feature, also with fewer images than features, the distance agrees with scipy's matrix root."""
    for n in (200, 6):
        a, b = normal(n, 8), normal(n, 8, seed=1) * 1.5 + 0.2
        a[:, 2], b[:, 2] = 0.5, 0.7
        cov = [np.cov(x.double().numpy(), rowvar=False) for x in (a, b)]
        root = np.trace(np.real(np.asarray(sqrtm(cov[0] @ cov[1]))))
        gap = (a.double().mean(0) - b.double().mean(0)).square().sum()
        expected = float(gap) + np.trace(cov[0]) + np.trace(cov[1]) - 2 * root
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-3)


def test_distance_at_infinity_is_unbiased_in_n() -> None:
    """For samples from the reference distribution the distance is 0, with an error below the removed bias."""
    statistics = Statistics(torch.zeros(8).double(), torch.eye(8).double())
    jackknives = [Jackknife(normal(400, 8, seed=k), statistics) for k in range(40)]
    plain, limits = (np.array([getattr(j, name) for j in jackknives]) for name in ("value", "value_at_infinity"))
    assert plain.mean() > 0.05
    assert abs(limits.mean()) < 3.5 * limits.std() / np.sqrt(40) + 0.002
    assert limits.std() < 0.03


def test_delete_one_distances_are_those_of_the_remaining_images() -> None:
    """The data have a decaying spectrum, a constant feature and an outlier."""
    x = normal(40, 6) * torch.logspace(0, -2, 6)
    x[:, 2], x[7] = 0.5, x[7] * 30
    reference = normal(300, 6, seed=1)
    jackknife = Jackknife(x, reference)
    assert jackknife.value == pytest.approx(frechet_distance(x, reference), rel=1e-9)
    for i in (0, 7, 39):
        others = torch.cat([x[:i], x[i + 1 :]])
        assert float(jackknife.delete_one[i]) == pytest.approx(frechet_distance(others, reference), rel=1e-5)


def shifted_gaussians(n: int, seed: int) -> Tensor:
    return 1.2 * normal(n, 64, seed=seed) + 0.1


def narrowed_gaussians(n: int, seed: int) -> Tensor:
    return 0.8 * normal(n, 64, seed=seed)


def skewed_mixture(n: int, seed: int, modes: int = 9) -> Tensor:
    """Draw from nine of ten modes, with heavy tails along a decaying spectrum, and a ReLU."""
    g = torch.Generator().manual_seed(seed)
    centres = 2 * normal(10, 64, seed=99)[torch.randint(modes, (n,), generator=g)]
    tails = torch.empty(n, 1).exponential_(generator=g)
    return (centres + (0.3 + tails) * torch.randn(n, 64, generator=g) * torch.logspace(0, -2, 64)).relu()


def heavy_tailed(n: int, seed: int, scale: float = 1.2) -> Tensor:
    """Draw from a multivariate t distribution with 5 degrees of freedom."""
    g = torch.Generator().manual_seed(seed)
    chi2 = torch.randn(n, 5, generator=g).square().sum(1, keepdim=True)
    return scale * torch.randn(n, 64, generator=g) * (5 / chi2).sqrt()


CASES: dict[str, tuple[Any, Any]] = {
    "shifted": (shifted_gaussians, lambda: normal(5000, 64, seed=5)),
    "narrowed": (narrowed_gaussians, lambda: normal(5000, 64, seed=5)),
    "mode dropped": (skewed_mixture, lambda: skewed_mixture(5000, 5, modes=10)),
    "heavy tails": (heavy_tailed, lambda: heavy_tailed(5000, 5, scale=1.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_intervals_cover_the_expectation(name: str) -> None:
    """At n = 500, at least 88 of 100 intervals contain the expectation, and are at most 1.6 times as wide as needed."""
    draw, real = CASES[name]
    statistics, kernel = (
        Statistics.from_features(real()),
        KernelReference.from_features(real()[:1000], GaussianKernel()),
    )
    means = {
        "frechet": np.array([frechet_distance(draw(500, 1000 + k), statistics) for k in range(300)]),
        "gaussian": np.array([kernel_distance(draw(500, 1000 + k), kernel).value for k in range(150)]),
    }
    samples = [draw(500, 2000 + k) for k in range(100)]
    found = {
        "frechet": [Jackknife(x, statistics).distance for x in samples],
        "gaussian": [kernel_distance(x, kernel) for x in samples],
    }
    for metric, estimates in found.items():
        intervals = np.array([e.interval for e in estimates])
        expected, deviation = means[metric].mean(), means[metric].std(ddof=1)
        covered = ((intervals[:, 0] <= expected) & (expected <= intervals[:, 1])).mean()
        assert covered >= 0.88, metric
        assert (intervals[:, 1] - intervals[:, 0]).mean() < 1.6 * 3.92 * deviation, metric


def test_a_note_names_an_image_that_dominates_a_distance() -> None:
    statistics, x = Statistics.from_features(normal(5000, 16, seed=5)), shifted_gaussians(500, 0)[:, :16]
    assert distance_metric(Jackknife(x, statistics).distance).note == ""
    x[0] *= 40
    metric = distance_metric(Jackknife(x, statistics).distance, "a note")
    assert re.fullmatch(r"a note; heavy tails: one image makes up (100|9\d)% of the variance", metric.note), metric


def test_a_bootstrap_overestimates_the_frechet_distance() -> None:
    """If images are drawn with replacement, the whole interval lies above the expectation."""
    reference = Statistics.from_features(normal(10_000, 64, seed=5))
    expected = np.mean([frechet_distance(shifted_gaussians(2000, 1000 + k), reference) for k in range(50)])
    g = torch.Generator().manual_seed(0)
    boot = shifted_gaussians(2000, 3000)
    again = [frechet_distance(boot[torch.randint(2000, (2000,), generator=g)], reference) for _ in range(40)]
    assert np.quantile(again, 0.025) > expected


def test_few_images_have_no_interval_and_equal_ones_a_point() -> None:
    assert kernel_distance(normal(9, 3), normal(50, 3, seed=1)).interval is None
    same = kernel_distance(torch.ones(50, 3), normal(50, 3, seed=1))
    assert same.interval == (same.value, same.value)


NOT_FINITE: dict[str, Any] = {
    "frechet": frechet_distance,
    "jackknife": Jackknife,
    "kernel": kernel_distance,
    "kid": kid,
    "neighbours": compute_prdc,
}


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(name: str, value: float) -> None:
    good, bad = normal(50, 8), normal(50, 8, seed=1)
    bad[3, 4] = value
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(UserError, match="NaN or infinite"):
            NOT_FINITE[name](*pair)


def test_repeated_images_have_balls_of_radius_zero() -> None:
    """If 10 of 60 images occur five times each, balls of 3 neighbours collapse and balls of 5 do not."""
    a, b = 5 + normal(100, 16), 5 + normal(100, 16, seed=1)
    assert (compute_prdc(a, b).zero_radii, compute_prdc(a, b).zero_radii_reference) == (0, 0)
    repeated = torch.cat([a[:60], a[:10].repeat(4, 1)])
    assert compute_prdc(repeated, b).zero_radii == pytest.approx(0.5)
    assert compute_prdc(b, repeated).zero_radii_reference == 0
    sixfold = torch.cat([a[:50], a[50:60].repeat(5, 1)])
    assert compute_prdc(b, sixfold).zero_radii_reference == 0
    sixfold[:10] = a[50:60]
    assert compute_prdc(b, sixfold).zero_radii_reference == pytest.approx(0.6)


def test_frechet_distance_rises_with_blur_and_dropped_classes() -> None:
    """The distance is measured on real digits with their own classifier."""
    data = Digits()
    extractor = shipped_classifier(data.spec)
    train, test = data.split("train"), data.split("test")
    reference = Statistics.from_features(extractor.features(quantize_split(train.images, data.spec)))
    stored = quantize_split(test.images, data.spec)
    blurred = [stored]
    for _ in range(3):
        x = torch.nn.functional.avg_pool2d(blurred[-1].float(), 3, 1, 1)
        blurred.append(x.round().byte())
    dropped = [stored[(test.labels >= c)] for c in range(4)]  # type: ignore[operator]
    for images in (blurred, dropped):
        values = [
            gaussian_frechet_distance(Statistics.from_features(extractor.features(part[:300])), reference)
            for part in images
        ]
        assert values == sorted(values) and values[-1] > 2 * values[0]


def test_the_classifier_score_of_known_predictions() -> None:
    """Certain predictions of four classes give exp(KL) = 4, and the same prediction for all images gives 1."""
    sure = 100.0 * torch.eye(4).repeat(100, 1)
    assert classifier_score(sure)[0] == pytest.approx(4, rel=0.05)
    assert classifier_score(torch.zeros(400, 4))[0] == pytest.approx(1)


def test_class_metrics_count_predictions() -> None:
    sure, unsure = [10.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    logits = torch.tensor([sure, sure, unsure, [0.0, 0.0, 10.0]])
    assert confident_share(logits) == 0.75
    assert class_shares(logits) == [0.5, 0.25, 0.25]
    assert label_accuracy(logits, torch.tensor([0, 1, 1, 0])) == 0.5


# Memorisation


def test_nearest_finds_copies_at_zero() -> None:
    keys = 100 + normal(5000, 32)
    rows = torch.arange(0, 5000, 7)
    distance, index = nearest_neighbor(keys[rows], keys)
    assert torch.equal(index, rows) and (distance == 0).all()
    queries = 100 + normal(50, 32, seed=1)
    exact = (queries.double()[:, None] - keys.double()).norm(dim=2)
    torch.testing.assert_close(nearest_neighbor(queries, keys)[0].double(), exact.amin(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("sizes", [(1000, 1000, 300), (8000, 500, 500)])
def test_memorization_is_one_minus_the_share_of_copies(sizes: tuple[int, ...]) -> None:
    """The ratio is 1 for fresh samples and 0 for copies of training images, for any sizes of the three sets."""
    train, test, val = (normal(n, 12, seed=k) for k, n in enumerate(sizes))
    fresh = normal(500, 12, seed=9)
    assert memorization_ratio(fresh, train, test, val) == pytest.approx(1, abs=0.03)
    assert memorization_ratio(train[:500], train, test, val) == 0
    for share in (0.2, 0.5):
        copies = int(500 * share)
        mixed = torch.cat([train[:copies], fresh[copies:]])
        assert memorization_ratio(mixed, train, test, val) == pytest.approx(1 - share, abs=0.04)


def test_copies_are_not_authentic_and_fresh_samples_match_test_images() -> None:
    train, fresh, other = (normal(n, 12, seed=k) for k, n in enumerate((4000, 2000, 2000)))
    assert authenticity(train[:500], train) == 0
    assert authenticity(fresh, train) == pytest.approx(authenticity(other, train), abs=0.05)
    assert 0.5 < authenticity(fresh, train) < 0.75
    half = torch.cat([train[:1000], fresh[:1000]])
    assert authenticity(half, train) == pytest.approx(authenticity(fresh[:1000], train) / 2, abs=1e-9)


def test_memorization_of_held_out_images_is_undefined() -> None:
    train, test, val = normal(50, 3), normal(50, 3, seed=1), normal(50, 3, seed=2)
    assert memorization_ratio(test, train, test, val) is None


# Quantisation


def test_real_images_are_unchanged_by_the_model_range() -> None:
    """A pixel value gives the same byte for a stored image of the data set as for a model sample in [-1, 1]."""
    for levels in (2, 17, 256):
        spec = DataSpec(name="x", shape=(1, 1, levels), num_bins=levels)
        stored = torch.arange(levels, dtype=torch.uint8).view(1, 1, 1, levels)
        x = stored.float() * 2 / (levels - 1) - 1
        expected = (stored.double() * 255 / (levels - 1)).round().to(torch.uint8)
        assert torch.equal(quantize_split(stored, spec), expected)
        assert torch.equal(quantize_images(x, spec), expected)
        # 0.9 of the way to the next level, towards 0.
        assert torch.equal(quantize_images(x - 0.9 / (levels - 1) * x.sign(), spec), expected)
        assert torch.equal(quantize_images(expected, spec), expected), "uint8 images"


def test_normalized_digits_are_quantized_as_their_split() -> None:
    data = Digits()
    x, _ = next(data.batches("test"))
    assert torch.equal(to_uint8(x, data.spec), quantize_split(data.split("test").images, data.spec))


def test_padding_is_cropped() -> None:
    spec = DataSpec(name="x", shape=(1, 6, 6), padding=2)
    x = -torch.ones(1, 1, 6, 6)
    x[..., 2:4, 2:4] = 1
    assert torch.equal(quantize_images(x, spec), torch.full((1, 1, 2, 2), 255, dtype=torch.uint8))
    assert torch.equal(quantize_images(x[..., 2:4, 2:4], spec), quantize_images(x, spec))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.fill_(float("nan")), "2 of 2 samples contain NaN"),
        (lambda x: x.mul_(float("inf")), "NaN or infinite"),
        (lambda x: x.mul_(1.2), "reach 1.2"),
        (lambda x: x.add(1).mul(127.5).long(), "int64"),
        (lambda x: x[:, :, :4], r"not \(1, 4, 8\)"),
        (lambda x: x.expand(-1, 3, -1, -1), r"not \(3, 8, 8\)"),
    ],
)
def test_invalid_images_are_refused(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize_images(change(torch.ones(2, 1, 8, 8)), Digits.spec)


def test_a_small_overshoot_is_clamped() -> None:
    assert torch.equal(
        quantize_images(torch.full((1, 1, 8, 8), 1.01), Digits.spec), torch.full((1, 1, 8, 8), 255).byte()
    )


# Cost


def test_flops_of_a_matrix_product() -> None:
    """The product of an m x k and a k x n matrix takes 2 m n k FLOPs. The backward pass of a linear layer computes two
    gradients, each of which takes as many FLOPs as the forward pass."""
    layer, x = nn.Linear(30, 7, bias=False), torch.randn(10, 30, requires_grad=True)
    with torch.no_grad():
        assert flops_per_image(lambda: layer(x), 10) == 2 * 30 * 7
    assert flops_per_image(lambda: layer(x).sum().backward(), 10) == 3 * 2 * 30 * 7


def test_flops_of_a_gradient_with_respect_to_an_input() -> None:
    """Classifier guidance needs such a gradient. Its cost is that of the forward pass and of one of the layer's two
    gradients."""
    layer, x = nn.Linear(30, 7, bias=False), torch.randn(10, 30, requires_grad=True)
    assert flops_per_image(lambda: torch.autograd.grad(layer(x).sum(), x), 10) == 2 * 2 * 30 * 7


class LargestResult(TorchDispatchMode):
    """Records the largest number of values in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:  # else a view
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("name", ["statistics", "jackknife", "prdc", "memorization", "authenticity", "mmd"])
def test_no_metric_copies_a_set_of_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("extractors.extractor", "metrics.frechet", "metrics.neighbors", "metrics.kernel"):
        monkeypatch.setattr(f"gencompare.evaluation.{module}.BLOCK_SIZE", 100)
    for module in ("frechet", "kernel"):
        monkeypatch.setattr(f"gencompare.evaluation.metrics.{module}.PAIR_IMAGES", 100)
    features, reference, val = normal(2000, 30), normal(2000, 30, seed=1), normal(100, 30, seed=2)
    statistics = Statistics.from_features(reference)
    metrics: dict[str, Any] = {
        "statistics": lambda: Statistics.from_features(features),
        "jackknife": lambda: Jackknife(features, statistics).infinity,
        "prdc": lambda: compute_prdc(features, reference),
        "memorization": lambda: memorization_ratio(features, reference, val, val),
        "authenticity": lambda: authenticity(features, reference),
        "mmd": lambda: kernel_distance(features, KernelReference.from_features(reference, GaussianKernel(), 200)),
    }
    with LargestResult() as largest:
        metrics[name]()
    assert largest.numel <= features.numel() // 2


def test_statistics_and_jackknife_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, reference = 3 + normal(250, 8), Statistics.from_features(normal(300, 8, seed=1))
    assert Statistics.from_features(features).cov.numpy() == pytest.approx(np.cov(features.double().T.numpy()), 1e-12)
    whole = Jackknife(features, reference)
    for module in ("extractors.extractor", "metrics.frechet"):
        monkeypatch.setattr(f"gencompare.evaluation.{module}.BLOCK_SIZE", 70)
    parts = Jackknife(features, reference)
    torch.testing.assert_close(parts.delete_one, whole.delete_one, rtol=1e-10, atol=0)
    assert parts.distance.interval == pytest.approx(whole.distance.interval, rel=1e-8)


def test_nearest_neighbours_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (normal(n, 8, seed=n) for n in (250, 330, 50))
    a[:20] = b[5:25]  # copies
    expected = compute_prdc(a, b), authenticity(a, b), memorization_ratio(a, b, c, normal(60, 8, seed=9))
    monkeypatch.setattr("gencompare.evaluation.metrics.neighbors.BLOCK_SIZE", 70)
    assert compute_prdc(a, b) == expected[0]
    assert authenticity(a, b) == expected[1] <= 230 / 250
    assert memorization_ratio(a, b, c, normal(60, 8, seed=9)) == pytest.approx(expected[2], rel=1e-6)
