"""Networks of energy-based models: from an image to one number that is smooth in the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.convnets import SMALLEST, stages
from gencompare.networks.gan_networks import normalize_spectrally
from gencompare.networks.layers import he_normal
from gencompare.networks.mlp import mlp


class EnergyNetwork(nn.Module):
    """E(x, y) = w . phi(x) + b + v_y . phi(x), (n, C, H, W) and labels (n,) to (n,).

    The head of Miyato and Koyama (2018), "cGANs with projection discriminator", eq. 3; without classes the last term is
    left out. v starts at nought, so that all classes start with the same energy.

    Args:
        trunk: phi, (n, C, H, W) -> (n, trunk.features).
        spectral_norm: divide every weight of the trunk by its largest singular value, estimated by power iteration
            (Miyato et al. 2018, "Spectral normalization for GANs", eq. 8). The head stays free, as in Du and Mordatch
            (2019): it decides how far energies lie apart.
    """

    def __init__(self, trunk: nn.Module, num_classes: int = 0, *, spectral_norm: bool = False) -> None:
        super().__init__()
        features = trunk.features
        assert isinstance(features, int)
        if spectral_norm:
            normalize_spectrally(trunk)
        self.trunk = trunk
        self.head = nn.Linear(features, 1)
        self.classes = nn.Embedding(num_classes, features) if num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        phi = self.trunk(x)
        energy = self.head(phi).squeeze(1)
        return energy if self.classes is None else energy + (self.classes(label) * phi).sum(1)


class EnergyMLP(nn.Module):
    """``depth`` layers of ``width`` SiLU units over all pixels, (n, *shape) -> (n, width): for points, tiny images."""

    def __init__(self, shape: tuple[int, int, int], *, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise UserError(f"model.energy.width={width}, model.energy.depth={depth}: both must be at least 1.")
        self.features = width
        self.net = mlp(math.prod(shape), width, width, depth - 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.net(x.flatten(1)))


class EnergyResNet(nn.Module):
    """The ResNet of Du and Mordatch (2019), (n, C, H, W) -> (n, channels[-1]).

    A 3x3 convolution, then ``blocks`` residual blocks with each number of ``channels``, of which the first halves the
    sides, as long as both are even and stay at least 4 long; then the sum over all places. No layer normalises over an
    image or a batch. With channels (128, 256, 512) and 3 blocks it has the layers of the authors' network for CIFAR-10
    (without labels): ``ResNet32Large`` in github.com/openai/ebm_code_release, ``models.py``.

    Args:
        channels: one number a stage.
        blocks: a stage.
        leaky: the slope below nought of leaky ReLUs; None has SiLU ("swish") in their place, whose gradient in x, which
            Langevin steps follow, has no jumps.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        leaky: float | None = None,
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or blocks < 1:
            raise UserError(
                f"model.energy.channels={list(channels)}, model.energy.blocks={blocks}: give at least one number, all"
                " at least 1."
            )
        self.features = channels[-1]
        self.act = smooth_or_leaky(leaky)
        self.stem = nn.Conv2d(shape[0], channels[0], 3, padding=1)
        he_normal(self.stem)
        self.blocks = nn.ModuleList()
        before, (h, w) = channels[0], shape[1:]
        for here in channels:
            for k in range(blocks):
                halve = k == 0 and h % 2 == w % 2 == 0 and min(h, w) >= 2 * SMALLEST
                h, w = (h // 2, w // 2) if halve else (h, w)
                self.blocks.append(EnergyBlock(before, here, halve, self.act))
                before = here

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.stem(x))
        for block in self.blocks:
            h = block(h)
        return h.sum((2, 3))


class EnergyConvNet(nn.Module):
    """A plain convolutional network, (n, C, H, W) -> (n, numbers of the last resolution).

    A 3x3 convolution, then one 4x4 with stride 2 for each resolution of `convnets.stages` after the first. The head
    weighs each place by itself. Nijkamp et al. (2020), "On the anatomy of MCMC-based maximum likelihood learning of
    energy-based models": with its defaults it has the layers of ``VanillaNet`` in github.com/point0bar1/ebm-anatomy,
    ``nets.py``, for 32x32 images.

    Args:
        channels: at the finest resolution; doubled at each halving, up to ``max_channels``.
        leaky: as in `EnergyResNet`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 32,
        max_channels: int = 256,
        leaky: float | None = 0.05,
    ) -> None:
        super().__init__()
        if channels < 1 or max_channels < 1:
            raise UserError(
                f"model.energy.channels={channels}, model.energy.max_channels={max_channels}: both must be at least 1."
            )
        plan = stages(shape[1], shape[2], channels, max_channels)
        widths, self.features = [width for width, _, _ in plan], math.prod(plan[-1])
        self.act = smooth_or_leaky(leaky)
        convs = [nn.Conv2d(shape[0], widths[0], 3, padding=1)]
        convs += [nn.Conv2d(before, here, 4, stride=2, padding=1) for before, here in pairwise(widths)]
        for conv in convs:
            he_normal(conv)
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.act(conv(x))
        return x.flatten(1)


def smooth_or_leaky(leaky: float | None) -> nn.Module:
    """Leaky ReLU of the slope below nought; SiLU for None."""
    return nn.SiLU() if leaky is None else nn.LeakyReLU(leaky)


class EnergyBlock(nn.Module):
    """act([2x2 mean](skip(x) + conv(act(conv(x))))): all convolutions 3x3, a skip only where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, halve: bool, act: nn.Module) -> None:
        super().__init__()
        self.halve, self.act = halve, act
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        he_normal(self.conv1)
        he_normal(self.conv2, scale=0.1)
        self.skip: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.skip = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.skip.weight, nonlinearity="linear")  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.skip(x) + self.conv2(self.act(self.conv1(x)))
        return self.act(F.avg_pool2d(h, 2) if self.halve else h)
