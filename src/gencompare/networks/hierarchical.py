"""The network of a hierarchical VAE: features from fine to coarse, latents from coarse to fine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.convnets import stages
from gencompare.networks.layers import he_normal

OUTPUT_SCALE = 0.3
"""Scale of the first weights on the way of the latents: what they say is heard, and their noise does not drown it."""


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(log_std)^2), number by number. log_std is what was ``said``, or b tanh(said / b) with a ``bound`` b.

    Residual posteriors have a bound, and so have their priors: without it, where few images are learned by heart,
    variances fell until a divergence overflowed.
    """

    mean: Tensor
    said: Tensor
    bound: float | None = None

    @cached_property
    def log_std(self) -> Tensor:
        return self.said if self.bound is None else self.bound * torch.tanh(self.said / self.bound)

    def at(self, u: Tensor) -> Tensor:
        """mean + std u: a draw where u is standard normal, the mean where it is nought."""
        return self.mean + self.log_std.exp() * u

    def standardized(self, z: Tensor) -> Tensor:
        """(z - mean) / std, the u whose ``at`` is z."""
        return (z - self.mean) * (-self.log_std).exp()

    def kl(self, other: DiagonalGaussian) -> Tensor:
        r"""KL(self || other) in nats, number by number: (r^2 - 1) / 2 - log r + ((mu - mu') / sigma')^2 / 2 with
        r = sigma / sigma'. With a residual posterior it is eq. 2 of Vahdat and Kautz 2020."""
        log_ratio = self.log_std - other.log_std
        return 0.5 * (torch.expm1(2 * log_ratio) + other.standardized(self.mean).square()) - log_ratio


