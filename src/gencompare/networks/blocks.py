"""Blocks of the convolutional networks that are not U-Nets: VAEs, GANs, classifiers of patches."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class ModulatedGroupNorm(nn.Module):
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


class Normalized(nn.Module):
    """Modulated GroupNorm, then SiLU."""

    def __init__(self, channels: int, embed_dim: int = 0) -> None:
        super().__init__()
        self.norm = ModulatedGroupNorm(channels, embed_dim)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return F.silu(self.norm(x, e))


class Plain(nn.Module):
    """Leaky ReLU and no normalisation, for discriminators: gradients pass at full strength, pixels stay untied."""

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return F.leaky_relu(x, 0.2)


def activation(channels: int, embed_dim: int, normalize: bool) -> nn.Module:
    """What a network puts before its convolutions."""
    return Normalized(channels, embed_dim) if normalize else Plain()


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
