"""The ResNets of SNGAN for small images.

Miyato et al. 2018, "Spectral normalization for GANs", table 4 and figure 8 (https://arxiv.org/abs/1802.05957). With
classes, the networks follow Miyato and Koyama 2018, "cGANs with projection discriminator"
(https://arxiv.org/abs/1802.05637). `ClassConditionalGroupNorm` replaces the generator's batch norm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError, check_counts
from gencompare.networks.convnets import pyramid_shapes
from gencompare.networks.gan_networks import ProjectionHead
from gencompare.networks.layers import ClassConditionalGroupNorm, at_least_float32, upsample_nearest


class SNGANGenerator(nn.Module):
    """Generator from latents (n, latent_dim) and labels (n,) to images ``(n, *shape)`` in (-1, 1).

    Table 4 (a): a linear layer to 256 x 4 x 4, three residual blocks that upsample, normalisation, ReLU and a 3x3
    convolution. Other image sizes have more or fewer blocks.

    Args:
        latent_dim: dimension of the latent.
        shape: (C, H, W) of the images.
        num_classes: number of classes, 0 for none.
        channels: channels at every resolution.
    """

    def __init__(
        self, latent_dim: int, shape: tuple[int, int, int], num_classes: int = 0, *, channels: int = 256
    ) -> None:
        super().__init__()
        check_counts(type(self).__name__, channels=channels)
        shapes = pyramid_shapes(shape[1], shape[2], channels, channels)
        self.start_shape = shapes[-1]
        self.root = nn.Linear(latent_dim, math.prod(self.start_shape))
        self.blocks = nn.ModuleList(UpBlock(channels, num_classes) for _ in shapes[1:])
        self.norm = ClassConditionalGroupNorm(channels)
        self.out = nn.Conv2d(channels, shape[0], 3, padding=1)
        glorot_uniform_(self.root, self.out)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.root(z).unflatten(1, self.start_shape)
        for block in self.blocks:
            h = block(h, label)
        return torch.tanh(at_least_float32(self.out(F.relu(self.norm(h)))))


class SNGANDiscriminator(nn.Module):
    """Discriminator from images ``(n, *shape)`` and labels (n,) to scores (n,).

    Table 4 (b): two residual blocks that downsample, two that do not, all with 128 channels, ReLU, sum pooling and a
    linear layer. Intended for use with spectral norm (``model.spectral_norm=true``).

    Args:
        shape: (C, H, W) of the images; H and W must be multiples of 4.
        num_classes: number of classes, 0 for none.
        channels: channels of every block.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int = 0, *, channels: int = 128) -> None:
        super().__init__()
        check_counts(type(self).__name__, channels=channels)
        if shape[1] % 4 or shape[2] % 4:
            raise UserError(
                f"SNGAN's discriminator halves its images twice, which is impossible for {shape[1]}x{shape[2]}: use"
                " model/discriminator=resnet or mlp."
            )
        self.blocks = nn.Sequential(
            FirstBlock(shape[0], channels),
            DownBlock(channels, downsample=True),
            DownBlock(channels, downsample=False),
            DownBlock(channels, downsample=False),
        )
        self.head = ProjectionHead(channels, num_classes)
        glorot_uniform_(self.head.score)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.head(F.relu(self.blocks(x)).sum((2, 3)), label)


class UpBlock(nn.Module):
    """Normalisation, ReLU, upsampling, convolution, normalisation, ReLU, convolution; with a shortcut."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            ClassConditionalGroupNorm(channels, num_classes),
            ClassConditionalGroupNorm(channels, num_classes),
        )
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.skip = nn.Conv2d(channels, channels, 1)
        glorot_uniform_(self.conv1, self.conv2, gain=math.sqrt(2))
        glorot_uniform_(self.skip)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        h = self.conv1(upsample_nearest(F.relu(self.norm1(x, label))))
        # A 1x1 convolution commutes with nearest-neighbour upsampling and is cheaper before it.
        return self.conv2(F.relu(self.norm2(h, label))) + upsample_nearest(self.skip(x))


class DownBlock(nn.Module):
    """ReLU, convolution, ReLU, convolution and, if ``downsample``, 2x2 average pooling; with a shortcut."""

    def __init__(self, channels: int, *, downsample: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.skip = nn.Conv2d(channels, channels, 1) if downsample else nn.Identity()
        glorot_uniform_(self.conv1, self.conv2, gain=math.sqrt(2))
        if isinstance(self.skip, nn.Conv2d):
            glorot_uniform_(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2)) if self.downsample else h + x


class FirstBlock(nn.Module):
    """First block, without ReLU on the image: convolution, ReLU, convolution, 2x2 average pooling; with a shortcut."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1)
        glorot_uniform_(self.conv1, self.conv2, gain=math.sqrt(2))
        glorot_uniform_(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv2(F.relu(self.conv1(x))), 2) + self.skip(F.avg_pool2d(x, 2))


def glorot_uniform_(*layers: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Initialise weights uniformly with variance 2 gain^2 / (fan_in + fan_out) and biases to zero, as in the published
    code (github.com/pfnet-research/sngan_projection)."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, gain)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
