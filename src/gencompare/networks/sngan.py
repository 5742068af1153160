"""The residual networks of SNGAN for small images.

Miyato et al. 2018, "Spectral normalization for GANs", table 4 and figure 8; with classes, Miyato and Koyama 2018,
"cGANs with projection discriminator". `ClassConditionalGroupNorm` replaces the batch norm
of the generator.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.convnets import stages
from gencompare.networks.gan_networks import ProjectionHead
from gencompare.networks.layers import ClassConditionalGroupNorm


class SNGANGenerator(nn.Module):
    """Latents (n, latent_dim) and labels (n,) to images (n, *shape) in (-1, 1).

    Table 4 (a): a linear layer to 256 x 4 x 4, three residual blocks that double the side, normalisation, ReLU and a
    convolution 3x3. Other sizes have more or fewer blocks.
    """

    def __init__(
        self, latent_dim: int, shape: tuple[int, int, int], num_classes: int = 0, *, channels: int = 256
    ) -> None:
        super().__init__()
        plan = stages(shape[1], shape[2], channels, channels)
        self.start = plan[-1]
        self.root = nn.Linear(latent_dim, math.prod(self.start))
        self.blocks = nn.ModuleList(UpBlock(channels, num_classes) for _ in plan[1:])
        self.norm = ClassConditionalGroupNorm(channels)
        self.out = nn.Conv2d(channels, shape[0], 3, padding=1)
        glorot(self.root, self.out)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.root(z).unflatten(1, self.start)
        for block in self.blocks:
            h = block(h, label)
        return torch.tanh(self.out(F.relu(self.norm(h))).float())


class SNGANDiscriminator(nn.Module):
    """Images (n, *shape) and labels (n,) to scores (n,).

    Table 4 (b): two residual blocks that halve the side, two that keep it, all with 128 channels, ReLU, the sum over
    places, a linear layer. It is meant for weights of spectral norm 1 (``model.spectral_norm=true``).
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int = 0, *, channels: int = 128) -> None:
        super().__init__()
        if shape[1] % 4 or shape[2] % 4:
            raise UserError(
                f"SNGAN's discriminator halves the sides twice, and {shape[1]}x{shape[2]} cannot be: use"
                " model/discriminator=resnet or mlp."
            )
        self.blocks = nn.Sequential(
            FirstBlock(shape[0], channels),
            DownBlock(channels, down=True),
            DownBlock(channels, down=False),
            DownBlock(channels, down=False),
        )
        self.head = ProjectionHead(channels, num_classes)
        glorot(self.head.score)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.head(F.relu(self.blocks(x)).sum((2, 3)), label)


class UpBlock(nn.Module):
    """Normalisation, ReLU, doubling of the side, convolution, normalisation, ReLU, convolution; and a shortcut."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            ClassConditionalGroupNorm(channels, num_classes),
            ClassConditionalGroupNorm(channels, num_classes),
        )
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.skip = nn.Conv2d(channels, channels, 1)
        glorot(self.conv1, self.conv2, gain=math.sqrt(2))
        glorot(self.skip)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        h = self.conv1(_double(F.relu(self.norm1(x, label))))
        # A convolution 1x1 and the repetition of pixels can be done in either order.
        return self.conv2(F.relu(self.norm2(h, label))) + _double(self.skip(x))


class DownBlock(nn.Module):
    """ReLU, convolution, ReLU, convolution and, if ``down``, the mean of 2x2 pixels; and a shortcut."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.skip = nn.Conv2d(channels, channels, 1) if down else nn.Identity()
        glorot(self.conv1, self.conv2, gain=math.sqrt(2))
        if isinstance(self.skip, nn.Conv2d):
            glorot(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2)) if self.down else h + x


class FirstBlock(nn.Module):
    """The same at the image itself, which no ReLU should see: convolution, ReLU, convolution, mean of 2x2 pixels."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1)
        glorot(self.conv1, self.conv2, gain=math.sqrt(2))
        glorot(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv2(F.relu(self.conv1(x))), 2) + self.skip(F.avg_pool2d(x, 2))


def glorot(*layers: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Weights uniform with variance 2 gain^2 / (fan in + fan out), biases nought, as in the code published with the
    paper (github.com/pfnet-research/sngan_projection)."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, gain)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
