"""A small residual classifier: the network of the classifier extractors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError


class ResidualBlock(nn.Module):
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
            layers.append(ResidualBlock(width, block_depth))
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
