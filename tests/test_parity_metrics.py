"""Metrics against other implementations, on the same images and weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import prdc
import pytest
import torch
from PIL import Image
from pytorch_fid import fid_score
from torch import Tensor

from gencompare.evaluation.extractors.extractor import Features
from gencompare.evaluation.extractors.torch_fidelity_networks import InceptionExtractor
from gencompare.evaluation.metrics.class_metrics import classifier_score
from gencompare.evaluation.metrics.frechet import frechet_distance
from gencompare.evaluation.metrics.kernel import kid
from gencompare.evaluation.metrics.neighbors import compute_prdc
from gencompare.generative_model import DataSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from random_inception import save_random_inception  # type: ignore[import-not-found]

SPEC = DataSpec(name="photos", shape=(3, 32, 32))
IMAGES = 24
"""Number of images in each folder. It is small, because each image costs Inception 11 GFLOP for every metric."""


def correlated(n: int, d: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) / d**0.5 + 0.3 * seed


@pytest.mark.parametrize(("n", "m"), [(400, 400), (300, 450)])
def test_density_and_coverage_equal_those_of_prdc(n: int, m: int, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = correlated(n, 24, 1), torch.cat([correlated(m - 100, 24, 2), correlated(100, 24, 1)])
    own = compute_prdc(a, b)
    for k, names in ((5, ("density", "coverage")), (3, ("precision", "recall"))):
        theirs = prdc.compute_prdc(b.numpy(), a.numpy(), k)
        for name in names:
            assert getattr(own, name) == pytest.approx(float(theirs[name]), rel=1e-4), name


def test_metrics_of_features_equal_torch_fidelity_and_pytorch_fid() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = correlated(1200, 64, 1), correlated(1500, 64, 2)
    statistics = [fid_features_to_statistics(x.double()) for x in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-4)
    moments = [(x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)) for x in (a, b)]
    pytorch_fid = fid_score.calculate_frechet_distance(*moments[0], *moments[1])
    assert frechet_distance(a, b) == pytest.approx(float(pytorch_fid), rel=1e-4)
    their_kid = kid_features_to_metric(a, b, kid_subsets=100, kid_subset_size=1000, verbose=False)
    assert kid(a, b)[0] == pytest.approx(their_kid["kernel_inception_distance_mean"], rel=1e-4)
    prc = prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=500, save_cpu_ram=False, verbose=False)
    own = compute_prdc(a, b)
    assert own.precision == pytest.approx(prc["precision"], rel=1e-4)
    assert own.recall == pytest.approx(prc["recall"], rel=1e-4)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write two folders of PNG files with smooth random images, which have finer structure and more contrast in the
    second."""
    places = []
    for k, (scale, side) in enumerate(((30, 4), (90, 16))):
        folder = tmp_path_factory.mktemp(f"images{k}")
        random = np.random.default_rng(k)
        coarse = torch.from_numpy(random.standard_normal((IMAGES, 3, side, side))).float()
        images = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").mul(scale).add(128)
        images = images.clamp(0, 255)
        for i, image in enumerate(images.byte().permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(folder / f"{i:03d}.png")
        places.append(folder)
    return places


def loaded(folder: Path) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in sorted(folder.iterdir())])


@pytest.fixture(scope="module")
def own_features(folders: list[Path], random_weights: Path) -> list[Features]:
    extractor = InceptionExtractor(SPEC, random_weights)
    return [extractor(loaded(folder)) for folder in folders]


@pytest.mark.slow
def test_metrics_of_folders_equal_torch_fidelity(
    folders: list[Path], random_weights: Path, own_features: list[Features]
) -> None:
    """FID, IS, KID, precision and recall of two image folders agree for the same network."""
    from torch_fidelity import calculate_metrics

    theirs = calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), cuda=False, fid=True, kid=True, isc=True, prc=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(random_weights), batch_size=16,
        kid_subsets=100, kid_subset_size=IMAGES, cache=False, verbose=False, samples_find_deep=False,
    )  # fmt: skip
    a, b = own_features
    assert frechet_distance(a.features, b.features) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    own_kid = kid(a.features, b.features)[0]
    assert own_kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert a.logits is not None
    assert classifier_score(a.logits)[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    own = compute_prdc(a.features, b.features)
    assert own.precision == pytest.approx(theirs["precision"], abs=1e-4)
    assert own.recall == pytest.approx(theirs["recall"], abs=1e-4)


@pytest.mark.slow
def test_fid_equals_that_of_torchmetrics_on_its_network(
    folders: list[Path], random_weights: Path, own_features: list[Features]
) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(feature_extractor_weights_path=str(random_weights))
    for folder, real in zip(folders, (True, False), strict=True):
        fid.update(loaded(folder), real=real)
    a, b = own_features
    assert frechet_distance(b.features, a.features) == pytest.approx(float(fid.compute()), rel=1e-4)
