"""Layers shared by networks: residual blocks, norms, and resampling with a low-pass filter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError


class AdaptiveGroupNorm(nn.Module):
    r"""GroupNorm whose scale and shift may depend on an embedding.

    y = (1 + a(e)) \hat x + b(e), with a and b linear in e and nought at the start (Perez et al. 2018, "FiLM", eq. 1;
    with e the latent of a generator it is Chen et al. 2019, "On Self Modulation for GANs", eq. 2, on GroupNorm). It
    uses no statistic of the batch, so an image comes out the same whatever images stand beside it.

    Shapes: x (n, channels, H, W), e (n, embed_dim) -> (n, channels, H, W). With ``embed_dim=0`` e is not looked at.
    """

    def __init__(self, channels: int, embed_dim: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels)
        self.modulation = nn.Linear(embed_dim, 2 * channels) if embed_dim else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.modulation is None:
            return x
        scale, shift = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class NormActivation(nn.Module):
    """Modulated GroupNorm, then SiLU."""

    def __init__(self, channels: int, embed_dim: int = 0) -> None:
        super().__init__()
        self.norm = AdaptiveGroupNorm(channels, embed_dim)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return F.silu(self.norm(x, e))


class Activation(nn.Module):
    """Leaky ReLU and no normalisation, for discriminators: gradients pass at full strength, pixels stay untied."""

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return F.leaky_relu(x, 0.2)


def activation(channels: int, embed_dim: int, normalize: bool) -> nn.Module:
    """What a network puts before its convolutions."""
    return NormActivation(channels, embed_dim) if normalize else Activation()


def he_normal(layer: nn.Conv2d, scale: float = 1.0) -> None:
    """Weights with variance scale^2 2 / ((1 + 0.2^2) fan in), which keeps the size of what a leaky ReLU hands on.

    He et al. (2015), "Delving deep into rectifiers", eq. 15. ``scale`` well below 1 for the last layer of a residual
    branch makes a block start near its shortcut (Zhang et al. 2019, "Fixup initialization").
    """
    nn.init.kaiming_normal_(layer.weight, a=0.2)
    layer.weight.data.mul_(scale)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


class ResBlock(nn.Module):
    r"""Pre-activation residual block, skip(x) + f(x), that may halve or double the side.

    f is activation, [nearest-neighbour up], 3x3 convolution, activation, [2x2 mean], 3x3 convolution: the block of
    Miyato et al. 2018, "Spectral normalization for GANs", figure 8, with the mean taken before the last convolution,
    which then costs a quarter.

    Args:
        resample: ``up``, ``down`` or ``none``.
        normalize: whether an activation is GroupNorm and SiLU, or a leaky ReLU alone.
    """

    def __init__(
        self, channels_in: int, channels_out: int, embed_dim: int = 0, *, resample: str = "none", normalize: bool = True
    ) -> None:
        super().__init__()
        self.resample = resample
        self.act1 = activation(channels_in, embed_dim, normalize)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.act2 = activation(channels_out, embed_dim, normalize)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        changes = channels_in != channels_out
        self.skip = nn.Conv2d(channels_in, channels_out, 1, bias=False) if changes else nn.Identity()
        if not normalize:
            # PyTorch's default lets the signal fade from layer to layer, and no normalisation brings it back.
            he_normal(self.conv1)
            he_normal(self.conv2, scale=0.1)
            if changes:
                nn.init.kaiming_normal_(self.skip.weight, nonlinearity="linear")  # type: ignore[arg-type]

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.act1(x, e)
        if self.resample == "up":
            h, x = _double(h), _double(x)
        h = self.act2(self.conv1(h), e)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return self.skip(x) + self.conv2(h)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Filter(nn.Module):
    """The filter k k^T of sum 1, from its taps k."""

    kernel: Tensor

    def __init__(self, taps: Sequence[float]) -> None:
        super().__init__()
        if len(taps) < 2 or len(taps) % 2 or list(taps) != list(taps)[::-1] or not sum(taps) > 0:
            raise UserError(
                f"A resampling filter is an even number of symmetric taps, as [1, 1] or [1, 3, 3, 1], not {list(taps)}."
            )
        k = torch.tensor([float(tap) for tap in taps])
        self.register_buffer("kernel", (torch.outer(k, k) / k.sum() ** 2)[None, None], persistent=False)
        self.padding = len(taps) // 2 - 1

    def depthwise(self, channels: int) -> Tensor:
        """(channels, 1, k, k): the same filter for each channel by itself."""
        return self.kernel.expand(channels, -1, -1, -1)


class FIRDownsample(Filter):
    """Every second pixel of the filtered image, (n, C, H, W) -> (n, C, H/2, W/2); beyond the edge lie noughts.

    A constant image keeps its value away from the edge.
    """

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return F.conv2d(x, self.depthwise(c), stride=2, padding=self.padding, groups=c)


class FIRUpsample(Filter):
    """The image with noughts between its pixels, filtered, times 4: (n, C, H, W) -> (n, C, 2 H, 2 W).

    It is the transpose of `FIRDownsample`, times 4, and keeps the value of a constant image away from the edge.
    """

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return F.conv_transpose2d(x, 4 * self.depthwise(c), stride=2, padding=self.padding, groups=c)


class FIRConvDownsample(Filter):
    """A 3x3 convolution with stride 2 of the filtered image, (n, C, H, W) -> (n, channels_out, H/2, W/2).

    The image is padded once, before the filter (Karras et al. 2020, StyleGAN2's ``conv_downsample_2d``).
    """

    def __init__(self, channels_in: int, channels_out: int, taps: Sequence[float]) -> None:
        super().__init__(taps)
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return self.conv(F.conv2d(x, self.depthwise(c), padding=self.padding + 1, groups=c))


class ClassConditionalGroupNorm(nn.Module):
    r"""y = a_y \hat x + b_y, where papers on GANs have (class-conditional) batch norm.

    \hat x is the image after GroupNorm, so it comes out the same whatever images stand beside it. There are as many
    parameters as batch norm has: 2 ``channels``, and as many for each class where there are classes (Dumoulin et al.
    2017, "A learned representation for artistic style", eq. 5).

    Shapes: x (n, channels, H, W), labels (n,) -> (n, channels, H, W).
    """

    def __init__(self, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels, affine=not num_classes)
        self.classes = nn.Embedding(num_classes, 2 * channels) if num_classes else None
        if self.classes is not None:
            nn.init.ones_(self.classes.weight[:, :channels])
            nn.init.zeros_(self.classes.weight[:, channels:])

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.classes is None:
            return x
        scale, shift = self.classes(label)[:, :, None, None].chunk(2, dim=1)
        return scale * x + shift


EPS = 1e-5
"""Added to every variance."""


class InstanceNormPlus(nn.Module):
    r"""InstanceNorm++: each feature map normalised by itself, and the shift between maps that this takes away put back.

    Map k of an image, with mean mu_k and standard deviation sigma_k over its pixels, becomes

        gamma_k (h_k - mu_k) / sigma_k + alpha_k (mu_k - m) / v + beta_k,

    where m and v are mean and standard deviation of the mu_k over the maps. gamma, alpha and beta are linear in what
    the network is told. With the noise level as one of ``levels`` unit vectors, each level has its own: this is
    CondInstanceNorm++ (Song and Ermon 2019, "Generative modeling by estimating gradients of the data distribution",
    appendix A.1). With one level there is one set of them (Song and Ermon 2020, "Improved techniques for training
    score-based generative models", section 3.3).

    Shapes: h (n, channels, H, W), told (n, levels + emb_dim) -> (n, channels, H, W).

    Args:
        channels: at least 2.
        levels: unit vectors in the first places of ``told``; gamma and alpha of each start at N(1, 0.02^2), beta at 0.
        emb_dim: further numbers of ``told``: conditions, which add to the three.
    """

    def __init__(self, channels: int, levels: int = 1, emb_dim: int = 0) -> None:
        super().__init__()
        self.channels, self.levels = channels, levels
        self.level = nn.Linear(levels, 3 * channels, bias=False)
        nn.init.normal_(self.level.weight[: 2 * channels], 1, 0.02)
        nn.init.zeros_(self.level.weight[2 * channels :])
        self.conditions = nn.Linear(emb_dim, 3 * channels, bias=False) if emb_dim else None
        if self.conditions is not None:
            nn.init.normal_(self.conditions.weight, std=emb_dim**-0.5)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        modulation = self.level(told[:, : self.levels])
        if self.conditions is not None:
            modulation = modulation + self.conditions(told[:, self.levels :])
        gamma, alpha, beta = modulation[:, :, None, None].chunk(3, dim=1)
        means = h.mean(dim=(2, 3), keepdim=True)
        v2, m = torch.var_mean(means, dim=1, keepdim=True)
        normal = F.group_norm(h, self.channels, eps=EPS)  # as many groups as maps: each by itself
        return gamma * normal + alpha * (means - m) * torch.rsqrt(v2 + EPS) + beta


class NoNorm(nn.Module):
    """The identity, in the place of a normalisation."""

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        return h
