"""Halving and doubling images with a low-pass filter, so that fine detail does not fold into coarse patterns.

Zhang (2019), "Making convolutional networks shift-invariant again", section 3; the filter [1, 3, 3, 1] and where it
stands are those of Karras et al. (2020), "Analyzing and improving the image quality of StyleGAN", appendix B. With the
filter [1, 1], halving is the 2x2 mean and doubling repeats each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError


class Filter(nn.Module):
    """The filter k k^T of sum 1, from its taps k."""

    kernel: Tensor

    def __init__(self, taps: Sequence[float]) -> None:
        super().__init__()
        if len(taps) < 2 or len(taps) % 2 or list(taps) != list(taps)[::-1] or not sum(taps) > 0:
            raise UserError(
                f"A resampling filter is an even number of symmetric taps, as [1, 1] or [1, 3, 3, 1], not {list(taps)}."
            )
        k = torch.tensor([float(tap) for tap in taps])
        self.register_buffer("kernel", (torch.outer(k, k) / k.sum() ** 2)[None, None], persistent=False)
        self.padding = len(taps) // 2 - 1

    def depthwise(self, channels: int) -> Tensor:
        """(channels, 1, k, k): the same filter for each channel by itself."""
        return self.kernel.expand(channels, -1, -1, -1)


class FIRDownsample(Filter):
    """Every second pixel of the filtered image, (n, C, H, W) -> (n, C, H/2, W/2); beyond the edge lie noughts.

    A constant image keeps its value away from the edge.
    """

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return F.conv2d(x, self.depthwise(c), stride=2, padding=self.padding, groups=c)


class FIRUpsample(Filter):
    """The image with noughts between its pixels, filtered, times 4: (n, C, H, W) -> (n, C, 2 H, 2 W).

    It is the transpose of `FIRDownsample`, times 4, and keeps the value of a constant image away from the edge.
    """

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return F.conv_transpose2d(x, 4 * self.depthwise(c), stride=2, padding=self.padding, groups=c)


class FIRConvDownsample(Filter):
    """A 3x3 convolution with stride 2 of the filtered image, (n, C, H, W) -> (n, channels_out, H/2, W/2).

    The image is padded once, before the filter (Karras et al. 2020, StyleGAN2's ``conv_downsample_2d``).
    """

    def __init__(self, channels_in: int, channels_out: int, taps: Sequence[float]) -> None:
        super().__init__(taps)
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return self.conv(F.conv2d(x, self.depthwise(c), padding=self.padding + 1, groups=c))
