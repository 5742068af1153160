"""A classifier that is told how much noise there is."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.embeddings import SinusoidalEmbedding
from gencompare.networks.unet_blocks import EPS, Block, Downsample, ResidualBlock, SelfAttention, fan_avg


class NoisyClassifierNet(nn.Module):
    """The encoder of a U-Net, and attention pooling on top of it.

    Dhariwal and Nichol (2021), "Diffusion models beat GANs on image synthesis", section 4.1 and appendix J: the
    downsampling half of the U-Net with an attention pool at its smallest size.

    Shapes: x (n, C, H, W), noise_cond (n,) -> logits (n, num_classes), nought at the start.

    Args:
        shape: (C, H, W) of x; H and W must be halved once for each multiplier after the first.
        num_classes: logits.
        channels: base width; a multiple of ``groups``.
        multipliers: width of each level, from the image's own resolution down, as a multiple of ``channels``.
        blocks: residual blocks a level.
        attention: resolutions (image heights) with self-attention after each block.
        dropout: probability with which a feature inside a residual block is dropped in training.
        groups: groups of every GroupNorm.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        *,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16, 8),
        dropout: float = 0.0,
        groups: int = 8,
    ) -> None:
        super().__init__()
        halvings = len(multipliers) - 1
        if halvings < 0 or shape[1] % 2**halvings or shape[2] % 2**halvings:
            raise UserError(
                f"network.multipliers={list(multipliers)} halves an image {max(halvings, 0)} time(s), which"
                f" {shape[1]}x{shape[2]} does not allow: give fewer of them."
            )
        if channels < 1 or blocks < 1 or channels % groups:
            raise UserError(
                f"network.channels={channels} must be a multiple of groups={groups}, and blocks={blocks} at least 1."
            )
        emb_dim = 4 * channels
        self.noise = nn.Sequential(
            SinusoidalEmbedding(channels),
            fan_avg(nn.Linear(channels, emb_dim)),
            nn.SiLU(),
            fan_avg(nn.Linear(emb_dim, emb_dim)),
        )
        self.stem = fan_avg(nn.Conv2d(shape[0], channels, 3, padding=1))
        self.layers = nn.ModuleList()
        width = channels
        for level, multiplier in enumerate(multipliers):
            if level:
                self.layers.append(Downsample(width))
            for _ in range(blocks):
                residual = ResidualBlock(width, channels * multiplier, emb_dim, dropout=dropout, groups=groups)
                width = channels * multiplier
                attends = shape[1] >> level in attention
                self.layers.append(Block(residual, SelfAttention(width, groups=groups) if attends else None))
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.pool = AttentionPool(width)
        self.out = fan_avg(nn.Linear(width, num_classes), scale=0)

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        emb = F.silu(self.noise(noise_cond))
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h, emb)
        return self.out(self.pool(F.silu(self.norm(h))))


class AttentionPool(nn.Module):
    """The mean pixel asks, all pixels answer: linear(softmax(q k^T / sqrt C) v), (n, C, H, W) -> (n, C).

    Radford et al. (2021), "CLIP", section 2.4, with one head, and the places of pixels left to the convolutions below.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q = fan_avg(nn.Linear(channels, channels))
        self.kv = fan_avg(nn.Linear(channels, 2 * channels), scale=1.5)  # as two maps C -> C would have
        self.out = fan_avg(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        pixels = h.flatten(2).mT  # (n, HW, C)
        k, v = self.kv(pixels).unsqueeze(1).chunk(2, dim=-1)
        q = self.q(pixels.mean(1, keepdim=True)).unsqueeze(1)  # (n, 1 head, 1, C)
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))
