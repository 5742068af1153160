"""The default metric agrees with people, on every data set of real images that is available."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gencompare.data.cifar10 import CIFAR10
from gencompare.data.datamodule import ImageData
from gencompare.data.digits import Digits
from gencompare.data.eurosat64 import EuroSAT64
from gencompare.data.mnist import MNIST, FashionMNIST
from gencompare.evaluation.degradations import DEGRADATIONS
from gencompare.evaluation.evaluate import EvaluationProtocol
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.kernel import GaussianKernel as GaussianKernel
from gencompare.evaluation.metrics.kernel import KernelReference, mmd
from gencompare.evaluation.reference import quantize_images, quantize_split

FULL = 2000
SHORT = 500
"""Images per set of photographs in ``make test-slow``; ``make test`` has the digits alone."""
PHOTOGRAPHS = {"mnist": MNIST, "fashion_mnist": FashionMNIST, "cifar10": CIFAR10, "eurosat64": EuroSAT64}
ORDERED_PAIRS = [
    (("real", 0), ("jpeg", 50)), (("jpeg", 50), ("blur", 1.0)), (("blur", 1.0), ("blur", 2.0)),
    (("noise", 10), ("noise", 25)), (("patch shuffle", 2), ("patch shuffle", 4)),
    (("jpeg", 50), ("gaussian", 0)), (("blur", 1.0), ("gaussian", 0)), (("noise", 10), ("gaussian", 0)),
    (("patch shuffle", 2), ("gaussian", 0)), (("mixing", 0.5), ("gaussian", 0)),
]  # fmt: skip
"""(better, worse) pairs for images of 28 pixels and more."""
VISIBLE_AT_8X8 = [
    (("real", 0), ("noise", 25)), (("noise", 10), ("noise", 25)), (("noise", 25), ("noise", 60)),
    (("real", 0), ("patch shuffle", 2)), (("patch shuffle", 2), ("patch shuffle", 4)),
    (("real", 0), ("blur", 1.0)), (("blur", 0.6), ("blur", 1.0)), (("blur", 1.0), ("blur", 2.0)),
    (("real", 0), ("gaussian", 0)),
]  # fmt: skip
"""(better, worse) pairs that a person can tell apart on digits of 8 x 8 pixels (docs/evaluation.md). JPEG is excluded,
because the whole image is one block. Degraded digits are not compared with samples of the Gaussian, because these
samples look like digits."""


Key = tuple[str, float]


def pixel_gaussian(images: torch.Tensor, labels: torch.Tensor, n: int) -> torch.Tensor:
    """Draw n uint8 samples of one Gaussian per class, with the mean and full covariance of its images (N, C, H, W).

    With the centred images X (m, d) of a class and z from N(0, I_m), mean + X^T z / sqrt(m - 1) has their covariance.
    """
    random = torch.Generator().manual_seed(0)
    drawn = labels[torch.randint(len(labels), (n,), generator=random)]
    out = torch.empty(n, *images.shape[1:])
    for k in drawn.unique():
        x = images[labels == k].float()
        mean = x.mean(0)
        z = torch.randn(int((drawn == k).sum()), len(x), generator=random)
        out[drawn == k] = mean + torch.einsum("nm,mchw->nchw", z, x - mean) / (len(x) - 1) ** 0.5
    return out.round().clamp(0, 255).to(torch.uint8)


def distances(data: ImageData, n: int, references: int, pairs: list[tuple[Key, Key]]) -> dict[tuple[str, float], float]:
    """Return the primary metric of each image set in ``pairs``."""
    spec = data.spec
    extractor = EvaluationProtocol().build_extractors(spec)[0]
    train, test = data.split("train"), data.split("test")
    reference = quantize_split(train.images[evenly_spaced_indices(len(train), references)], spec)
    assert train.labels is not None
    side = KernelReference.from_features(extractor(reference).features, GaussianKernel())
    real = quantize_split(test.images[evenly_spaced_indices(len(test), n)], spec)
    by_name = {degradation.name: degradation for degradation in DEGRADATIONS}
    found = {}
    for name, strength in dict.fromkeys(key for pair in pairs for key in pair):
        if name == "real":
            images = real
        elif name == "gaussian":
            chosen = evenly_spaced_indices(len(train), 5000)
            images = pixel_gaussian(quantize_split(train.images[chosen], spec), train.labels[chosen], len(real))
        else:
            images = quantize_images(by_name[name](real, strength), spec)
        found[name, strength] = mmd(extractor(images).features, side).value
    return found


@pytest.mark.parametrize(
    ("name", "n"),
    [pytest.param(name, SHORT, marks=pytest.mark.slow) for name in PHOTOGRAPHS]
    + [pytest.param(name, FULL, marks=[pytest.mark.slow, pytest.mark.timeout(900)]) for name in PHOTOGRAPHS],
)
def test_the_default_metric_orders_degraded_images_as_a_person_does(
    name: str, n: int, data_root: Path, cache: Path
) -> None:
    decoded = {"cache": cache} if name in ("cifar10", "eurosat64") else {}
    found = distances(PHOTOGRAPHS[name](data_root, **decoded), n, max(1000, 2 * n), ORDERED_PAIRS)
    wrong = [f"{a} {found[a]:.2f} >= {b} {found[b]:.2f}" for a, b in ORDERED_PAIRS if not found[a] < found[b]]
    assert not wrong, found


@pytest.mark.parametrize(("n", "references"), [(300, 500), pytest.param(500, 800, marks=pytest.mark.slow)])
def test_the_default_metric_orders_digits_as_a_person_does(n: int, references: int) -> None:
    found = distances(Digits(), n, references, VISIBLE_AT_8X8)
    wrong = [f"{a} {found[a]:.2f} >= {b} {found[b]:.2f}" for a, b in VISIBLE_AT_8X8 if not found[a] < found[b]]
    assert not wrong, found


def test_degradations_grow_with_strength_and_keep_their_input() -> None:
    """A stronger degradation has a larger pixel error. The shape and type are kept, and the input is not modified."""
    images = torch.randint(256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    images = torch.nn.functional.avg_pool2d(images, 3, 1, 1).to(
        torch.uint8
    )  # adjacent pixels are similar, as in photographs
    before = images.clone()
    for degradation in DEGRADATIONS:
        if 3 not in degradation.channels:
            continue
        moved = []
        # Pixelation by a fraction has blocks of two sizes, and their positions matter as much as their size.
        whole = degradation.name == "pixelate"
        for strength in (s for s in degradation.strengths if not whole or s == int(s)):
            out = degradation(images, strength)
            assert out.shape == images.shape and out.dtype == torch.uint8, degradation.name
            assert torch.equal(out, degradation(images, strength)), degradation.name
            moved.append(float((out.float() - images.float()).square().mean()))
        assert torch.equal(images, before), degradation.name
        if degradation.name != "patch shuffle":  # each grid moves most pixels to a random position
            assert moved == sorted(moved) and moved[0] < moved[-1], (degradation.name, moved)


def test_a_patch_shuffle_moves_whole_patches() -> None:
    shuffle = next(degradation for degradation in DEGRADATIONS if degradation.name == "patch shuffle")
    images = torch.arange(2 * 64).reshape(2, 1, 8, 8).to(torch.uint8)
    out = shuffle(images, 2)

    def corners(x: torch.Tensor) -> list[list[int]]:
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 4, 16)
        return [sorted(int(patch[0]) for patch in image) for image in patches]

    assert corners(out) == corners(images) and not torch.equal(out, images)


def test_the_default_needs_no_download() -> None:
    extractor = EvaluationProtocol().build_extractors(Digits.spec)[0]
    assert extractor.name == "efficientnet_lite0" and extractor.primary == "mmd_efficientnet_lite0"
