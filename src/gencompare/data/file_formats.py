"""Readers of image files, of the IDX format (MNIST) and of the pickles of CIFAR. None runs code from a file."""

from __future__ import annotations

import gzip
import io
import logging
import math
import pickle
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gencompare.cache import cached_array
from gencompare.data.archives import Archive
from gencompare.errors import UserError

log = logging.getLogger(__name__)

RECIPE = "1"
"""Part of the cache's key: raise it when the same files come to be decoded into other pixels."""
FORMATS = ("PNG", "JPEG")
GREY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


def decode_cached(
    archive: Archive,
    names: Sequence[str],
    *,
    cache: Path | None,
    size: int | None = None,
    channels: int | None = None,
) -> Tensor:
    """The images called ``names``, (n, C, H, W) uint8, decoded once and from then on read from the folder ``cache``.

    The cache's key is the hash of names and contents, so changed files are decoded again.

    Args:
        size: height and width; the largest centred square of each image is brought to it. None takes images as they
            are, which must then all have one size.
        channels: 1 (grey) or 3 (RGB); None gives 1 where all files are grey, and 3 otherwise.
    """
    stem = re.sub(r"\W+", "_", archive.path.stem)[:40]
    key = f"{stem}-{size or 'asis'}x{channels or 'asis'}-{RECIPE}-{archive.fingerprint(names)[:32]}"
    return cached_array(cache, key, lambda: decode(archive, names, size=size, channels=channels))


def decode(archive: Archive, names: Sequence[str], *, size: int | None = None, channels: int | None = None) -> Tensor:
    """As `decode_cached`, without the cache."""
    log.info("Decoding %s images from %s", f"{len(names):,}", archive.path)
    images: np.ndarray | None = None
    for k, name in enumerate(names):
        pixels = _pixels(archive, name, size, channels)
        if images is None:
            images = np.empty((len(names), *pixels.shape), dtype=np.uint8)
        if pixels.shape[1:] != images.shape[2:]:
            raise UserError(
                f"{archive.path}: {name} has {_extent(pixels)} pixels, and {names[0]} has {_extent(images[0])}:"
                " set data.size=N to bring all images to one size."
            )
        if len(pixels) > images.shape[1]:  # the first image in colour after grey ones
            images = np.repeat(images, 3, axis=1)
        images[k] = pixels  # a grey image among coloured ones is the same in all three channels
    if images is None:
        raise UserError(f"{archive.path} holds no images.")
    return torch.from_numpy(images)


def _pixels(archive: Archive, name: str, size: int | None, channels: int | None) -> np.ndarray:
    """One image, (C, H, W) uint8."""
    try:
        with Image.open(io.BytesIO(archive.read(name)), formats=FORMATS) as image:
            mode = image.mode
            if mode not in GREY_MODES | COLOUR_MODES:
                raise UserError(
                    f"{archive.path}: {name} has pixels of the kind '{mode}', not 8 bits a channel: convert it."
                )
            pixels = np.asarray(_prepared(image, size, channels or (1 if mode in GREY_MODES else 3)))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise UserError(
            f"{archive.path}: {name} cannot be read as PNG or JPEG ({error}): mend it or move it out."
        ) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _prepared(image: Image.Image, size: int | None, channels: int) -> Image.Image:
    upright = ImageOps.exif_transpose(image)  # cameras store how they were held
    if (
        "A" in upright.mode or "transparency" in upright.info
    ):  # what lies under transparent pixels is arbitrary: lay them on white
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    image = upright.convert("L" if channels == 1 else "RGB")
    if size is None or image.size == (size, size):
        return image
    # Bicubic with a support that widens as the image shrinks: Pillow's resampling is antialiased, which is what Parmar
    # et al. 2022 ("On Aliased Resizing and Surprising Subtleties in GAN Evaluation") find to matter.
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _extent(pixels: np.ndarray) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"


UNSIGNED_BYTE = 8


def decompress(path: Path) -> bytes:
    """The bytes of an idx file, which may be packed by gzip (``.gz``)."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and fetch it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def parse_idx(content: bytes, path: Path) -> Tensor:
    """The array in the bytes of an idx file, uint8 in the shape that it states; ``path`` is named in errors."""
    dimensions = content[3] if content[:3] == bytes((0, 0, UNSIGNED_BYTE)) and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if not dimensions or len(content) < start:
        raise UserError(f"{path} is no idx file of bytes: fetch it again.")
    shape = [int.from_bytes(content[k : k + 4], "big") for k in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path} is damaged: it states {'x'.join(map(str, shape))} values and holds {len(content) - start}."
            " Remove it and fetch it again."
        )
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


class _Type:
    """``numpy.dtype("u1")``, recorded."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and fields: nothing that bytes need


class _Array:
    """``numpy.ndarray``: what fills it is (version, shape, dtype, column-major, content)."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Tensor:
        _, shape, kind, column_major, content = self.state
        content = content.encode("latin1") if isinstance(content, str) else content  # str: written by Python 2
        if not isinstance(kind, _Type) or kind.code not in ("u1", "|u1") or column_major:
            raise ValueError("its array is not one of bytes")
        if not content or len(content) != math.prod(shape):
            raise ValueError("its array is incomplete")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, _: str = "latin1") -> bytes:
    return text.encode("latin1")


ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return ADMITTED[module, name]


def read_batch(path: Path) -> dict[str, Any]:
    """The dictionary in a CIFAR batch file, arrays as uint8 tensors. Raises `UserError` for anything else."""
    try:
        with open(path, "rb") as file:
            batch = _Reader(file, encoding="latin1").load()
        if not isinstance(batch, dict):
            raise ValueError("it holds no dictionary")
        return {str(key): value.tensor() if isinstance(value, _Array) else value for key, value in batch.items()}
    except Exception as error:  # damaged pickles raise almost anything
        raise UserError(f"{path} is no CIFAR batch file ({error}): fetch it again.") from error
