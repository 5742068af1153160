"""The U-Net of denoising diffusion models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.embeddings import LabelEmbedding, SinusoidalEmbedding
from gencompare.networks.unet_blocks import EPS, Block, Downsample, ResidualBlock, SelfAttention, Upsample, fan_avg


class UNet(nn.Module):
    """The network of Ho et al. (2020), "Denoising diffusion probabilistic models", appendix B.

    An encoder of residual blocks halves the image level by level and keeps the output of every layer; a decoder
    mirrors it, each of its blocks seeing one of the kept outputs beside its own input, last kept first used. The
    defaults are the paper's CIFAR-10 network, of 35.7 M parameters. At the start the output is nought.

    Shapes: x (n, C, H, W), noise_cond (n,), ``cond["label"]`` (n,) int64 -> (n, out_channels, H, W).

    Args:
        shape: (C, H, W) of x; H and W must be halved once for each multiplier after the first.
        num_classes: 0 for a network without labels. Otherwise labels are 0 to num_classes - 1, and num_classes itself
            means "no label".
        channels: base width; a multiple of ``groups``, as all widths then are.
        multipliers: width of each level, from the image's own resolution down, as a multiple of ``channels``.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention: resolutions (image heights) with self-attention after each block. The list may name some that this
            shape does not come to, so that one list serves several sizes of image. The middle has attention always.
        dropout: probability with which a feature inside a residual block is dropped in training.
        groups: groups of every GroupNorm.
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int,
        num_classes: int = 0,
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        groups: int = 32,
    ) -> None:
        super().__init__()
        _check(shape, channels, multipliers, blocks, dropout, groups)
        self.levels, self.blocks = len(multipliers), blocks
        resolutions = [shape[1] >> level for level in range(len(multipliers))]
        widths = [channels * multiplier for multiplier in multipliers]
        emb_dim = 4 * channels

        def residual(channels_in: int, channels_out: int) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, emb_dim, dropout=dropout, groups=groups)

        def block(channels_in: int, level: int) -> Block:
            attends = resolutions[level] in attention
            width = widths[level]
            return Block(residual(channels_in, width), SelfAttention(width, groups=groups) if attends else None)

        self.noise = nn.Sequential(
            SinusoidalEmbedding(channels),
            fan_avg(nn.Linear(channels, emb_dim)),
            nn.SiLU(),
            fan_avg(nn.Linear(emb_dim, emb_dim)),
        )
        self.label = LabelEmbedding(num_classes, emb_dim) if num_classes else None

        self.stem = fan_avg(nn.Conv2d(shape[0], channels, 3, padding=1))
        kept = [channels]  # widths of the outputs that the encoder keeps
        self.encoder = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.encoder.append(block(kept[-1], level))
                kept.append(width)
            if level < len(widths) - 1:
                self.encoder.append(Downsample(width))
                kept.append(width)

        deepest = widths[-1]
        self.middle = nn.ModuleList(
            [Block(residual(deepest, deepest), SelfAttention(deepest, groups=groups)), residual(deepest, deepest)]
        )

        self.decoder = nn.ModuleList()
        width = deepest
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                self.decoder.append(block(width + kept.pop(), level))
                width = widths[level]
            if level > 0:
                self.decoder.append(Upsample(width))
        self.norm = nn.GroupNorm(groups, channels * multipliers[0], EPS)
        self.out = fan_avg(nn.Conv2d(channels * multipliers[0], out_channels, 3, padding=1), scale=0)

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        emb = F.silu(self.embedding(noise_cond, cond))  # every block begins with it
        h = self.stem(x)
        kept = [h]
        for layer in self.encoder:
            h = layer(h, emb)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.decoder:
            if isinstance(layer, Block):
                h = torch.cat([h, kept.pop()], dim=1)
            h = layer(h, emb)
        return self.out(F.silu(self.norm(h)))

    def embedding(self, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(n, 4 channels): the noise level, and the class where there is one."""
        emb = self.noise(noise_cond)
        if self.label is None:
            return emb
        if "label" not in cond:
            raise UserError(
                f"This U-Net was made for {self.label.no_label} classes: give cond['label'], where"
                f" {self.label.no_label} means no label."
            )
        return emb + self.label(cond["label"])


def _check(
    shape: Sequence[int],
    channels: int,
    multipliers: Sequence[int],
    blocks: int,
    dropout: float,
    groups: int,
) -> None:
    """Raises `UserError` on sizes that cannot be."""
    height, width = shape[1:]
    if not multipliers or min(multipliers) < 1 or channels < 1 or blocks < 1 or groups < 1:
        raise UserError(
            f"A U-Net needs channels, multipliers, blocks and groups of at least 1, not channels={channels},"
            f" multipliers={list(multipliers)}, blocks={blocks}, groups={groups}."
        )
    if not 0 <= dropout < 1:
        raise UserError(
            f"dropout={dropout} of the U-Net is a probability: give a number from 0 up to, not including, 1."
        )
    if channels % groups:
        raise UserError(
            f"The U-Net's channels={channels} cannot be normalised in groups={groups}: make channels a multiple of"
            f" groups, or use groups={math.gcd(channels, groups)}."
        )
    levels = len(multipliers)
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        possible = next(n for n in range(levels - 1, 0, -1) if not (height % 2 ** (n - 1) or width % 2 ** (n - 1)))
        raise UserError(
            f"A U-Net with multipliers={list(multipliers)} halves its images {levels - 1} time(s), which"
            f" {height}x{width} does not allow: use model.network.multipliers={list(multipliers[:possible])}, or images"
            " of another size."
        )
