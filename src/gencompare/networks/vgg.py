"""A plain convolutional classifier: the network behind perceptual losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gencompare.errors import UserError


class VGG(nn.Module):
    """Stages of two 3x3 convolutions, each at half of the side of the one before; average pool; logits.

    Simonyan and Zisserman (2015), "Very deep convolutional networks for large-scale image recognition", with two
    convolutions a stage and group norm, which needs no statistic of the batch.

    Args:
        channels: of the image.
        num_classes: logits.
        widths: channels of each stage, multiples of 8.
    """

    def __init__(self, channels: int, num_classes: int, *, widths: Sequence[int]) -> None:
        super().__init__()
        if not widths or any(width % 8 for width in widths):
            raise UserError(f"The widths of a classifier must be multiples of 8, not {list(widths)}.")
        self.stages = nn.ModuleList(
            nn.Sequential(*convolution(before, width), *convolution(width, width))
            for before, width in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def activations(self, x: Tensor) -> list[Tensor]:
        """The activations after each stage, finest first, of images (n, C, H, W) in [-1, 1]."""
        found: list[Tensor] = []
        for stage in self.stages:
            x = stage(nn.functional.max_pool2d(found[-1], 2) if found else x)
            found.append(x)
        return found

    def features(self, x: Tensor) -> Tensor:
        """(n, widths[-1]): the mean over all places of the last stage."""
        return self.activations(x)[-1].mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (n, num_classes) of ``features``."""
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


def convolution(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
