"""Patch training: the network is trained on random crops, and conditioned on the coordinates of their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.errors import UserError, check_counts, check_non_negative, check_positive
from gencompare.rng import RandomSource


@dataclass(frozen=True)
class RandomPatches:
    r"""Patch Diffusion: each step trains on whole images, or on random crops of one random size.

    With the coordinates :math:`i, j` of the pixels of a crop in the whole image, the network learns the score of every
    crop, :math:`\epsilon_\theta(x_{t,i,j}, t, i, j)`. The noise of a crop has the distribution of the noise of these
    pixels in a whole image, so the loss per pixel has the same meaning for all sizes. A crop of the side H / d costs
    about :math:`1 / d^2` of a whole image. Sampling and evaluation use whole images.

    Wang et al. (2023), "Patch diffusion: faster and more data-efficient training of diffusion models", section 3.2
    (https://arxiv.org/abs/2304.12526). All images of a step have crops of the same size, as in the published code,
    which also puts more images into a step with smaller crops; here the number of images in a step is fixed.

    Args:
        full_image_prob: probability that a step trains on whole images (0.5 in the paper).
        divisors: side of the image divided by the side of the crops, for the other steps (2 and 4 in the paper).
        weights: relative probability of each divisor (3 and 2 in the paper).
    """

    full_image_prob: float = 0.5
    divisors: Sequence[int] = (2, 4)
    weights: Sequence[float] = (3.0, 2.0)

    def __post_init__(self) -> None:
        check_non_negative("model.patches.full_image_prob", self.full_image_prob)
        if self.full_image_prob > 1:
            raise UserError(f"model.patches.full_image_prob={self.full_image_prob} must be in [0, 1].")
        if not self.divisors or len(self.divisors) != len(self.weights):
            raise UserError(
                f"model.patches needs one weight for each divisor, not divisors={list(self.divisors)} and"
                f" weights={list(self.weights)}."
            )
        for divisor, weight in zip(self.divisors, self.weights, strict=True):
            check_counts("model.patches", minimum=2, divisors=divisor)
            check_positive("model.patches.weights", weight)

    def draw_divisor(self, rng: RandomSource) -> int:
        """Draw the ratio of the sides of image and crops for the next step; 1 stands for whole images."""
        number = rng.shared_uniform("patch size")
        if number < self.full_image_prob:
            return 1
        number = (number - self.full_image_prob) / (1 - self.full_image_prob) * sum(self.weights)
        for divisor, weight in zip(self.divisors, self.weights, strict=True):
            if number < weight:
                return divisor
            number -= weight
        return self.divisors[-1]

    def __call__(self, x: Tensor, divisor: int, rng: RandomSource) -> Tensor:
        """Crop images (n, C, H, W) at random positions, giving (n, C, H / divisor, W / divisor)."""
        if divisor == 1:
            return x
        height, width = (side // divisor for side in x.shape[2:])
        down, right = rng.uniform((2,)).to(x.device).T
        top = (down * (x.shape[2] - height + 1)).long()
        left = (right * (x.shape[3] - width + 1)).long()
        return crop(x, top, left, height, width)


def crop(x: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Crop each image of (n, C, H, W) at its own position, ``top`` and ``left`` (n,), giving (n, C, height, width)."""
    rows = top[:, None] + torch.arange(height, device=top.device)
    columns = left[:, None] + torch.arange(width, device=top.device)
    images = torch.arange(len(x), device=top.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
