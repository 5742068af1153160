"""Images from folders and zip files: layout, preprocessing, caching and error messages."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gencompare.cache import cached_array, cached_shards
from gencompare.data import file_formats
from gencompare.data.image_folder import ImageFolder, read_layout
from gencompare.errors import UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def png(pixels: np.ndarray | Image.Image, **how: object) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, "PNG", **how)
    return buffer.getvalue()


def noise(k: int, size: tuple[int, ...] = (6, 6, 3)) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, size, dtype=np.uint8)


def as_folder(files: Mapping[str, bytes], root: Path) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def as_zip(files: Mapping[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def one(content: bytes, root: Path, **options: object) -> torch.Tensor:
    """Return the pixels (C, H, W) that the data set gives for one image file."""
    data = ImageFolder(as_folder({f"{k}.png": content for k in range(3)}, root), **options)  # type: ignore[arg-type]
    return data.split("train").images[0]


# Layout


@pytest.mark.parametrize(
    ("names", "splits", "labels", "classes"),
    [
        (["a.png", "b.png"], None, None, ()),
        (["cats/1.png", "dogs/1.png", "cats/2.png"], None, [0, 1, 0], ("cats", "dogs")),
        (["pets/cats/1.png", "pets/dogs/1.png"], None, [0, 1], ("cats", "dogs")),
        (["all/1.png", "all/2.png"], None, None, ()),
        (["cats/deep/1.png", "dogs/1.png"], None, [0, 1], ("cats", "dogs")),
        (["train/1.png", "test/1.png"], ["train", "test"], None, ()),
        (
            ["train/b/1.png", "valid/a/1.png", "test/b/1.png"],
            ["train", "val", "test"],
            [1, 0, 1],
            ("a", "b"),
        ),
        (["set/train/b/1.png", "set/test/a/1.png"], ["train", "test"], [1, 0], ("a", "b")),
        (["train/1.png"], ["train"], None, ()),
        (["train/cats/1.png", "test/cats/1.png"], ["train", "test"], None, ()),
    ],
)
def test_layout_gives_splits_and_classes(
    names: list[str], splits: list[str] | None, labels: list[int] | None, classes: tuple[str, ...]
) -> None:
    layout = read_layout(names, Path("data.zip"))
    assert (layout.splits, layout.labels) == (splits, labels)
    assert (layout.classes if labels else ()) == classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/1.png", "cats/1.png"], "'train' next to 'cats'"),
        (["train/1.png", "loose.png"], r"'train' next to 'loose\.png'"),
        (["test/1.png", "val/1.png"], "no 'train'"),
        (["cats/1.png", "dogs/1.png", "loose.png"], r"loose\.png next to class folders such as 'cats'"),
        (["train/cats/1.png", "train/loose.png"], r"train/loose\.png next to class folders"),
    ],
)
def test_ambiguous_layouts_are_errors(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_layout(names, Path("data.zip"))


def numbered(n: int, name: str = "{k}.png") -> dict[str, bytes]:
    """Return n images, where all pixels of image k have the value k."""
    return {name.format(k=k): png(np.full((4, 4), k, np.uint8)) for k in range(n)}


def numbers(data: ImageFolder, split: str) -> list[int]:
    return data.split(split).images[:, 0, 0, 0].tolist()


def test_missing_splits_are_held_out_and_disjoint(tmp_path: Path) -> None:
    data = ImageFolder(as_folder(numbered(50), tmp_path / "flat"), val_fraction=0.2, test_fraction=0.1)
    parts = {name: numbers(data, name) for name in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 35, "val": 10, "test": 5}
    assert sorted(k for part in parts.values() for k in part) == list(range(50))
    assert data.spec.num_classes == 0 and data.split("train").labels is None
    assert data.spec.name == "image_folder_flat"

    files = {f"test/x/{k}.png": png(np.full((4, 4), k, np.uint8)) for k in range(100, 104)}
    files |= {f"train/{'xy'[k % 2]}/{k}.png": png(np.full((4, 4), k, np.uint8)) for k in range(50)}
    data = ImageFolder(as_zip(files, tmp_path / "some.zip"), val_fraction=0.2)
    assert sorted(numbers(data, "test")) == [100, 101, 102, 103], "split folders are used as they are"
    assert len(numbers(data, "val")) == 10
    assert sorted(numbers(data, "train") + numbers(data, "val")) == list(range(50))
    labels = data.split("train").labels
    assert labels is not None and labels.tolist() == [k % 2 for k in numbers(data, "train")]


def test_zip_and_folder_give_the_same_data(tmp_path: Path) -> None:
    files = {f"{'ab'[k % 2]}/{k}.png": png(noise(k)) for k in range(20)}
    packed = dict(reversed(files.items())) | {"__MACOSX/a/._1.png": b"junk", ".DS_Store": b"junk", "a/Thumbs.db": b""}
    one = ImageFolder(as_folder(files, tmp_path / "folder"))
    two = ImageFolder(as_zip(packed, tmp_path / "folder.zip"))
    assert one.spec == two.spec and one.spec.num_classes == 2
    for name in ("train", "val", "test"):
        assert one.hash(name) == two.hash(name)


def test_circular_symbolic_links_are_followed_once(tmp_path: Path) -> None:
    root = as_folder(numbered(10, "a/{k}.png"), tmp_path / "real")
    (root / "a" / "up").symlink_to(root)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "images").symlink_to(root / "a")
    assert len(ImageFolder(tmp_path / "linked").split("train")) == 8


# Preprocessing


def test_images_are_centre_cropped(tmp_path: Path) -> None:
    wide = np.empty((10, 30, 3), np.uint8)
    wide[:, :10], wide[:, 10:20], wide[:, 20:] = RED, GREEN, BLUE
    for name, pixels in (("wide", wide), ("tall", wide.transpose(1, 0, 2).copy())):
        got = one(png(pixels), tmp_path / name, image_size=10)
        assert got.shape == (3, 10, 10)
        assert (got == torch.tensor(GREEN, dtype=torch.uint8)[:, None, None]).all()
        inner = one(png(pixels), tmp_path / f"{name}-small", image_size=5)[:, 1:-1, 1:-1]
        assert (inner == torch.tensor(GREEN, dtype=torch.uint8)[:, None, None]).all()


def test_downsampling_is_antialiased(tmp_path: Path) -> None:
    # Without a filter, stripes above the Nyquist frequency of the small image alias; with one, only their mean remains.
    x, y = np.meshgrid(np.arange(96), np.arange(96))
    stripes = (255 * ((x + y) % 2)).astype(np.uint8)
    got = one(png(stripes), tmp_path / "stripes", image_size=7).double()
    assert (got - 127.5).abs().max() < 3
    # A linear ramp stays linear: pixel k of the small image is the mean of the pixels that it covers.
    ramp = np.tile(np.arange(0, 240, 2.5), (96, 1)).astype(np.uint8)
    got = one(png(ramp), tmp_path / "ramp", image_size=12).double()[0]
    expected = ramp.reshape(96, 12, 8).mean((0, 2))
    assert (got[:, 1:-1] - torch.tensor(expected)[1:-1]).abs().max() < 1


def test_images_of_the_requested_size_are_unchanged(tmp_path: Path) -> None:
    pixels = noise(1, (8, 8, 3))
    for k, options in enumerate(({}, {"image_size": 8})):
        assert torch.equal(one(png(pixels), tmp_path / str(k), **options), torch.tensor(pixels).permute(2, 0, 1))


def test_grey_and_colour_images_get_the_requested_channels(tmp_path: Path) -> None:
    grey, colour = noise(1, (4, 4)), np.full((4, 4, 3), RED, np.uint8)
    assert torch.equal(one(png(grey), tmp_path / "g"), torch.tensor(grey)[None])
    assert torch.equal(one(png(grey), tmp_path / "g3", channels=3), torch.tensor(grey).expand(3, 4, 4))
    # ITU-R 601 luma of pure red: 0.299 * 255.
    assert (one(png(colour), tmp_path / "c1", channels=1) == 76).all()
    files = {f"{k}.png": png(colour if k == 2 else np.full((4, 4), k, np.uint8)) for k in range(6)}
    data = ImageFolder(as_folder(files, tmp_path / "mixed"))
    assert data.spec.shape == (3, 4, 4), "one colour image makes the data set RGB"
    everything = torch.cat([data.split(name).images for name in ("train", "val", "test")])
    got = {tuple(image[:, 0, 0].tolist()) for image in everything}
    assert got == {(0, 0, 0), (1, 1, 1), RED, (3, 3, 3), (4, 4, 4), (5, 5, 5)}


def test_transparent_palette_and_bilevel_images(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (*BLUE, 255)
    got = one(png(clear), tmp_path / "rgba")
    assert (got[:, :2] == torch.tensor(BLUE, dtype=torch.uint8)[:, None, None]).all() and (got[:, 2:] == 255).all()
    palette = Image.fromarray(np.full((4, 4, 3), GREEN, np.uint8)).convert("P")
    assert one(png(palette), tmp_path / "p")[:, 0, 0].tolist() == list(GREEN)
    keyed = one(png(np.full((4, 4), 9, np.uint8), transparency=9), tmp_path / "key")
    assert keyed.shape == (1, 4, 4) and (keyed == 255).all()
    two_levels = Image.fromarray(255 * (np.arange(16).reshape(4, 4) % 2).astype(np.uint8)).convert("1")
    assert one(png(two_levels), tmp_path / "1")[0, 0].tolist() == [0, 255, 0, 255]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(np.concatenate([np.full((4, 4, 3), RED, np.uint8), np.full((4, 4, 3), BLUE, np.uint8)]))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise, which moves the bottom to the left
    got = one(png(image, exif=exif), tmp_path / "turned")
    assert got.shape == (3, 4, 8)
    assert got[:, 0, 0].tolist() == list(BLUE) and got[:, 0, -1].tolist() == list(RED)


# The cache


def test_images_are_decoded_again_only_if_files_or_options_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    real = file_formats.decode
    monkeypatch.setattr(file_formats, "decode", lambda *a, **k: decoded.append(1) or real(*a, **k))
    root, cache = as_folder(numbered(9), tmp_path / "flat"), tmp_path / "cache"

    def read(**options: object) -> list[int]:
        data = ImageFolder(root, cache=cache, **options)  # type: ignore[arg-type]
        return sorted(k for name in ("train", "val", "test") for k in numbers(data, name))

    assert read() == read() == list(range(9)) and len(decoded) == 1
    old = (root / "3.png").stat()
    (root / "3.png").write_bytes(png(np.full((4, 4), 77, np.uint8)))
    os.utime(root / "3.png", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert old.st_size == (root / "3.png").stat().st_size, (
        "size and modification time are equal, and only the content differs"
    )
    assert read() == [0, 1, 2, 4, 5, 6, 7, 8, 77] and len(decoded) == 2
    (root / "3.png").rename(root / "zzz.png")
    read()
    assert len(decoded) == 3
    for options in ({"image_size": 2}, {"channels": 3}):
        read(**options)
    assert len(decoded) == 5
    packed = as_zip(numbered(9), tmp_path / "flat.zip")
    root = packed
    read()
    read()
    assert len(decoded) == 6
    as_zip(numbered(9) | {"3.png": png(np.full((4, 4), 77, np.uint8))}, packed)
    assert 77 in read() and len(decoded) == 7


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty", "other"])
def test_damaged_cache_file_is_computed_again(damage: str, tmp_path: Path) -> None:
    computed = []

    def compute() -> torch.Tensor:
        computed.append(1)
        return torch.arange(3000, dtype=torch.int16).to(torch.uint8).reshape(30, 1, 10, 10)

    expected = compute()
    for _ in range(2):
        assert torch.equal(cached_array(tmp_path, "x", compute), expected)
    assert len(computed) == 2
    file = tmp_path / "x.npy"
    content = file.read_bytes()
    file.write_bytes(
        {
            "flip": content[:1500] + bytes([content[1500] ^ 4]) + content[1501:],
            "cut": content[:-700],
            "grow": content + b"more",
            "empty": b"",
            "other": b"not what was written here at all" * 9,
        }[damage]
    )
    assert torch.equal(cached_array(tmp_path, "x", compute), expected) and len(computed) == 3
    assert file.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in (".npy", ".lock")] == []


def test_unwritable_cache_folder_only_logs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        got = cached_array(tmp_path / "file" / "cache", "x", lambda: torch.ones(3))
    assert got.tolist() == [1, 1, 1]
    assert "set paths.cache=DIR" in caplog.text
    assert cached_array(None, "x", lambda: torch.ones(3)).tolist() == [1, 1, 1]


def test_errors_of_the_computation_pass_through_the_cache(tmp_path: Path) -> None:
    attempts = []

    def compute() -> torch.Tensor:
        attempts.append(1)
        raise UserError("the images are invalid")

    with pytest.raises(UserError, match="are invalid"):
        cached_array(tmp_path, "x", compute)
    assert len(attempts) == 1, "there is no second attempt"
    assert cached_array(tmp_path, "x", lambda: torch.zeros(2)).tolist() == [0, 0], "nothing was stored"


def _load_or_compute(folder: Path, results: multiprocessing.Queue, sharded: bool) -> None:
    def compute() -> torch.Tensor:
        with open(folder / "computed", "a") as file:
            file.write("x")
        time.sleep(0.3)
        return torch.arange(5)

    stored = cached_shards(folder, "x", [compute])[0] if sharded else cached_array(folder, "x", compute)
    results.put(stored.tolist())


@pytest.mark.parametrize("sharded", [False, True], ids=["in memory", "in shards"])
def test_concurrent_processes_compute_an_array_once(sharded: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_load_or_compute, args=(tmp_path, results, sharded)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [[0, 1, 2, 3, 4]] * 3
    for process in processes:
        process.join()
    assert (tmp_path / "computed").read_text() == "x"


# Invalid input


def error_message(root: Path, **options: object) -> str:
    """Return the error message, which must be a single line."""
    with pytest.raises(UserError) as error:
        ImageFolder(root, **options).setup()  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def sixteen_bit_png() -> bytes:
    return png(Image.fromarray(np.full((4, 4), 40_000, np.uint16)))


def decompression_bomb() -> bytes:
    """Return a PNG whose header states 100,000 x 100,000 pixels."""
    header = struct.pack(">II5B", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.png", b"no image", "bad.png cannot be read"),
        ("empty.png", b"", "empty.png cannot be read"),
        ("cut.png", png(noise(9, (64, 64, 3)))[:5000], "cut.png cannot be read"),
        ("notes.txt", b"text", "notes.txt, which is neither PNG nor JPEG"),
        ("deep.png", sixteen_bit_png(), "deep.png has pixel format"),
        ("bomb.png", decompression_bomb(), "bomb.png cannot be read"),
        ("other.png", png(noise(1, (5, 7, 3))), "other.png has 7x5 pixels, but 0.png has 6x6: set data.image_size=N"),
    ],
)
def test_error_names_the_invalid_file(tmp_path: Path, packed: bool, name: str, content: bytes, message: str) -> None:
    files = {f"{k}.png": png(noise(k)) for k in range(10)} | {name: content}
    root = as_zip(files, tmp_path / "x.zip") if packed else as_folder(files, tmp_path / "x")
    text = error_message(root, cache=tmp_path / "cache")
    assert message in text and str(root) in text
    assert not list((tmp_path / "cache").glob("*.npy")), "nothing is stored after an error"


def test_invalid_archives_are_errors(tmp_path: Path) -> None:
    files = numbered(9)
    assert "no folder or zip file" in error_message(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "contains no images" in error_message(tmp_path / "empty")
    assert "contains no images" in error_message(as_zip({}, tmp_path / "empty.zip"))
    for name in ("../out.png", "/abs.png", "a/../../b.png", "C:/x.png", "..\\x.png"):
        text = error_message(as_zip({**files, name: files["0.png"]}, tmp_path / "escapes.zip"))
        assert "points outside the archive" in text and name in text
    whole = as_zip(files, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-200])
    assert "cannot be read as a zip file" in error_message(tmp_path / "cut.zip")
    (tmp_path / "flipped.zip").write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    assert "0.png cannot be read" in error_message(tmp_path / "flipped.zip")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.zip", "w") as file:
        for _ in range(2):
            file.writestr("0.png", files["0.png"])
    assert "'0.png' twice" in error_message(tmp_path / "twice.zip")
    assert "too few" in error_message(as_folder(numbered(2), tmp_path / "two"))


def test_invalid_options_are_errors() -> None:
    for options, message in (
        ({"image_size": 0}, r"data\.image_size=0"),
        ({"channels": 2}, r"data\.channels=2"),
        ({"val_fraction": 0.0}, r"data\.val_fraction=0\.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"data\.test_fraction=0\.5"),
        ({"batch_size": 0}, "at least 1"),
        ({"train_subset_size": 0}, r"data\.train_subset_size=0"),
    ):
        with pytest.raises(UserError, match=message):
            ImageFolder("anywhere", **options)  # type: ignore[arg-type]
