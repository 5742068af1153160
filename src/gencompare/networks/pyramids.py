"""Copies of the image at lower resolutions, which a U-Net reads on its way down or writes on its way up.

Karras et al. (2020), "Analyzing and improving the image quality of StyleGAN", section 4.1 and figure 7 (input and
output skips, residual networks), as Song et al. (2021), "Score-based generative modeling through stochastic
differential equations", appendix H.1, put them into a U-Net. Shapes: h (n, width, H, W); image and h have one side.

Args of all: ``taps`` of the filter that resamples the image (see `gencompare.networks.resampling`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.resampling import FIRConvDownsample, FIRDownsample, FIRUpsample
from gencompare.networks.unet_blocks import EPS, fan_avg, rescaled

FIR = (1, 3, 3, 1)


class InputPyramid(nn.Module):
    """(h, image of twice the side) -> (h that has seen the image, image of the side of h)."""

    width: int
    """Channels of the new h."""
    channels: int
    """Channels of the new image."""


class InputSkip(InputPyramid):
    """(h + conv(half the image), half the image): the image itself, filtered, at each resolution.

    Args:
        channels: of the image.
        width: channels of h.
        combine: ``sum``, or ``cat`` to lay the two side by side, (n, 2 width, H, W).
    """

    def __init__(self, channels: int, width: int, *, taps: Sequence[float] = FIR, combine: str = "sum") -> None:
        super().__init__()
        if combine not in ("sum", "cat"):
            raise UserError(f"combine={combine} of an input skip: choose sum or cat.")
        self.joined = combine == "cat"
        self.width, self.channels = 2 * width if self.joined else width, channels
        self.downsample = FIRDownsample(taps)
        self.conv = fan_avg(nn.Conv2d(channels, width, 1))

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.downsample(image)
        seen = self.conv(image)
        return (torch.cat([seen, h], dim=1) if self.joined else h + seen), image


class ResidualInput(InputPyramid):
    """(y, y) with y = h + conv(half the image): what is known so far is the image of the next level.

    Args:
        channels: of the image.
        width: channels of h.
        skip_rescale: divide y by sqrt 2.
    """

    def __init__(self, channels: int, width: int, *, taps: Sequence[float] = FIR, skip_rescale: bool = True) -> None:
        super().__init__()
        self.width = self.channels = width
        self.skip_rescale = skip_rescale
        self.downsample = FIRConvDownsample(channels, width, taps)
        fan_avg(self.downsample.conv)

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        h = rescaled(h + self.downsample(image), self.skip_rescale)
        return h, h


class OutputSkip(nn.Module):
    """Adds conv(silu(norm(h))) to the image, None at the coarsest level, and doubles the image's side.

    Args:
        width: channels of h.
        channels: of the image.
        groups: of the norm.
    """

    def __init__(self, width: int, channels: int, groups: int, *, taps: Sequence[float] = FIR) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.conv = fan_avg(nn.Conv2d(width, channels, 3, padding=1), scale=0)
        self.upsample = FIRUpsample(taps)

    def forward(self, h: Tensor, image: Tensor | None) -> Tensor:
        own = self.conv(F.silu(self.norm(h)))
        return self.upsample(own if image is None else image + own)
