"""Residual classifiers: of images, and of noisy images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.conditioning import SinusoidalEmbedding
from gencompare.networks.unet_blocks import EPS, Downsample, ResidualBlock, SelfAttention, UNetBlock, fan_avg


class ClassifierBlock(nn.Module):
    """x + f(x), with f ``depth`` times a 3x3 convolution, batch norm and GELU."""

    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        layers = [(convolution(width, width), nn.BatchNorm2d(width), nn.GELU()) for _ in range(depth)]
        self.body = nn.Sequential(*(layer for each in layers for layer in each))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualClassifier(nn.Module):
    r"""Whitening; stages of convolution, 2x2 max pool and residual block, each of half the side; mean; logits.

    After Jordan (2024), "94% on CIFAR-10 in 3.29 seconds on a single GPU" (https://arxiv.org/abs/2404.00498), sections
    3.1 to 3.3: the first layer decorrelates patches of 2x2 pixels, batch norm and GELU follow every other convolution,
    and most channels are where the image is small. The residual blocks are as in the ResNet-9 of Page (2018), "How to
    train your ResNet" (https://github.com/davidcpage/cifar10-fast).

    Args:
        channels: of the image.
        num_classes: logits.
        widths: channels of each stage; the last is the number of features.
        stem_stride: 2 halves the image before the first stage, which is where most of the cost lies.
        block_depth: convolutions of each residual block.
    """

    def __init__(
        self, channels: int, num_classes: int, *, widths: Sequence[int], stem_stride: int = 1, block_depth: int = 1
    ) -> None:
        super().__init__()
        if not num_classes:
            raise UserError("A classifier needs labelled data.")
        if not widths or min(widths) < 1:
            raise UserError(f"A classifier has stages of at least 1 channel, not {list(widths)}.")
        if block_depth < 1:
            raise UserError(f"A residual block has at least 1 convolution, not {block_depth}.")
        self.whitening = nn.Conv2d(channels, 8 * channels, 2, stride=stem_stride).requires_grad_(False)
        layers: list[nn.Module] = []
        for before, width in zip([8 * channels, *widths[:-1]], widths, strict=True):
            # Pooling before the norm: a quarter of the values to normalise.
            layers += [convolution(before, width), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU()]
            layers.append(ClassifierBlock(width, block_depth))
        self.trunk = nn.Sequential(nn.GELU(), *layers)
        self.head = nn.Linear(widths[-1], num_classes)
        # Convolutions in bfloat16 take half the time with the channels last.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def whiten(self, x: Tensor) -> None:
        r"""Fit the first layer to images (n, channels, H, W).

        With e_i and l_i the eigenvectors and eigenvalues of the covariance of patches p of 2x2 pixels, and m their
        mean, its outputs are \pm e_i \cdot (p - m) / sqrt(l_i + c): uncorrelated and of variance about 1, c being small
        beside the mean eigenvalue.
        """
        patches = F.unfold(x, 2, stride=self.whitening.stride).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        filters = (vectors / (values + 5e-4 * values.mean()).sqrt()).T
        filters = torch.cat([filters, -filters])
        self.whitening.weight.copy_(filters.unflatten(1, (x.shape[1], 2, 2)))
        assert self.whitening.bias is not None
        self.whitening.bias.copy_(-filters @ mean)

    def activations(self, x: Tensor) -> Tensor:
        """Activations of the last stage, (n, widths[-1], h, w), of images (n, channels, H, W) in [-1, 1]."""
        return self.trunk(self.whitening(x.contiguous(memory_format=torch.channels_last)))

    def pool(self, activations: Tensor) -> Tensor:
        """`features`, from the activations of the last stage."""
        return activations.mean((2, 3))

    def features(self, x: Tensor) -> Tensor:
        """(n, widths[-1]): the layer before the logits."""
        return self.pool(self.activations(x))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (n, num_classes) of ``features``."""
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, channels, H, W) in [-1, 1]."""
        return self.classify(self.features(x))


def convolution(before: int, after: int) -> nn.Conv2d:
    """3x3; a bias would be lost in the batch norm that follows."""
    return nn.Conv2d(before, after, 3, padding=1, bias=False)


class NoisyClassifierNet(nn.Module):
    """The encoder of a U-Net, and attention pooling on top of it.

    Dhariwal and Nichol (2021), "Diffusion models beat GANs on image synthesis", section 4.1 and appendix J: the
    downsampling half of the U-Net with an attention pool at its smallest size.

    Shapes: x (n, C, H, W), noise_cond (n,) -> logits (n, num_classes), nought at the start.

    Args:
        shape: (C, H, W) of x; H and W must be halved once for each multiplier after the first.
        num_classes: logits.
        channels: base width; a multiple of ``groups``.
        multipliers: width of each level, from the image's own resolution down, as a multiple of ``channels``.
        blocks: residual blocks a level.
        attention: resolutions (image heights) with self-attention after each block.
        dropout: probability with which a feature inside a residual block is dropped in training.
        groups: groups of every GroupNorm.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        *,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16, 8),
        dropout: float = 0.0,
        groups: int = 8,
    ) -> None:
        super().__init__()
        halvings = len(multipliers) - 1
        if halvings < 0 or shape[1] % 2**halvings or shape[2] % 2**halvings:
            raise UserError(
                f"network.multipliers={list(multipliers)} halves an image {max(halvings, 0)} time(s), which"
                f" {shape[1]}x{shape[2]} does not allow: give fewer of them."
            )
        if channels < 1 or blocks < 1 or channels % groups:
            raise UserError(
                f"network.channels={channels} must be a multiple of groups={groups}, and blocks={blocks} at least 1."
            )
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
        for level, multiplier in enumerate(multipliers):
            if level:
                self.layers.append(Downsample(width))
            for _ in range(blocks):
                residual = ResidualBlock(width, channels * multiplier, emb_dim, dropout=dropout, groups=groups)
                width = channels * multiplier
                attends = shape[1] >> level in attention
                self.layers.append(UNetBlock(residual, SelfAttention(width, groups=groups) if attends else None))
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.pool = AttentionPool(width)
        self.out = fan_avg(nn.Linear(width, num_classes), scale=0)

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        emb = F.silu(self.noise(noise_cond))
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h, emb)
        return self.out(self.pool(F.silu(self.norm(h))))


class AttentionPool(nn.Module):
    """The mean pixel asks, all pixels answer: linear(softmax(q k^T / sqrt C) v), (n, C, H, W) -> (n, C).

    Radford et al. (2021), "CLIP", section 2.4, with one head, and the places of pixels left to the convolutions below.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q = fan_avg(nn.Linear(channels, channels))
        self.kv = fan_avg(nn.Linear(channels, 2 * channels), scale=1.5)  # as two maps C -> C would have
        self.out = fan_avg(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        pixels = h.flatten(2).mT  # (n, HW, C)
        k, v = self.kv(pixels).unsqueeze(1).chunk(2, dim=-1)
        q = self.q(pixels.mean(1, keepdim=True)).unsqueeze(1)  # (n, 1 head, 1, C)
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))
