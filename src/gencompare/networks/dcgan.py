"""The convolutional networks of DCGAN (Radford et al. 2016), as papers use them for 32x32 images."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.networks.class_norm import ClassNorm
from gencompare.networks.convnets import stages
from gencompare.networks.projection import ProjectionHead


class DCGANGenerator(nn.Module):
    """Latents (n, latent_dim) and labels (n,) to images (n, *shape) in (-1, 1), by transposed convolutions.

    Miyato et al. 2018, "Spectral normalization for GANs", table 3 (a): for 32x32 images a linear layer to 512 x 4 x 4,
    three transposed convolutions 4x4 with stride 2, to 256, 128 and 64 channels, each with normalisation (`ClassNorm`
    in the place of batch norm) and ReLU, and a convolution 3x3 to the image. Other sizes have more or fewer stages.

    Args:
        channels: at the finest resolution; doubled at each halving, up to ``max_channels``.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 64,
        max_channels: int = 512,
    ) -> None:
        super().__init__()
        plan = stages(shape[1], shape[2], channels, max_channels)[::-1]
        self.start = plan[0]
        widths = [width for width, _, _ in plan]
        self.root = nn.Linear(latent_dim, plan[0][0] * plan[0][1] * plan[0][2])
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(before, here, 4, stride=2, padding=1) for before, here in pairwise(widths)
        )
        self.norms = nn.ModuleList(ClassNorm(width, num_classes) for width in widths[1:])
        self.out = nn.Conv2d(widths[-1], shape[0], 3, padding=1)
        small_normal(self)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.root(z).unflatten(1, self.start)
        for up, norm in zip(self.ups, self.norms, strict=True):
            h = F.relu(norm(up(h), label))
        return torch.tanh(self.out(h).float())


class DCGANDiscriminator(nn.Module):
    """Images (n, *shape) and labels (n,) to scores (n,), by convolutions with stride.

    The same paper, table 3 (b): at each resolution a convolution 3x3 (64, 128, 256 and 512 channels for 32x32 images)
    and, but for the last, one 4x4 with stride 2 that keeps the channels, each with a leaky ReLU of slope 0.1; then one
    linear layer. It has no normalisation but that of its weights, if any.
    """

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int = 0, *, channels: int = 64, max_channels: int = 512
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        before = shape[0]
        plan = stages(shape[1], shape[2], channels, max_channels)
        for width, *_ in plan:
            self.convs.append(nn.Conv2d(before, width, 3, padding=1))
            self.convs.append(nn.Conv2d(width, width, 4, stride=2, padding=1))
            before = width
        del self.convs[-1]
        width, height, across = plan[-1]
        self.head = ProjectionHead(width * height * across, num_classes)
        small_normal(self)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
        return self.head(x.flatten(1), label)


def small_normal(network: nn.Module) -> None:
    """Weights from N(0, 0.02^2) (Radford et al. 2016, section 4), biases nought."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
