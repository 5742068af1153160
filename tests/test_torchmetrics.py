"""Metrics as `torchmetrics.Metric`, alone and in a collection, equal other implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.image.fid import FrechetInceptionDistance

from gencompare.errors import UserError
from gencompare.evaluation.extractors.efficientnet import efficientnet_lite0
from gencompare.evaluation.metrics import modules
from gencompare.evaluation.metrics.frechet import frechet_distance
from gencompare.evaluation.model_metrics import reconstruction_similarity
from gencompare.generative_model import DataSpec

REAL_COMPARISONS = [
    modules.MaximumMeanDiscrepancy, modules.FrechetDistance, modules.FrechetDistanceInfinity,
    modules.SpatialFrechetDistance, modules.KernelDistance,
    modules.Precision, modules.Recall, modules.Density, modules.Coverage, modules.Authenticity,
]  # fmt: skip


class Pooled(nn.Module):
    """Extracts twelve features of an image."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.double() / 255, 2).flatten(1)


def images(n: int, seed: int, shift: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 200, (n, 3, 8, 8), generator=random) + shift).clamp(max=255).to(torch.uint8)


@pytest.mark.parametrize("kind", REAL_COMPARISONS)
def test_a_metric_separates_shifted_images_in_its_direction(kind: type) -> None:
    values = []
    for shift in (0, 40):
        metric = kind(Pooled())
        for part in images(300, 0).split(100):
            metric.update(part, real=True)
        for part in images(200, 1, shift).split(50):
            metric.update(part, real=False)
        values.append(float(metric.compute()))
        assert metric.compute().shape == ()
    if kind is modules.Authenticity:
        assert values[1] >= values[0]
    else:
        assert (values[0] > values[1]) == kind.higher_is_better and values[0] != values[1]


def test_the_frechet_distance_equals_that_of_torchmetrics() -> None:
    ours, theirs = modules.FrechetDistance(Pooled()), FrechetInceptionDistance(Pooled(), input_img_size=(3, 8, 8))
    for metric in (ours, theirs):
        metric.update(images(300, 0), real=True)
        metric.update(images(200, 1, 30), real=False)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-3)


def test_metrics_in_a_collection_take_floats_and_keep_real_features() -> None:
    both = MetricCollection(
        [modules.MaximumMeanDiscrepancy(Pooled(), normalize=True, reset_real_features=False),
         modules.Coverage(Pooled(), normalize=True, reset_real_features=False)]
    )  # fmt: skip
    both.update(images(100, 0) / 255, real=True)
    both.update(images(100, 1) / 255, real=False)
    before = both.compute()
    both.reset()
    both.update(images(100, 1) / 255, real=False)
    assert both.compute() == before


def test_the_default_network_is_that_of_evaluate() -> None:
    metric = modules.MaximumMeanDiscrepancy()
    metric.update(images(30, 0), real=True)
    metric.update(images(30, 1, 40), real=False)
    assert metric.compute() > 0 and metric.real[0].shape == (30, 1280)


def test_memorization_is_zero_for_copies_and_one_for_fresh_images() -> None:
    fresh, copies = modules.MemorizationRatio(Pooled()), modules.MemorizationRatio(Pooled())
    for metric, generated in ((fresh, images(200, 9)), (copies, images(500, 0)[:200])):
        metric.update(generated, "generated")
        for k, split in enumerate(("train", "val", "test")):
            metric.update(images(500, k), split)
    assert float(fresh.compute()) == pytest.approx(1, abs=0.1) and float(copies.compute()) == 0


def test_class_metrics_follow_the_logits() -> None:
    def classifier(x: Tensor) -> Tensor:
        return 20 * nn.functional.one_hot((x[:, 0, 0, 0] % 4).long(), 4).float()

    x = images(400, 0)
    score, accuracy = modules.ClassifierScore(classifier), modules.LabelAccuracy(classifier)
    score.update(x)
    accuracy.update(x, (x[:, 0, 0, 0] % 4).long())
    assert float(score.compute()) == pytest.approx(4, rel=0.05) and float(accuracy.compute()) == 1
    shares = modules.ClassShares(classifier)
    for part in x.split(150):
        shares.update(part)
    expected = torch.bincount((x[:, 0, 0, 0] % 4).long(), minlength=4).double() / len(x)
    torch.testing.assert_close(shares.compute().double(), expected)
    for scale, share in ((20, 1), (1e-3, 0)):
        confident = modules.ConfidentShare(lambda x, scale=scale: scale * classifier(x))
        confident.update(x)
        assert float(confident.compute()) == share


def test_the_class_frechet_distance_is_the_mean_over_classes() -> None:
    real, generated = images(300, 0), images(200, 1, 30)
    metric = modules.ClassFrechetDistance(Pooled(), reset_real_features=False)
    with pytest.raises(UserError, match="no generated images yet"):
        metric.compute()
    expected = []
    for label in range(2):
        metric.update(real[label::2], torch.full((150,), label), real=True)
        metric.update(generated[label::2], torch.full((100,), label), real=False)
        expected.append(frechet_distance(Pooled()(generated[label::2]).float(), Pooled()(real[label::2]).float()))
    assert float(metric.compute()) == pytest.approx(sum(expected) / 2, rel=1e-6)
    metric.reset()
    metric.update(generated, torch.arange(200) % 2, real=False)
    assert float(metric.compute()) == pytest.approx(sum(expected) / 2, rel=1e-6)
    metric.reset()
    metric.update(generated, torch.zeros(200, dtype=torch.long), real=False)
    with pytest.raises(UserError, match="at least two samples"):
        metric.compute()


def test_the_default_spatial_features_are_those_of_evaluate() -> None:
    metric = modules.SpatialFrechetDistance()
    real, generated = images(30, 0), images(30, 1, 40)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    extractor = efficientnet_lite0(DataSpec(name="images", shape=(3, 8, 8)))
    expected = frechet_distance(extractor(generated).spatial, extractor(real).spatial)  # type: ignore[arg-type]
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)


def test_psnr_and_ssim_of_torchmetrics_equal_those_of_evaluate() -> None:
    originals = torch.nn.functional.interpolate(images(150, 0).float(), (16, 16), mode="bilinear").round().byte()
    reconstructions = (originals.float() * 0.9 + 10).round().byte()
    expected = reconstruction_similarity(originals, reconstructions)
    for name, kind in (("psnr", modules.PeakSignalNoiseRatio), ("ssim", modules.StructuralSimilarityIndexMeasure)):
        metric = kind(data_range=255.0)
        for real, other in zip(originals.split(40), reconstructions.split(40), strict=True):
            metric.update(other.float(), real.float())
        assert float(metric.compute()) == pytest.approx(expected[name].value, rel=1e-5), name  # type: ignore[arg-type]


def test_invalid_and_missing_images_are_refused() -> None:
    metric = modules.Coverage(Pooled())
    with pytest.raises(UserError, match="uint8, or floats in \\[0, 1\\] with normalize=True"):
        metric.update(torch.rand(4, 3, 8, 8), real=True)
    metric.update(images(10, 0), real=True)
    with pytest.raises(UserError, match="no generated images yet"):
        metric.compute()
