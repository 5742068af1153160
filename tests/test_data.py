"""Every data set in conf/data satisfies the same contract, and the real data agree with published statistics."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

from composing import options, roots
from gencompare.data import archives
from gencompare.data.cifar10 import CIFAR10, CLASSES
from gencompare.data.datamodule import ImageData, Split, hold_out
from gencompare.data.digits import read_digits
from gencompare.data.eurosat64 import EuroSAT64
from gencompare.data.mnist import MNIST, FashionMNIST
from gencompare.errors import UserError

SPLITS = ("train", "val", "test")
Read = Callable[[str, Path | None], ImageData]


@pytest.fixture(scope="session")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 60 random 8x8 images in two classes."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for k in range(60):
        path = folder / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


def from_conf(option: str, root: Path | None, cache: Path, **changes: Any) -> ImageData:
    """Return the data set of ``conf/data/option.yaml``, without downloads."""
    path = next(p for base in roots() if (p := base / "data" / f"{option}.yaml").is_file())
    cfg = OmegaConf.create(
        {
            "seed": 0,
            "paths": {"data": str(root), "cache": str(cache)},
            "trainer": {"global_batch_size": 16},
            "data": OmegaConf.merge(OmegaConf.load(path), changes),
        }
    )
    if "download" in cfg.data:
        cfg.data.download = False
    OmegaConf.resolve(cfg)
    return instantiate(cfg.data, _convert_="all")


@pytest.fixture(scope="session")
def read(cache: Path) -> Read:
    """Return a function that reads the data set of an option, once per session."""
    return functools.cache(lambda option, root: from_conf(option, root, cache))


@pytest.fixture(params=options("data"))
def place(request: pytest.FixtureRequest, few_images: Path) -> tuple[str, Path | None]:
    """Return each option with its root, skipping options whose files are missing."""
    option = request.param
    if option == "image_folder":
        return option, few_images
    text = "".join(p.read_text() for base in roots() if (p := base / "data" / f"{option}.yaml").is_file())
    return option, request.getfixturevalue("data_root") if "paths.data" in text else None


@pytest.fixture
def data_set(place: tuple[str, Path | None], read: Read) -> ImageData:
    return read(*place)


def fingerprints(split: Split) -> list[bytes]:
    images = split.images.flatten(1).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in images]


def test_batches_have_the_shape_range_and_padding_of_the_spec(data_set: ImageData) -> None:
    spec = data_set.spec
    for name in SPLITS:
        x, cond = next(iter(data_set.batches(name, 300)))
        stored = data_set.split(name)[slice(300)]
        assert x.dtype == torch.float32 and x.shape[1:] == spec.shape
        assert x.min() >= -1 and x.max() <= 1
        if spec.num_bins is not None:
            assert stored.images.dtype == torch.uint8
            levels = (spec.crop(x).double() + 1) / 2 * (spec.num_bins - 1)
            assert torch.allclose(levels, stored.images.double(), atol=1e-4), "levels 0 to L - 1 span [-1, 1]"
            assert data_set.split(name).images.max() == spec.num_bins - 1
        outside = (spec.mask() == 0).expand(spec.shape)
        assert (x[:, outside] == -1).all()
        assert int((~outside).sum()) == spec.num_values == stored.images[0].numel()
        assert (stored.labels is None) == (spec.num_classes == 0) == ("label" not in cond)
        if stored.labels is not None:
            assert stored.labels.dtype == torch.int64
            labels = data_set.split(name).labels
            assert labels is not None and set(labels.tolist()) == set(range(spec.num_classes))


def test_splits_are_disjoint_and_fixed(data_set: ImageData, place: tuple[str, Path | None], cache: Path) -> None:
    found = {name: fingerprints(data_set.split(name)) for name in SPLITS}
    train = set(found["train"])
    for name in ("val", "test"):
        # Published MNIST and Fashion-MNIST contain a few duplicate images; overlapping splits would share far more.
        assert sum(f in train for f in found[name]) <= 0.005 * len(found[name])
    assert len({data_set.hash(name) for name in SPLITS}) == 3
    again = from_conf(*place, cache, seed=7, batch_size=8, random_flip=True)
    for name in SPLITS:
        assert again.hash(name) == data_set.hash(name), "splits do not depend on training options"


def test_the_first_images_of_a_split_have_its_class_balance(data_set: ImageData) -> None:
    for name in SPLITS:
        labels = data_set.split(name).labels
        if labels is None or len(labels) < 300:
            continue
        n = len(labels) // 5
        for label in range(data_set.spec.num_classes):
            share = float((labels == label).double().mean())
            error = abs(float((labels[:n] == label).double().mean()) - share)
            assert error < 5 * (share * (1 - share) / n) ** 0.5, f"class {label} in the first {n} of {name}"


def test_train_subset_size_limits_only_the_training_images(few_images: Path, cache: Path) -> None:
    whole = from_conf("image_folder", few_images, cache)
    part = from_conf("image_folder", few_images, cache, train_subset_size=7)
    assert torch.equal(part.train_subset.images, whole.train_subset.images[:7])
    assert sum(len(x) for x, _ in part.batches("train")) == 7
    assert part.hash("train") == whole.hash("train"), "reference statistics use all images"
    assert part.hash("val") == whole.hash("val") and part.hash("test") == whole.hash("test")


def test_constructors_read_no_files(tmp_path: Path) -> None:
    for make in (MNIST, FashionMNIST, CIFAR10, EuroSAT64):
        data_set = make(tmp_path / "nowhere")
        assert data_set.spec.num_classes == 10
        with pytest.raises(UserError, match=r"nowhere.*data\.root=DIR") as error:
            data_set.setup()
        assert "\n" not in str(error.value)


def test_hold_out_partitions_the_split() -> None:
    whole = Split(torch.arange(101)[:, None, None, None], torch.arange(101) * 2)
    rest, held = hold_out(whole, 17, "a purpose")
    both = torch.cat([rest.images, held.images]).flatten()
    assert (len(rest), len(held)) == (84, 17)
    assert both.sort().values.tolist() == list(range(101))
    assert rest.labels is not None and torch.equal(rest.labels, rest.images.flatten() * 2), "labels follow their images"
    other, _ = hold_out(whole, 17, "another purpose")
    assert not torch.equal(rest.images, other.images)


# Published statistics


def official(data_set: ImageData) -> Split:
    """Return the official training split, which is ``train`` and ``val`` together."""
    train, val = data_set.split("train"), data_set.split("val")
    assert train.labels is not None and val.labels is not None
    return Split(torch.cat([train.images, val.images]), torch.cat([train.labels, val.labels]))


def mean_and_std(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Compute the exact mean and standard deviation of each channel in [0, 1], from the histogram of the levels."""
    means, stds = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel in images.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float((shares * levels).sum())
        means.append(mean)
        stds.append(float((shares * (levels - mean) ** 2).sum()) ** 0.5)
    return means, stds


