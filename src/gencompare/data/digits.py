"""The handwritten digits of scikit-learn: 1,797 images of 8x8 pixels with 17 grey levels; no download is needed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
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
        table = read_digits()
        images = torch.tensor(table[:, :-1], dtype=torch.uint8).reshape(-1, *self.spec.shape)
        labels = torch.tensor(table[:, -1], dtype=torch.int64)
        order = torch.randperm(len(images), generator=generator("cpu", "digits", "split"))
        shuffled = Split(images[order], labels[order])
        return {
            "train": shuffled[slice(TEST_SIZE + VAL_SIZE, None)],
            "val": shuffled[slice(TEST_SIZE, TEST_SIZE + VAL_SIZE)],
            "test": shuffled[slice(TEST_SIZE)],
        }


def read_digits() -> np.ndarray:
    """Return the pixels and the class of each image of `sklearn.datasets.load_digits`, (1797, 65).

    Its file is read directly, if it is where it was so far: importing scikit-learn takes longer than all the rest.
    """
    package = find_spec("sklearn")
    path = Path(str(package.origin if package else "")).parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return np.column_stack([digits.data, digits.target])
