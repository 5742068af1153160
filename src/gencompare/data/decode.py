"""PNG and JPEG files to one uint8 tensor."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gencompare.cache import cached
from gencompare.data.archive import Archive
from gencompare.errors import UserError

log = logging.getLogger(__name__)

RECIPE = "1"
"""Part of the cache's key: raise it when the same files come to be decoded into other pixels."""
FORMATS = ("PNG", "JPEG")
GREY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


def decoded(
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
    return cached(cache, key, lambda: decode(archive, names, size=size, channels=channels))


def decode(archive: Archive, names: Sequence[str], *, size: int | None = None, channels: int | None = None) -> Tensor:
    """As `decoded`, without the cache."""
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