@pytest.mark.parametrize(
    ("option", "folder", "mean", "std", "per_class"),
    [
        # Published class counts, and the mean and standard deviation commonly used for normalisation.
        (
            "mnist",
            "mnist/MNIST",
            0.1307,
            0.3081,
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        ),
        ("fashion_mnist", "fashion_mnist/FashionMNIST", 0.2860, 0.3530, [6000] * 10),
    ],
)
def test_mnist_and_fashion_mnist_match_the_published_files(
    data_root: Path, read: Read, option: str, folder: str, mean: float, std: float, per_class: list[int]
) -> None:
    data_set = read(option, data_root)
    assert [len(data_set.split(name)) for name in SPLITS] == [55_000, 5_000, 10_000]
    whole = official(data_set)
    assert whole.labels is not None and torch.bincount(whole.labels).tolist() == per_class
    means, stds = mean_and_std(whole.images)
    assert means == pytest.approx([mean], abs=6e-5) and stds == pytest.approx([std], abs=6e-5)
    for images, labels, part in (
        (whole.images, whole.labels, "train"),
        (data_set.split("test").images, data_set.split("test").labels, "t10k"),
    ):
        raw = data_root / folder / "raw"
        x = np.frombuffer(gzip.decompress((raw / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
        y = np.frombuffer(gzip.decompress((raw / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
        assert labels is not None
        expected = Counter(zip((row.tobytes() for row in x.reshape(-1, 784)), y.tolist(), strict=True))
        got = Counter(zip((row.tobytes() for row in images.flatten(1).numpy()), labels.tolist(), strict=True))
        assert got == expected, "each image occurs once, with its label"


def test_mnist_reads_torchvision_layout_and_rejects_wrong_files(data_root: Path, tmp_path: Path, read: Read) -> None:
    raw = tmp_path / "tv" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (data_root / "mnist/MNIST/raw").glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert MNIST(tmp_path / "tv").hash("test") == read("mnist", data_root).hash("test")

    with pytest.raises(UserError, match="not the official file of data set 'fashion_mnist'"):
        FashionMNIST(raw).setup()
    labels = raw / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(UserError, match="train-labels-idx1-ubyte is not the official file"):
        MNIST(tmp_path / "tv").setup()


def test_error_names_the_damaged_gzip_file(tmp_path: Path, data_root: Path) -> None:
    for file in (data_root / "mnist/MNIST/raw").glob("*.gz"):
        (tmp_path / file.name).symlink_to(file)
    broken = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = broken.read_bytes()
    broken.unlink()
    invalid = content[:10] + b"\xff" * 50 + content[60:]  # not a valid deflate block
    for damage in (content[:1000], b"no gzip at all", content[:2000] + bytes(100) + content[2100:], invalid):
        broken.write_bytes(damage)
        with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is corrupted"):
            MNIST(tmp_path).setup()


def test_cifar10_matches_the_published_statistics(data_root: Path, read: Read) -> None:
    data_set = read("cifar10", data_root)
    assert [len(data_set.split(name)) for name in SPLITS] == [45_000, 5_000, 10_000]
    whole = official(data_set)
    assert whole.labels is not None and torch.bincount(whole.labels).tolist() == [5000] * 10
    means, stds = mean_and_std(whole.images)
    assert means == pytest.approx([0.49139968, 0.48215841, 0.44653091], abs=1e-8)
    assert stds == pytest.approx([0.24703223, 0.24348513, 0.26158784], abs=1e-8)
    # CIFAR-10 has no duplicate images, so the splits share none.
    assert len({f for name in SPLITS for f in fingerprints(data_set.split(name))}) == 60_000


def as_python2_pickle(images: np.ndarray, labels: list[int], names: list[str]) -> bytes:
    """Return a batch file as written by Python 2 in 2009 (protocol 2, byte strings), assembled by hand."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    content = images.tobytes()
    return b"".join(
        [
            b"\x80\x02}(",
            text("batch_label"), text("batch 1 of 1"),
            text("labels"), b"](", *(number(k) for k in labels), b"e",
            text("data"),
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t", text("b"), b"tR(K\x01(",
            *(number(k) for k in images.shape),
            b"tcnumpy\ndtype\n(", text("u1"), b"K\x00K\x01tR(K\x03", text("|"),
            b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + len(content).to_bytes(4, "little"), content,
            b"tb",
            text("filenames"), b"](", *(text(name) for name in names), b"eu.",
        ]
    )  # fmt: skip


def test_cifar10_python_release_gives_the_same_splits(data_root: Path, cache: Path, tmp_path: Path, read: Read) -> None:
    with zipfile.ZipFile(data_root / "cifar10.zip") as file:
        names = [name for name in file.namelist() if name.endswith(".png")]
    order = np.random.default_rng(1).permutation(len(names))
    # Pixels by file name, from the cache of decoded images, which is in the order of the names.
    rows = {name: k for k, name in enumerate(sorted(names))}
    data_set = read("cifar10", data_root)
    data_set.setup()
    stored = next(path for path in cache.glob("cifar10-*.npy"))
    pixels = np.load(stored, mmap_mode="r")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for split, files in {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}.items():
        mine = [names[k] for k in order if names[k].startswith(split)]
        for k, file in enumerate(files):
            part = mine[k * 10_000 : (k + 1) * 10_000]
            images = pixels[[rows[name] for name in part]].reshape(-1, 3072)
            labels = [CLASSES.index(name.split("/")[1]) for name in part]
            short = [name.split("/")[2] for name in part]
            if k == 0:
                (folder / file).write_bytes(as_python2_pickle(images, labels, short))
            else:  # as Python 3 writes it
                batch = {"labels": labels, "data": images, "filenames": short}
                (folder / file).write_bytes(pickle.dumps(batch, protocol=2 + k % 3))
    released = CIFAR10(tmp_path)
    for name in SPLITS:
        assert released.hash(name) == data_set.hash(name), name

    batch = folder / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match="data_batch_3 is not a CIFAR batch file"):
        CIFAR10(tmp_path).setup()


def test_cifar10_executes_no_code_from_a_pickle(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for k in range(1, 6):
        (folder / f"data_batch_{k}").write_bytes(pickle.dumps({"data": Evil(), "labels": [], "filenames": []}))
    (folder / "test_batch").write_bytes(b"")
    with pytest.raises(UserError, match=r"data_batch_1 is not a CIFAR batch file .it refers to \w+\.system"):
        CIFAR10(tmp_path).setup()
    assert not (tmp_path / "ran").exists()
    for k in range(1, 6):
        (folder / f"data_batch_{k}").write_bytes(pickle.dumps({"labels": [1], "filenames": ["a.png"]}))
    (folder / "test_batch").write_bytes((folder / "data_batch_1").read_bytes())
    with pytest.raises(UserError, match="does not contain CIFAR-10"):
        CIFAR10(tmp_path).setup()


def test_incomplete_cifar10_is_an_error(data_root: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(data_root / "cifar10.zip") as whole, zipfile.ZipFile(tmp_path / "cifar10.zip", "w") as part:
        for name in whole.namelist()[:40]:
            part.writestr(name, whole.read(name))
    with pytest.raises(
        UserError, match=r"'cifar10' in .* is incomplete: its train split has 0 images instead of 50,000"
    ):
        CIFAR10(tmp_path).setup()


def test_eurosat64_is_the_same_subset_from_every_archive(data_root: Path, tmp_path: Path, read: Read) -> None:
    data_set = read("eurosat64", data_root)
    assert [len(data_set.split(name)) for name in SPLITS] == [4500, 500, 500]
    for split, n in ((official(data_set), 500), (data_set.split("test"), 50)):
        assert split.labels is not None and torch.bincount(split.labels).tolist() == [n] * 10
    means, _ = mean_and_std(official(data_set).images)
    # The published means are of all 27,000 images, whose class balance differs slightly from the subset's.
    assert means == pytest.approx([0.3444, 0.3803, 0.4078], abs=0.02)

    # The official release has one folder per class and more files; the same subset is selected from it.
    release = tmp_path / "EuroSAT_RGB.zip"
    with zipfile.ZipFile(data_root / "eurosat64.zip") as whole, zipfile.ZipFile(release, "w") as other:
        for name in whole.namelist():
            if name.endswith(".jpg"):
                other.writestr("EuroSAT_RGB/" + name.split("/", 1)[1], whole.read(name))
        other.writestr("EuroSAT_RGB/Forest/Forest_2999.jpg", b"not in the subset, never read")
    assert EuroSAT64(tmp_path).hash("test") == data_set.hash("test")
    with zipfile.ZipFile(release) as whole, zipfile.ZipFile(tmp_path / "eurosat64.zip", "w") as other:
        for name in whole.namelist():
            if not name.endswith("River_17.jpg"):
                other.writestr(name, b"")
    with pytest.raises(UserError, match=r"1 of 5,500 images are missing, such as River_17\.jpg"):
        EuroSAT64(tmp_path / "eurosat64.zip").setup()


@pytest.mark.parametrize(
    ("option", "hashes"),
    [
        ("mnist", ["bd1d574d6878", "57c23f4278c5", "19cf84b8e8df"]),
        ("fashion_mnist", ["36e2b8047121", "485174d697ea", "1cbccb145d27"]),
        ("cifar10", ["09e912854e9b", "91ec16018cdc", "20e067b48928"]),
    ],
)
def test_split_hashes_are_unchanged(data_root: Path, read: Read, option: str, hashes: list[str]) -> None:
    """Results are compared by these hashes: changing them makes old and new records incomparable."""
    assert [read(option, data_root).hash(name)[:12] for name in SPLITS] == hashes


# Downloads, without a network


def test_failed_download_error_names_the_files_to_provide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError("urlopen error: no network\nand more"), RuntimeError("File not found or corrupted.")):

        def fail(name: str, root: Path, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(archives, "_download", fail)
        with pytest.raises(UserError, match=r"could not be downloaded .*put .* there") as caught:
            CIFAR10(tmp_path, download=True).setup()
        assert "\n" not in str(caught.value)


def test_download_happens_once(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded = []

    def deliver(name: str, root: Path) -> None:
        downloaded.append(name)
        (root / name).symlink_to(data_root / "fashion_mnist" / name)

    monkeypatch.setattr(archives, "_download", deliver)
    for _ in range(2):
        assert len(FashionMNIST(tmp_path, download=True).split("test")) == 10_000
    assert downloaded == ["FashionMNIST"]


def test_digits_are_those_of_scikit_learn() -> None:
    """The file is read directly; without it, scikit-learn reads it."""
    digits: Any = load_digits()
    expected = np.column_stack([digits.data, digits.target])
    np.testing.assert_array_equal(read_digits(), expected)
    with mock.patch("gencompare.data.digits.find_spec", return_value=None):
        np.testing.assert_array_equal(read_digits(), expected)
