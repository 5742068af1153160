"""An image classifier: the recipe of the compact feature extractors, trained by the same trainer as every model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.contract import Cond, DataSpec, TrainedModel
from gencompare.errors import UserError
from gencompare.seeds import Draws

NOISE = 0.5
"""Largest standard deviation of the noise that images are flawed with, in units of [-1, 1]."""
FLAWED = 0.25
"""Share of training images that are flawed by noise, and (independently) of those that are blurred."""


class Classifier(TrainedModel):
    """Names the class of an image, and grades its flaws.

    A network that is trained for classes alone learns to look past noise and blur: a Frechet distance on its features
    rates noisy digits as good as real ones. So a quarter of the training images get a known amount of noise, and a
    quarter a known amount of blur, and the same features must tell how much:

        loss = cross-entropy + ``grading`` * mean squared error of the grades

    Training images are also shifted at random. Held-out images are left as they are.

    Args:
        spec: of the data; it must have labels.
        network: ``(channels, num_classes) -> nn.Module`` with ``features``, ``classify`` and ``grade``.
        shift: largest random shift in pixels, each way; 0 for none.
        grading: weight of the grades.
        common: see `TrainedModel`.
    """

    def __init__(
        self,
        spec: DataSpec,
        network: Callable[..., nn.Module],
        *,
        shift: int = 0,
        grading: float = 15.0,
        **common: Any,
    ) -> None:
        if not spec.num_classes:
            raise UserError(f"model=classifier needs labels, and data '{spec.name}' has none.")
        super().__init__(spec, **common)
        self.net: Any = network(channels=spec.shape[0], num_classes=spec.num_classes)
        self.shift, self.grading = shift, grading

    def losses(self, x: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        label, flaws = cond["label"], x.new_zeros(len(x), 2)
        if self.training:
            x = shifted(x, self.shift, draws) if self.shift else x
            x, flaws = flawed(x, draws)
        features = self.net.features(x)
        logits = self.net.classify(features)
        cross_entropy = F.cross_entropy(logits, label, reduction="none")
        grade_error = (self.net.grade(features) - flaws).square().mean(1)
        return {
            "loss": cross_entropy + self.grading * grade_error,
            "cross_entropy": cross_entropy,
            "grade_error": grade_error,
            "accuracy": (logits.argmax(1) == label).float(),
        }

    def used(self, cond: Cond | None) -> Cond:
        """Labels are what a classifier learns from, whether or not anything is steered by them."""
        return cond or {}

    def features(self, x: Tensor) -> Tensor:
        """(n, d): the layer before the logits."""
        return self.net.features(x)

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)


def shifted(x: Tensor, most: int, draws: Draws) -> Tensor:
    """Each image moved by its own whole number of pixels in [-most, most] each way; black (-1) comes in."""
    n, _, height, width = x.shape
    offset = draws.integers(2 * most + 1, (2,)).to(x.device)
    padded = F.pad(x, (most,) * 4, value=-1.0)
    rows = offset[:, :1] + torch.arange(height, device=x.device)
    columns = offset[:, 1:] + torch.arange(width, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    # Indices on both sides of a slice come first: (n, H, W, C).
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def flawed(x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """(images, strengths (n, 2) in [0, 1]): some blurred, some with noise, some with both, the rest as they are.

    Blur of strength b is (1 - b) x + b (mean over 3 x 3 pixels); noise of strength s has standard deviation `NOISE` s.
    """
    strength = draws.uniform((2,)) * (draws.uniform((2,)) < FLAWED)
    blur, noise = strength[:, 0, None, None, None], strength[:, 1, None, None, None]
    smooth = F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, stride=1)
    x = torch.lerp(x, smooth, blur) + NOISE * noise * draws.normal(tuple(x.shape[1:]))
    return x.clamp(-1, 1), strength
