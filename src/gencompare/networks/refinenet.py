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
"""Factory ``channels -> module(h, c)``, with c the condition vector of `InstanceNormPlus`."""
Pool = Callable[..., Tensor]


class DilatedBlock(nn.Module):
    """shortcut(h) + conv(elu(norm(conv(elu(norm(h)))))), then optionally 2x2 average pooling.

    Dilated convolutions enlarge the receptive field without losing resolution: Yu and Koltun (2016), "Multi-scale
    context aggregation by dilated convolutions", eq. 2 (https://arxiv.org/abs/1511.07122).

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        norm: factory of the normalisation.
        dilation: dilation of the convolutions.
        first_of_stage: whether this block starts a stage with a larger receptive field. Its shortcut is then a
            convolution: 1x1 if it downsamples, otherwise 3x3 and dilated.
        downsample: apply average pooling at the end.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        norm: Norm,
        *,
        dilation: int,
        first_of_stage: bool,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.norm1, self.norm2 = norm(channels_in), norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(channels_in, channels_out, 3, padding=dilation, dilation=dilation)
        self.shortcut: nn.Module = nn.Identity()
        if first_of_stage and downsample:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1)
        elif first_of_stage:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 3, padding=dilation, dilation=dilation)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        r = self.conv1(F.elu(self.norm1(h, c)))
        r = self.shortcut(h) + self.conv2(F.elu(self.norm2(r, c)))
        return F.avg_pool2d(r, 2) if self.downsample else r


class ResidualConvUnits(nn.Module):
    """A sequence of ``num_units`` residual units h + conv(elu(norm(conv(elu(norm(h)))))), without biases."""

    def __init__(self, channels: int, num_units: int, norm: Norm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(channels) for _ in range(2 * num_units))
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2 * num_units)
        )

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        for i in range(0, len(self.convs), 2):
            r = self.convs[i](F.elu(self.norms[i](h, c)))
            h = h + self.convs[i + 1](F.elu(self.norms[i + 1](r, c)))
        return h


class Fusion(nn.Module):
    """The sum of conv(norm(h)) over several inputs h, each resized bilinearly to the resolution of the first."""

    def __init__(self, channels_in: Sequence[int], channels_out: int, norm: Norm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(channels) for channels in channels_in)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels_out, 3, padding=1) for channels in channels_in)

    def forward(self, hs: Sequence[Tensor], c: Tensor) -> Tensor:
        parts = [conv(norm(h, c)) for h, norm, conv in zip(hs, self.norms, self.convs, strict=True)]
        total, size = parts[0], parts[0].shape[2:]
        for part in parts[1:]:
            total = total + F.interpolate(part, size=size, mode="bilinear", align_corners=True)
        return total


class ChainedPooling(nn.Module):
    """Chained residual pooling: g + p_1 + p_2 with g = elu(h), p_1 = conv(pool(norm(g))), p_2 = conv(pool(norm(p_1))).

    The pools are 5x5 with stride 1.
    """

    def __init__(self, channels: int, norm: Norm, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.norms = nn.ModuleList(norm(channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        total = path = F.elu(h)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            path = conv(self.pool(norm(path, c), 5, stride=1, padding=2))
            total = total + path
        return total


class RefineBlock(nn.Module):
    """Merges the features of a stage with the output of the previous, coarser refine block, if any.

    The layers are two residual units for each input, fusion at the resolution of the first input, chained pooling, and
    ``num_output_units`` residual units.

    Args:
        channels_in: channels of each input.
        channels_out: channels of the output.
        norm: factory of the normalisation.
        pool: pooling function of `ChainedPooling`.
        num_output_units: number of residual units at the end.
    """

    def __init__(
        self, channels_in: Sequence[int], channels_out: int, norm: Norm, pool: Pool, *, num_output_units: int
    ) -> None:
        super().__init__()
        self.adapt = nn.ModuleList(ResidualConvUnits(channels, 2, norm) for channels in channels_in)
        self.fuse = Fusion(channels_in, channels_out, norm) if len(channels_in) > 1 else None
        self.pool = ChainedPooling(channels_out, norm, pool)
        self.last = ResidualConvUnits(channels_out, num_output_units, norm)

    def forward(self, hs: Sequence[Tensor], c: Tensor) -> Tensor:
        adapted = [adapt(h, c) for h, adapt in zip(hs, self.adapt, strict=True)]
        h = adapted[0] if self.fuse is None else self.fuse(adapted, c)
        return self.last(self.pool(h, c), c)


class RefineNet(nn.Module):
    """The 4-cascaded RefineNet of NCSN (Song and Ermon 2019, "Generative modeling by estimating gradients of the data
    distribution", appendix A, https://arxiv.org/abs/1907.05600) and of NCSNv2 (Song and Ermon 2020, "Improved
    techniques for training score-based generative models", https://arxiv.org/abs/2006.09011), as in the published code.

    There are four stages of two residual blocks. The second stage halves the resolution; the third and fourth enlarge
    the receptive field with dilations 2 and 4. Four refine blocks go back from the last stage to the first; each
    receives the features of its stage and the output of the previous refine block.

    With ``num_levels > 1`` this is NCSN: every normalisation, including those in the refine blocks, has separate
    parameters for each noise level, and pooling is average pooling. ``noise_cond`` is then the index of the level, 0 to
    num_levels - 1 (`LevelIndexConditioning`), and the schedule must have ``num_levels`` levels.

    With ``num_levels = 1`` this is NCSNv2: the refine blocks have no normalisation, pooling is max pooling, and
    ``noise_cond`` is ignored, so any schedule works. The score is the output divided by sigma (section 3.3 of the
    paper), which is ``model/parameterization=eps`` up to the sign.

    Unlike in the papers, the output is zero at initialisation, and conditions shift the parameters of every
    normalisation.

    Shapes: x (n, C, H, W), noise_cond (n,), ``cond`` as for `ConditionEmbedding` -> (n, out_channels, H, W).

    Args:
        shape: (C, H, W) of x; H and W must be even and at least 4.
        out_channels: channels of the output.
        num_classes: number of classes, 0 for none. Label ``num_classes`` means "no label".
        channels: channels of the first stage; the other stages have twice as many.
        num_levels: number of noise levels with separate normalisation parameters.
        condition_sizes: ``low_res_channels``, ``embedding_dim``, ``augment_dim``, ``coordinate_channels`` and
            ``interval_dim``, see `ConditionEmbedding`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int,
        num_classes: int = 0,
        *,
        channels: int = 128,
        num_levels: int = 1,
        **condition_sizes: int,
    ) -> None:
        super().__init__()
        if channels < 2 or num_levels < 1:
            raise UserError(
                f"A RefineNet needs at least 2 channels and 1 noise level, not channels={channels} and"
                f" num_levels={num_levels}."
            )
        if shape[1] % 2 or shape[2] % 2 or min(shape[1:]) < 4:
            raise UserError(
                f"A RefineNet halves its images, which is impossible for {shape[1]}x{shape[2]}: use images whose"
                " height and width are even and at least 4, or model/network=dit or mlp."
            )
        self.num_noise_levels = num_levels
        vectors = ("embedding_dim", "augment_dim", "interval_dim")
        needs_embedding = num_classes or any(condition_sizes.get(name) for name in vectors)
        self.emb_dim = 4 * channels if needs_embedding else 0
        self.conditions = ConditionEmbedding(self.emb_dim, num_classes, noise_dim=self.emb_dim, **condition_sizes)
        norm = partial(InstanceNormPlus, num_levels=num_levels, emb_dim=self.emb_dim)
        refine: Any = (
            partial(RefineBlock, norm=norm, pool=F.avg_pool2d)
            if num_levels > 1
            else partial(RefineBlock, norm=lambda _: NoNorm(), pool=F.max_pool2d)
        )

        self.stem = nn.Conv2d(shape[0] + self.conditions.image_channels, channels, 3, padding=1)
        wide = 2 * channels
        self.stages = nn.ModuleList()
        for channels_in, width, dilation, downsample in (
            (channels, channels, 1, False),
            (channels, wide, 1, True),
            (wide, wide, 2, False),
            (wide, wide, 4, False),
        ):
            has_shortcut = downsample or dilation > 1
            first = DilatedBlock(
                channels_in, width, norm, dilation=dilation, first_of_stage=has_shortcut, downsample=downsample
            )
            second = DilatedBlock(width, width, norm, dilation=dilation, first_of_stage=False, downsample=False)
            self.stages.append(nn.ModuleList([first, second]))
        self.refine = nn.ModuleList(
            [
                refine([wide], wide, num_output_units=1),
                refine([wide, wide], wide, num_output_units=1),
                refine([wide, wide], channels, num_output_units=1),
                refine([channels, channels], channels, num_output_units=3),
            ]
        )
        self.norm = norm(channels)
        self.out = nn.Conv2d(channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        c = self.condition_vector(noise_cond, cond)
        h = self.stem(self.conditions.concat_images(x, cond))
        stage_outputs: list[Tensor] = []
        for blocks in self.stages:
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, c)
            stage_outputs.append(h)
        h = self.refine[0]([stage_outputs[3]], c)
        for refine, features in zip(list(self.refine)[1:], reversed(stage_outputs[:3]), strict=True):
            h = refine([features, h], c)
        return self.out(F.elu(self.norm(h, c)))

    def condition_vector(self, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the one-hot noise level and the embedding of the conditions, (n, num_levels + emb_dim)."""
        level = noise_cond.round().long().clamp(0, self.num_noise_levels - 1)
        one_hot = F.one_hot(level, self.num_noise_levels).to(noise_cond.dtype)
        if not self.emb_dim:
            return one_hot
        zeros = one_hot.new_zeros(len(one_hot), self.emb_dim)
        emb = self.conditions.add_label_and_embedding(self.conditions.add_augmentation_and_interval(zeros, cond), cond)
        return torch.cat([one_hot, emb], dim=1)
