"""Residual classifiers for clean and noisy images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError, check_counts
from gencompare.networks.conditioning import SinusoidalEmbedding
from gencompare.networks.layers import GlobalBatchNorm2d
from gencompare.networks.unet_blocks import (
    GROUP_NORM_EPS,
    Downsample,
    ResidualBlock,
    SelfAttention,
    UNetBlock,
    fan_avg,
)


class ClassifierBlock(nn.Module):
    """x + f(x), where f repeats a 3x3 convolution, batch norm and GELU ``depth`` times."""

    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        layers = [(convolution(width, width), GlobalBatchNorm2d(width), nn.GELU()) for _ in range(depth)]
        self.body = nn.Sequential(*(layer for each in layers for layer in each))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualClassifier(nn.Module):
    r"""A fast residual classifier for small images.

    A whitening layer; stages of convolution, 2x2 max pooling, batch norm, GELU and a residual block; average pooling;
    logits. It follows Jordan (2024), "94% on CIFAR-10 in 3.29 seconds on a single GPU"
    (https://arxiv.org/abs/2404.00498), sections 3.1 to 3.3: the first layer decorrelates patches of 2x2 pixels, and
    most channels are at low resolution. The residual blocks are those of the ResNet-9 of Page (2018), "How to train
    your ResNet" (https://github.com/davidcpage/cifar10-fast).

    Args:
        channels: channels of the image.
        num_classes: number of logits.
        widths: channels of each stage; the last is the number of features.
        stem_stride: stride of the whitening layer; 2 halves the image before the first stage, which is the most
            expensive.
        block_depth: convolutions per residual block.
    """

    def __init__(
        self, channels: int, num_classes: int, *, widths: Sequence[int], stem_stride: int = 1, block_depth: int = 1
    ) -> None:
        super().__init__()
        if not num_classes:
            raise UserError("A classifier needs labelled data.")
        if not widths or min(widths) < 1:
            raise UserError(f"The widths of a classifier must be at least 1, not {list(widths)}.")
        check_counts("model.network", stem_stride=stem_stride, block_depth=block_depth)
        self.whitening = nn.Conv2d(channels, 8 * channels, 2, stride=stem_stride).requires_grad_(False)
        layers: list[nn.Module] = []
        for before, width in zip([8 * channels, *widths[:-1]], widths, strict=True):
            # Pooling before batch norm leaves a quarter of the values to normalise.
            layers += [convolution(before, width), nn.MaxPool2d(2), GlobalBatchNorm2d(width), nn.GELU()]
            layers.append(ClassifierBlock(width, block_depth))
        self.trunk = nn.Sequential(nn.GELU(), *layers)
        self.head = nn.Linear(widths[-1], num_classes)
        # bfloat16 convolutions are twice as fast in the channels-last memory format.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def whiten(self, x: Tensor) -> None:
        r"""Fit the whitening layer to images (n, channels, H, W).

        With :math:`e_i` and :math:`\lambda_i` the eigenvectors and eigenvalues of the covariance of 2x2 patches
        :math:`p`, and :math:`m` their mean, the outputs are

        .. math:: \pm e_i^T (p - m) / \sqrt{\lambda_i + c}

        which are uncorrelated and have a variance of about 1; :math:`c` is small compared with the mean eigenvalue.
        """
        patches = F.unfold(x, 2, stride=self.whitening.stride).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        eigenvalues, eigenvectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        filters = (eigenvectors / (eigenvalues + 5e-4 * eigenvalues.mean()).sqrt()).T
        filters = torch.cat([filters, -filters])
        self.whitening.weight.copy_(filters.unflatten(1, (x.shape[1], 2, 2)))
        assert self.whitening.bias is not None
        self.whitening.bias.copy_(-filters @ mean)

    def activations(self, x: Tensor) -> Tensor:
        """Compute the activations (n, widths[-1], h, w) of the last stage for images (n, channels, H, W) in [-1, 1]."""
        return self.trunk(self.whitening(x.contiguous(memory_format=torch.channels_last)))

    def pool(self, activations: Tensor) -> Tensor:
        """Compute `features` from the activations of the last stage."""
        return activations.mean((2, 3))

    def features(self, x: Tensor) -> Tensor:
        """Compute the inputs of the output layer, (n, widths[-1])."""
        return self.pool(self.activations(x))

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits (n, num_classes) from ``features``."""
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (n, num_classes) of images (n, channels, H, W) in [-1, 1]."""
        return self.classify(self.features(x))


def convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """Build a 3x3 convolution without bias, because batch norm follows."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)


class NoisyClassifierNet(nn.Module):
    """A classifier for noisy images: the encoder of a U-Net with attention pooling.

    Dhariwal and Nichol (2021), "Diffusion models beat GANs on image synthesis", section 4.1 and appendix J
    (https://arxiv.org/abs/2105.05233). The logits are zero at initialisation.

    Shapes: x (n, C, H, W), noise_cond (n,) -> (n, num_classes).

    Args:
        shape: (C, H, W) of x. H and W must be divisible by 2 for each multiplier after the first.
        num_classes: number of logits.
        channels: base width, a multiple of ``num_groups``.
        channel_mult: width of each level as a multiple of ``channels``, from the full resolution down.
        num_blocks: residual blocks per level.
        attention_resolutions: image heights at which each block is followed by self-attention.
        dropout: dropout probability inside residual blocks.
        num_groups: groups of each GroupNorm.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        *,
        channels: int = 32,
        channel_mult: Sequence[int] = (1, 2, 2),
        num_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16, 8),
        dropout: float = 0.0,
        num_groups: int = 8,
    ) -> None:
        super().__init__()
        halvings = len(channel_mult) - 1
        if halvings < 0 or shape[1] % 2**halvings or shape[2] % 2**halvings:
            raise UserError(
                f"model.network.channel_mult={list(channel_mult)} halves an image {max(halvings, 0)} time(s), which is"
                f" impossible for {shape[1]}x{shape[2]}: use a list of a different length."
            )
        check_counts("model.network", channels=channels, num_blocks=num_blocks, num_groups=num_groups)
        if channels % num_groups or min(channel_mult) < 1:
            raise UserError(
                f"model.network.channels={channels} must be a multiple of num_groups={num_groups}, and the entries of"
                f" channel_mult={list(channel_mult)} at least 1."
            )
        if not 0 <= dropout < 1:
            raise UserError(f"model.network.dropout={dropout} must be in [0, 1).")
        emb_dim = 4 * channels
        self.noise = nn.Sequential(
            SinusoidalEmbedding(channels),
            fan_avg(nn.Linear(channels, emb_dim)),
            nn.SiLU(),
            fan_avg(nn.Linear(emb_dim, emb_dim)),
        )
        self.stem = fan_avg(nn.Conv2d(shape[0], channels, 3, padding=1))
        self.layers = nn.ModuleList()
        width = channels
        for level, multiplier in enumerate(channel_mult):
            if level:
                self.layers.append(Downsample(width))
            for _ in range(num_blocks):
                residual = ResidualBlock(width, channels * multiplier, emb_dim, dropout=dropout, num_groups=num_groups)
                width = channels * multiplier
                has_attention = shape[1] >> level in attention_resolutions
                attention = SelfAttention(width, num_groups=num_groups) if has_attention else None
                self.layers.append(UNetBlock(residual, attention))
        self.norm = nn.GroupNorm(num_groups, width, GROUP_NORM_EPS)
        self.pool = AttentionPool(width)
        self.out = fan_avg(nn.Linear(width, num_classes), scale=0)

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        emb = F.silu(self.noise(noise_cond))
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h, emb)
        return self.out(self.pool(F.silu(self.norm(h))))


class AttentionPool(nn.Module):
    r"""Attention pooling with the mean feature as the query, (n, C, H, W) -> (n, C).

    .. math:: W_o \, \mathrm{softmax}(q k^T / \sqrt C) v

    Radford et al. (2021), "Learning transferable visual models from natural language supervision" (CLIP), section 2.4
    (https://arxiv.org/abs/2103.00020), with one head and no position embedding.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q = fan_avg(nn.Linear(channels, channels))
        # Two C -> C maps in one layer: scale 1.5 gives the variance of two separate layers.
        self.kv = fan_avg(nn.Linear(channels, 2 * channels), scale=1.5)
        self.out = fan_avg(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        pixels = h.flatten(2).mT  # (n, HW, C)
        k, v = self.kv(pixels).unsqueeze(1).chunk(2, dim=-1)
        q = self.q(pixels.mean(1, keepdim=True)).unsqueeze(1)  # (n, 1 head, 1, C)
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))
