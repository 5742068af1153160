"""The handwritten digits of scikit-learn: 1,797 images of 8x8 pixels with 17 grey levels; no download is needed."""

from __future__ import annotations

import torch

from gencompare.data.datamodule import ImageData, Split
from gencompare.generative_model import DataSpec
from gencompare.rng import generator

TEST_SIZE, VAL_SIZE = 500, 150


class Digits(ImageData):
    """The test part of the UCI "Optical Recognition of Handwritten Digits" set, as included in scikit-learn.

    A fixed permutation splits it into 1,147 training, 150 validation and 500 test images.
    """

    spec = DataSpec(name="digits", shape=(1, 8, 8), num_classes=10, num_bins=17)

    def load(self) -> dict[str, Split]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.tensor(bunch.images, dtype=torch.uint8)[:, None]  # type: ignore[attr-defined]
        labels = torch.tensor(bunch.target, dtype=torch.int64)  # type: ignore[attr-defined]
        order = torch.randperm(len(images), generator=generator("cpu", "digits", "split"))
        shuffled = Split(images[order], labels[order])
        return {
            "train": shuffled[slice(TEST_SIZE + VAL_SIZE, None)],
            "val": shuffled[slice(TEST_SIZE, TEST_SIZE + VAL_SIZE)],
            "test": shuffled[slice(TEST_SIZE)],
        }
