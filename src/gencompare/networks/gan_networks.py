"""Generators and discriminators of GANs: ResNet, MLP, DCGAN and PatchGAN."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gencompare.errors import UserError, check_counts
from gencompare.networks.convnets import ResNetDecoder, ResNetEncoder, pyramid_shapes
from gencompare.networks.layers import ClassConditionalGroupNorm, at_least_float32, he_normal_
from gencompare.networks.mlp import MLPDecoder, MLPEncoder, hstack


class ProjectionHead(nn.Module):
    r"""The output layer of a projection discriminator, from features and labels to scores.

    .. math:: D(x, y) = w^T \phi(x) + b + v_y^T \phi(x)

    Miyato and Koyama 2018, "cGANs with projection discriminator", eq. 3 (https://arxiv.org/abs/1802.05637). Without
    classes the last term is absent.

    Shapes: phi (n, num_features), label (n,) -> (n,).
    """

    def __init__(self, num_features: int, num_classes: int = 0) -> None:
        super().__init__()
        self.score = nn.Linear(num_features, 1)
        self.classes = nn.Embedding(num_classes, num_features) if num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, phi: Tensor, label: Tensor | None = None) -> Tensor:
        score = self.score(phi).squeeze(1)
        if self.classes is None:
            return score
        return score + (self.classes(label) * phi).sum(1)


def apply_spectral_norm(network: nn.Module) -> None:
    """Apply spectral normalisation to every convolution, linear layer and embedding of ``network``, in place.

    Weights are divided by an estimate of their largest singular value, updated by one power iteration per forward pass
    in training (Miyato et al. 2018, "Spectral normalization for GANs", eq. 8 and algorithm 1,
    https://arxiv.org/abs/1802.05957).
    """
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            if not module.weight.is_meta and not module.weight.any():
                nn.init.orthogonal_(module.weight)  # a zero weight cannot be normalised
            spectral_norm(module)


# Generators and discriminators built from the decoder and encoder of a VAE


class DecodingGenerator(nn.Module):
    """A decoder followed by tanh, from latents (n, latent_dim) and labels (n,) to images ``(n, *shape)`` in (-1, 1).

    The latent is the decoder's input. Concatenated with the label embedding, it is also the decoder's embedding e,
    which modulates the normalisation of a ResNet (Chen et al. 2019, "On self modulation for GANs",
    https://arxiv.org/abs/1810.01365).

    Args:
        decoder: ``module(z, e)``, where e has ``latent_dim`` features, plus ``label_dim`` if there are classes.
        num_classes: number of classes, 0 for none.
        label_dim: dimension of the label embedding.
    """

    def __init__(self, decoder: nn.Module, num_classes: int, label_dim: int) -> None:
        super().__init__()
        check_counts(type(self).__name__, label_dim=label_dim)
        self.decoder = decoder
        self.labels = nn.Embedding(num_classes, label_dim) if num_classes else None

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        style = z if self.labels is None else hstack(z, self.labels(label))
        return torch.tanh(at_least_float32(self.decoder(z, style)))


class ResNetGenerator(DecodingGenerator):
    """A `ResNetDecoder` with normalisation modulated by the latent.

    Args:
        latent_dim: dimension of the latent.
        shape: (C, H, W) of the images.
        num_classes: number of classes, 0 for none.
        channels: channels at full resolution; doubled at each halving, up to ``max_channels``.
        max_channels: maximum number of channels.
        num_blocks: residual blocks per resolution.
        label_dim: dimension of the label embedding.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 256,
        num_blocks: int = 1,
        label_dim: int = 32,
    ) -> None:
        embed_dim = latent_dim + (label_dim if num_classes else 0)
        decoder = ResNetDecoder(
            latent_dim, shape, embed_dim, channels=channels, max_channels=max_channels, num_blocks=num_blocks
        )
        super().__init__(decoder, num_classes, label_dim)


class MLPGenerator(DecodingGenerator):
    """An MLP for points and very small images."""

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
    """An encoder, a leaky ReLU and a `ProjectionHead`, from images ``(n, *shape)`` and labels (n,) to scores (n,).

    Args:
        trunk: the encoder, ``(n, *shape)`` -> (n, num_features).
        num_features: dimension of the features.
        num_classes: number of classes, 0 for none.
    """

    def __init__(self, trunk: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ProjectionHead(num_features, num_classes)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.head(F.leaky_relu(self.trunk(x), 0.2), label)


class ResNetDiscriminator(EncodingDiscriminator):
    """A `ResNetEncoder` without normalisation, which would couple the pixels of an image.

    Args:
        shape: (C, H, W) of the images.
        num_classes: number of classes, 0 for none.
        channels: channels at full resolution; doubled at each halving, up to ``max_channels``.
        max_channels: maximum number of channels.
        num_blocks: residual blocks per resolution.
        num_features: dimension of the features before the head.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 256,
        num_blocks: int = 1,
        num_features: int = 128,
    ) -> None:
        check_counts(type(self).__name__, num_features=num_features)
        encoder = ResNetEncoder(
            shape,
            num_features,
            channels=channels,
            max_channels=max_channels,
            num_blocks=num_blocks,
            normalize=False,
        )
        super().__init__(encoder, num_features, num_classes)


class MLPDiscriminator(EncodingDiscriminator):
    """An MLP for points and very small images."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        width: int = 256,
        depth: int = 3,
        num_features: int = 128,
    ) -> None:
        check_counts(type(self).__name__, num_features=num_features)
        super().__init__(MLPEncoder(shape, num_features, width=width, depth=depth), num_features, num_classes)


# DCGAN


class DCGANGenerator(nn.Module):
    """Transposed convolutions from latents (n, latent_dim) and labels (n,) to images ``(n, *shape)`` in (-1, 1).

    Miyato et al. 2018, "Spectral normalization for GANs", table 3 (a) (https://arxiv.org/abs/1802.05957). For 32x32
    images: a linear layer to 512 x 4 x 4; three 4x4 transposed convolutions with stride 2, to 256, 128 and 64 channels,
    each with normalisation and ReLU; a 3x3 convolution to the image. `ClassConditionalGroupNorm` replaces batch norm.
    Other image sizes have more or fewer resolutions.

    Args:
        latent_dim: dimension of the latent.
        shape: (C, H, W) of the images.
        num_classes: number of classes, 0 for none.
        channels: channels at full resolution; doubled at each halving, up to ``max_channels``.
        max_channels: maximum number of channels.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        channels: int = 64,
        max_channels: int = 512,
    ) -> None:
        super().__init__()
        check_counts(type(self).__name__, channels=channels, max_channels=max_channels)
        shapes = pyramid_shapes(shape[1], shape[2], channels, max_channels)[::-1]
        self.start_shape = shapes[0]
        widths = [width for width, _, _ in shapes]
        self.root = nn.Linear(latent_dim, shapes[0][0] * shapes[0][1] * shapes[0][2])
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(ClassConditionalGroupNorm(width, num_classes) for width in widths[1:])
        self.out = nn.Conv2d(widths[-1], shape[0], 3, padding=1)
        dcgan_init_(self)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.root(z).unflatten(1, self.start_shape)
        for up, norm in zip(self.ups, self.norms, strict=True):
            h = F.relu(norm(up(h), label))
        return torch.tanh(at_least_float32(self.out(h)))


class DCGANDiscriminator(nn.Module):
    """Strided convolutions from images ``(n, *shape)`` and labels (n,) to scores (n,).

    Miyato et al. 2018, table 3 (b): at each resolution a 3x3 convolution (64, 128, 256 and 512 channels for 32x32
    images) and, except at the last, a 4x4 convolution with stride 2 that keeps the number of channels, each followed by
    a leaky ReLU of slope 0.1; then a linear layer. There is no normalisation except spectral norm, if enabled.

    Args:
        shape: (C, H, W) of the images.
        num_classes: number of classes, 0 for none.
        channels: channels at full resolution; doubled at each halving, up to ``max_channels``.
        max_channels: maximum number of channels.
    """

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int = 0, *, channels: int = 64, max_channels: int = 512
    ) -> None:
        super().__init__()
        check_counts(type(self).__name__, channels=channels, max_channels=max_channels)
        self.convs = nn.ModuleList()
        previous_width = shape[0]
        shapes = pyramid_shapes(shape[1], shape[2], channels, max_channels)
        for width, *_ in shapes:
            self.convs.append(nn.Conv2d(previous_width, width, 3, padding=1))
            self.convs.append(nn.Conv2d(width, width, 4, stride=2, padding=1))
            previous_width = width
        del self.convs[-1]
        c, h, w = shapes[-1]
        self.head = ProjectionHead(c * h * w, num_classes)
        dcgan_init_(self)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
        return self.head(x.flatten(1), label)


def dcgan_init_(network: nn.Module) -> None:
    """Initialise weights from N(0, 0.02^2) and biases to zero (Radford et al. 2016, section 4,
    https://arxiv.org/abs/1511.06434)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# PatchGAN


class PatchDiscriminator(nn.Module):
    """PatchGAN discriminator, which scores each overlapping patch of an image: (n, C, H, W) -> (n, patches).

    4x4 convolutions with stride 2 are followed by two with stride 1, the last of which outputs a map of scores (Isola
    et al. 2017, "Image-to-image translation with conditional adversarial networks", appendix 6.1.2,
    https://arxiv.org/abs/1611.07004). Group norm replaces batch norm, so the score of an image does not depend on the
    rest of the batch. ``num_layers=3`` gives the 70x70 patches of the paper.

    Args:
        shape: (C, H, W) of the images.
        channels: channels of the first convolution, a multiple of 8; doubled by each further convolution up to 8-fold.
        num_layers: convolutions with stride 2. Reduced for small images to keep feature maps at least 4x4.
    """

    def __init__(self, shape: tuple[int, int, int], *, channels: int = 32, num_layers: int = 2) -> None:
        super().__init__()
        if channels < 8 or channels % 8 or num_layers < 1:
            raise UserError(
                f"The patch discriminator's channels={channels} must be a multiple of 8, and num_layers={num_layers} at"
                " least 1."
            )
        if min(shape[1:]) < 8:
            raise UserError(f"{shape[1]}x{shape[2]} images are too small for patches: use model.discriminator=null.")
        while num_layers > 1 and min(shape[1:]) < 4 * 2**num_layers:
            num_layers -= 1
        widths = [channels * min(2**k, 8) for k in range(num_layers + 1)]
        self.stem = nn.Conv2d(shape[0], widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2 if k < num_layers - 1 else 1, padding=1, bias=False)
            for k, (before, after) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, after) for after in widths[1:])
        self.out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        he_normal_(self.stem)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.stem(x), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.out(h).flatten(1)
