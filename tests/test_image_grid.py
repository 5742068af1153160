"""Grids show each image at its position, pixel for pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gencompare.image_grid import BACKGROUND, GAP, grid, save_png, to_image


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_repeated_at_its_position(channels: int):
    images = np.random.default_rng(0).integers(0, 256, (5, channels, 4, 3), dtype=np.uint8)
    shown = np.asarray(grid(images, columns=2, scale=7)).reshape(3 * 30 + 2, 2 * 23 + 2, channels)
    assert GAP == 2
    for k, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]):
        for y in range(4):
            for x in range(3):
                block = shown[2 + row * 30 + 7 * y :, 2 + column * 23 + 7 * x :][:7, :7]
                assert (block == images[k, :, y, x]).all()
    assert (shown[62:90, 25:46] == BACKGROUND).all(), "the position of the missing sixth image is empty"


def test_small_images_are_enlarged_by_default():
    assert grid(np.zeros((10, 1, 8, 8), np.uint8)).size == (4 * 50 + 2, 3 * 50 + 2)
    assert grid(np.zeros((2, 3, 64, 64), np.uint8)).size == (2 * 66 + 2, 66 + 2)
    assert grid(np.zeros((2, 3, 64, 64), np.uint8), columns=8).size == (2 * 66 + 2, 66 + 2)


def test_points_are_dots_with_the_second_axis_upwards():
    points = np.array([[0, 0], [255, 10], [100, 255]], dtype=np.uint8)
    shown = np.asarray(grid(points[:, :, None, None]))
    dots = {(int(x) // 2, 255 - int(y) // 2) for y, x in np.argwhere(shown == 0)}
    assert shown.shape == (512, 512) and dots == {(0, 0), (255, 10), (100, 255)}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_single_image_is_unchanged(channels: int):
    image = np.random.default_rng(2).integers(0, 256, (channels, 5, 4), dtype=np.uint8)
    shown = np.asarray(to_image(image))
    assert shown.shape == ((5, 4) if channels == 1 else (5, 4, 3))
    assert (shown.reshape(5, 4, channels) == np.moveaxis(image, 0, -1)).all()


@pytest.mark.parametrize("shape, dtype", [((4, 2, 8, 8), "uint8"), ((4, 1, 8, 8), "float32"), ((0, 1, 8, 8), "uint8")])
def test_other_arrays_are_refused(shape: tuple[int, ...], dtype: str):
    with pytest.raises(ValueError, match="uint8 images"):
        grid(np.zeros(shape, dtype))


def test_a_png_keeps_the_pixels(tmp_path):
    image = grid(np.random.default_rng(1).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    save_png(image, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as read:
        assert np.array_equal(np.asarray(read), np.asarray(image))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
