"""The U-Net of denoising diffusion models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError, check_counts
from gencompare.networks.conditioning import ConditionEmbedding, FourierFeatures, SinusoidalEmbedding
from gencompare.networks.layers import FIRDownsample, FIRUpsample
from gencompare.networks.mup import lr_factors, rescale_inputs
from gencompare.networks.unet_blocks import (
    GROUP_NORM_EPS,
    Downsample,
    InputPyramid,
    InputSkip,
    OutputSkip,
    ResidualBlock,
    ResidualInput,
    SelfAttention,
    UNetBlock,
    Upsample,
    fan_avg,
)


class UNet(nn.Module):
    """The U-Net of DDPM and its descendants.

    The encoder applies residual blocks at each level and halves the resolution between levels. The decoder mirrors it;
    each of its blocks receives the output of one encoder layer, concatenated to its input, in reverse order. The
    output is zero at initialisation. The defaults are the CIFAR-10 network of Ho et al. (2020), "Denoising diffusion
    probabilistic models", appendix B (https://arxiv.org/abs/2006.11239), with 35.7 M parameters.

    The options after ``num_groups`` also give DDPM++ and NCSN++ (Song et al. 2021, "Score-based generative modeling
    through stochastic differential equations", appendix H, https://arxiv.org/abs/2011.13456), ADM (Dhariwal and Nichol
    2021, "Diffusion models beat GANs on image synthesis", https://arxiv.org/abs/2105.05233), the variants of these in
    EDM (Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", table 7,
    https://arxiv.org/abs/2206.00364) and the network of VDM (Kingma et al. 2021, "Variational diffusion models",
    appendix B, https://arxiv.org/abs/2107.00630). The configs are in conf/model/network.

    Shapes: x (n, C, H, W), noise_cond (n,), ``cond`` as for `ConditionEmbedding` -> (n, out_channels, H, W).

    Args:
        shape: (C, H, W) of x. H and W must be divisible by 2 for each multiplier after the first.
        out_channels: channels of the output.
        num_classes: number of classes, 0 for none. Label ``num_classes`` means "no label".
        channels: base width, a multiple of ``num_groups``.
        channel_mult: width of each level as a multiple of ``channels``, from the full resolution down.
        num_blocks: residual blocks per encoder level; the decoder has one more.
        attention_resolutions: image heights at which each block is followed by self-attention. Heights that do not
            occur are ignored, so one list serves several image sizes. The middle always has attention.
        dropout: dropout probability inside residual blocks.
        num_groups: groups of each GroupNorm.
        num_heads: number of attention heads.
        head_channels: features per attention head; overrides ``num_heads``. Layers with fewer features have one head.
        decoder_attention_once: put attention only after the last block of each decoder level.
        noise_embedding: factory ``channels -> module`` from noise_cond (n,) to (n, module.dim).
        resample_filter: None downsamples with a strided convolution, and upsamples with nearest neighbour and a
            convolution. Filter taps move resampling into residual blocks, as in BigGAN: [1, 1] gives average pooling
            and nearest neighbour; NCSN++ uses [1, 3, 3, 1].
        resample_proj: always put a convolution on the shortcut of a resampling block.
        scale_shift_norm: let the embedding scale and shift the features of a block instead of adding it to them.
        skip_rescale: divide each residual sum by sqrt(2).
        progressive_input: factory ``(image channels, width) -> InputPyramid`` that feeds the image into each encoder
            level; None disables it.
        progressive_output: factory ``(width, out_channels, num_groups) -> OutputSkip`` that makes the output a sum over
            the decoder levels; None disables it.
        fourier_exponents: exponents n of the input features sin(2^n pi x) and cos(2^n pi x).
        add_input: add x to the output, which then equals x at initialisation (VDM, which predicts eps).
        base_width: the ``channels`` at which the learning rate was found, for muP (`gencompare.networks.mup`); a
            multiple of ``head_channels``, so that the size of a head stays the same. None for the standard
            parametrisation.
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
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        num_groups: int = 32,
        num_heads: int = 1,
        head_channels: int | None = None,
        decoder_attention_once: bool = False,
        noise_embedding: Callable[[int], nn.Module] = SinusoidalEmbedding,
        resample_filter: Sequence[float] | None = None,
        resample_proj: bool = True,
        scale_shift_norm: bool = False,
        skip_rescale: bool = False,
        progressive_input: Callable[[int, int], InputPyramid] | None = None,
        progressive_output: Callable[[int, int, int], OutputSkip] | None = None,
        fourier_exponents: Sequence[int] = (),
        add_input: bool = False,
        base_width: int | None = None,
        **condition_sizes: int,
    ) -> None:
        super().__init__()
        _check(shape, channels, channel_mult, num_blocks, dropout, num_groups)
        if add_input and out_channels != shape[0]:
            raise UserError(
                f"add_input=true adds the input, with {shape[0]} channels, to the output, which has {out_channels}:"
                " use a parameterisation with one output per pixel, or add_input=false."
            )
        self.num_levels, self.num_blocks, self.add_input = len(channel_mult), num_blocks, add_input
        resolutions = [shape[1] >> level for level in range(len(channel_mult))]
        widths = [channels * multiplier for multiplier in channel_mult]
        emb_dim = 4 * channels

        residual = partial(
            ResidualBlock,
            emb_dim=emb_dim,
            dropout=dropout,
            num_groups=num_groups,
            resample_proj=resample_proj,
            scale_shift_norm=scale_shift_norm,
            skip_rescale=skip_rescale,
        )

        def make_attention(width: int) -> SelfAttention:
            heads = _head_count(width, num_heads, head_channels)
            return SelfAttention(width, num_groups=num_groups, num_heads=heads, skip_rescale=skip_rescale)

        def make_block(channels_in: int, level: int, allow_attention: bool = True) -> UNetBlock:
            width, has_attention = widths[level], allow_attention and resolutions[level] in attention_resolutions
            return UNetBlock(residual(channels_in, width), make_attention(width) if has_attention else None)

        def make_downsample(width: int) -> nn.Module:
            if resample_filter is None:
                return Downsample(width)
            return residual(width, width, resample=FIRDownsample(resample_filter))

        def make_upsample(width: int) -> nn.Module:
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
        self.conditions = ConditionEmbedding(emb_dim, num_classes, noise_dim=embedding.dim, **condition_sizes)
        self.features = FourierFeatures(fourier_exponents) if fourier_exponents else nn.Identity()
        image_channels = shape[0] + self.conditions.image_channels

        self.stem = fan_avg(nn.Conv2d(image_channels * (1 + 2 * len(fourier_exponents)), channels, 3, padding=1))
        skip_widths = [channels]  # channels of the encoder outputs that the decoder receives
        self.encoder, self.inputs = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                self.encoder.append(make_block(skip_widths[-1], level))
                skip_widths.append(width)
            if level < len(widths) - 1:
                self.encoder.append(make_downsample(width))
                skip_widths.append(width)
                if progressive_input is not None:
                    self.inputs.append(pyramid := progressive_input(image_channels, width))
                    skip_widths[-1], image_channels = pyramid.width, pyramid.channels

        deepest = widths[-1]
        self.middle = nn.ModuleList(
            [UNetBlock(residual(deepest, deepest), make_attention(deepest)), residual(deepest, deepest)]
        )

        self.decoder, self.outputs = nn.ModuleList(), nn.ModuleList()
        width = deepest
        for level in reversed(range(len(widths))):
            for i in range(num_blocks + 1):
                allow_attention = not decoder_attention_once or i == num_blocks
                self.decoder.append(make_block(width + skip_widths.pop(), level, allow_attention))
                width = widths[level]
            if level > 0:
                self.decoder.append(make_upsample(width))
                if progressive_output is not None:
                    self.outputs.append(progressive_output(width, out_channels, num_groups))
        self.norm = nn.GroupNorm(num_groups, widths[0], GROUP_NORM_EPS)
        self.out = fan_avg(nn.Conv2d(widths[0], out_channels, 3, padding=1), scale=0)

        self.lr_ratio = 1.0
        if base_width is not None:
            _check_base_width(base_width, head_channels)
            self.lr_ratio = base_width / channels
            # The projection of embeddings has the same variance at every width.
            rescaled = [each for each in self._input_layers() if each is not self.conditions.embedding]
            rescale_inputs(rescaled, self.lr_ratio)

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        emb = F.silu(self.embedding(noise_cond, cond))  # SiLU once here, since every block would start with it
        image = self.conditions.concat_images(x, cond)
        h = self.stem(self.features(image))
        skips = [h]
        inputs: Iterator[Any] = iter(self.inputs)
        for layer in self.encoder:
            h = layer(h, emb)
            if self.inputs and not isinstance(layer, UNetBlock):  # after downsampling
                h, image = next(inputs)(h, image)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        coarse_output: Tensor | None = None
        outputs: Iterator[Any] = iter(self.outputs)
        for layer in self.decoder:
            if isinstance(layer, UNetBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            elif self.outputs:  # before upsampling
                coarse_output = next(outputs)(h, coarse_output)
            h = layer(h, emb)
        out = self.out(F.silu(self.norm(h)))
        if coarse_output is not None:
            out = out + coarse_output
        return x + out if self.add_input else out

    @property
    def size_multiple(self) -> int:
        """The network takes crops of any height and width that are multiples of this."""
        return 2 ** (self.num_levels - 1)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all levels in the order of computation."""
        return [*self.encoder, *self.middle, *self.decoder]

    def lr_factors(self) -> dict[str, float]:
        """Return the factor of the learning rate by name of the parameter, where it is not 1."""
        return {} if self.lr_ratio == 1 else lr_factors(self, self._input_layers(), self.lr_ratio)

    def _input_layers(self) -> list[nn.Linear | nn.Conv2d]:
        """Return the layers whose number of inputs does not grow with the width."""
        layers: list[nn.Linear | nn.Conv2d] = [self.stem]
        for k, each in enumerate(self.inputs):
            if isinstance(each, InputSkip):
                layers.append(each.conv)
            elif isinstance(each, ResidualInput) and k == 0:  # the next levels receive features
                layers.append(each.downsample.conv)
        return layers + [each for each in self.conditions.children() if isinstance(each, nn.Linear)]

    def embedding(self, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Compute the embedding of noise level and conditions, (n, 4 * channels)."""
        return self.conditions.embed(self.noise, noise_cond, cond)


def _head_count(width: int, num_heads: int, head_channels: int | None) -> int:
    """Return the number of attention heads for ``width`` features."""
    if head_channels is None:
        features_per_head = 0 if num_heads < 1 or width % num_heads else width // num_heads
    else:
        features_per_head = min(head_channels, width)
    if features_per_head < 1 or width % features_per_head:
        raise UserError(
            f"{width} features of the U-Net cannot be divided among the attention heads with num_heads={num_heads} and"
            f" head_channels={head_channels}: choose values that divide every width."
        )
    return width // features_per_head


def _check_base_width(base_width: int, head_channels: int | None) -> None:
    """Raise `UserError` unless a U-Net of the base width has attention heads of the same size."""
    check_counts("model.network", base_width=base_width)
    if head_channels is None or base_width % head_channels:
        raise UserError(
            f"model.network.base_width={base_width} needs attention heads of constant size: set"
            " model.network.head_channels to a divisor of it."
        )


def _check(
    shape: Sequence[int],
    channels: int,
    channel_mult: Sequence[int],
    num_blocks: int,
    dropout: float,
    num_groups: int,
) -> None:
    """Raise `UserError` for invalid sizes."""
    height, width = shape[1:]
    if not channel_mult or min(channel_mult) < 1 or channels < 1 or num_blocks < 1 or num_groups < 1:
        raise UserError(
            f"A U-Net needs channels, channel_mult, num_blocks and num_groups of at least 1, not channels={channels},"
            f" channel_mult={list(channel_mult)}, num_blocks={num_blocks}, num_groups={num_groups}."
        )
    if not 0 <= dropout < 1:
        raise UserError(f"The U-Net's dropout={dropout} must be at least 0 and below 1.")
    if channels % num_groups:
        raise UserError(
            f"The U-Net's channels={channels} cannot be divided into num_groups={num_groups}: make channels a multiple"
            f" of num_groups, or use num_groups={math.gcd(channels, num_groups)}."
        )
    levels = len(channel_mult)
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        possible = next(n for n in range(levels - 1, 0, -1) if not (height % 2 ** (n - 1) or width % 2 ** (n - 1)))
        raise UserError(
            f"A U-Net with channel_mult={list(channel_mult)} halves its images {levels - 1} time(s), which is"
            f" impossible for {height}x{width}: use model.network.channel_mult={list(channel_mult[:possible])}, or"
            " images of a different size."
        )
