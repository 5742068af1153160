"""The layers of a denoising U-Net. Each takes the features h and the embedding of the noise level, and gives new h.

Shapes: h (n, C, H, W), emb (n, E). Ho et al. (2020), "Denoising diffusion probabilistic models", appendix B, and the
code published with it.
"""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
"""Added to the variance by every normalisation (PyTorch's own default is 1e-5)."""

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def fan_avg(layer: Layer, scale: float = 1.0) -> Layer:
    """Draw weights uniformly with variance scale / mean(fan in, fan out), Ho et al.'s choice; biases are nought.

    Layers that end a residual branch, and the last of the network, have ``scale=0``: each block is the identity at the
    start, and the network's output is nought.
    """
    nn.init.xavier_uniform_(layer.weight, gain=scale**0.5)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class ResidualBlock(nn.Module):
    """shortcut(h) + conv(dropout(silu(norm(conv(silu(norm(h))) + linear(emb))))).

    The shortcut is the identity, or a 1x1 convolution where the number of channels changes.
    """

    def __init__(self, channels_in: int, channels_out: int, emb_dim: int, *, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, EPS)
        self.conv1 = fan_avg(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.emb = fan_avg(nn.Linear(emb_dim, channels_out))
        self.norm2 = nn.GroupNorm(groups, channels_out, EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = fan_avg(nn.Conv2d(channels_out, channels_out, 3, padding=1), scale=0)
        changes = channels_in != channels_out
        self.shortcut = fan_avg(nn.Conv2d(channels_in, channels_out, 1)) if changes else nn.Identity()

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        r = self.conv1(F.silu(self.norm1(h)))
        r = r + self.emb(emb)[:, :, None, None]
        r = self.conv2(self.dropout(F.silu(self.norm2(r))))
        return self.shortcut(h) + r


class SelfAttention(nn.Module):
    """h + linear(softmax(q k^T / sqrt C) v): each pixel attends to all, with one head as wide as the features.

    q, k and v are linear in norm(h), pixel by pixel (Vaswani et al. 2017, "Attention is all you need", eq. 1).
    """

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        # Three maps C -> C in one. Scale 2 gives each the variance it would have by itself: fan_avg is here 2 C.
        self.qkv = fan_avg(nn.Linear(channels, 3 * channels), scale=2)
        self.out = fan_avg(nn.Linear(channels, channels), scale=0)

    def forward(self, h: Tensor) -> Tensor:
        pixels = self.norm(h).flatten(2).mT  # (n, HW, C)
        q, k, v = self.qkv(pixels).unsqueeze(1).chunk(3, dim=-1)  # (n, 1 head, HW, C) each
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return h + self.out(mixed).mT.unflatten(2, h.shape[2:])


class Block(nn.Module):
    """A residual block, then attention where asked for."""

    def __init__(self, residual: ResidualBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = self.residual(h, emb)
        return h if self.attention is None else self.attention(h)


class Downsample(nn.Module):
    """3x3 convolution with stride 2: half the side. Output (i, j) sees rows 2i to 2i + 2, columns 2j to 2j + 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = fan_avg(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling of the side, then a 3x3 convolution, done in one.

    The doubling repeats each pixel, so several taps of the 3x3 kernel meet the same one. With those taps summed
    beforehand, the pair is a transposed convolution of stride 2 whose 4x4 kernel is the 3x3 kernel (turned, as
    transposition asks) spread by a 2x2 block of ones. That takes 16 products a pixel of h in place of 36.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = fan_avg(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        turned = self.conv.weight.transpose(0, 1).flip(2, 3)  # (in, out, 3, 3)
        spread = 4 * F.avg_pool2d(F.pad(turned, (1, 1, 1, 1)), kernel_size=2, stride=1)  # (in, out, 4, 4)
        return F.conv_transpose2d(h, spread, self.conv.bias, stride=2, padding=1)
