"""References: cached features, statistics files from other programs, joined splits and resumed sampling."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gencompare.data.datamodule import Split
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.evaluation import reference as reference_module
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.extractors.selection import ModuleExtractor, module_extractor
from gencompare.evaluation.extractors.shipped_classifiers import ClassifierExtractor, shipped_classifier
from gencompare.evaluation.metrics.frechet import Statistics, frechet_distance
from gencompare.evaluation.reference import load_reference, quantize_split, read_statistics, split_features
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import Cond, DataSpec
from gencompare.models.gaussian import GaussianBaseline


@pytest.fixture(autouse=True)
def empty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "_REFERENCES", type(reference_module._REFERENCES)())


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the size of every batch of more than one image that the bundled classifier processes."""
    sizes: list[int] = []
    original = ClassifierExtractor.extract_batch

    def extract_batch(self: ClassifierExtractor, images: Tensor) -> Any:
        if len(images) > 1:
            sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(ClassifierExtractor, "extract_batch", extract_batch)
    return sizes


def test_features_are_computed_once_and_then_read_from_the_cache(tmp_path: Path, batch_sizes: list[int]) -> None:
    data, extractor = Digits(), shipped_classifier(Digits.spec)
    first = split_features(data, "train", extractor, cache=tmp_path)
    assert sum(batch_sizes) == 1147
    again = split_features(data, "train", extractor, cache=tmp_path)
    assert sum(batch_sizes) == 1147, "the features come from the file"
    for one, two in zip(first.parts(), again.parts(), strict=True):
        assert one is not None and two is not None and torch.equal(one, two)


def test_a_damaged_cache_file_is_recomputed(
    tmp_path: Path, batch_sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    data, extractor = Digits(), shipped_classifier(Digits.spec)
    first = split_features(data, "val", extractor, cache=tmp_path)
    (file,) = tmp_path.glob("*.npy")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = split_features(data, "val", extractor, cache=tmp_path)
    assert "corrupted" in caplog.text and sum(batch_sizes) == 300
    assert torch.equal(first.features, again.features)


def test_changed_pixels_have_their_own_cache_file(tmp_path: Path) -> None:
    extractor = shipped_classifier(Digits.spec)

    class Changed(Digits):
        def load(self) -> dict[str, Split]:
            splits = super().load()
            images = splits["val"].images.clone()
            images[0, 0, 3, 3] ^= 1
            return {**splits, "val": Split(images, splits["val"].labels)}

    for data in (Digits(), Changed()):
        split_features(data, "val", extractor, cache=tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_splits_can_be_joined() -> None:
    data = Digits()
    both = data.split("train+val")
    assert len(both) == 1147 + 150 and both.labels is not None and len(both.labels) == len(both)
    assert torch.equal(both.images[1147:], data.split("val").images)
    assert data.hash("train+val") not in (data.hash("train"), data.hash("val"))
    images = quantize_split(data.split("test").images, data.spec)
    result = evaluate(
        images, data, EvaluationProtocol(extractors=(shipped_classifier,), reference="train+val", num_images=500)
    )
    assert (result.measurement.reference, result.measurement.num_reference_images) == ("train+val", 1297)
    with pytest.raises(UserError, match="no split 'train\\+tset'"):
        data.split("train+tset")


# Statistics files


def statistics_file(path: Path, features: Tensor, **more: Any) -> Path:
    x = features.double().numpy()
    np.savez(path, mu=x.mean(0), sigma=np.cov(x, rowvar=False), **more)
    return path


def test_a_statistics_file_gives_the_distance_of_its_images(tmp_path: Path) -> None:
    """Both the layout of pytorch-fid and EDM (mu, sigma) and that of ADM (with mu_s, sigma_s) are read."""
    data, extractor = Digits(), shipped_classifier(Digits.spec)
    train = load_reference(data, "train", extractor).features
    assert train is not None and train.spatial is not None
    spatial = Statistics.from_features(train.spatial)
    path = statistics_file(tmp_path / "adm.npz", train.features, mu_s=spatial.mean.numpy(), sigma_s=spatial.cov.numpy())
    images = quantize_split(data.split("test").images, data.spec)
    classifier = EvaluationProtocol(extractors=(shipped_classifier,), num_images=500)
    ours, theirs = (
        evaluate(images, data, dataclasses.replace(classifier, reference=name)) for name in ("train", str(path))
    )
    assert (ours.primary_metric, theirs.primary_metric) == ("mmd_digits", "fd_digits"), (
        "statistics give no kernel distance"
    )
    for name in ("fd_digits", "fd_digits_infinity", "sfd_digits"):
        assert theirs.metrics[name].value == pytest.approx(ours.metrics[name].value, rel=1e-6), name
        assert theirs.metrics[name].baseline == pytest.approx(ours.metrics[name].baseline, rel=1e-6), name
    assert "precision" not in theirs.metrics, "precision needs features"
    assert theirs.measurement.reference == "adm.npz" and theirs.measurement.differences(ours.measurement)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: None, "There is no statistics file"),
        (lambda p: p.write_bytes(b"PK\3\4 cut"), "corrupted"),
        (lambda p: np.savez(p, arr_0=np.zeros(3)), "has no 'mu'"),
        (lambda p: np.savez(p, mu=np.zeros(2048), sigma=np.eye(2048)), "2048 features"),
        (lambda p: np.savez(p, mu=np.full(64, np.nan), sigma=np.eye(64)), "not finite"),
        (lambda p: np.savez(p, mu=np.array([{}], dtype=object), sigma=np.eye(64)), "corrupted"),
    ],
)
def test_bad_statistics_files_are_refused(make: Any, named: str, tmp_path: Path) -> None:
    make(tmp_path / "s.npz")
    with pytest.raises(UserError, match=named):
        read_statistics(tmp_path / "s.npz", shipped_classifier(Digits.spec))


