"""Sanity checks reject impossible samples or warn of them, but never reject real images or samples of poor models."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from rich.console import Console
from torch import Tensor

from gencompare.comparison import page
from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.terminal import print_tables
from gencompare.data.cifar10 import CIFAR10
from gencompare.data.digits import Digits
from gencompare.data.eurosat64 import EuroSAT64
from gencompare.data.generated_samples import read_samples
from gencompare.data.image_folder import ImageFolder
from gencompare.data.mnist import MNIST, FashionMNIST
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.extractors.shipped_classifiers import shipped_classifier
from gencompare.evaluation.metrics.neighbors import MIN_COVERAGE_IMAGES, missing_modes
from gencompare.evaluation.reference import quantize_images, quantize_split
from gencompare.evaluation.sanity import (
    RealImages,
    check_features,
    check_images,
    check_reference,
    share_of_copies,
    statistics,
    wrap_ratio,
)
from gencompare.generative_model import Cond, DataSpec

Change = Callable[[Tensor], Tensor]

GREY, COLOR = ("digits", "mnist", "fashion_mnist"), ("cifar10", "eurosat64")
NAMES = GREY + COLOR
random = torch.Generator().manual_seed(0)


class Images(NamedTuple):
    spec: DataSpec
    reference: Tensor
    """Training images with the levels of the data set."""
    test: Tensor
    """Test images as in image files, from 0 to 255."""
    labels: Tensor


@cache
def read_zip(path: Path, split: str, n: int) -> tuple[Tensor, Tensor]:
    """Return (n images, labels), evenly spaced over the archive, since decoding all of CIFAR-10 takes ten seconds."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{split}/") and name[-4:] != ".txt")
        names = [name for name in names if name.endswith((".png", ".jpg"))]
        classes = sorted({name.split("/")[1] for name in names})
        names = [names[k * len(names) // n] for k in torch.randperm(n, generator=torch.Generator().manual_seed(1))]
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    labels = torch.tensor([classes.index(name.split("/")[1]) for name in names])
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy()), labels


@cache
def images_of(name: str, root: Path | None) -> Images:
    if name == "digits":
        train, test = (Digits().split(split) for split in ("train", "test"))
        assert test.labels is not None
        return Images(Digits.spec, train.images, quantize_split(test.images, Digits.spec), test.labels)
    assert root is not None
    if name in COLOR:
        spec = CIFAR10.spec if name == "cifar10" else EuroSAT64.spec
        test, labels = read_zip(root / f"{name}.zip", "test", 2000 if name == "cifar10" else 500)
        return Images(
            spec, read_zip(root / f"{name}.zip", "train", 1000 if name == "cifar10" else 400)[0], test, labels
        )
    data = (MNIST if name == "mnist" else FashionMNIST)(root)
    test = data.split("test")
    assert test.labels is not None
    return Images(data.spec, data.split("train").images, test.images[:2000], test.labels[:2000])


@pytest.fixture(params=NAMES)
def images(request: pytest.FixtureRequest) -> Images:
    return images_of(request.param, None if request.param == "digits" else request.getfixturevalue("data_root"))


@pytest.fixture
def cifar10(data_root: Path) -> Images:
    return images_of("cifar10", data_root)


@pytest.fixture
def digits() -> Images:
    return images_of("digits", None)


def warnings(samples: Tensor, real: Images) -> list[str]:
    return check_images(samples, real.reference, real.spec)


def byte(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


def cast(x: Tensor) -> Tensor:
    """Cast to uint8 as NumPy does for most floats: truncated, modulo 256."""
    return (x.trunc().int() % 256).to(torch.uint8)


def noise(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=random)


def each(change: Callable[[Image.Image], Image.Image]) -> Change:
    def changed(x: Tensor) -> Tensor:
        rows = [
            np.asarray(change(Image.fromarray(row.transpose(1, 2, 0).squeeze())).convert("RGB")) for row in x.numpy()
        ]
        return torch.from_numpy(np.stack(rows).transpose(0, 3, 1, 2).copy())[:, : x.shape[1]]

    return changed


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    return Image.open(io.BytesIO(file.getvalue()))


def shuffled(x: Tensor) -> Tensor:
    """Permute the quarters of each image."""
    top, bottom = x.chunk(2, 2)
    quarters = [*top.chunk(2, 3), *bottom.chunk(2, 3)]
    return torch.cat([torch.cat([quarters[2], quarters[0]], 3), torch.cat([quarters[1], quarters[3]], 3)], 2)


def gaussian(x: Tensor) -> Tensor:
    """Draw samples from a Gaussian with the mean and covariance of the pixels of ``x``."""
    rows = x.flatten(1).double()
    centred = rows - rows.mean(0)
    weights = torch.randn(len(x), len(x), generator=random, dtype=torch.float64) / len(x) ** 0.5
    return byte(rows.mean(0) + weights @ centred).reshape(x.shape)


# No false alarms


@pytest.mark.parametrize("n", [50, 500, 2000])
def test_real_images_get_no_warning(images: Images, n: int) -> None:
    assert warnings(images.test[:n], images) == []
    as_floats = images.test[:n].float() / 127.5 - 1
    assert warnings(as_floats, images) == []
    assert check_reference(images.reference[:n], "train") == []


@pytest.mark.parametrize("n", [20, 50])
def test_one_class_of_real_images_gets_no_warning(images: Images, n: int) -> None:
    for label in range(10):
        assert warnings(images.test[images.labels == label][:n], images) == [], label


MILD: dict[str, Change] = {
    "blurred a little": each(lambda image: image.filter(ImageFilter.GaussianBlur(0.6))),
    "noisy": lambda x: byte(x + 10 * noise(x)),
    "JPEG": each(jpeg),
    "quarters shuffled": shuffled,
    "mean of two": lambda x: byte((x.float() + x.roll(1, 0)) / 2),
    "few real images with noise": lambda x: byte(x[:20].repeat(len(x) // 20, 1, 1, 1) + 8 * noise(x)),
    "pixel Gaussian": gaussian,
}
"""Poor samples on the right scale."""

POOR: dict[str, Change] = {
    "blurred": each(lambda image: image.filter(ImageFilter.GaussianBlur(2))),
    "very noisy": lambda x: byte(x + 60 * noise(x)),
    "grey with faint noise": lambda x: byte(128 + 10 * noise(x)),
    "clipped noise": lambda x: byte(127.5 + 127.5 * noise(x)),
    "smooth noise": lambda x: byte(128 + 60 * F.interpolate(noise(x[:, :, :4, :4]), x.shape[2:], mode="bilinear")),
    "dark": lambda x: byte(x * 0.2),
    "almost black": lambda x: byte(x * 0.05),
    "black": torch.zeros_like,
    "black with a few lit pixels": lambda x: (torch.rand(x.shape, generator=random) < 0.01) * x,
    "bright": lambda x: byte(128 + x / 2.0),
    "white": lambda x: torch.full_like(x, 255),
    "saturated": lambda x: (x > 127) * torch.full_like(x, 255),
    "low contrast": lambda x: byte(128 + 0.3 * (x - 128.0)),
    "one image": lambda x: x[:1].repeat(len(x), 1, 1, 1),
    "three images": lambda x: x[torch.arange(len(x)) % 3],
    "blank images": lambda x: x[:, :, :1, :1].expand(x.shape).contiguous(),
    "mirrored": lambda x: x.flip(3),
}
"""Samples of untrained, collapsed or diverged models."""


@pytest.mark.parametrize("kind", MILD)
def test_poor_samples_on_the_right_scale_get_no_warning(images: Images, kind: str) -> None:
    assert warnings(MILD[kind](images.test[:200]), images) == []


@pytest.mark.parametrize("kind", [*POOR])
def test_bad_samples_of_a_model_are_never_refused(images: Images, kind: str) -> None:
    samples = POOR[kind](images.test[:60])
    warnings(samples, images)
    if kind != "bright":  # as floats these would be in [0, 1] instead of [-1, 1]
        warnings(samples.float() / 127.5 - 1, images)


# Errors


@pytest.mark.parametrize("n", [50, 500])
def test_values_of_0_and_1_are_refused(images: Images, n: int) -> None:
    x = images.test[:n]
    with pytest.raises(UserError, match=r"only the levels 0 and 1 of .*span \d+ to 255: multiply by 255"):
        warnings((x > 127).byte(), images)
    with pytest.raises(UserError, match=r"only the levels 0 and 1 of .*multiply by 255"):
        warnings((x / 255).byte(), images)  # a cast that keeps only 255
    black = (
        "0 and 1" if images.spec.name == "eurosat64" else r"0, 1 and 255 .*\(x \+ 1\) \* 127\.5"
    )  # the data contain no black
    with pytest.raises(UserError, match=f"only the levels {black}"):
        warnings(cast(x / 127.5 - 1), images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_the_data_sets_own_levels_are_refused(digits: Images, dtype: torch.dtype) -> None:
    data = Digits()
    own = data.split("test").images
    with pytest.raises(UserError, match=r"data\.normalize\(images\)"):
        warnings(own.to(dtype), digits)
    with pytest.raises(UserError, match=r"data\.normalize\(images\)"):
        evaluate(own.to(dtype), data, EvaluationProtocol(extractors=(shipped_classifier,)))
    assert warnings(data.normalize(own), digits) == []


def test_normalized_images_of_a_split_give_the_baseline() -> None:
    data = Digits()
    result = evaluate(
        data.normalize(data.split("test").images), data, EvaluationProtocol(extractors=(shipped_classifier,))
    )
    metric = result.metrics[result.primary_metric]
    assert metric.value == pytest.approx(metric.baseline) and result.details["warnings"] == []


def test_floats_on_another_scale_are_refused(images: Images) -> None:
    x = images.test[:200].float()
    with pytest.raises(UserError, match=r"lie in \[0, 1\] .*pass 2 \* images - 1"):
        warnings(x / 255, images)
    with pytest.raises(UserError, match=r"these reach 255: .*uint8"):
        warnings(x, images)
    with pytest.raises(UserError, match=r"not torch\.int32.*uint8"):
        warnings(x.int(), images)


def test_bad_floats_in_the_unit_interval_are_warned_about(images: Images) -> None:
    """Real images would contain values below 0, but these are not rescaled real images either."""
    shown = warnings(torch.rand(images.test[:60].shape, generator=random), images)
    assert any("[0, 1]" in warning for warning in shown)


def test_a_models_own_samples_are_never_refused(images: Images) -> None:
    dark = (images.test[:60] > 127).byte()
    assert check_images(dark, images.reference, images.spec, refuse=False)


# Warnings

SCALES: dict[str, tuple[Change, str]] = {
    "halved": (lambda x: x // 2, r"0 to 127, but real \w+ images span \d+ to 255: multiply by 2 "),
    "to 63": (lambda x: x // 4, r"0 to 63, but .*multiply by 4 "),
    "to 31": (lambda x: x // 8, r" to 31, but .*multiply by 8\.2 "),
    "[0, 1] read as [-1, 1]": (lambda x: byte(127.5 + x / 2.0), r"1[23]\d to 255, but .*2 x - 1"),
    "signed bytes": (lambda x: cast(x.int() - 128), r"x \+ 128 modulo 256"),
    "inverted": (lambda x: 255 - x, "inverted: 255 - x matches "),
}
"""Wrong scales for every data set, and the warnings that they cause."""


@pytest.mark.parametrize("kind", SCALES)
def test_a_wrong_scale_is_warned_about(images: Images, kind: str) -> None:
    if images.spec.name == "eurosat64" and kind.startswith("["):
        pytest.skip("no level of these is below 17")
    change, expected = SCALES[kind]
    (found,) = warnings(change(images.test[:50]), images)
    if images.spec.name == "eurosat64":
        expected = expected.replace("0 to", r"\d+ to")
    assert re.search(expected, found), found


OVERFLOWS: dict[str, Change] = {
    "[-1, 1] times 255": lambda x: cast(x.int() * 2 - 255),
    "doubled": lambda x: cast(x.int() * 2),
    "a little beyond the range": lambda x: cast((x - 127.5) * 1.3 + 127.5),
    "noise beyond the range": lambda x: cast(x + 15 * noise(x)),
}


@pytest.mark.parametrize("kind", OVERFLOWS)
@pytest.mark.parametrize("name", COLOR)
def test_overflow_is_warned_about(kind: str, name: str, data_root: Path) -> None:
    images = images_of(name, data_root)
    assert any("overflowed 0 to 255" in warning for warning in warnings(OVERFLOWS[kind](images.test[:200]), images))


@pytest.mark.parametrize("name", GREY)
def test_a_background_of_another_level_is_warned_about(name: str, request: pytest.FixtureRequest) -> None:
    images = images_of(name, None if name == "digits" else request.getfixturevalue("data_root"))
    for change, level in ((OVERFLOWS["[-1, 1] times 255"], 1), (lambda x: byte(x * 0.8 + 50), 50)):
        found = warnings(change(images.test[:200]), images)
        assert any(f"background of the samples has level {level}" in warning for warning in found), found


LAYOUTS: dict[str, tuple[Change, str]] = {
    "BGR": (lambda x: x.flip(1), "as BGR"),
    "(C, H, W) reshaped to (H, W, C)": (
        lambda x: x.reshape(len(x), *x.shape[2:], 3).permute(0, 3, 1, 2), r"scrambled.*\(3, \d+, \d+\)",
    ),
    "(H, W, C) reshaped to (C, H, W)": (lambda x: x.permute(0, 2, 3, 1).reshape(x.shape), r"scrambled.*, 3\)"),
    "grey": (lambda x: byte(x.float().mean(1, keepdim=True)).repeat(1, 3, 1, 1), "all samples are greyscale"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", COLOR)
def test_wrong_channels_are_warned_about(kind: str, name: str, data_root: Path) -> None:
    images = images_of(name, data_root)
    change, expected = LAYOUTS[kind]
    found = warnings(change(images.test[:200]).contiguous(), images)
    assert any(re.search(expected, warning) for warning in found), found


def test_rotated_and_mirrored_images_are_warned_about(images: Images) -> None:
    if images.spec.name == "eurosat64":
        pytest.skip("seen from above, images have no top")
    x = images.test[:200]
    assert "swapped" in " ".join(warnings(x.mT.contiguous(), images))
    assert "upside down" in " ".join(warnings(x.flip(2), images))
    if images.spec.name != "cifar10":  # its mirrored images are as plausible
        assert "mirrored" in " ".join(warnings(x.flip(3), images))
        assert "-90 degrees" in " ".join(warnings(x.rot90(1, (2, 3)), images))


def test_levels_blank_images_and_noise_are_warned_about(images: Images) -> None:
    x = images.test[:100]
    assert "have 2 distinct pixel values" in " ".join(warnings((x > 127).byte() * 255, images))
    levels = torch.arange(100, dtype=torch.uint8)[:, None, None, None]
    assert "blank" in " ".join(warnings((levels * 2 + 40).expand(x.shape).contiguous(), images))
    if images.spec.name != "digits":  # adjacent values of digits differ as much as noise
        assert "noise" in " ".join(warnings(byte(127.5 + 127.5 * noise(x)), images))
    assert "same image" in " ".join(warnings(x[:1].repeat(50, 1, 1, 1), images))


def test_clipped_values_are_warned_about(cifar10: Images) -> None:
    """The images are normalised by mean and standard deviation, but saved as if they were in [-1, 1]."""
    x = (cifar10.test[:200] / 255 - 0.45) / 0.225
    assert "were clipped" in " ".join(warnings(x.clamp(-1, 1), cifar10))


def test_padding_that_is_not_black_is_warned_about(data_root: Path) -> None:
    images = images_of("fashion_mnist", data_root)
    x = images.test[:200].float()
    padded, resized = F.pad(x, (2, 2, 2, 2)), F.interpolate(x, (32, 32), mode="bilinear")
    for convert in (byte, lambda image: image / 127.5 - 1):
        assert warnings(convert(padded), images) == []
        assert "padding" in " ".join(warnings(convert(resized), images))


# Duplicates


def test_copies_among_samples_are_warned_about(images: Images) -> None:
    x = images.test[:200]
    assert "100% of the samples are exact copies" in " ".join(warnings(x[:50].repeat(4, 1, 1, 1), images))
    assert "50% of the samples" in " ".join(warnings(torch.cat([x[:150], x[:50]]), images))


def test_copies_in_the_reference_are_warned_about(tmp_path: Path, cifar10: Images) -> None:
    for k in range(400):
        Image.fromarray(cifar10.test[k % 100].permute(1, 2, 0).numpy()).save(tmp_path / f"{k:03d}.png")
    data = ImageFolder(tmp_path)
    copied = evaluate(cifar10.test[:100].repeat(4, 1, 1, 1), data, EvaluationProtocol(num_images=300))
    flags = " ".join(copied.details["warnings"])
    assert "of the reference images (train) have 3 or more exact copies" in flags
    assert "of the samples are exact copies" not in flags, "real images contain as many copies"


def test_copies_are_counted_exactly() -> None:
    x = torch.arange(6, dtype=torch.uint8)[torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])][:, None, None, None]
    assert share_of_copies(x) == 6 / 8 and share_of_copies(x, 3) == 4 / 8 and share_of_copies(x, 4) == 0


# Where warnings are shown


def test_a_warning_appears_in_terminal_record_and_page(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], digits: Images
) -> None:
    np.savez(tmp_path / "half.npz", arr_0=(digits.test // 2).permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "levels.npz", arr_0=Digits().split("test").images.permute(0, 2, 3, 1).numpy())
    words = ["task=evaluate", "data=digits", "evaluation=quick"]
    assert cli(*words, "samples=levels.npz", "hydra.run.dir=levels") == 1
    assert "own levels" in capsys.readouterr().err and not (tmp_path / "levels" / "record.json").exists()
    assert cli(*words, "samples=half.npz", "hydra.run.dir=half") == 0
    said = "samples span 0 to 127, but real digits images span"
    out = " ".join(capsys.readouterr().out.split())
    assert f"Warning: half: {said}" in out
    assert out.index("warning") < out.index("infinity"), "next to the primary metric"
    results = json.loads((tmp_path / "half" / "record.json").read_text())["results"]
    assert len(results) == 2 and all(any(said in flag for flag in r["details"]["warnings"]) for r in results)
    html = (tmp_path / "half" / "compare.html").read_text()
    assert html.index(f"<b>Warning:</b> half: {said}") < html.index("<table")
    assert '<span class="annotation">warning</span>' in html

    np.savez(tmp_path / "ok.npz", arr_0=digits.test.permute(0, 2, 3, 1).numpy())
    assert cli(*words, "samples=ok.npz", "hydra.run.dir=ok") == 0
    assert "arning" not in capsys.readouterr().out
    gathered = load_runs([tmp_path / "half", tmp_path / "ok"])
    assert f"<b>Warning:</b> half: {said}" in page.render(gathered)
    console = Console(width=200, record=True, file=io.StringIO())
    print_tables(gathered, console)
    assert f"Warning: half: {said}" in console.export_text()


class Halved:
    """A model that uses only half of the range."""

    def __init__(self, data: Digits) -> None:
        self.images = data.normalize(data.split("test").images)

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.images), (n,), generator=generator)
        return (self.images[rows] + 1) / 2 - 1


def test_a_models_samples_are_checked_too() -> None:
    data = Digits()
    result = evaluate(Halved(data), data, EvaluationProtocol(num_images=100))
    assert any("0 to 12" in warning and "span 0 to 255" in warning for warning in result.details["warnings"])


# Grey images in three channels


def test_grey_images_in_three_channels_are_read_from_any_file(tmp_path: Path, digits: Images) -> None:
    grey = digits.test[:20]
    as_rgb = grey.repeat(1, 3, 1, 1).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "rgb.npz", arr_0=as_rgb)
    np.savez(tmp_path / "flat.npz", arr_0=grey[:, 0].numpy())
    (tmp_path / "folder").mkdir()
    for k, image in enumerate(as_rgb):
        Image.fromarray(image).save(tmp_path / "folder" / f"{k:02d}.png")
    for name in ("rgb.npz", "flat.npz", "folder"):
        assert torch.equal(read_samples(tmp_path / name, Digits.spec)[0], grey), name
    in_color = DataSpec("color", (3, 8, 8))
    assert torch.equal(read_samples(tmp_path / "flat.npz", in_color)[0], grey.repeat(1, 3, 1, 1))


def test_color_images_are_refused_on_grey_data(tmp_path: Path) -> None:
    color = torch.randint(0, 256, (3, 8, 8, 3), generator=random).to(torch.uint8).numpy()
    np.savez(tmp_path / "color.npz", arr_0=color)
    (tmp_path / "folder").mkdir()
    Image.fromarray(color[0]).save(tmp_path / "folder" / "0.png")
    for name in ("color.npz", "folder"):
        with pytest.raises(UserError, match=r"3 channels that are not greyscale.*convert them to greyscale"):
            read_samples(tmp_path / name, Digits.spec)


# The parts


def test_few_samples_give_no_warning_of_missing_modes() -> None:
    assert (
        missing_modes(1.0, 0.1, n=MIN_COVERAGE_IMAGES - 1) is None
        and missing_modes(0.0, 0.1, 0.9, n=MIN_COVERAGE_IMAGES - 1) is None
    )
    assert missing_modes(1.0, 0.1, n=MIN_COVERAGE_IMAGES) and missing_modes(0.0, 0.1, 0.9, n=MIN_COVERAGE_IMAGES)


def test_the_distance_has_its_exact_value() -> None:
    """The distance is -k / n for the reference itself, and a squared z score for the brightness of blank images."""
    x = torch.randint(0, 256, (400, 1, 4, 4), generator=random).to(torch.uint8)
    real = RealImages(x, DataSpec("noise", (1, 4, 4)))
    k = statistics(x).shape[1]
    assert real.distance(x) == pytest.approx(-k / 400)
    blank = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None, None].repeat(100, 1, 1, 1)
    real = RealImages(blank, DataSpec("blank", (1, 1, 1)))
    variance = blank.double().var() + 16  # 4 levels of tolerance, squared; one pixel has no contrast or neighbours
    assert real.distance(blank + 40) == pytest.approx(float(1600 / variance) - 2 / 300)


def test_overflow_is_measured_on_the_circle() -> None:
    """250, 5 and 100 differ by 245 and 95, and on the circle by 11 and 95. Saturated values are ignored."""
    row = torch.tensor([250, 5, 100, 0, 255], dtype=torch.uint8)[None, None, None]
    ratio, circular = wrap_ratio(row)
    assert ratio == pytest.approx(340 / 106) and circular == 53


def test_degenerate_features_are_named() -> None:
    x = torch.randn(10, 4, generator=random)
    assert check_features(x, x) == [] and "generates a single image" in check_features(x[:1].expand(5, 4), x)[0]
    half = x * torch.tensor([1, 1, 0, 0])
    assert check_features(half, x)[0].startswith("2 of 4 features are the same for all samples")
    assert check_features(half, half) == [], "features that are constant over real images do not count"


def test_the_checks_are_deterministic_and_do_not_change_images(cifar10: Images) -> None:
    x = byte(cifar10.test[:300] * 0.5)
    before = x.clone()
    assert warnings(x, cifar10) == warnings(x, cifar10) and torch.equal(x, before)
    assert warnings(quantize_images(x, cifar10.spec), cifar10) == warnings(x, cifar10)
