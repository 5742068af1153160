"""The network of a hierarchical VAE: a bottom-up encoder of features and a top-down decoder of latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.convnets import pyramid_shapes
from gencompare.networks.layers import at_least_float32, he_normal_

OUTPUT_SCALE = 0.3
"""Initial scale of the posterior, projection and output layers, small enough that latents do not dominate."""


@dataclass(frozen=True)
class DiagonalGaussian:
    r"""A diagonal Gaussian :math:`N(\mu, \sigma^2)`, elementwise.

    Args:
        mean: the mean :math:`\mu`.
        raw_log_std: :math:`\log \sigma` before bounding.
        bound: if given, :math:`\log \sigma = b \tanh(\mathrm{raw} / b)`. Residual posteriors and their priors are
            bounded because variances could otherwise shrink until a KL divergence overflows, when a model overfits a
            few images.
    """

    mean: Tensor
    raw_log_std: Tensor
    bound: float | None = None

    @cached_property
    def log_std(self) -> Tensor:
        return self.raw_log_std if self.bound is None else self.bound * torch.tanh(self.raw_log_std / self.bound)

    def reparameterize(self, u: Tensor) -> Tensor:
        r"""Return :math:`\mu + \sigma u`: a sample if u is standard normal, the mean if u is zero."""
        return self.mean + self.log_std.exp() * u

    def standardize(self, z: Tensor) -> Tensor:
        r"""Return :math:`(z - \mu) / \sigma`, the inverse of `reparameterize`."""
        return (z - self.mean) * (-self.log_std).exp()

    def kl(self, other: DiagonalGaussian) -> Tensor:
        r"""Compute KL(self || other) in nats, elementwise.

        .. math:: (r^2 - 1) / 2 - \log r + ((\mu - \mu') / \sigma')^2 / 2, \quad r = \sigma / \sigma'

        With a residual posterior this is eq. 2 of Vahdat and Kautz 2020.
        """
        log_ratio = self.log_std - other.log_std
        return 0.5 * (torch.expm1(2 * log_ratio) + other.standardize(self.mean).square()) - log_ratio


class BottleneckBlock(nn.Module):
    """1x1, k x k, k x k and 1x1 convolutions, each preceded by a GELU, without normalisation (Child 2021).

    k is 3, or 1 if ``side`` (the smaller of height and width) is at most 2. At initialisation the output has the
    magnitude of the input times ``scale``.
    """

    def __init__(
        self, channels_in: int, hidden_channels: int, channels_out: int, side: int, *, scale: float = 1.0
    ) -> None:
        super().__init__()
        k = 3 if side > 2 else 1
        self.convs = nn.ModuleList(
            [
                convolution(channels_in, hidden_channels, 1),
                convolution(hidden_channels, hidden_channels, k),
                convolution(hidden_channels, hidden_channels, k),
                convolution(hidden_channels, channels_out, 1, scale),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(F.gelu(x))
        return x


def convolution(channels_in: int, channels_out: int, kernel_size: int, scale: float = 1.0) -> nn.Conv2d:
    """Build a convolution that keeps the resolution, initialised by `he_normal_` with ``scale``."""
    layer = nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2)
    he_normal_(layer, scale)
    return layer


class TopDownBlock(nn.Module):
    r"""One latent layer z (n, latent_channels, H, W) of the top-down path with state h (n, channels, H, W).

    One block computes the prior p(z | h) and features that are added to h; another computes the posterior q(z | h, a)
    from h and the encoder's features a. Then

    .. math:: h \leftarrow h + \text{prior features}, \quad h \leftarrow h + W z, \quad
        h \leftarrow h + \mathrm{block}(h)

    A residual posterior is relative to the prior, :math:`q = N(\mu + \Delta\mu, (\sigma \Delta\sigma)^2)` (Vahdat and
    Kautz 2020, "NVAE", section 3.2, https://arxiv.org/abs/2007.03898), so it moves with the prior. Otherwise q has its
    own mean and variance (Child 2021, https://arxiv.org/abs/2011.10650). At initialisation the prior is N(0, 1) and the
    posterior is close to it. Log standard deviations are bounded as in NVAE if the posterior is residual.

    Weights are initialised by `he_normal_`, so that narrow and shallow networks also propagate signals. The authors'
    code uses PyTorch's smaller default.

    Args:
        level: index of the resolution; 0 is the finest.
        channels: channels of h.
        latent_shape: (C, H, W) of z.
        hidden_channels: channels inside the bottleneck blocks.
        num_branches: number of residual branches of the top-down path; each is scaled by num_branches^-1/2 at
            initialisation.
        residual_posterior: whether the posterior is relative to the prior.
    """

    def __init__(
        self,
        level: int,
        channels: int,
        latent_shape: tuple[int, int, int],
        hidden_channels: int,
        *,
        num_branches: int,
        residual_posterior: bool,
    ) -> None:
        super().__init__()
        self.level, self.latent_shape, self.residual_posterior = level, latent_shape, residual_posterior
        self.bound = 5.0 if residual_posterior else None  # as in the published code of NVAE
        z, side = latent_shape[0], min(latent_shape[1:])
        branch_scale = num_branches**-0.5
        self.posterior_block = BottleneckBlock(2 * channels, hidden_channels, 2 * z, side, scale=OUTPUT_SCALE)
        self.prior_block = BottleneckBlock(channels, hidden_channels, 2 * z + channels, side, scale=0.0)
        self.project = convolution(z, channels, 1, OUTPUT_SCALE * branch_scale)
        self.block = BottleneckBlock(channels, hidden_channels, channels, side, scale=branch_scale)

    def prior(self, h: Tensor) -> tuple[DiagonalGaussian, Tensor]:
        """Return p(z | h), and h with the prior's features added."""
        z = self.latent_shape[0]
        mean, log_std, features = self.prior_block(h).split([z, z, h.shape[1]], dim=1)
        return DiagonalGaussian(at_least_float32(mean), at_least_float32(log_std), self.bound), h + features

    def posterior(self, h: Tensor, features: Tensor, prior: DiagonalGaussian) -> DiagonalGaussian:
        """Return q(z | h, features), where ``features`` are the encoder's features of the image."""
        mean, log_std = at_least_float32(self.posterior_block(torch.cat([h, features], dim=1))).chunk(2, dim=1)
        if self.residual_posterior:
            mean, log_std = prior.mean + mean, prior.raw_log_std + log_std
        return DiagonalGaussian(mean, log_std, self.bound)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """Add the latents z to the state h, and apply a block."""
        h = h + self.project(z)
        return h + self.block(h)


ChooseLatents = Callable[[TopDownBlock, Tensor, DiagonalGaussian], Tensor]
"""(layer, state, prior) -> z: determines the latents of a layer, for example by sampling from the prior."""


class TopDownDecoder(nn.Module):
    r"""The network of a very deep VAE (Child 2021, "Very deep VAEs generalize autoregressive models and can outperform
    them on images", https://arxiv.org/abs/2011.10650).

    The encoder computes features from full resolution to 1x1; latents are sampled from 1x1 to full resolution, with

    .. math:: p(z) = \prod_l p(z_l | z_{<l}), \quad q(z | x) = \prod_l q(z_l | z_{<l}, x)

    Prior and posterior share the top-down state. At each resolution the state starts as the sum of a learned tensor, an
    embedding of the class and the upsampled state of the coarser resolution.

    The resolutions are those of `pyramid_shapes` plus 1x1, so 8x8 images have 3 and 32x32 images have 5. Where the
    number of channels doubles, the encoder pads features with zero channels, and the decoder keeps only the first
    channels of the state. A resolution without latents has one block in the top-down path (as in NVAE at the finest
    resolutions).

    Args:
        shape: (C, H, W) of the images.
        out_channels: channels of the output, the likelihood parameters of a pixel.
        num_classes: number of classes, 0 for none.
        channels: channels at full resolution; doubled at each coarser one, up to ``max_channels``.
        max_channels: maximum number of channels.
        bottleneck_ratio: channels inside a block as a fraction of the channels outside.
        latent_channels: channels of each latent layer.
        num_encoder_blocks: encoder blocks per resolution, one number or a list, finest first. The last block of each
            resolution but the coarsest leads to the next resolution, and its output is not passed to the decoder.
        num_decoder_blocks: latent layers per resolution, one number or a list, finest first. A resolution with 0 has no
            latents; the coarsest must have latents.
        residual_posterior: make posteriors relative to their priors, see `TopDownBlock`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        out_channels: int,
        num_classes: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 128,
        bottleneck_ratio: float = 1.0,
        latent_channels: int = 16,
        num_encoder_blocks: int | Sequence[int] = 1,
        num_decoder_blocks: int | Sequence[int] = 2,
        residual_posterior: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(shape, int):  # called like the decoder of a VAE
            raise UserError("TopDownDecoder is for model=hvae. Other VAEs use model/decoder=resnet or mlp.")
        if min(channels, max_channels, latent_channels) < 1 or not bottleneck_ratio > 0:
            raise UserError(
                f"model.decoder: channels={channels}, max_channels={max_channels}, latent_channels={latent_channels}"
                f" and bottleneck_ratio={bottleneck_ratio} must all be positive."
            )
        shapes = pyramid_shapes_to_1x1(shape[1], shape[2], channels, max_channels)
        encoder_counts = expand_counts("num_encoder_blocks", num_encoder_blocks, shapes)
        decoder_counts = expand_counts("num_decoder_blocks", num_decoder_blocks, shapes, minimum=0)
        if not decoder_counts[-1]:
            raise UserError(
                f"model.decoder.num_decoder_blocks={num_decoder_blocks}: the coarsest resolution needs latents."
            )
        hidden_channels = [max(1, int(c * bottleneck_ratio)) for c, _, _ in shapes]
        num_branches = sum(max(1, count) for count in decoder_counts)
        self.shapes = shapes
        self.stem = convolution(shape[0], shapes[0][0], 3)
        self.features = nn.ModuleList(
            nn.ModuleList(
                BottleneckBlock(c, hidden, c, min(h, w), scale=sum(encoder_counts) ** -0.5) for _ in range(count)
            )
            for (c, h, w), hidden, count in zip(shapes, hidden_channels, encoder_counts, strict=True)
        )
        self.starts = nn.ParameterList(torch.zeros(each) for each in shapes)
        self.labels = nn.ModuleList(nn.Embedding(num_classes, c) for c, _, _ in shapes) if num_classes else None
        for embedding in self.labels or []:
            nn.init.normal_(embedding.weight, std=0.2)  # type: ignore[arg-type]
        self.latents = nn.ModuleList(
            nn.ModuleList(
                TopDownBlock(
                    level,
                    c,
                    (latent_channels, h, w),
                    hidden,
                    num_branches=num_branches,
                    residual_posterior=residual_posterior,
                )
                for _ in range(count)
            )
            for level, ((c, h, w), hidden, count) in enumerate(
                zip(shapes, hidden_channels, decoder_counts, strict=True)
            )
        )
        self.blocks = nn.ModuleDict(
            {
                str(level): BottleneckBlock(c, hidden, c, min(h, w), scale=num_branches**-0.5)
                for level, ((c, h, w), hidden, count) in enumerate(
                    zip(shapes, hidden_channels, decoder_counts, strict=True)
                )
                if not count
            }
        )
        self.gain = nn.Parameter(torch.ones(shapes[0][0], 1, 1))
        self.bias = nn.Parameter(torch.zeros(shapes[0][0], 1, 1))
        self.out = convolution(shapes[0][0], out_channels, 1, OUTPUT_SCALE)

    @property
    def layers(self) -> list[TopDownBlock]:
        """All latent layers in order, from the coarsest resolution to the finest."""
        return [layer for layers in reversed(list(self.latents)) for layer in layers]  # type: ignore[union-attr]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Compute the encoder features (n, channels, H, W) at each resolution, finest first."""
        h, features = self.stem(x), []
        for level, level_blocks in enumerate(self.features):
            *blocks, last = level_blocks  # type: ignore[misc]
            for block in blocks:
                h = h + block(h)
            if level + 1 < len(self.shapes):
                features.append(h)
                h = pool_and_pad(h + last(h), self.shapes[level + 1])
            else:
                features.append(h + last(h))
        return features

    def forward(self, label: Tensor, choose_latents: ChooseLatents) -> Tensor:
        """Decode latents to the parameters of the likelihood, (n, out_channels, H, W).

        Args:
            label: classes (n,) int64; only its length is used if the network has no classes.
            choose_latents: called for each latent layer in turn.
        """
        h = None
        for level in reversed(range(len(self.shapes))):
            h = self._initial_state(level, label, h)
            for layer in self.latents[level]:  # type: ignore[union-attr]
                prior, with_prior_features = layer.prior(h)
                h = layer(with_prior_features, choose_latents(layer, h, prior))
            if str(level) in self.blocks:
                h = h + self.blocks[str(level)](h)
        assert h is not None
        return self.out(h * self.gain + self.bias)

    def _initial_state(self, level: int, label: Tensor, coarser: Tensor | None) -> Tensor:
        """Return the state (n, channels, H, W) before the first latents of a resolution."""
        c, height, width = self.shapes[level]
        h = self.starts[level].expand(len(label), -1, -1, -1)
        if self.labels is not None:
            h = h + self.labels[level](label)[:, :, None, None]
        return h if coarser is None else h + F.interpolate(coarser[:, :c], size=(height, width), mode="nearest")


def pool_and_pad(h: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Average-pool h to the resolution of ``shape`` and pad it with zero channels."""
    c, height, width = shape
    h = F.avg_pool2d(h, (h.shape[2] // height, h.shape[3] // width))
    return F.pad(h, (0, 0, 0, 0, 0, c - h.shape[1]))


def pyramid_shapes_to_1x1(height: int, width: int, channels: int, max_channels: int) -> list[tuple[int, int, int]]:
    """Return (channels, H, W) of each resolution, finest first: those of `pyramid_shapes` and 1x1."""
    shapes = pyramid_shapes(height, width, channels, max_channels)
    c, h, w = shapes[-1]
    return shapes if (h, w) == (1, 1) else [*shapes, (min(2 * c, max_channels), 1, 1)]


def expand_counts(
    name: str, counts: int | Sequence[int], shapes: Sequence[tuple[int, int, int]], *, minimum: int = 1
) -> list[int]:
    """Return one count per resolution, finest first. Raise `UserError` if the argument ``name`` is invalid."""
    expanded = list(counts) if isinstance(counts, Sequence) else [counts] * len(shapes)
    if len(expanded) != len(shapes) or any(
        not isinstance(k, int) or isinstance(k, bool) or k < minimum for k in expanded
    ):
        sides = ", ".join(f"{h}x{w}" for _, h, w in shapes)
        raise UserError(
            f"model.decoder.{name}={counts} must be an integer of at least 1, or a list of integers of at least"
            f" {minimum}, one for each of {sides}."
        )
    return expanded
