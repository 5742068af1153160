"""Blocks of the denoising U-Net, and the image pyramids of NCSN++."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.layers import FIRConvDownsample, FIRDownsample, FIRUpsample, attention

GROUP_NORM_EPS = 1e-6
"""Added to the variance in every GroupNorm (PyTorch's default is 1e-5)."""
DEFAULT_TAPS = (1, 3, 3, 1)
"""The FIR filter of NCSN++."""

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def fan_avg(layer: Layer, scale: float = 1.0) -> Layer:
    r"""Initialise weights uniformly with variance scale / mean(fan_in, fan_out), as Ho et al. do, and biases to zero.

    The last layer of each residual branch and of the network has ``scale=0``, so that the branches and the network's
    output are zero at initialisation.
    """
    nn.init.xavier_uniform_(layer.weight, gain=scale**0.5)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def rescale_sum(total: Tensor, rescale: bool) -> Tensor:
    r"""Divide the sum of two branches by :math:`\sqrt 2` if ``rescale``, which preserves the variance.

    Karras et al. (2020), "Analyzing and improving the image quality of StyleGAN", section 4.1
    (https://arxiv.org/abs/1912.04958), and Song et al. (2021), "Score-based generative modeling through stochastic
    differential equations", appendix H.1 (https://arxiv.org/abs/2011.13456).
    """
    return total / math.sqrt(2) if rescale else total


class ResidualBlock(nn.Module):
    """shortcut(h) + conv(dropout(silu(norm(conv(silu(norm(h))) + linear(emb))))).

    The shortcut is the identity, or a 1x1 convolution if the number of channels changes.

    Shapes: h (n, channels_in, H, W), emb (n, emb_dim) -> (n, channels_out, H', W').

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        emb_dim: dimension of the embedding of noise level and conditions.
        dropout: dropout probability.
        num_groups: groups of each GroupNorm.
        resample: module that changes the resolution, applied on the branch before its first convolution and on the
            shortcut before its convolution, as in Brock et al. (2019), "Large scale GAN training for high fidelity
            natural image synthesis" (BigGAN), appendix B (https://arxiv.org/abs/1809.11096).
        resample_proj: put a convolution on the shortcut of a resampling block even if the number of channels stays
            the same, as in Song et al. (2021) but not in Dhariwal and Nichol (2021).
        scale_shift_norm: let emb scale and shift the output of the second norm, (1 + a) norm(r) + b, instead of adding
            it before the norm (Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis", section 3.1,
            https://arxiv.org/abs/2105.05233).
        skip_rescale: divide the sum by sqrt(2), see `rescale_sum`.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        emb_dim: int,
        *,
        dropout: float,
        num_groups: int,
        resample: nn.Module | None = None,
        resample_proj: bool = True,
        scale_shift_norm: bool = False,
        skip_rescale: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift_norm, self.skip_rescale = scale_shift_norm, skip_rescale
        self.resample = nn.Identity() if resample is None else resample
        self.norm1 = nn.GroupNorm(num_groups, channels_in, GROUP_NORM_EPS)
        self.conv1 = fan_avg(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.emb = fan_avg(nn.Linear(emb_dim, 2 * channels_out if scale_shift_norm else channels_out))
        self.norm2 = nn.GroupNorm(num_groups, channels_out, GROUP_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = fan_avg(nn.Conv2d(channels_out, channels_out, 3, padding=1), scale=0)
        has_projection = channels_in != channels_out or (resample is not None and resample_proj)
        self.shortcut = fan_avg(nn.Conv2d(channels_in, channels_out, 1)) if has_projection else nn.Identity()

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        r = self.conv1(self.resample(F.silu(self.norm1(h))))
        projected_emb = self.emb(emb)[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = projected_emb.chunk(2, dim=1)
            r = (1 + scale) * self.norm2(r) + shift
        else:
            r = self.norm2(r + projected_emb)
        r = self.conv2(self.dropout(F.silu(r)))
        return rescale_sum(self.shortcut(self.resample(h)) + r, self.skip_rescale)


class SelfAttention(nn.Module):
    r"""Multi-head self-attention over all pixels, with a residual connection.

    .. math:: h + W_o \, \mathrm{softmax}(q k^T / \sqrt d) v

    where q, k and v are linear projections of norm(h) at each pixel, and each head has d features (Vaswani et al. 2017,
    "Attention is all you need", eq. 1 and section 3.2.2, https://arxiv.org/abs/1706.03762).

    Shapes: (n, channels, H, W) -> (n, channels, H, W).

    Args:
        channels: channels of h, divided among the heads.
        num_groups: groups of the GroupNorm.
        num_heads: number of attention heads.
        skip_rescale: divide the sum by sqrt(2), see `rescale_sum`.
    """

    def __init__(self, channels: int, *, num_groups: int, num_heads: int = 1, skip_rescale: bool = False) -> None:
        super().__init__()
        self.num_heads, self.skip_rescale = num_heads, skip_rescale
        self.norm = nn.GroupNorm(num_groups, channels, GROUP_NORM_EPS)
        # Three C -> C maps in one layer, whose mean fan is 2 C: scale 2 gives the variance of three separate layers.
        self.qkv = fan_avg(nn.Linear(channels, 3 * channels), scale=2)
        self.out = fan_avg(nn.Linear(channels, channels), scale=0)

    def forward(self, h: Tensor) -> Tensor:
        pixels = self.norm(h).flatten(2).mT  # (n, HW, C)
        qkv = self.qkv(pixels).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)  # (n, num_heads, HW, d) each
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        return rescale_sum(h + self.out(attended).mT.unflatten(2, h.shape[2:]), self.skip_rescale)


class UNetBlock(nn.Module):
    """A residual block, optionally followed by attention."""

    def __init__(self, residual: ResidualBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = self.residual(h, emb)
        return h if self.attention is None else self.attention(h)


class Downsample(nn.Module):
    """3x3 convolution with stride 2. Output pixel (i, j) sees rows 2i to 2i + 2 and columns 2j to 2j + 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = fan_avg(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution, fused into one operation.

    Upsampling repeats each pixel, so several taps of the 3x3 kernel multiply the same pixel. Summing these taps first
    turns the two operations into one transposed convolution of stride 2, whose 4x4 kernel is the flipped 3x3 kernel
    convolved with a 2x2 block of ones. This takes 16 multiplications per input pixel instead of 36.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = fan_avg(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        flipped = self.conv.weight.transpose(0, 1).flip(2, 3)  # (in, out, 3, 3)
        kernel = 4 * F.avg_pool2d(F.pad(flipped, (1, 1, 1, 1)), kernel_size=2, stride=1)  # (in, out, 4, 4)
        return F.conv_transpose2d(h, kernel, self.conv.bias, stride=2, padding=1)


class InputPyramid(nn.Module):
    """Feeds the downsampled input image into an encoder level.

    (h, image at twice the resolution) -> (h combined with the image, image at the resolution of h).
    """

    width: int
    """Channels of the returned h."""
    channels: int
    """Channels of the returned image."""


class InputSkip(InputPyramid):
    """Combines h with a 1x1 convolution of the input image, which is filtered and downsampled at each level.

    Args:
        channels: channels of the image.
        width: channels of h.
        taps: taps of the FIR filter.
        combine: ``sum``, or ``cat`` to concatenate the two to (n, 2 width, H, W).
    """

    def __init__(
        self, channels: int, width: int, *, taps: Sequence[float] = DEFAULT_TAPS, combine: str = "sum"
    ) -> None:
        super().__init__()
        if combine not in ("sum", "cat"):
            raise UserError(f"An input skip cannot have combine={combine}: choose sum or cat.")
        self.combine = combine
        self.width, self.channels = 2 * width if combine == "cat" else width, channels
        self.downsample = FIRDownsample(taps)
        self.conv = fan_avg(nn.Conv2d(channels, width, 1))

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.downsample(image)
        projected = self.conv(image)
        return (torch.cat([projected, h], dim=1) if self.combine == "cat" else h + projected), image


class ResidualInput(InputPyramid):
    """Adds a strided convolution of the image to the features h. The next level receives the sum in place of the image.

    Args:
        channels: channels of the image.
        width: channels of h.
        taps: taps of the FIR filter.
        skip_rescale: divide the sum by sqrt(2), see `rescale_sum`.
    """

    def __init__(
        self, channels: int, width: int, *, taps: Sequence[float] = DEFAULT_TAPS, skip_rescale: bool = True
    ) -> None:
        super().__init__()
        self.width = self.channels = width
        self.skip_rescale = skip_rescale
        self.downsample = FIRConvDownsample(channels, width, taps)
        fan_avg(self.downsample.conv)

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        h = rescale_sum(h + self.downsample(image), self.skip_rescale)
        return h, h


class OutputSkip(nn.Module):
    """Adds conv(silu(norm(h))) to the output image of the coarser levels and upsamples the sum by 2.

    Args:
        width: channels of h.
        channels: channels of the output image.
        num_groups: groups of the GroupNorm.
        taps: taps of the FIR filter.
    """

    def __init__(self, width: int, channels: int, num_groups: int, *, taps: Sequence[float] = DEFAULT_TAPS) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, width, GROUP_NORM_EPS)
        self.conv = fan_avg(nn.Conv2d(width, channels, 3, padding=1), scale=0)
        self.upsample = FIRUpsample(taps)

    def forward(self, h: Tensor, image: Tensor | None) -> Tensor:
        output = self.conv(F.silu(self.norm(h)))
        return self.upsample(output if image is None else image + output)
