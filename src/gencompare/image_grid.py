"""Grids of uint8 images as PNG files. This module does not import torch."""

from __future__ import annotations

import math
import os

import numpy as np
from PIL import Image

from gencompare.files import atomic_write

MIN_TILE = 48
"""By default, images are enlarged by the smallest integer factor that makes their longer side at least this many pixels
long."""
GAP = 2
BACKGROUND = 128
"""Mid-grey between images, so that the edges of black and white images are visible."""


def grid(images: np.ndarray, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Arrange images in a grid, in row-major order.

    Images are enlarged by repeating pixels, because interpolation would show detail that no model generated. Points in
    the plane (two-channel images of one pixel) are drawn by `scatter`.

    Args:
        images: (n, C, H, W) uint8 with C = 1 (greyscale) or 3 (RGB), n at least 1.
        columns: images per row; None makes the grid approximately square.
        scale: integer enlargement factor; None chooses it according to `MIN_TILE`.

    Returns:
        An image of mode ``L`` or ``RGB``, ``rows (H scale + GAP) + GAP`` high and ``columns (W scale + GAP) + GAP``
        wide.
    """
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == (2, 1, 1):
        return scatter(images[:, :, 0, 0])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise ValueError(f"a grid needs uint8 images (n, 1 or 3, H, W), not {images.dtype} {images.shape}")
    n, channels, height, width = images.shape
    per_row = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / per_row)
    factor = scale or math.ceil(MIN_TILE / max(height, width))
    row_height, column_width = height * factor + GAP, width * factor + GAP
    canvas = np.full((rows * row_height + GAP, per_row * column_width + GAP, channels), BACKGROUND, dtype=np.uint8)
    for k, image in enumerate(images.transpose(0, 2, 3, 1)):
        top, left = GAP + (k // per_row) * row_height, GAP + (k % per_row) * column_width
        tile = image.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + height * factor, left : left + width * factor] = tile
    return to_image(canvas.transpose(2, 0, 1))


def to_image(image: np.ndarray) -> Image.Image:
    """Convert a uint8 image (C, H, W), with C = 1 or 3, to a PIL image."""
    return Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0))


def scatter(points: np.ndarray) -> Image.Image:
    """Draw points (n, 2) uint8 as black dots on 512 x 512 white pixels. The first axis points right, the second up."""
    canvas = np.full((256, 256), 255, dtype=np.uint8)
    canvas[255 - points[:, 1].astype(int), points[:, 0]] = 0
    return Image.fromarray(canvas.repeat(2, axis=0).repeat(2, axis=1))


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write ``image`` as a PNG file atomically."""
    with atomic_write(path) as file:
        image.save(file, format="PNG")
