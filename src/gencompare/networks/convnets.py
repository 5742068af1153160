"""ResNets between images and vectors: the encoder and decoder of a VAE, the discriminator and generator of a GAN."""

from __future__ import annotations

from torch import Tensor, nn

from gencompare.errors import check_counts
from gencompare.networks.layers import ResBlock, make_activation

MIN_SIDE = 4
"""Images are halved as long as both height and width remain at least this many pixels."""


def pyramid_shapes(height: int, width: int, channels: int, max_channels: int) -> list[tuple[int, int, int]]:
    """Return (channels, H, W) of each resolution, finest first.

    Height and width halve, and channels double up to ``max_channels``. 8x8 images have 2 resolutions, 32x32 images have
    4 and 64x64 images have 5, so one config serves all image sizes.
    """
    shapes = [(min(channels, max_channels), height, width)]
    while height % 2 == width % 2 == 0 and min(height, width) >= 2 * MIN_SIDE:
        height, width, channels = height // 2, width // 2, 2 * channels
        shapes.append((min(channels, max_channels), height, width))
    return shapes


class ResNetEncoder(nn.Module):
    """A ResNet from images ``(n, *shape)`` and an optional embedding (n, embed_dim) to (n, out_features).

    Each resolution has ``num_blocks`` residual blocks, and the last block of each resolution but the coarsest
    downsamples. A linear layer is applied to the flattened features.

    Args:
        shape: (C, H, W) of the images.
        out_features: dimension of the output.
        embed_dim: dimension of the embedding that modulates the normalisation; 0 for none.
        channels: channels at full resolution; doubled at each halving, up to ``max_channels``.
        max_channels: maximum number of channels.
        num_blocks: residual blocks per resolution.
        normalize: use GroupNorm and SiLU; False uses leaky ReLUs alone, for discriminators.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        out_features: int,
        embed_dim: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 256,
        num_blocks: int = 2,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        check_counts(type(self).__name__, channels=channels, max_channels=max_channels, num_blocks=num_blocks)
        shapes = pyramid_shapes(shape[1], shape[2], channels, max_channels)
        self.stem = nn.Conv2d(shape[0], shapes[0][0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for (width, _, _), (next_width, _, _) in zip(shapes, [*shapes[1:], shapes[-1]], strict=True):
            self.blocks.extend(ResBlock(width, width, embed_dim, normalize=normalize) for _ in range(num_blocks - 1))
            resample = "none" if len(self.blocks) == len(shapes) * num_blocks - 1 else "down"
            self.blocks.append(ResBlock(width, next_width, embed_dim, resample=resample, normalize=normalize))
        c, h, w = shapes[-1]
        self.act = make_activation(c, embed_dim, normalize)
        self.out = nn.Linear(c * h * w, out_features)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, e)
        return self.out(self.act(h, e).flatten(1))


class ResNetDecoder(nn.Module):
    """A ResNet from latents (n, in_features) and an optional embedding (n, embed_dim) to images ``(n, *shape)``.

    The mirror image of `ResNetEncoder`, with the same arguments. The first block of each resolution but the coarsest
    upsamples.
    """

    def __init__(
        self,
        in_features: int,
        shape: tuple[int, int, int],
        embed_dim: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 256,
        num_blocks: int = 2,
    ) -> None:
        super().__init__()
        check_counts(type(self).__name__, channels=channels, max_channels=max_channels, num_blocks=num_blocks)
        shapes = pyramid_shapes(shape[1], shape[2], channels, max_channels)[::-1]
        self.start_shape = shapes[0]
        c, h, w = shapes[0]
        self.stem = nn.Linear(in_features, c * h * w)
        self.blocks = nn.ModuleList()
        for (previous_width, _, _), (width, _, _) in zip([shapes[0], *shapes[:-1]], shapes, strict=True):
            resample = "up" if self.blocks else "none"
            self.blocks.append(ResBlock(previous_width, width, embed_dim, resample=resample))
            self.blocks.extend(ResBlock(width, width, embed_dim) for _ in range(num_blocks - 1))
        self.act = make_activation(shapes[-1][0], embed_dim, normalize=True)
        self.out = nn.Conv2d(shapes[-1][0], shape[0], 3, padding=1)

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.stem(z).unflatten(1, self.start_shape)
        for block in self.blocks:
            h = block(h, e)
        return self.out(self.act(h, e))
