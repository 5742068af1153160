"""Readers for image files, the IDX format (MNIST) and CIFAR's pickled batches. They never execute code from a file."""

from __future__ import annotations

import gzip
import io
import logging
import math
import os
import pickle
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gencompare.cache import cached_array, cached_shards
from gencompare.data.archives import Archive
from gencompare.data.mapped_images import MappedImages
from gencompare.errors import UserError
from gencompare.safe_files import MAX_RATIO, SMALL, check_claim

log = logging.getLogger(__name__)

DECODER_VERSION = "1"
"""Part of the cache key. Increment it when a change here decodes the same files to different pixels."""
FORMATS = ("PNG", "JPEG")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
MAX_PIXELS = 1 << 26
"""Size limit of an image (67 million pixels, as 8192x8192), which is checked before it is decoded."""
MAX_IN_MEMORY_BYTES = 2 << 30
"""Decoded images of more than this size (2 GiB, as three channels) are memory-mapped instead of kept in memory."""
SHARD_BYTES, MAX_SHARDS = 1 << 27, 512
"""Size of the files of memory-mapped images (128 MiB), unless that makes too many of them to keep open."""
NUM_THREADS, FILES_PER_TASK = min(8, os.cpu_count() or 1), 16
"""Threads that decode files, and files that each decodes at a time. Pillow decodes and resizes in parallel."""
GREY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}

# PNG and JPEG


def decode_cached(
    archive: Archive,
    names: Sequence[str],
    *,
    cache: Path | None,
    size: int | None = None,
    channels: int | None = None,
) -> Tensor:
    """Decode image files to (n, C, H, W) uint8, or read the result of an earlier call from the folder ``cache``.

    The cache key contains a hash of names and contents, so changed files are decoded again.

    Args:
        archive: folder or zip file that contains the images.
        names: file names in ``archive``.
        cache: folder for the decoded images; None disables caching.
        size: resize the largest centred square of each image to this height and width. None keeps the images as they
            are; they must then all have the same size.
        channels: 1 (greyscale) or 3 (RGB); None gives 1 if all files are greyscale, otherwise 3.
    """
    key = _cache_key(archive, names, size, channels)
    return cached_array(cache, key, lambda: decode(archive, names, size=size, channels=channels))


