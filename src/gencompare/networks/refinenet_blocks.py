"""The layers of a RefineNet. Each takes features h, and what the network is told, and gives new h.

Shapes: h (n, C, H, W), told (n, T). The parts are those of Lin et al. (2017), "RefineNet: multi-path refinement
networks for high-resolution semantic segmentation", section 3.2, with ELU, as Song and Ermon (2019), "Generative
modeling by estimating gradients of the data distribution", appendix A, and the code published with it have them.
``norm`` makes a normalisation ``(h, told) -> h`` of so many channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
Pool = Callable[..., Tensor]


class DilatedBlock(nn.Module):
    """shortcut(h) + conv(elu(norm(conv(elu(norm(h)))))), then its mean over 2x2 pixels where asked for.

    Yu and Koltun (2016), "Multi-scale context aggregation by dilated convolutions", eq. 2: taps ``dilation`` pixels
    apart see further, and no pixel is lost.

    Args:
        opens: whether the block is the first of a stage that sees further than the one before, and so has a convolution
            on its shortcut: 1x1 where it halves the side, else as the others.
        halve: take the mean at the end.
    """

    def __init__(
        self, channels_in: int, channels_out: int, norm: Norm, *, dilation: int, opens: bool, halve: bool
    ) -> None:
        super().__init__()
        self.halve = halve
        self.norm1, self.norm2 = norm(channels_in), norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(channels_in, channels_out, 3, padding=dilation, dilation=dilation)
        self.shortcut: nn.Module = nn.Identity()
        if opens and halve:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1)
        elif opens:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 3, padding=dilation, dilation=dilation)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        r = self.conv1(F.elu(self.norm1(h, told)))
        r = self.shortcut(h) + self.conv2(F.elu(self.norm2(r, told)))
        return F.avg_pool2d(r, 2) if self.halve else r


class ResidualConvUnits(nn.Module):
    """``units`` times h + conv(elu(norm(conv(elu(norm(h)))))), the convolutions without bias."""

    def __init__(self, channels: int, units: int, norm: Norm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(channels) for _ in range(2 * units))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2 * units))

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        for i in range(0, len(self.convs), 2):
            r = self.convs[i](F.elu(self.norms[i](h, told)))
            h = h + self.convs[i + 1](F.elu(self.norms[i + 1](r, told)))
        return h


class Fusion(nn.Module):
    """The sum of conv(norm(h)) over several h, each brought to the size of the first by bilinear interpolation."""

    def __init__(self, channels_in: Sequence[int], channels_out: int, norm: Norm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(channels) for channels in channels_in)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels_out, 3, padding=1) for channels in channels_in)

    def forward(self, hs: Sequence[Tensor], told: Tensor) -> Tensor:
        parts = [conv(norm(h, told)) for h, norm, conv in zip(hs, self.norms, self.convs, strict=True)]
        total, size = parts[0], parts[0].shape[2:]
        for part in parts[1:]:
            total = total + F.interpolate(part, size=size, mode="bilinear", align_corners=True)
        return total


class ChainedPooling(nn.Module):
    """g + p_1 + p_2 with g = elu(h), p_1 = conv(pool(norm(g))) and p_2 the same of p_1; pools are 5x5, of stride 1."""

    def __init__(self, channels: int, norm: Norm, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.norms = nn.ModuleList(norm(channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        total = path = F.elu(h)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            path = conv(self.pool(norm(path, told), 5, stride=1, padding=2))
            total = total + path
        return total


class RefineBlock(nn.Module):
    """Features of a stage and, where given, what was made of the coarser ones -> both in one, at the size of the first.

    Two residual units on each, fusion, chained pooling, and ``last_units`` residual units.

    Args:
        channels_in: of each input.
    """

    def __init__(
        self, channels_in: Sequence[int], channels_out: int, norm: Norm, pool: Pool, *, last_units: int
    ) -> None:
        super().__init__()
        self.adapt = nn.ModuleList(ResidualConvUnits(channels, 2, norm) for channels in channels_in)
        self.fuse = Fusion(channels_in, channels_out, norm) if len(channels_in) > 1 else None
        self.pool = ChainedPooling(channels_out, norm, pool)
        self.last = ResidualConvUnits(channels_out, last_units, norm)

    def forward(self, hs: Sequence[Tensor], told: Tensor) -> Tensor:
        adapted = [adapt(h, told) for h, adapt in zip(hs, self.adapt, strict=True)]
        h = adapted[0] if self.fuse is None else self.fuse(adapted, told)
        return self.last(self.pool(h, told), told)
