"""Convolutional encoder and decoder between images and spatial latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.layers import ResBlock
from gencompare.networks.unet_blocks import SelfAttention

NUM_GROUPS = 8
"""Number of groups in the GroupNorm of the attention block and in the last GroupNorm. Must divide the channels at each
resolution."""


class LatentEncoder(nn.Module):
    """Encoder from images (n, C, H, W) to latents (n, out_channels, H / f, W / f), f = 2^(len(channel_mult) - 1).

    Each resolution has residual blocks, and the last block of each resolution but the coarsest downsamples. A block,
    attention and another block follow at the coarsest resolution. This is the encoder of Esser et al. (2021), "Taming
    transformers for high-resolution image synthesis", table 7 (https://arxiv.org/abs/2012.09841), except that residual
    blocks downsample.

    Args:
        shape: (C, H, W) of the images.
        out_channels: channels of the latents.
        channels: channels at full resolution, a multiple of 8.
        channel_mult: channels at each resolution as a multiple of ``channels``.
        num_blocks: residual blocks per resolution.
        mid_attention: use attention at the coarsest resolution.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        out_channels: int,
        *,
        channels: int = 32,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_blocks: int = 1,
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = checked_widths(shape, channels, channel_mult, num_blocks)
        self.stem = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, next_width in zip(widths, [*widths[1:], None], strict=True):
            self.blocks.extend(ResBlock(width, width) for _ in range(num_blocks - 1))
            if next_width is None:
                self.blocks.append(ResBlock(width, width))
            else:
                self.blocks.append(ResBlock(width, next_width, resample="down"))
        self.blocks.extend(middle_blocks(widths[-1], mid_attention))
        self.norm = nn.GroupNorm(NUM_GROUPS, widths[-1])
        self.out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.out(F.silu(self.norm(h)))


class LatentDecoder(nn.Module):
    """Decoder from latents (n, in_channels, H / f, W / f) to images (n, C, H, W), the mirror image of `LatentEncoder`.

    The output is not bounded to [-1, 1]. The arguments are those of `LatentEncoder`.
    """

    def __init__(
        self,
        in_channels: int,
        shape: tuple[int, int, int],
        *,
        channels: int = 32,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_blocks: int = 1,
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = checked_widths(shape, channels, channel_mult, num_blocks)[::-1]
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(middle_blocks(widths[0], mid_attention))
        for previous_width, width in zip([None, *widths[:-1]], widths, strict=True):
            if previous_width is None:
                self.blocks.append(ResBlock(width, width))
            else:
                self.blocks.append(ResBlock(previous_width, width, resample="up"))
            self.blocks.extend(ResBlock(width, width) for _ in range(num_blocks - 1))
        self.norm = nn.GroupNorm(NUM_GROUPS, widths[-1])
        self.out = nn.Conv2d(widths[-1], shape[0], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.stem(z)
        for block in self.blocks:
            h = block(h)
        return self.out(F.silu(self.norm(h)))


def middle_blocks(width: int, attention: bool) -> list[nn.Module]:
    """Build the middle blocks, at the coarsest resolution."""
    if not attention:
        return [ResBlock(width, width)]
    return [ResBlock(width, width), SelfAttention(width, num_groups=NUM_GROUPS), ResBlock(width, width)]


def checked_widths(
    shape: tuple[int, int, int], channels: int, channel_mult: Sequence[int], num_blocks: int
) -> list[int]:
    """Return the channels at each resolution, finest first. Raise `UserError` for invalid sizes."""
    if channels < 1 or channels % NUM_GROUPS or num_blocks < 1 or not channel_mult or min(channel_mult) < 1:
        raise UserError(
            f"The autoencoder's channels={channels} must be a multiple of {NUM_GROUPS}, and"
            f" channel_mult={list(channel_mult)} and num_blocks={num_blocks} at least 1."
        )
    factor = 2 ** (len(channel_mult) - 1)
    if shape[1] % factor or shape[2] % factor:
        raise UserError(
            f"{shape[1]}x{shape[2]} images cannot be halved {len(channel_mult) - 1} times: use a shorter list"
            " (model.encoder.channel_mult, model.decoder.channel_mult)."
        )
    return [channels * multiplier for multiplier in channel_mult]
