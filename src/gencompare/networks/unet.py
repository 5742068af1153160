"""The U-Net of denoising diffusion models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.conditioning import ConditionEmbedding, FourierFeatures, SinusoidalEmbedding
from gencompare.networks.layers import FIRDownsample, FIRUpsample
from gencompare.networks.unet_blocks import (
    EPS,
    Downsample,
    InputPyramid,
    OutputSkip,
    ResidualBlock,
    SelfAttention,
    UNetBlock,
    Upsample,
    fan_avg,
)


class UNet(nn.Module):
    """The network of Ho et al. (2020), "Denoising diffusion probabilistic models", appendix B, and its descendants.

    An encoder of residual blocks halves the image level by level and keeps the output of every layer; a decoder
    mirrors it, each of its blocks seeing one of the kept outputs beside its own input, last kept first used. The
    defaults are that paper's CIFAR-10 network, of 35.7 M parameters. At the start the output is nought.

    The options past ``groups`` make of it DDPM++ and NCSN++ (Song et al. 2021, "Score-based generative modeling
    through stochastic differential equations", appendix H), ADM (Dhariwal and Nichol 2021, "Diffusion models beat GANs
    on image synthesis"), what Karras et al. (2022), "Elucidating the design space of diffusion-based generative
    models", table 7, make of these, and the network of VDM (Kingma et al. 2021, "Variational diffusion models",
    appendix B): see conf/model/network.

    Shapes: x (n, C, H, W), noise_cond (n,), ``cond`` as `ConditionEmbedding` has it -> (n, out_channels, H, W).

    Args:
        shape: (C, H, W) of x; H and W must be halved once for each multiplier after the first.
        num_classes: 0 for a network without labels. Otherwise labels are 0 to num_classes - 1, and num_classes itself
            means "no label".
        channels: base width; a multiple of ``groups``, as all widths then are.
        multipliers: width of each level, from the image's own resolution down, as a multiple of ``channels``.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention: resolutions (image heights) with self-attention after each block. The list may name some that this
            shape does not come to, so that one list serves several sizes of image. The middle has attention always.
        dropout: probability with which a feature inside a residual block is dropped in training.
        groups: groups of every GroupNorm.
        heads: of each attention.
        head_channels: features of a head; where given, it decides the number of heads (one at widths below it).
        decoder_attention_once: attention follows the last block of a level in the decoder alone, not every one.
        noise_embedding: a factory ``channels -> module`` from noise_cond (n,) to (n, module.dim).
        resample_filter: None halves by a convolution of stride 2 and doubles by one after nearest neighbours. Taps put
            resampling with that filter into residual blocks (BigGAN): [1, 1] is mean and nearest neighbour, and NCSN++
            has [1, 3, 3, 1].
        resample_proj: whether such a block has a convolution on its shortcut always.
        scale_shift: whether the noise level scales and shifts the features of a block, in place of being added.
        skip_rescale: divide the sum of a branch and its shortcut by sqrt 2.
        progressive_input: a factory ``(channels of the image, width) -> InputPyramid``, with which the image enters
            again at each level.
        progressive_output: a factory ``(width, out_channels, groups) -> OutputSkip``, which makes the output a sum over
            the levels of the decoder.
        fourier_input: exponents n of the features sin(2^n pi x) and cos(2^n pi x) that the network sees beside x.
        add_input: whether x is added to the output, which at the start then is x (VDM, which predicts eps).
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
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        groups: int = 32,
        heads: int = 1,
        head_channels: int | None = None,
        decoder_attention_once: bool = False,
        noise_embedding: Callable[[int], nn.Module] = SinusoidalEmbedding,
        resample_filter: Sequence[float] | None = None,
        resample_proj: bool = True,
        scale_shift: bool = False,
        skip_rescale: bool = False,
        progressive_input: Callable[[int, int], InputPyramid] | None = None,
        progressive_output: Callable[[int, int, int], OutputSkip] | None = None,
        fourier_input: Sequence[int] = (),
        add_input: bool = False,
        low_res: int = 0,
        embedding_dim: int = 0,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        _check(shape, channels, multipliers, blocks, dropout, groups)
        if add_input and out_channels != shape[0]:
            raise UserError(
                f"add_input=true adds the image of {shape[0]} channels to the U-Net's output, which has {out_channels}:"
                " use a parameterisation with one output a pixel, or add_input=false."
            )
        self.levels, self.blocks, self.add_input = len(multipliers), blocks, add_input
        resolutions = [shape[1] >> level for level in range(len(multipliers))]
        widths = [channels * multiplier for multiplier in multipliers]
        emb_dim = 4 * channels

        residual = partial(
            ResidualBlock,
            emb_dim=emb_dim,
            dropout=dropout,
            groups=groups,
            resample_proj=resample_proj,
            scale_shift=scale_shift,
            skip_rescale=skip_rescale,
        )

        def attend(width: int) -> SelfAttention:
            count = _heads(width, heads, head_channels)
            return SelfAttention(width, groups=groups, heads=count, skip_rescale=skip_rescale)

        def block(channels_in: int, level: int, attends: bool = True) -> UNetBlock:
            attends = attends and resolutions[level] in attention
            return UNetBlock(residual(channels_in, widths[level]), attend(widths[level]) if attends else None)

        def downsample(width: int) -> nn.Module:
            if resample_filter is None:
                return Downsample(width)
            return residual(width, width, resample=FIRDownsample(resample_filter))

        def upsample(width: int) -> nn.Module:
            if resample_filter is None:
                return Upsample(width)
            return residual(width, width, resample=FIRUpsample(resample_filter))

        embedding: Any = noise_embedding(channels)
        self.noise = nn.Sequential(
            embedding,
            fan_avg(nn.Linear(embedding.dim, emb_dim)),
            nn.SiLU(),
            fan_avg(nn.Linear(emb_dim, emb_dim)),
        )
        self.conditions = ConditionEmbedding(
            emb_dim,
            num_classes,
            low_res=low_res,
            embedding_dim=embedding_dim,
            augment_dim=augment_dim,
            noise_dim=embedding.dim,
        )
        self.features = FourierFeatures(fourier_input) if fourier_input else nn.Identity()
        seen = shape[0] + low_res

        self.stem = fan_avg(nn.Conv2d(seen * (1 + 2 * len(fourier_input)), channels, 3, padding=1))
        kept = [channels]  # widths of the outputs that the encoder keeps
        self.encoder, self.inputs = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.encoder.append(block(kept[-1], level))
                kept.append(width)
            if level < len(widths) - 1:
                self.encoder.append(downsample(width))
                kept.append(width)
                if progressive_input is not None:
                    self.inputs.append(join := progressive_input(seen, width))
                    kept[-1], seen = join.width, join.channels

        deepest = widths[-1]
        self.middle = nn.ModuleList(
            [UNetBlock(residual(deepest, deepest), attend(deepest)), residual(deepest, deepest)]
        )

        self.decoder, self.outputs = nn.ModuleList(), nn.ModuleList()
        width = deepest
        for level in reversed(range(len(widths))):
            for i in range(blocks + 1):
                attends = not decoder_attention_once or i == blocks
                self.decoder.append(block(width + kept.pop(), level, attends))
                width = widths[level]
            if level > 0:
                self.decoder.append(upsample(width))
                if progressive_output is not None:
                    self.outputs.append(progressive_output(width, out_channels, groups))
        self.norm = nn.GroupNorm(groups, channels * multipliers[0], EPS)
        self.out = fan_avg(nn.Conv2d(channels * multipliers[0], out_channels, 3, padding=1), scale=0)

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        emb = F.silu(self.embedding(noise_cond, cond))  # every block begins with it
        image = self.conditions.beside(x, cond)
        h = self.stem(self.features(image))
        kept = [h]
        inputs: Iterator[Any] = iter(self.inputs)
        for layer in self.encoder:
            h = layer(h, emb)
            if self.inputs and not isinstance(layer, UNetBlock):  # the side was halved
                h, image = next(inputs)(h, image)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        written: Tensor | None = None
        outputs: Iterator[Any] = iter(self.outputs)
        for layer in self.decoder:
            if isinstance(layer, UNetBlock):
                h = torch.cat([h, kept.pop()], dim=1)
            elif self.outputs:  # the side is about to be doubled
                written = next(outputs)(h, written)
            h = layer(h, emb)
        out = self.out(F.silu(self.norm(h)))
        if written is not None:
            out = out + written
        return x + out if self.add_input else out

    def embedding(self, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(n, 4 channels): the noise level, and what is told beside it."""
        return self.conditions.with_noise(self.noise, noise_cond, cond)


def _heads(width: int, heads: int, head_channels: int | None) -> int:
    """Heads of an attention over ``width`` features."""
    if head_channels is None:
        share = 0 if heads < 1 or width % heads else width // heads
    else:
        share = min(head_channels, width)
    if share < 1 or width % share:
        raise UserError(
            f"{width} features of the U-Net cannot be dealt out to the heads of attention, with heads={heads} and"
            f" head_channels={head_channels}: use model.network.heads or head_channels that divide the widths."
        )
    return width // share


def _check(
    shape: Sequence[int],
    channels: int,
    multipliers: Sequence[int],
    blocks: int,
    dropout: float,
    groups: int,
) -> None:
    """Raises `UserError` on sizes that cannot be."""
    height, width = shape[1:]
    if not multipliers or min(multipliers) < 1 or channels < 1 or blocks < 1 or groups < 1:
        raise UserError(
            f"A U-Net needs channels, multipliers, blocks and groups of at least 1, not channels={channels},"
            f" multipliers={list(multipliers)}, blocks={blocks}, groups={groups}."
        )
    if not 0 <= dropout < 1:
        raise UserError(
            f"dropout={dropout} of the U-Net is a probability: give a number from 0 up to, not including, 1."
        )
    if channels % groups:
        raise UserError(
            f"The U-Net's channels={channels} cannot be normalised in groups={groups}: make channels a multiple of"
            f" groups, or use groups={math.gcd(channels, groups)}."
        )
    levels = len(multipliers)
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        possible = next(n for n in range(levels - 1, 0, -1) if not (height % 2 ** (n - 1) or width % 2 ** (n - 1)))
        raise UserError(
            f"A U-Net with multipliers={list(multipliers)} halves its images {levels - 1} time(s), which"
            f" {height}x{width} does not allow: use model.network.multipliers={list(multipliers[:possible])}, or images"
            " of another size."
        )
