"""The layers of a denoising U-Net, and the image pyramids of NCSN++."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.layers import FIRConvDownsample, FIRDownsample, FIRUpsample

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


def rescaled(total: Tensor, rescale: bool) -> Tensor:
    """A sum of two branches, over sqrt 2 where asked for: two of equal variance then give a sum of that variance.

    Karras et al. (2020), "Analyzing and improving the image quality of StyleGAN", section 4.1, and Song et al. (2021),
    "Score-based generative modeling through stochastic differential equations", appendix H.1.
    """
    return total / math.sqrt(2) if rescale else total


class ResidualBlock(nn.Module):
    """shortcut(h) + conv(dropout(silu(norm(conv(silu(norm(h))) + linear(emb))))).

    The shortcut is the identity, or a 1x1 convolution where the number of channels changes.

    Args:
        resample: halves or doubles the side, on the branch before its first convolution and on the shortcut before its
            own: the block of Brock et al. (2019), "Large scale GAN training" (BigGAN), appendix B.
        resample_proj: give a block that resamples a convolution on its shortcut even where its channels stay, as Song
            et al. (2021) do and Dhariwal and Nichol (2021) do not.
        scale_shift: emb scales and shifts what the second norm gives, (1 + a) norm(r) + b, in place of being added
            before it: Dhariwal and Nichol (2021), "Diffusion models beat GANs on image synthesis", section 3.1.
        skip_rescale: divide the sum by sqrt 2 (see `rescaled`).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        emb_dim: int,
        *,
        dropout: float,
        groups: int,
        resample: nn.Module | None = None,
        resample_proj: bool = True,
        scale_shift: bool = False,
        skip_rescale: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift, self.skip_rescale = scale_shift, skip_rescale
        self.resample = nn.Identity() if resample is None else resample
        self.norm1 = nn.GroupNorm(groups, channels_in, EPS)
        self.conv1 = fan_avg(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.emb = fan_avg(nn.Linear(emb_dim, 2 * channels_out if scale_shift else channels_out))
        self.norm2 = nn.GroupNorm(groups, channels_out, EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = fan_avg(nn.Conv2d(channels_out, channels_out, 3, padding=1), scale=0)
        projects = channels_in != channels_out or (resample is not None and resample_proj)
        self.shortcut = fan_avg(nn.Conv2d(channels_in, channels_out, 1)) if projects else nn.Identity()

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        r = self.conv1(self.resample(F.silu(self.norm1(h))))
        told = self.emb(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            r = (1 + scale) * self.norm2(r) + shift
        else:
            r = self.norm2(r + told)
        r = self.conv2(self.dropout(F.silu(r)))
        return rescaled(self.shortcut(self.resample(h)) + r, self.skip_rescale)


class SelfAttention(nn.Module):
    """h + linear(softmax(q k^T / sqrt d) v): each pixel attends to all, with heads of d features each.

    q, k and v are linear in norm(h), pixel by pixel (Vaswani et al. 2017, "Attention is all you need", eq. 1 and
    section 3.2.2). Head i has the i-th share of the features; one head is as wide as h. ``skip_rescale`` as in
    `ResidualBlock`.
    """

    def __init__(self, channels: int, *, groups: int, heads: int = 1, skip_rescale: bool = False) -> None:
        super().__init__()
        self.heads, self.skip_rescale = heads, skip_rescale
        self.norm = nn.GroupNorm(groups, channels, EPS)
        # Three maps C -> C in one. Scale 2 gives each the variance it would have by itself: fan_avg is here 2 C.
        self.qkv = fan_avg(nn.Linear(channels, 3 * channels), scale=2)
        self.out = fan_avg(nn.Linear(channels, channels), scale=0)

    def forward(self, h: Tensor) -> Tensor:
        pixels = self.norm(h).flatten(2).mT  # (n, HW, C)
        heads = self.qkv(pixels).unflatten(2, (3 * self.heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)  # (n, heads, HW, d) each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return rescaled(h + self.out(mixed).mT.unflatten(2, h.shape[2:]), self.skip_rescale)


class UNetBlock(nn.Module):
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
