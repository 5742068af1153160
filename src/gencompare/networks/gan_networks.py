"""Generators and discriminators: DCGAN, PatchGAN, and those made of a VAE's decoder and encoder."""

from __future__ import annotations

import itertools
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gencompare.errors import UserError
from gencompare.networks.convnets import ResNetDecoder, ResNetEncoder, stages
from gencompare.networks.layers import ClassConditionalGroupNorm, he_normal
from gencompare.networks.mlp import MLPDecoder, MLPEncoder, hstack


class ProjectionHead(nn.Module):
    r"""D(x, y) = w . phi(x) + b + v_y . phi(x), features (n, features) and labels (n,) to scores (n,).

    Miyato and Koyama 2018, "cGANs with projection discriminator", eq. 3. Without classes the last term is left out.
    """

    def __init__(self, features: int, num_classes: int = 0) -> None:
        super().__init__()
        self.score = nn.Linear(features, 1)
        self.classes = nn.Embedding(num_classes, features) if num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, phi: Tensor, label: Tensor | None = None) -> Tensor:
        score = self.score(phi).squeeze(1)
        if self.classes is None:
            return score
        return score + (self.classes(label) * phi).sum(1)


def normalize_spectrally(network: nn.Module) -> None:
    """Give every convolution, linear layer and embedding of ``network`` a weight of spectral norm 1.

    Weights are divided by their largest singular value, which one power iteration each time that the network runs in
    training keeps up to date (Miyato et al. 2018, "Spectral normalization for GANs", eq. 8 and algorithm 1).
    """
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            if not module.weight.is_meta and not module.weight.any():
                nn.init.orthogonal_(module.weight)  # noughts have no direction that could be normalised
            spectral_norm(module)


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
        style = z if self.labels is None else hstack(z, self.labels(label))
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


class DCGANGenerator(nn.Module):
    """Latents (n, latent_dim) and labels (n,) to images (n, *shape) in (-1, 1), by transposed convolutions.

    Miyato et al. 2018, "Spectral normalization for GANs", table 3 (a): for 32x32 images a linear layer to 512 x 4 x 4,
    three transposed convolutions 4x4 with stride 2, to 256, 128 and 64 channels, each with normalisation
    (`ClassConditionalGroupNorm` replaces batch norm) and ReLU, and a convolution
    3x3 to the image. Other sizes have more or fewer stages.

    Args:
        channels: at the finest resolution; doubled at each halving, up to ``max_channels``.
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
        plan = stages(shape[1], shape[2], channels, max_channels)[::-1]
        self.start = plan[0]
        widths = [width for width, _, _ in plan]
        self.root = nn.Linear(latent_dim, plan[0][0] * plan[0][1] * plan[0][2])
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(before, here, 4, stride=2, padding=1) for before, here in pairwise(widths)
        )
        self.norms = nn.ModuleList(ClassConditionalGroupNorm(width, num_classes) for width in widths[1:])
        self.out = nn.Conv2d(widths[-1], shape[0], 3, padding=1)
        small_normal(self)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.root(z).unflatten(1, self.start)
        for up, norm in zip(self.ups, self.norms, strict=True):
            h = F.relu(norm(up(h), label))
        return torch.tanh(self.out(h).float())


class DCGANDiscriminator(nn.Module):
    """Images (n, *shape) and labels (n,) to scores (n,), by convolutions with stride.

    The same paper, table 3 (b): at each resolution a convolution 3x3 (64, 128, 256 and 512 channels for 32x32 images)
    and, but for the last, one 4x4 with stride 2 that keeps the channels, each with a leaky ReLU of slope 0.1; then one
    linear layer. It has no normalisation but that of its weights, if any.
    """

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int = 0, *, channels: int = 64, max_channels: int = 512
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        before = shape[0]
        plan = stages(shape[1], shape[2], channels, max_channels)
        for width, *_ in plan:
            self.convs.append(nn.Conv2d(before, width, 3, padding=1))
            self.convs.append(nn.Conv2d(width, width, 4, stride=2, padding=1))
            before = width
        del self.convs[-1]
        width, height, across = plan[-1]
        self.head = ProjectionHead(width * height * across, num_classes)
        small_normal(self)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
        return self.head(x.flatten(1), label)


def small_normal(network: nn.Module) -> None:
    """Weights from N(0, 0.02^2) (Radford et al. 2016, section 4), biases nought."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PatchDiscriminator(nn.Module):
    """(n, C, H, W) to (n, patches): a score for each of the overlapping patches of an image.

    Convolutions of 4x4 with stride 2, and two of stride 1 that end in a map of scores: Isola et al. (2017),
    "Image-to-image translation with conditional adversarial networks", appendix 6.1.2, with group norm in place of
    batch norm, so that no image's score depends on another's. Their 70x70 patches are ``layers=3``; small images want
    fewer, and get no more than leave a side of 4.

    Args:
        shape: (C, H, W) of the images.
        width: channels of the first convolution, a multiple of 8; doubled by each further one, up to 8 times.
        layers: convolutions of stride 2, at most.
    """

    def __init__(self, shape: tuple[int, int, int], *, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        if width < 8 or width % 8 or layers < 1:
            raise UserError(f"A discriminator of patches with width={width}, layers={layers}: a multiple of 8, and 1.")
        if min(shape[1:]) < 8:
            raise UserError(f"Images of {shape[1]}x{shape[2]} have no patches: use model.discriminator=null.")
        while layers > 1 and min(shape[1:]) < 4 * 2**layers:
            layers -= 1
        widths = [width * min(2**k, 8) for k in range(layers + 1)]
        self.stem = nn.Conv2d(shape[0], widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2 if k < layers - 1 else 1, padding=1, bias=False)
            for k, (before, after) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, after) for after in widths[1:])
        self.out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        he_normal(self.stem)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.stem(x), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.out(h).flatten(1)