def decode_or_map(
    archive: Archive,
    names: Sequence[str],
    *,
    cache: Path | None,
    size: int | None = None,
    channels: int | None = None,
) -> Tensor | MappedImages:
    """Decode image files like `decode_cached`, but memory-map them if they take more than `MAX_IN_MEMORY_BYTES`.

    They are then decoded in parts, one of which at a time is in memory; an interrupted call is continued by the next
    one. If ``cache`` is None, the images are kept in memory regardless of their size.

    Raises:
        UserError: a file cannot be decoded, or ``cache`` is not writable or full.
    """
    with _no_size_warning():
        image_bytes = (channels or 3) * _decode_file(archive, names[0], size, channels)[0].nbytes
    if cache is None or len(names) * image_bytes <= MAX_IN_MEMORY_BYTES:
        return decode_cached(archive, names, cache=cache, size=size, channels=channels)
    num_shards = min(-(-len(names) * image_bytes // SHARD_BYTES), MAX_SHARDS, len(names))
    ends = [len(names) * k // num_shards for k in range(num_shards + 1)]
    compute = [
        partial(decode, archive, names[start:end], size=size, channels=channels, like=names[0])
        for start, end in pairwise(ends)
    ]
    return MappedImages(cached_shards(cache, _cache_key(archive, names, size, channels), compute))


def _cache_key(archive: Archive, names: Sequence[str], size: int | None, channels: int | None) -> str:
    stem = re.sub(r"\W+", "_", archive.path.stem)[:40]
    fingerprint = archive.fingerprint(names)[:32]
    return f"{stem}-{size or 'asis'}x{channels or 'asis'}-{DECODER_VERSION}-{fingerprint}"


def decode(
    archive: Archive,
    names: Sequence[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    like: str | None = None,
) -> Tensor:
    """Decode image files like `decode_cached`, but without a cache.

    All must have the height and width of the file ``like``, which defaults to the first.
    """
    if not names:
        raise UserError(f"{archive.path} contains no images.")
    log.info("Decoding %s images from %s", f"{len(names):,}", archive.path)
    like = like or names[0]

    def decode_files(part: Sequence[str]) -> list[np.ndarray]:
        decoded = [_decode_file(archive, name, size, channels) for name in part]
        for name, pixels in zip(part, decoded, strict=True):
            if pixels.shape[1:] != first.shape[1:]:
                raise UserError(
                    f"{archive.path}: {name} has {_resolution(pixels)} pixels, but {like} has {_resolution(first)}:"
                    " set data.image_size=N to resize all images."
                )
        return decoded

    parts = [names[k : k + FILES_PER_TASK] for k in range(0, len(names), FILES_PER_TASK)]
    with _no_size_warning(), ThreadPoolExecutor(NUM_THREADS) as pool:
        first = _decode_file(archive, like, size, channels)
        images: np.ndarray = np.empty((len(names), *first.shape), dtype=np.uint8)
        for k, pixels in enumerate(chain.from_iterable(pool.map(decode_files, parts))):
            if len(pixels) > images.shape[1]:  # the first colour image after greyscale ones
                images = np.repeat(images, 3, axis=1)
            images[k] = pixels  # broadcasts a greyscale image to three channels
    return torch.from_numpy(images)


@contextmanager
def _no_size_warning() -> Iterator[None]:
    """Ignore Pillow's warning of large images, whose size `_decode_file` checks. Filters are shared by all threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _decode_file(archive: Archive, name: str, size: int | None, channels: int | None) -> np.ndarray:
    """Decode one image to (C, H, W) uint8."""
    try:
        with Image.open(io.BytesIO(archive.read(name)), formats=FORMATS) as image:
            mode = image.mode
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{archive.path}: {name} claims {image.width}x{image.height} pixels, more than {MAX_PIXELS >> 20}"
                    " million: make it smaller or remove it."
                )
            if mode not in GREY_MODES | COLOUR_MODES:
                raise UserError(
                    f"{archive.path}: {name} has pixel format '{mode}' instead of 8 bits per channel: convert it."
                )
            pixels = np.asarray(_convert(image, size, channels or (1 if mode in GREY_MODES else 3)))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise almost any exception on corrupted files
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise UserError(
            f"{archive.path}: {name} cannot be read as PNG or JPEG{reason}: replace or remove it."
        ) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _convert(image: Image.Image, size: int | None, channels: int) -> Image.Image:
    """Apply the EXIF orientation, flatten transparency onto white, convert to greyscale or RGB, crop and resize."""
    upright = ImageOps.exif_transpose(image)
    if "A" in upright.mode or "transparency" in upright.info:  # colours of transparent pixels are arbitrary
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = upright.convert("L" if channels == 1 else "RGB")
    if size is None or image.size == (size, size):
        return image
    # Pillow's bicubic filter widens its support when it shrinks an image, so it is antialiased; this matters for FID
    # (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _resolution(pixels: np.ndarray) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"


# IDX

UINT8_CODE = 8


def decompress(path: Path) -> bytes:
    """Read a file, and decompress it if its name ends in ``.gz``."""
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        stored = path.stat().st_size
        limit = max(SMALL, MAX_RATIO * stored)
        with gzip.open(path) as file:
            content = file.read(limit + 1)
        check_claim(path, len(content), stored)
        return content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is corrupted ({error}): remove it and download it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def parse_idx(content: bytes, path: Path) -> Tensor:
    """Parse an IDX file of bytes into a uint8 tensor of the shape in its header. ``path`` is used in error messages."""
    dimensions = content[3] if content[:3] == bytes((0, 0, UINT8_CODE)) and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if not dimensions or len(content) < start:
        raise UserError(f"{path} is not an IDX file of bytes: download it again.")
    shape = [int.from_bytes(content[k : k + 4], "big") for k in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path} is corrupted: its header says {'x'.join(map(str, shape))} values, but it contains"
            f" {len(content) - start}. Remove it and download it again."
        )
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


# Pickled batches of CIFAR


class _DtypeStub:
    """Replaces ``numpy.dtype`` while unpickling and records its code, such as ``u1``."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and fields, irrelevant for bytes


class _ArrayStub:
    """Replaces ``numpy.ndarray`` while unpickling and records its state: (version, shape, dtype, is_fortran, data)."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Tensor:
        _, shape, dtype, is_fortran, data = self.state
        data = data.encode("latin1") if isinstance(data, str) else data  # str if written by Python 2
        if not isinstance(dtype, _DtypeStub) or dtype.code not in ("u1", "|u1") or is_fortran:
            raise ValueError("its array is not a C-ordered array of bytes")
        if not data or len(data) != math.prod(shape):
            raise ValueError("its array is incomplete")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape)


def _reconstruct(*_: Any) -> _ArrayStub:
    return _ArrayStub()


def _encode(text: str, _: str = "latin1") -> bytes:
    return text.encode("latin1")


ALLOWED_GLOBALS = {
    ("numpy", "ndarray"): _ArrayStub,
    ("numpy", "dtype"): _DtypeStub,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file needs")
        return ALLOWED_GLOBALS[module, name]


def read_cifar_batch(path: Path) -> dict[str, Any]:
    """Read the dictionary in a CIFAR batch file, with arrays as uint8 tensors. Raise `UserError` for any other file."""
    try:
        with open(path, "rb") as file:
            batch = _RestrictedUnpickler(file, encoding="latin1").load()
        if not isinstance(batch, dict):
            raise ValueError("it does not contain a dictionary")
        return {str(key): value.tensor() if isinstance(value, _ArrayStub) else value for key, value in batch.items()}
    except Exception as error:  # corrupted pickles raise almost any exception
        raise UserError(f"{path} is not a CIFAR batch file ({error}): download it again.") from error
