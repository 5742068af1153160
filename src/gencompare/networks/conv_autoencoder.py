"""Convolutional encoder and decoder between images and small images of latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.layers import ResBlock
from gencompare.networks.unet_blocks import SelfAttention

GROUPS = 8
"""Groups of the last normalisation and of the attention's; widths are multiples of it."""


class LatentEncoder(nn.Module):
    """Images (n, C, H, W) to (n, out_channels, H / f, W / f), f = 2^(len(multipliers) - 1).

    Residual blocks at each resolution, the last but the coarsest halving the side; in the middle a block, attention and
    a block: the encoder of Esser et al. (2021), "Taming transformers for high-resolution image synthesis", table 7,
    with the halving inside of a block.

    Args:
        shape: (C, H, W) of the images.
        channels: at the finest resolution, a multiple of 8.
        multipliers: channels of each resolution as a multiple of that.
        blocks: residual blocks a resolution.
        attention: whether there is attention in the middle.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        out_channels: int,
        *,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 1,
        attention: bool = True,
    ) -> None:
        super().__init__()
        widths = checked_widths(shape, channels, multipliers, blocks)
        self.stem = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for here, after in zip(widths, [*widths[1:], None], strict=True):
            self.blocks.extend(ResBlock(here, here) for _ in range(blocks - 1))
            if after is None:
                self.blocks.append(ResBlock(here, here))
            else:
                self.blocks.append(ResBlock(here, after, resample="down"))
        self.blocks.extend(middle(widths[-1], attention))
        self.norm = nn.GroupNorm(GROUPS, widths[-1])
        self.out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.out(F.silu(self.norm(h)))


class LatentDecoder(nn.Module):
    """Latents (n, in_channels, H / f, W / f) to images (n, C, H, W): the encoder's mirror image.

    The values are not held within [-1, 1]. Arguments as for `LatentEncoder`.
    """

    def __init__(
        self,
        in_channels: int,
        shape: tuple[int, int, int],
        *,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 1,
        attention: bool = True,
    ) -> None:
        super().__init__()
        widths = checked_widths(shape, channels, multipliers, blocks)[::-1]
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(middle(widths[0], attention))
        for before, here in zip([None, *widths[:-1]], widths, strict=True):
            if before is None:
                self.blocks.append(ResBlock(here, here))
            else:
                self.blocks.append(ResBlock(before, here, resample="up"))
            self.blocks.extend(ResBlock(here, here) for _ in range(blocks - 1))
        self.norm = nn.GroupNorm(GROUPS, widths[-1])
        self.out = nn.Conv2d(widths[-1], shape[0], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.stem(z)
        for block in self.blocks:
            h = block(h)
        return self.out(F.silu(self.norm(h)))


def middle(width: int, attention: bool) -> list[nn.Module]:
    """What stands at the coarsest resolution."""
    if not attention:
        return [ResBlock(width, width)]
    return [ResBlock(width, width), SelfAttention(width, groups=GROUPS), ResBlock(width, width)]


def checked_widths(shape: tuple[int, int, int], channels: int, multipliers: Sequence[int], blocks: int) -> list[int]:
    """Channels of each resolution, finest first. Raises `UserError` where the images cannot be halved so often."""
    if channels < 1 or channels % GROUPS or blocks < 1 or not multipliers or min(multipliers) < 1:
        raise UserError(
            f"An autoencoder with channels={channels}, multipliers={list(multipliers)}, blocks={blocks}: channels must"
            f" be a multiple of {GROUPS}, and the rest at least 1."
        )
    factor = 2 ** (len(multipliers) - 1)
    if shape[1] % factor or shape[2] % factor:
        raise UserError(
            f"Images of {shape[1]}x{shape[2]} cannot be halved {len(multipliers) - 1} times: give fewer multipliers"
            " (model.encoder.multipliers, model.decoder.multipliers)."
        )
    return [channels * m for m in multipliers]