# Any network


class Moments(nn.Module):
    """Computes the mean of each pixel row."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 3))


def test_any_module_can_be_an_extractor() -> None:
    data = Digits()
    images = quantize_split(data.split("test").images, data.spec)
    result = evaluate(
        images, data, EvaluationProtocol(extractors=(lambda spec: module_extractor(spec, Moments(), "rows"),))
    )
    expected = [(quantize_split(data.split(s).images, data.spec).float() / 255).mean((1, 3)) for s in ("test", "train")]
    assert result.metrics["fd_rows"].value == pytest.approx(frechet_distance(*expected), rel=1e-5)
    one, two = (ModuleExtractor(data.spec, nn.Sequential(Moments(), nn.Linear(8, 4)), "x") for _ in range(2))
    assert one.hash != two.hash, "the hash depends on the weights"
    with pytest.raises(UserError, match="must return \\(images, features\\)"):
        ModuleExtractor(data.spec, nn.Identity(), "pixels")


# Interrupted evaluations


class Counting(GaussianBaseline):
    drawn = 0

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        self.drawn += n
        return super().sample(n, cond, generator=generator)


def test_sampling_resumes_from_stored_chunks(tmp_path: Path) -> None:
    data = Digits()
    model = Counting(data.spec).fit(data.batches("train"), data.batches("val"))
    assert isinstance(model, Counting)
    alone = draw_samples(model, 250, chunk_size=100)
    model.drawn = 0
    draw_samples(model, 200, chunk_size=100, chunk_dir=tmp_path)
    again = draw_samples(model, 250, chunk_size=100, chunk_dir=tmp_path)
    assert model.drawn == 250, "two chunks came from the folder"
    assert torch.equal(again.images, alone.images) and again.nfe == alone.nfe and again.seconds > 0
    first = sorted(tmp_path.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-7])
    model.drawn = 0
    assert torch.equal(draw_samples(model, 250, chunk_size=100, chunk_dir=tmp_path).images, alone.images)
    assert model.drawn == 100, "the corrupted chunk was drawn again"


def test_metrics_do_not_depend_on_the_batch_size_of_the_extractor() -> None:
    data = Digits()
    images = quantize_split(data.split("test").images, data.spec)
    found = []
    for batch in (500, 37):

        def small(spec: DataSpec, batch: int = batch) -> Any:
            extractor = shipped_classifier(spec)
            extractor.batch_size = batch
            return extractor

        reference_module._REFERENCES.clear()
        found.append(
            evaluate(
                images, data, dataclasses.replace(EvaluationProtocol(), extractors=(small,), num_images=500)
            ).metrics
        )
    for name, metric in found[0].items():
        assert metric.value == (None if metric.value is None else pytest.approx(found[1][name].value, rel=1e-6)), name
