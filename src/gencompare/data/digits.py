"""Handwritten digits that ship with scikit-learn: 1,797 images of 8x8 with 17 grey levels, no download."""

from __future__ import annotations

import torch

from gencompare.data.datamodule import ImageData, Split
from gencompare.generative_model import DataSpec
from gencompare.rng import generator

TEST, VAL = 500, 150


class Digits(ImageData):
    """The digits of the UCI "Optical Recognition of Handwritten Digits" set, as scikit-learn ships its test part.

    1,147 training, 150 validation and 500 test images, parted by one fixed permutation.
    """

    spec = DataSpec(name="digits", shape=(1, 8, 8), num_classes=10, num_levels=17)

    def load(self) -> dict[str, Split]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.tensor(bunch.images, dtype=torch.uint8)[:, None]  # type: ignore[attr-defined]
        labels = torch.tensor(bunch.target, dtype=torch.int64)  # type: ignore[attr-defined]
        order = torch.randperm(len(images), generator=generator("cpu", "digits", "split"))
        whole = Split(images[order], labels[order])
        test, val, train = whole[slice(TEST)], whole[slice(TEST, TEST + VAL)], whole[slice(TEST + VAL, None)]
        return {"train": train, "val": val, "test": test}
