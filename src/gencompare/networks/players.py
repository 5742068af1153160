"""Generators and discriminators made of the decoders and encoders that other families use too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.networks.convnets import ResNetDecoder, ResNetEncoder
from gencompare.networks.mlp import MLPDecoder, MLPEncoder, beside
from gencompare.networks.projection import ProjectionHead


class DecodingGenerator(nn.Module):
    """tanh of a decoder: latents (n, latent_dim) and labels (n,) to images (n, *shape) in (-1, 1).

    The latent enters at the root, and with the label's embedding wherever the decoder takes an embedding: in a ResNet
    it modulates the normalisations (Chen et al. 2019, "On self modulation for GANs").

    Args:
        decoder: ``module(z, e)`` for e of ``latent_dim`` numbers, and ``label_dim`` more where there are classes.
    """

    def __init__(self, decoder: nn.Module, num_classes: int, label_dim: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.labels = nn.Embedding(num_classes, label_dim) if num_classes else None

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        style = z if self.labels is None else beside(z, self.labels(label))
        return torch.tanh(self.decoder(z, style).float())


class ResNetGenerator(DecodingGenerator):
    """A `ResNetDecoder` whose normalisations the latent modulates."""

    def __init__(
        self,
        latent_dim: int,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 256,
        blocks: int = 1,
        label_dim: int = 32,
    ) -> None:
        embed_dim = latent_dim + (label_dim if num_classes else 0)
        sizes = {"channels": channels, "max_channels": max_channels, "blocks": blocks}
        super().__init__(ResNetDecoder(latent_dim, shape, embed_dim, **sizes), num_classes, label_dim)


class MLPGenerator(DecodingGenerator):
    """A perceptron, for points and very small images."""

    def __init__(
        self,
        latent_dim: int,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        width: int = 256,
        depth: int = 3,
        label_dim: int = 32,
    ) -> None:
        embed_dim = latent_dim + (label_dim if num_classes else 0)
        super().__init__(MLPDecoder(latent_dim, shape, embed_dim, width=width, depth=depth), num_classes, label_dim)


class EncodingDiscriminator(nn.Module):
    """A projection head on the leaky ReLU of an encoder: images (n, *shape) and labels (n,) to scores (n,).

    Args:
        trunk: (n, *shape) -> (n, features).
    """

    def __init__(self, trunk: nn.Module, features: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ProjectionHead(features, num_classes)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.head(F.leaky_relu(self.trunk(x), 0.2), label)


class ResNetDiscriminator(EncodingDiscriminator):
    """A `ResNetEncoder` without normalisation, which would tie the pixels of an image together."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 256,
        blocks: int = 1,
        features: int = 128,
    ) -> None:
        sizes = {"channels": channels, "max_channels": max_channels, "blocks": blocks}
        super().__init__(ResNetEncoder(shape, features, normalize=False, **sizes), features, num_classes)


class MLPDiscriminator(EncodingDiscriminator):
    """A perceptron, for points and very small images."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        width: int = 256,
        depth: int = 3,
        features: int = 128,
    ) -> None:
        super().__init__(MLPEncoder(shape, features, width=width, depth=depth), features, num_classes)
