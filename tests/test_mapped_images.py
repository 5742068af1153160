"""Images that do not fit in memory: the same batches, hashes and errors as in memory, and never all of them at once."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gencompare.data import file_formats, mapped_images
from gencompare.data.archives import open_archive
from gencompare.data.datamodule import SPLITS, ImageData, Split, TrainStream
from gencompare.data.image_folder import ImageFolder
from gencompare.data.mapped_images import MappedImages, blocks, concatenate
from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import IdentityExtractor
from gencompare.evaluation.reference import quantize_split, split_features
from gencompare.generative_model import DataSpec

NUM_FILES, SIDE = 60, 4
IMAGE_BYTES = 3 * SIDE * SIDE
SHARD = 7
"""Images in a shard: 60 = 8 * 7 + 4, so that shards are of unequal size."""


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Return greyscale and colour images, PNG and JPEG, in two classes; the first shards have no colour image."""
    random, found = np.random.default_rng(0), {}
    for k in range(NUM_FILES):
        pixels = random.integers(0, 256, (SIDE, SIDE, 3) if k > 40 and k % 3 else (SIDE, SIDE), dtype=np.uint8)
        buffer, kind = io.BytesIO(), ("PNG", "JPEG")[k % 2]
        Image.fromarray(pixels).save(buffer, kind)
        found[f"{'ab'[k // 30]}/{k:02}.{kind.lower()}"] = buffer.getvalue()
    return found


