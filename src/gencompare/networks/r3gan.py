"""The networks of R3GAN: residual blocks of grouped convolutions without normalisation.

Huang et al. (2024), "The GAN is dead; long live the GAN! A modern GAN baseline", section 4 and appendix
(https://arxiv.org/abs/2501.05441). Sizes and initialisation follow the published code (github.com/brownvc/R3GAN), whose
generator has no final tanh.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError, check_counts
from gencompare.networks.convnets import pyramid_shapes
from gencompare.networks.layers import FIRDownsample, FIRUpsample
from gencompare.networks.mlp import hstack

FILTER_TAPS = (1, 3, 3, 1)
NEGATIVE_SLOPE = 0.2
GAIN = math.sqrt(2 / (1 + NEGATIVE_SLOPE**2))
"""Gain that preserves the variance through a leaky ReLU (He et al. 2015, eq. 15)."""


class R3GANGenerator(nn.Module):
    """Generator from latents (n, latent_dim) and labels (n,) to images ``(n, *shape)``, which may exceed [-1, 1].

    A learned basis of 4x4 feature maps is scaled by a linear function of the latent and the label embedding; then
    ``num_blocks`` residual blocks per resolution, with filtered upsampling in between; then a 1x1 convolution.

    Args:
        latent_dim: dimension of the latent.
        shape: (C, H, W) of the images.
        num_classes: number of classes, 0 for none.
        channels: channels at every resolution.
        num_blocks: residual blocks per resolution.
        expansion: channels inside a block as a multiple of ``channels``.
        group_width: channels per group of the grouped 3x3 convolutions.
        label_dim: dimension of the label embedding.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 768,
        num_blocks: int = 2,
        expansion: int = 2,
        group_width: int = 16,
        label_dim: int = 64,
    ) -> None:
        super().__init__()
        check_r3gan_sizes(self, channels, num_blocks, expansion, group_width)
        check_counts(type(self).__name__, label_dim=label_dim)
        shapes = pyramid_shapes(shape[1], shape[2], channels, channels)
        self.labels = nn.Embedding(num_classes, label_dim) if num_classes else None
        self.weigh = nn.Linear(latent_dim + (label_dim if num_classes else 0), channels, bias=False)
        self.basis = nn.Parameter(torch.randn(shapes[-1]))
        self.stages = nn.ModuleList(
            residual_blocks(channels, num_blocks, expansion, group_width, num_blocks * len(shapes)) for _ in shapes
        )
        self.up = FIRUpsample(FILTER_TAPS)
        self.out = nn.Conv2d(channels, shape[0], 1, bias=False)
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=num_classes**-0.5)  # like a linear layer on one-hot labels
        fan_in_normal_(self.weigh)
        fan_in_normal_(self.out)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        style = z if self.labels is None else hstack(z, self.labels(label))
        h = self.basis * self.weigh(style)[:, :, None, None]
        for k, stage in enumerate(self.stages):
            h = stage(self.up(h) if k else h)
        return self.out(h)


class R3GANDiscriminator(nn.Module):
    """Discriminator from images ``(n, *shape)`` and labels (n,) to scores (n,), the mirror image of `R3GANGenerator`.

    At the coarsest resolution a depthwise convolution over the whole image and a linear layer follow. The linear layer
    gives a score or, with classes, ``channels`` features, whose inner product with a learned class vector is the score
    (Miyato and Koyama 2018, eq. 3, without the unconditional term).

    Args:
        shape: (C, H, W) of the images.
        num_classes: number of classes, 0 for none.
        channels: channels at every resolution.
        num_blocks: residual blocks per resolution.
        expansion: channels inside a block as a multiple of ``channels``.
        group_width: channels per group of the grouped 3x3 convolutions.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 768,
        num_blocks: int = 2,
        expansion: int = 2,
        group_width: int = 16,
    ) -> None:
        super().__init__()
        check_r3gan_sizes(self, channels, num_blocks, expansion, group_width)
        shapes = pyramid_shapes(shape[1], shape[2], channels, channels)
        self.stem = nn.Conv2d(shape[0], channels, 1, bias=False)
        self.stages = nn.ModuleList(
            residual_blocks(channels, num_blocks, expansion, group_width, num_blocks * len(shapes)) for _ in shapes
        )
        self.down = FIRDownsample(FILTER_TAPS)
        self.basis = nn.Conv2d(channels, channels, shapes[-1][1:], groups=channels, bias=False)
        self.out = nn.Linear(channels, channels if num_classes else 1, bias=False)
        self.classes = nn.Embedding(num_classes, channels) if num_classes else None
        for layer in (self.stem, self.basis, self.out):
            fan_in_normal_(layer)
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=(channels * num_classes) ** -0.5)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.stem(x)
        for k, stage in enumerate(self.stages):
            h = stage(self.down(h) if k else h)
        features = self.out(self.basis(h).flatten(1))
        return features.squeeze(1) if self.classes is None else (features * self.classes(label)).sum(1)


def check_r3gan_sizes(network: nn.Module, channels: int, num_blocks: int, expansion: int, group_width: int) -> None:
    """Raise `UserError` unless all sizes are positive whole numbers."""
    check_counts(
        type(network).__name__, channels=channels, num_blocks=num_blocks, expansion=expansion, group_width=group_width
    )


class R3GANBlock(nn.Module):
    """x + f(x), where f is a widening 1x1, a grouped 3x3 and a narrowing 1x1 convolution with leaky ReLUs in between.

    f is zero at initialisation. Its first weights are scaled by depth^(-1 / 4), so that the change in the output per
    training step is about independent of the number ``depth`` of blocks in the network (Zhang et al. 2019, "Fixup
    initialization", section 3, for branches of three layers, https://arxiv.org/abs/1901.09321).
    """

    def __init__(self, channels: int, expansion: int, group_width: int, depth: int) -> None:
        super().__init__()
        hidden = expansion * channels
        if hidden % group_width:
            raise UserError(
                f"{hidden} channels inside a block (channels={channels} times expansion={expansion}) are not divisible"
                f" by group_width={group_width}."
            )
        self.widen = nn.Conv2d(channels, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden // group_width)
        self.narrow = nn.Conv2d(hidden, channels, 1, bias=False)
        fan_in_normal_(self.widen, GAIN * depth**-0.25)
        fan_in_normal_(self.mix, GAIN * depth**-0.25)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.widen(x), NEGATIVE_SLOPE)
        return x + self.narrow(F.leaky_relu(self.mix(h), NEGATIVE_SLOPE))


def residual_blocks(channels: int, num_blocks: int, expansion: int, group_width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(R3GANBlock(channels, expansion, group_width, depth) for _ in range(num_blocks)))


def fan_in_normal_(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Initialise weights from N(0, gain^2 / fan_in) and biases to zero."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