class BottleneckBlock(nn.Module):
    """1x1, k x k, k x k and 1x1 convolutions, a GELU before each and no normalisation (Child 2021).

    k is 3 where the image has sides above 2, and else 1. At the start it hands on the size of what comes in, times
    ``scale``.
    """

    def __init__(self, channels_in: int, hidden: int, channels_out: int, side: int, *, scale: float = 1.0) -> None:
        super().__init__()
        k = 3 if side > 2 else 1
        self.convs = nn.ModuleList(
            [
                convolution(channels_in, hidden, 1),
                convolution(hidden, hidden, k),
                convolution(hidden, hidden, k),
                convolution(hidden, channels_out, 1, scale),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(F.gelu(x))
        return x


def convolution(channels_in: int, channels_out: int, kernel: int, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the side, its first weights times ``scale`` and its bias nought."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
    he_normal(layer, scale)
    return layer


class TopDownBlock(nn.Module):
    r"""One layer of latents z (n, latent_channels, H, W), within the state h (n, channels, H, W) of the way down.

    p(z | h) and a term of h come out of one block, q(z | h, a) of another that also sees the image's features a; then

        h <- h + prior features,  h <- h + W z,  h <- h + block(h).

    A residual posterior is parameterised relative to the prior, q = N(mu + dmu, (sigma dsigma)^2) (Vahdat and Kautz
    2020, "NVAE", section 3.2): where the prior moves, the posterior moves with it. Otherwise q has its own mean and
    variance (Child 2021). The prior starts as N(0, 1), and the posterior near it. NVAE's logarithms of standard
    deviations are bounded, VDVAE's are not.

    Weights start as `blocks.he_normal` has them, so that narrow and shallow networks pass signals on too; the authors'
    own start with less (PyTorch's default).

    Args:
        level: index of the resolution, 0 the finest.
        branches: residual branches on the way down; what each adds at the start is scaled by branches^-1/2.
    """

    def __init__(
        self,
        level: int,
        channels: int,
        latent_shape: tuple[int, int, int],
        hidden: int,
        *,
        branches: int,
        residual_posterior: bool,
    ) -> None:
        super().__init__()
        self.level, self.latent_shape, self.residual_posterior = level, latent_shape, residual_posterior
        self.bound = 5.0 if residual_posterior else None  # as in NVAE's published code
        z, side = latent_shape[0], min(latent_shape[1:])
        small = branches**-0.5
        self.posterior_block = BottleneckBlock(2 * channels, hidden, 2 * z, side, scale=OUTPUT_SCALE)
        self.prior_block = BottleneckBlock(channels, hidden, 2 * z + channels, side, scale=0.0)
        self.project = convolution(z, channels, 1, OUTPUT_SCALE * small)
        self.block = BottleneckBlock(channels, hidden, channels, side, scale=small)

    def prior(self, h: Tensor) -> tuple[DiagonalGaussian, Tensor]:
        """p(z | h), and h with the prior's features added."""
        z = self.latent_shape[0]
        mean, log_std, features = self.prior_block(h).split([z, z, h.shape[1]], dim=1)
        return DiagonalGaussian(mean.float(), log_std.float(), self.bound), h + features

    def posterior(self, h: Tensor, features: Tensor, prior: DiagonalGaussian) -> DiagonalGaussian:
        """q(z | h, features of the image)."""
        mean, log_std = self.posterior_block(torch.cat([h, features], dim=1)).float().chunk(2, dim=1)
        if self.residual_posterior:
            mean, log_std = prior.mean + mean, prior.said + log_std
        return DiagonalGaussian(mean, log_std, self.bound)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """The state once z is known."""
        h = h + self.project(z)
        return h + self.block(h)


Latent = Callable[[TopDownBlock, Tensor, DiagonalGaussian], Tensor]
"""(layer, state, prior) -> z: how the latents of a layer are found."""


class TopDownDecoder(nn.Module):
    r"""The network of a very deep VAE (Child 2021, "Very deep VAEs generalize autoregressive models and can outperform
    them on images"): features of the image from the finest resolution to 1x1, latents from 1x1 to the finest.

    p(z) = prod_l p(z_l | z_<l), and q(z | x) = prod_l q(z_l | z_<l, x) from the same side: both ways share the state
    that z_<l leaves. At each resolution it starts from learned numbers, those of the class among them, plus the state
    of the coarser resolution, each of whose pixels is repeated.

    The resolutions are those of `convnets.stages`, sides halved to 4 at least, and then 1x1: 8x8 has 3 and 32x32 has 5.
    Where channels double, features get further channels of noughts, and the state gives its first ones on. A resolution
    without latents has one block on the way down (in NVAE the finest resolutions are such).

    Args:
        shape: (C, H, W) of the image.
        maps: numbers that come out for each pixel.
        num_classes: 0 for a model without labels.
        channels: at the finest resolution; doubled at each coarser one, up to ``max_channels``.
        bottleneck: channels inside a block, as a share of those outside.
        latent_channels: numbers of a latent layer at each place.
        encoder_blocks: blocks a resolution; a list says how many at each, the finest first. At all resolutions but the
            coarsest the last one leads to the next, and latents do not see it.
        decoder_blocks: layers of latents a resolution, likewise; a 0 in the list leaves a resolution without,
            but for the coarsest.
        residual_posterior: posteriors are relative to their priors.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        maps: int,
        num_classes: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 128,
        bottleneck: float = 1.0,
        latent_channels: int = 16,
        encoder_blocks: int | Sequence[int] = 1,
        decoder_blocks: int | Sequence[int] = 2,
        residual_posterior: bool = False,
    ) -> None:
        super().__init__()
        if min(channels, max_channels, latent_channels) < 1 or not bottleneck > 0:
            raise UserError(
                f"model.ladder: channels={channels}, max_channels={max_channels}, latent_channels={latent_channels} and"
                f" bottleneck={bottleneck} must all be above nought."
            )
        plan = resolutions(shape[1], shape[2], channels, max_channels)
        up = expand_counts("encoder_blocks", encoder_blocks, plan)
        down = expand_counts("decoder_blocks", decoder_blocks, plan, least=0)
        if not down[-1]:
            raise UserError(f"model.ladder.decoder_blocks={decoder_blocks}: the coarsest resolution needs latents.")
        hidden = [max(1, int(c * bottleneck)) for c, _, _ in plan]
        branches = sum(max(1, count) for count in down)
        self.plan = plan
        self.stem = convolution(shape[0], plan[0][0], 3)
        self.features = nn.ModuleList(
            nn.ModuleList(BottleneckBlock(c, inner, c, min(h, w), scale=sum(up) ** -0.5) for _ in range(count))
            for (c, h, w), inner, count in zip(plan, hidden, up, strict=True)
        )
        self.starts = nn.ParameterList(torch.zeros(plane) for plane in plan)
        self.labels = nn.ModuleList(nn.Embedding(num_classes, c) for c, _, _ in plan) if num_classes else None
        for embedding in self.labels or []:
            nn.init.normal_(embedding.weight, std=0.2)  # type: ignore[arg-type]
        self.latents = nn.ModuleList(
            nn.ModuleList(
                TopDownBlock(
                    level, c, (latent_channels, h, w), inner, branches=branches, residual_posterior=residual_posterior
                )
                for _ in range(count)
            )
            for level, ((c, h, w), inner, count) in enumerate(zip(plan, hidden, down, strict=True))
        )
        self.blocks = nn.ModuleDict(
            {
                str(level): BottleneckBlock(c, inner, c, min(h, w), scale=branches**-0.5)
                for level, ((c, h, w), inner, count) in enumerate(zip(plan, hidden, down, strict=True))
                if not count
            }
        )
        self.gain = nn.Parameter(torch.ones(plan[0][0], 1, 1))
        self.bias = nn.Parameter(torch.zeros(plan[0][0], 1, 1))
        self.out = convolution(plan[0][0], maps, 1, OUTPUT_SCALE)

    @property
    def layers(self) -> list[TopDownBlock]:
        """All layers of latents in their order, from the coarsest resolution to the finest."""
        return [layer for here in reversed(list(self.latents)) for layer in here]  # type: ignore[union-attr]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features (n, channels, H, W) of each resolution, the finest first."""
        h, found = self.stem(x), []
        for level, blocks in enumerate(self.features):
            *here, last = blocks  # type: ignore[misc]
            for block in here:
                h = h + block(h)
            if level + 1 < len(self.plan):
                found.append(h)
                h = downsample_stages(h + last(h), self.plan[level + 1])
            else:
                found.append(h + last(h))
        return found

    def forward(self, label: Tensor, latent: Latent) -> Tensor:
        """(n, maps, H, W), with the latents that ``latent`` finds, layer after layer, and the classes (n,) int64, which
        a ladder without classes does not look at."""
        h = None
        for level in reversed(range(len(self.plan))):
            h = self._entered(level, label, h)
            for layer in self.latents[level]:  # type: ignore[union-attr]
                prior, with_features = layer.prior(h)
                h = layer(with_features, latent(layer, h, prior))
            if str(level) in self.blocks:
                h = h + self.blocks[str(level)](h)
        assert h is not None
        return self.out(h * self.gain + self.bias)

    def _entered(self, level: int, label: Tensor, coarser: Tensor | None) -> Tensor:
        """The state (n, channels, H, W) before the first latents of a resolution."""
        c, height, width = self.plan[level]
        h = self.starts[level].expand(len(label), -1, -1, -1)
        if self.labels is not None:
            h = h + self.labels[level](label)[:, :, None, None]
        return h if coarser is None else h + F.interpolate(coarser[:, :c], size=(height, width), mode="nearest")


def downsample_stages(h: Tensor, plane: tuple[int, int, int]) -> Tensor:
    """h as means over the pixels of the next resolution, further channels being noughts."""
    c, height, width = plane
    h = F.avg_pool2d(h, (h.shape[2] // height, h.shape[3] // width))
    return F.pad(h, (0, 0, 0, 0, 0, c - h.shape[1]))


def resolutions(side_h: int, side_w: int, channels: int, max_channels: int) -> list[tuple[int, int, int]]:
    """(channels, H, W) of every resolution, the finest first and 1x1 the last."""
    found = stages(side_h, side_w, channels, max_channels)
    last, h, w = found[-1]
    return found if (h, w) == (1, 1) else [*found, (min(2 * last, max_channels), 1, 1)]


def expand_counts(
    name: str, blocks: int | Sequence[int], plan: Sequence[tuple[int, int, int]], *, least: int = 1
) -> list[int]:
    """How many blocks there are at each resolution, the finest first."""
    counts = list(blocks) if isinstance(blocks, Sequence) else [blocks] * len(plan)
    if len(counts) != len(plan) or any(not isinstance(k, int) or isinstance(k, bool) or k < least for k in counts):
        sides = ", ".join(f"{h}x{w}" for _, h, w in plan)
        raise UserError(
            f"model.ladder.{name}={blocks}: give one whole number, at least 1, or one for each of {sides}, at least"
            f" {least}."
        )
    return counts
