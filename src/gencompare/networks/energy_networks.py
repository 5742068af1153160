"""Networks of energy-based models, which map an image to a scalar energy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.convnets import MIN_SIDE, pyramid_shapes
from gencompare.networks.gan_networks import apply_spectral_norm
from gencompare.networks.layers import he_normal_
from gencompare.networks.mlp import mlp


class EnergyNetwork(nn.Module):
    r"""A scalar energy per image, with a projection head for classes.

    .. math:: E(x, y) = w^T \phi(x) + b + v_y^T \phi(x)

    The head is that of Miyato and Koyama (2018), "cGANs with projection discriminator", eq. 3
    (https://arxiv.org/abs/1802.05637); without classes the last term is absent. :math:`v` is initialised to zero, so
    all classes start with the same energy.

    Shapes: x (n, C, H, W), label (n,) -> (n,).

    Args:
        trunk: the network phi, (n, C, H, W) -> (n, trunk.num_features).
        num_classes: number of classes, 0 for none.
        spectral_norm: divide every weight of the trunk by its largest singular value, estimated by power iteration
            (Miyato et al. 2018, "Spectral normalization for GANs", eq. 8, https://arxiv.org/abs/1802.05957). The head
            is not normalised, as in Du and Mordatch (2019), because it sets the scale of the energy.
    """

    def __init__(self, trunk: nn.Module, num_classes: int = 0, *, spectral_norm: bool = False) -> None:
        super().__init__()
        num_features = trunk.num_features
        assert isinstance(num_features, int)
        if spectral_norm:
            apply_spectral_norm(trunk)
        self.trunk = trunk
        self.head = nn.Linear(num_features, 1)
        self.classes = nn.Embedding(num_classes, num_features) if num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        phi = self.trunk(x)
        energy = self.head(phi).squeeze(1)
        return energy if self.classes is None else energy + (self.classes(label) * phi).sum(1)


class EnergyMLP(nn.Module):
    """An MLP of ``depth`` layers of ``width`` SiLU units, ``(n, *shape)`` -> (n, width), for points and tiny images."""

    def __init__(self, shape: tuple[int, int, int], *, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise UserError(f"model.energy.width={width} and model.energy.depth={depth} must be at least 1.")
        self.num_features = width
        self.net = mlp(math.prod(shape), width, width, depth - 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.net(x.flatten(1)))


class EnergyResNet(nn.Module):
    """The ResNet of Du and Mordatch (2019), "Implicit generation and modeling with energy-based models"
    (https://arxiv.org/abs/1903.08689), (n, C, H, W) -> (n, channels[-1]).

    A 3x3 convolution, then stages of ``num_blocks`` residual blocks, then sum pooling. The first block of each stage
    halves the resolution, as long as height and width are even and stay at least 4. There is no normalisation. With
    channels (128, 256, 512) and 3 blocks, the layers are those of the authors' unconditional network for CIFAR-10,
    ``ResNet32Large`` in github.com/openai/ebm_code_release, ``models.py``.

    Args:
        shape: (C, H, W) of the images.
        channels: channels of each stage.
        num_blocks: residual blocks per stage.
        negative_slope: slope of the leaky ReLUs for negative inputs. None uses SiLU instead, which makes the gradient
            that Langevin dynamics follows continuous.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: Sequence[int] = (32, 64),
        num_blocks: int = 1,
        negative_slope: float | None = None,
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or num_blocks < 1:
            raise UserError(
                f"model.energy.channels={list(channels)} must not be empty, and its entries and"
                f" model.energy.num_blocks={num_blocks} must be at least 1."
            )
        self.num_features = channels[-1]
        self.act = silu_or_leaky_relu(negative_slope)
        self.stem = nn.Conv2d(shape[0], channels[0], 3, padding=1)
        he_normal_(self.stem)
        self.blocks = nn.ModuleList()
        previous_width, (h, w) = channels[0], shape[1:]
        for width in channels:
            for k in range(num_blocks):
                downsample = k == 0 and h % 2 == w % 2 == 0 and min(h, w) >= 2 * MIN_SIDE
                h, w = (h // 2, w // 2) if downsample else (h, w)
                self.blocks.append(EnergyBlock(previous_width, width, downsample, self.act))
                previous_width = width

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.stem(x))
        for block in self.blocks:
            h = block(h)
        return h.sum((2, 3))


class EnergyConvNet(nn.Module):
    """A plain convolutional network, (n, C, H, W) -> (n, num_features).

    A 3x3 convolution, then a 4x4 convolution with stride 2 for each further resolution of `pyramid_shapes`. The output
    is flattened. For 32x32 images, the defaults are the layers of ``VanillaNet`` in github.com/point0bar1/ebm-anatomy,
    ``nets.py``, the code of Nijkamp et al. (2020), "On the anatomy of MCMC-based maximum likelihood learning of
    energy-based models" (https://arxiv.org/abs/1903.12370).

    Args:
        shape: (C, H, W) of the images.
        channels: channels at full resolution; doubled at each halving, up to ``max_channels``.
        max_channels: maximum number of channels.
        negative_slope: as in `EnergyResNet`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 32,
        max_channels: int = 256,
        negative_slope: float | None = 0.05,
    ) -> None:
        super().__init__()
        if channels < 1 or max_channels < 1:
            raise UserError(
                f"model.energy.channels={channels} and model.energy.max_channels={max_channels} must be at least 1."
            )
        shapes = pyramid_shapes(shape[1], shape[2], channels, max_channels)
        widths, self.num_features = [width for width, _, _ in shapes], math.prod(shapes[-1])
        self.act = silu_or_leaky_relu(negative_slope)
        convs = [nn.Conv2d(shape[0], widths[0], 3, padding=1)]
        convs += [nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)]
        for conv in convs:
            he_normal_(conv)
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.act(conv(x))
        return x.flatten(1)


def silu_or_leaky_relu(negative_slope: float | None) -> nn.Module:
    """Return a leaky ReLU with the given negative slope, or SiLU if the slope is None."""
    if negative_slope is not None and not 0 <= negative_slope < 1:
        raise UserError(f"model.energy.negative_slope={negative_slope} must be in [0, 1), or null for SiLU.")
    return nn.SiLU() if negative_slope is None else nn.LeakyReLU(negative_slope)


class EnergyBlock(nn.Module):
    """act([2x2 average pooling](skip(x) + conv(act(conv(x))))), with 3x3 convolutions.

    The skip is the identity, or a convolution if the number of channels changes.
    """

    def __init__(self, channels_in: int, channels_out: int, downsample: bool, act: nn.Module) -> None:
        super().__init__()
        self.downsample, self.act = downsample, act
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        he_normal_(self.conv1)
        he_normal_(self.conv2, scale=0.1)
        self.skip: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.skip = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.skip.weight, nonlinearity="linear")  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.skip(x) + self.conv2(self.act(self.conv1(x)))
        return self.act(F.avg_pool2d(h, 2) if self.downsample else h)
