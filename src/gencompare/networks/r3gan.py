"""The networks of R3GAN: residual blocks of grouped convolutions, without any normalisation.

Huang et al. (2024), "The GAN is dead; long live the GAN! A modern GAN baseline", section 4 and appendix; sizes and
first weights as in the code published with it (github.com/brownvc/R3GAN), which has no tanh at the end either.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.convnets import stages
from gencompare.networks.layers import FIRDownsample, FIRUpsample
from gencompare.networks.mlp import hstack

FILTER = (1, 3, 3, 1)
SLOPE = 0.2
GAIN = math.sqrt(2 / (1 + SLOPE**2))
"""Keeps the size of what a leaky ReLU hands on (He et al. 2015, eq. 15)."""


class R3GANGenerator(nn.Module):
    """Latents (n, latent_dim) and labels (n,) to images (n, *shape); values beyond [-1, 1] are possible.

    A learned basis of 4x4 images is weighed by the latent (and the label's embedding beside it); then at each
    resolution ``blocks`` residual blocks, the side doubled with a filter in between; then one convolution 1x1.

    Args:
        channels: everywhere.
        blocks: residual blocks a resolution.
        expansion: channels within a block, as a multiple of ``channels``.
        group_width: channels in each group of a block's convolution 3x3.
        label_dim: size of the label's embedding.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 768,
        blocks: int = 2,
        expansion: int = 2,
        group_width: int = 16,
        label_dim: int = 64,
    ) -> None:
        super().__init__()
        plan = stages(shape[1], shape[2], channels, channels)
        self.labels = nn.Embedding(num_classes, label_dim) if num_classes else None
        self.weigh = nn.Linear(latent_dim + (label_dim if num_classes else 0), channels, bias=False)
        self.basis = nn.Parameter(torch.randn(plan[-1]))
        self.stages = nn.ModuleList(
            residual_blocks(channels, blocks, expansion, group_width, blocks * len(plan)) for _ in plan
        )
        self.up = FIRUpsample(FILTER)
        self.out = nn.Conv2d(channels, shape[0], 1, bias=False)
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=num_classes**-0.5)  # a linear layer on one-hot labels
        scaled(self.weigh)
        scaled(self.out)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        style = z if self.labels is None else hstack(z, self.labels(label))
        h = self.basis * self.weigh(style)[:, :, None, None]
        for k, stage in enumerate(self.stages):
            h = stage(self.up(h) if k else h)
        return self.out(h)


class R3GANDiscriminator(nn.Module):
    """Images (n, *shape) and labels (n,) to scores (n,): the generator's mirror image.

    At 4x4 each channel is weighed by a learned image and summed up, and a linear layer follows: to one score, or with
    classes to ``channels`` features, whose product with the class's vector is the score (Miyato and Koyama 2018, eq. 3,
    without the term that is the same for all classes).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 768,
        blocks: int = 2,
        expansion: int = 2,
        group_width: int = 16,
    ) -> None:
        super().__init__()
        plan = stages(shape[1], shape[2], channels, channels)
        self.stem = nn.Conv2d(shape[0], channels, 1, bias=False)
        self.stages = nn.ModuleList(
            residual_blocks(channels, blocks, expansion, group_width, blocks * len(plan)) for _ in plan
        )
        self.down = FIRDownsample(FILTER)
        self.basis = nn.Conv2d(channels, channels, plan[-1][1:], groups=channels, bias=False)
        self.out = nn.Linear(channels, channels if num_classes else 1, bias=False)
        self.classes = nn.Embedding(num_classes, channels) if num_classes else None
        for layer in (self.stem, self.basis, self.out):
            scaled(layer)
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=(channels * num_classes) ** -0.5)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.stem(x)
        for k, stage in enumerate(self.stages):
            h = stage(self.down(h) if k else h)
        found = self.out(self.basis(h).flatten(1))
        return found.squeeze(1) if self.classes is None else (found * self.classes(label)).sum(1)


class R3GANBlock(nn.Module):
    """x + f(x): a convolution 1x1 that widens, a grouped one 3x3, one 1x1 that narrows, leaky ReLUs in between.

    f is nought at the start, and the weights within are so small that a step changes all ``depth`` blocks together by
    no more than it would one (Zhang et al. 2019, "Fixup initialization", section 3: three layers, hence
    depth^(-1 / 4)).
    """

    def __init__(self, channels: int, expansion: int, group_width: int, depth: int) -> None:
        super().__init__()
        wide = expansion * channels
        if wide % group_width:
            raise UserError(
                f"{wide} channels within a block (channels={channels} times expansion={expansion}) cannot be shared"
                f" out in groups of group_width={group_width}."
            )
        self.widen = nn.Conv2d(channels, wide, 1)
        self.mix = nn.Conv2d(wide, wide, 3, padding=1, groups=wide // group_width)
        self.narrow = nn.Conv2d(wide, channels, 1, bias=False)
        scaled(self.widen, GAIN * depth**-0.25)
        scaled(self.mix, GAIN * depth**-0.25)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.widen(x), SLOPE)
        return x + self.narrow(F.leaky_relu(self.mix(h), SLOPE))


def residual_blocks(channels: int, blocks: int, expansion: int, group_width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(R3GANBlock(channels, expansion, group_width, depth) for _ in range(blocks)))


def scaled(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Weights from N(0, gain^2 / fan in), biases nought."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
