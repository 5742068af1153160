"""Data sets drawn from distributions whose probabilities and entropy are known exactly."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from gencompare.data.datamodule import SPLITS, ImageData, Split
from gencompare.data.exact_distributions import (
    AutoregressiveNetwork,
    ExactDistribution,
    Ising,
    LowRankGaussianMixture,
    MonteCarlo,
)
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.rng import generator

SIDES = (8, 16, 32)


class ExactData(ImageData):
    """Images sampled with fixed seeds from an `ExactDistribution`; the labels are its mixture components.

    Args:
        side: height and width of the images.
        num_images: number of images in each split.
        common: arguments of `ImageData`.
    """

    kind: str
    """The last part of the option's name."""

    def __init__(self, *, side: int = 8, num_images: int = 10_000, **common: Any) -> None:
        super().__init__(**common)
        if side not in SIDES:
            raise UserError(f"data.side={side} must be one of {', '.join(map(str, SIDES))}.")
        if num_images < 1:
            raise UserError(f"data.num_images={num_images} must be at least 1.")
        self.num_images = num_images
        self.distribution = self.build(side)
        self.spec = DataSpec(
            name=f"exact_{self.kind}_{side}",
            shape=(1, side, side),
            num_classes=self.distribution.num_components,
            num_bins=self.distribution.num_bins,
        )

    @abstractmethod
    def build(self, side: int) -> ExactDistribution:
        """Create the distribution of images of ``side`` x ``side`` pixels."""

    def load(self) -> dict[str, Split]:
        splits = {}
        for split in SPLITS:
            x, labels = self.distribution.sample(self.num_images, generator("cpu", self.spec.name, split))
            splits[split] = Split(self.distribution.images(x), labels)
        return splits

    def log_prob(self, images: Tensor) -> Tensor:
        """Compute the log probability in nats, (n,), of images of a split, (n, 1, side, side) uint8."""
        return self.distribution.log_prob(images.flatten(1).double())

    @cached_property
    def bits_per_dim(self) -> MonteCarlo:
        r"""The entropy in bits per pixel, below which no model can get in expectation. The difference to a model's
        bits/dim, times :math:`d \log 2`, is :math:`\mathrm{KL}(\text{data} \,\|\, \text{model})` in nats."""
        entropy = self.distribution.entropy()
        scale = 1 / (self.spec.num_values * math.log(2))
        return replace(entropy, value=scale * entropy.value, standard_error=scale * entropy.standard_error)


class ExactMixture(ExactData):
    """Ten Gaussians of low rank, fitted to the classes of scikit-learn's digits (`LowRankGaussianMixture`)."""

    kind = "mixture"

    def build(self, side: int) -> LowRankGaussianMixture:
        return LowRankGaussianMixture.of_digits(side)


class ExactIsing(ExactData):
    """Black and white images from the Ising model (`Ising`), of 8 or 16 pixels."""

    kind = "ising"

    def build(self, side: int) -> Ising:
        return Ising(side)


class ExactAutoregressive(ExactData):
    """Images of four grey levels from a causal network with fixed random weights (`AutoregressiveNetwork`)."""

    kind = "autoregressive"

    def build(self, side: int) -> AutoregressiveNetwork:
        return AutoregressiveNetwork(side)
