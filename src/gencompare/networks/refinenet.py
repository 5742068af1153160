"""The RefineNet of NCSN."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.conditioning import ConditionEmbedding
from gencompare.networks.layers import InstanceNormPlus, NoNorm

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


class RefineNet(nn.Module):
    """The 4-cascaded RefineNet of NCSN (Song and Ermon 2019, "Generative modeling by estimating gradients of the data
    distribution", appendix A), and that of NCSNv2 (Song and Ermon 2020, "Improved techniques for training score-based
    generative models"), as the code published with each has them.

    Four stages of two residual blocks each: the second halves the image, the third and fourth see further by dilated
    convolutions (2 and 4). Four refining blocks go back from the last stage to the first, each fed with its stage and
    with what the one before has made.

    With several ``levels`` it is NCSN's: every normalisation, also in the refining blocks, has parameters for each
    level of noise, and pooling is by mean. noise_cond is then the level's index, from 0 to levels - 1 (the noise
    conditioning `LevelIndex`), so the schedule must have that many: a model reads ``noise_levels``, and refuses others.
    With one level it is NCSNv2's: no normalisation in the refining blocks, pooling by maximum, and noise_cond is not
    looked at, so every schedule will do. Its output over the noise is then the score (section 3.3 there), which is
    ``model/parameterization=eps`` but for the sign.

    Two things are ours: the output is nought at the start, as that of every network here; and conditions, which the
    papers do not have, add to the parameters of every normalisation.

    Shapes: x (n, C, H, W), noise_cond (n,), ``cond`` as `ConditionEmbedding` has it -> (n, out_channels, H, W).

    Args:
        shape: (C, H, W) of x; H and W even, at least 4.
        num_classes: 0 for a network without labels; num_classes itself means "no label".
        channels: width of the first stage, half of that of the others.
        levels: noise levels that are told apart.
        low_res: channels of the image ``cond["low_res"]``, 0 for none.
        embedding_dim: length of ``cond["embedding"]``, 0 for none.
        augment_dim: length of ``cond["augment"]``, 0 for none.
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int,
        num_classes: int = 0,
        *,
        channels: int = 128,
        levels: int = 1,
        low_res: int = 0,
        embedding_dim: int = 0,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        if channels < 2 or levels < 1:
            raise UserError(
                f"A RefineNet needs at least 2 channels and 1 noise level, not channels={channels} and levels={levels}."
            )
        if shape[1] % 2 or shape[2] % 2 or min(shape[1:]) < 4:
            raise UserError(
                f"A RefineNet halves its images, which {shape[1]}x{shape[2]} does not allow: give images of even sides"
                " of at least 4, or use model/network=dit or mlp."
            )
        self.noise_levels = levels
        self.emb_dim = 4 * channels if num_classes or embedding_dim or augment_dim else 0
        self.conditions = ConditionEmbedding(
            self.emb_dim,
            num_classes,
            low_res=low_res,
            embedding_dim=embedding_dim,
            augment_dim=augment_dim,
            noise_dim=self.emb_dim,
        )
        norm = partial(InstanceNormPlus, levels=levels, emb_dim=self.emb_dim)
        refine: Any = (
            partial(RefineBlock, norm=norm, pool=F.avg_pool2d)
            if levels > 1
            else partial(RefineBlock, norm=lambda _: NoNorm(), pool=F.max_pool2d)
        )

        self.stem = nn.Conv2d(shape[0] + low_res, channels, 3, padding=1)
        wide = 2 * channels
        self.stages = nn.ModuleList()
        for before, width, dilation, halve in (
            (channels, channels, 1, False),
            (channels, wide, 1, True),
            (wide, wide, 2, False),
            (wide, wide, 4, False),
        ):
            opens = halve or dilation > 1
            first = DilatedBlock(before, width, norm, dilation=dilation, opens=opens, halve=halve)
            second = DilatedBlock(width, width, norm, dilation=dilation, opens=False, halve=False)
            self.stages.append(nn.ModuleList([first, second]))
        self.refine = nn.ModuleList(
            [
                refine([wide], wide, last_units=1),
                refine([wide, wide], wide, last_units=1),
                refine([wide, wide], channels, last_units=1),
                refine([channels, channels], channels, last_units=3),
            ]
        )
        self.norm = norm(channels)
        self.out = nn.Conv2d(channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        told = self.told(noise_cond, cond)
        h = self.stem(self.conditions.beside(x, cond))
        made: list[Tensor] = []  # by each stage
        for blocks in self.stages:
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, told)
            made.append(h)
        h = self.refine[0]([made[3]], told)
        for refine, stage in zip(list(self.refine)[1:], reversed(made[:3]), strict=True):
            h = refine([stage, h], told)
        return self.out(F.elu(self.norm(h, told)))

    def told(self, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(n, levels + emb_dim): the noise level as a unit vector, and the embedding of the conditions."""
        level = noise_cond.round().long().clamp(0, self.noise_levels - 1)
        unit = F.one_hot(level, self.noise_levels).to(noise_cond.dtype)
        if not self.emb_dim:
            return unit
        nothing = unit.new_zeros(len(unit), self.emb_dim)
        return torch.cat([unit, self.conditions.embed(self.conditions.augmented(nothing, cond), cond)], dim=1)