@pytest.fixture
def root(files: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "photos"


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the images too large for memory, in shards and blocks of a few images."""
    monkeypatch.setattr(file_formats, "MAX_IN_MEMORY_BYTES", NUM_FILES * IMAGE_BYTES - 1)
    monkeypatch.setattr(file_formats, "SHARD_BYTES", SHARD * IMAGE_BYTES)
    monkeypatch.setattr(mapped_images, "BLOCK_BYTES", 5 * IMAGE_BYTES)


def folder(root: Path, cache: Path | None = None, **options: object) -> ImageFolder:
    return ImageFolder(root, cache=cache, batch_size=8, random_flip=True, seed=3, **options)  # type: ignore[arg-type]


def stream(data: ImageData, steps: int, *, start: int = 0, rank: int = 0, world_size: int = 1) -> list[torch.Tensor]:
    batches = TrainStream(data, start_step=start, rank=rank, world_size=world_size, device=torch.device("cpu"))
    return [tensor for x, cond in islice(batches, steps) for tensor in (x, cond["label"])]


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*-of-*.npy"))


def test_indexing_is_that_of_a_tensor() -> None:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (n, c, 2, 3), dtype=np.uint8) for n, c in ((4, 1), (1, 3), (5, 3))]
    expected = torch.cat([torch.from_numpy(array).expand(-1, 3, -1, -1) for array in arrays])
    images = MappedImages(arrays)
    some = torch.tensor([9, 0, 4, 4, 3, 7, 1])
    for lazy, plain in (
        (images, expected),
        (images.select(some), expected[some]),
        (images.select(some).select(slice(1, 6)).select(torch.tensor([4, 0])), expected[some][1:6][[4, 0]]),
        (concatenate([images.select(some), images]), torch.cat([expected[some], expected])),
        (concatenate([expected, images.select(some)]), torch.cat([expected, expected[some]])),
    ):
        assert isinstance(lazy, MappedImages)
        assert (lazy.shape, len(lazy), lazy.nbytes, lazy.dtype) == (plain.shape, len(plain), plain.nbytes, plain.dtype)
        n = len(plain)
        mask = torch.arange(n) % 2 == 0
        for index in (
            0,
            -1,
            slice(None),
            slice(1, None, 2),
            slice(0, 0),
            mask,
            torch.randperm(n),
            torch.tensor([[0, 1]]),
        ):
            assert torch.equal(lazy[index], plain[index]), index
        assert torch.equal(lazy.to("cpu"), plain) and torch.equal(torch.cat(list(blocks(lazy))), plain)
        with pytest.raises(IndexError):
            lazy[torch.tensor([n])]


@pytest.mark.usefixtures("small_limits")
def test_batches_and_hashes_are_those_of_images_in_memory(root: Path, tmp_path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    for place in (root, tmp_path / "photos.zip"):
        options = {"train_subset_size": 31, "val_fraction": 0.2}
        resident, mapped = folder(place, **options), folder(place, tmp_path / "cache", **options)
        assert isinstance(resident.split("train").images, torch.Tensor)
        assert isinstance(mapped.split("train").images, MappedImages)
        assert mapped.spec == resident.spec and mapped.spec.shape == (3, SIDE, SIDE)
        for name in (*SPLITS, "train+val", "test+train"):
            assert mapped.hash(name) == resident.hash(name), name
        for options in ({}, {"start": 5}, {"rank": 1, "world_size": 2}):
            for x, y in zip(stream(mapped, 9, **options), stream(resident, 9, **options), strict=True):
                assert torch.equal(x, y)
        for name in ("train", "test"):
            for (x, a), (y, b) in zip(mapped.batches(name, 4), resident.batches(name, 4), strict=True):
                assert torch.equal(x, y) and torch.equal(a["label"], b["label"])
    assert len(shards(tmp_path / "cache")) == 2 * 9


@pytest.mark.usefixtures("small_limits")
def test_reference_features_are_those_of_images_in_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdentityExtractor, "cpu_batch_size", 8)
    for data in (folder(root), folder(root, tmp_path / "cache"), Repeated(16)):
        features = split_features(data, "train+val", IdentityExtractor(data.spec)).features
        images = data.split("train+val")[slice(None)].images
        assert torch.equal(features, quantize_split(images, data.spec).flatten(1).float())


@pytest.mark.usefixtures("small_limits")
def test_no_more_than_a_block_is_read_at_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, decoded = [], []
    index, decode = MappedImages.__getitem__, file_formats.decode

    def recorded(self: MappedImages, rows: int | slice | torch.Tensor) -> torch.Tensor:
        images = index(self, rows)
        read.append(images.numel())
        return images

    def recorded_decode(archive: object, names: list[str], **options: object) -> torch.Tensor:
        decoded.append(len(names))
        return decode(archive, names, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(MappedImages, "__getitem__", recorded)
    monkeypatch.setattr(file_formats, "decode", recorded_decode)
    monkeypatch.setattr(IdentityExtractor, "cpu_batch_size", 8)
    data = folder(root, tmp_path / "cache", val_fraction=0.05, test_fraction=0.05)
    data.setup()
    split_features(data, "train+val", IdentityExtractor(data.spec))
    data.hash("train")
    stream(data, 3)
    list(data.batches("train", 8))
    assert sum(decoded) == NUM_FILES and max(decoded) <= SHARD
    assert sum(read) > 4 * NUM_FILES * IMAGE_BYTES and max(read) <= 8 * IMAGE_BYTES, "a block has 5 images, a batch 8"


@pytest.mark.usefixtures("small_limits")
def test_an_interrupted_decoding_is_continued(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, cache, decoded = folder(root).hash("train"), tmp_path / "cache", list[str]()
    decode = file_formats._decode_file

    def interrupted(archive: object, name: str, *options: object) -> np.ndarray:
        decoded.append(name)
        if name.startswith("b/30"):
            raise KeyboardInterrupt
        return decode(archive, name, *options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(file_formats, "_decode_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder(root, cache).setup()
        assert len(shards(cache)) == 30 // SHARD, "the shards before the one of the 31st file are complete"
        patch.setattr(file_formats, "_decode_file", lambda *a: decoded.append(a[1]) or decode(*a))
        decoded.clear()
        assert folder(root, cache).hash("train") == expected
    first = "a/00.png"
    assert len([name for name in decoded if name != first]) == NUM_FILES - sum(
        np.load(path).shape[0] for path in shards(cache)[: 30 // SHARD]
    )


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_only_a_damaged_shard_is_decoded_again(
    damage: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, decode, decoded = tmp_path / "cache", file_formats.decode, list[int]()
    expected = folder(root, cache).hash("train")
    path = shards(cache)[3]
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:] if damage == "flip" else content[:-9])
    if damage == "missing":
        path.unlink()
    monkeypatch.setattr(file_formats, "decode", lambda *a, **k: decoded.append(len(a[1])) or decode(*a, **k))
    for _ in range(2):
        assert folder(root, cache).hash("train") == expected
    assert decoded == [len(np.load(path))] and path.read_bytes() == content
    assert (f"{path} is corrupted" in caplog.text) == (damage != "missing")


@pytest.mark.usefixtures("small_limits")
def test_errors_are_those_of_images_in_memory(root: Path, tmp_path: Path) -> None:
    def messages(cache: Path) -> Iterator[str]:
        for used in (None, cache):
            with pytest.raises(UserError) as error:
                folder(root, used).setup()
            yield str(error.value)

    Image.new("RGB", (7, 5)).save(root / "b" / "55.jpeg")
    one, two = messages(tmp_path / "one")
    assert one == two and "b/55.jpeg has 7x5 pixels, but a/00.png has 4x4" in one
    (root / "b" / "55.jpeg").write_bytes(b"no image")
    one, two = messages(tmp_path / "two")
    assert one == two and "b/55.jpeg cannot be read" in one
    Image.new("RGB", (4, 4)).save(root / "b" / "55.jpeg")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"Cannot write .*/file/cache: Not a directory"):
        folder(root, tmp_path / "file" / "cache").setup()


class Repeated(ImageData):
    """Images that are memory-mapped, with the first training images again in ``val``."""

    spec = DataSpec(name="repeated", shape=(1, 4, 4), num_bins=17)

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.pixels = np.random.default_rng(0).integers(0, largest + 1, (40, 1, 4, 4), dtype=np.uint8)
        self.pixels[39] = largest

    def load(self) -> dict[str, Split]:
        images = MappedImages([self.pixels[:30], self.pixels[30:]])
        train, test = images.select(torch.arange(5, 40)), images.select(slice(0, 5))
        return {"train": Split(train), "val": Split(train.select(torch.arange(34, 19, -1))), "test": Split(test)}


def test_splits_are_checked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_images, "BLOCK_BYTES", 64)
    with pytest.warns(UserWarning, match="'val' images are training images"):
        Repeated(16).setup()
    with pytest.raises(UserError, match=r"uint8, from 0 to 20, but must be uint8 from 0 to num_bins - 1 = 16"):
        Repeated(20).setup()


def test_threads_decode_the_same_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = open_archive(root)
    decoded = []
    for threads in (1, 5):
        monkeypatch.setattr(file_formats, "NUM_THREADS", threads)
        decoded.append(file_formats.decode(archive, archive.names, size=4))
    assert torch.equal(*decoded)
    for name in ("b/31.jpeg", "a/17.jpeg"):
        (root / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="a/17"):  # the first one, regardless of which thread is faster
        file_formats.decode(archive, archive.names)
