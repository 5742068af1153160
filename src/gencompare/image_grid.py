"""Sample grids as PNG. No torch here: images arrive as uint8 arrays."""

from __future__ import annotations

import math
import os

import numpy as np
from PIL import Image

from gencompare.files import atomic

TILE = 48
"""Images are enlarged by the smallest whole factor that makes their longer side at least this many pixels."""
GAP = 2
BACKGROUND = 128
"""Mid-grey between tiles: the edge of a black image and of a white one both stay visible."""


def grid(images: np.ndarray, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Images side by side in rows, read left to right and top to bottom.

    Pixels are repeated, never smoothed: a smoothed 8x8 digit would show detail that no model drew.

    Points of the plane, which this suite keeps as images of two channels and one pixel, come out as `plane`.

    Args:
        images: (n, C, H, W) uint8 with C = 1 (grey) or 3 (RGB), n at least 1.
        columns: images a row; None makes the grid about square.
        scale: how many screen pixels an image pixel takes on each side; None as `TILE` says.

    Returns:
        An image of mode ``L`` or ``RGB``, ``rows (H scale + GAP) + GAP`` high and likewise wide.
    """
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == (2, 1, 1):
        return plane(images[:, :, 0, 0])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise ValueError(f"a grid needs uint8 images (n, 1 or 3, H, W), not {images.dtype} {images.shape}")
    n, channels, height, width = images.shape
    a_row = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / a_row)
    times = scale or math.ceil(TILE / max(height, width))
    tall, wide = height * times + GAP, width * times + GAP
    canvas = np.full((rows * tall + GAP, a_row * wide + GAP, channels), BACKGROUND, dtype=np.uint8)
    for k, image in enumerate(images.transpose(0, 2, 3, 1)):
        top, left = GAP + (k // a_row) * tall, GAP + (k % a_row) * wide
        tile = image.repeat(times, axis=0).repeat(times, axis=1)
        canvas[top : top + height * times, left : left + width * times] = tile
    return to_image(canvas.transpose(2, 0, 1))


def to_image(image: np.ndarray) -> Image.Image:
    """One uint8 image (C, H, W), C = 1 or 3, as it is."""
    return Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0))


def plane(points: np.ndarray) -> Image.Image:
    """Points (n, 2) uint8 as dark dots on white, 512 pixels a side; the first axis runs right and the second up."""
    canvas = np.full((256, 256), 255, dtype=np.uint8)
    canvas[255 - points[:, 1].astype(int), points[:, 0]] = 0
    return Image.fromarray(canvas.repeat(2, axis=0).repeat(2, axis=1))


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write ``image`` as PNG, whole or not at all."""
    with atomic(path) as file:
        image.save(file, format="PNG")
