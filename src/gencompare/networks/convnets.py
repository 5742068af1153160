"""ResNets from image to vector and back: encoder and decoder of a VAE, discriminator and generator of a GAN."""

from __future__ import annotations

from torch import Tensor, nn

from gencompare.networks.layers import ResBlock, activation

SMALLEST = 4
"""Images are halved as long as both sides stay at least this long."""


def stages(side_h: int, side_w: int, channels: int, max_channels: int) -> list[tuple[int, int, int]]:
    """(channels, H, W) of every resolution, finest first: sides halve, channels double up to ``max_channels``.

    8x8 has 2 stages, 32x32 has 4, 64x64 has 5, so one config serves images of every size.
    """
    found = [(min(channels, max_channels), side_h, side_w)]
    while side_h % 2 == side_w % 2 == 0 and min(side_h, side_w) >= 2 * SMALLEST:
        side_h, side_w, channels = side_h // 2, side_w // 2, 2 * channels
        found.append((min(channels, max_channels), side_h, side_w))
    return found


class ResNetEncoder(nn.Module):
    """(n, *shape), and an embedding (n, embed_dim), to (n, out_features).

    ``blocks`` residual blocks a resolution, the last of each but the coarsest halving the side; then one linear layer
    over all that is left.

    Args:
        channels: at the finest resolution; doubled at each halving, up to ``max_channels``.
        normalize: False (leaky ReLU alone) makes the trunk of a discriminator.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        out_features: int,
        embed_dim: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 256,
        blocks: int = 2,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        plan = stages(shape[1], shape[2], channels, max_channels)
        self.stem = nn.Conv2d(shape[0], plan[0][0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for (here, _, _), (after, _, _) in zip(plan, [*plan[1:], plan[-1]], strict=True):
            self.blocks.extend(ResBlock(here, here, embed_dim, normalize=normalize) for _ in range(blocks - 1))
            resample = "none" if len(self.blocks) == len(plan) * blocks - 1 else "down"
            self.blocks.append(ResBlock(here, after, embed_dim, resample=resample, normalize=normalize))
        last, h, w = plan[-1]
        self.act = activation(last, embed_dim, normalize)
        self.out = nn.Linear(last * h * w, out_features)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, e)
        return self.out(self.act(h, e).flatten(1))


class ResNetDecoder(nn.Module):
    """(n, in_features), and an embedding (n, embed_dim), to (n, *shape): the encoder's mirror image.

    The first of each resolution's ``blocks``, but for the coarsest, doubles the side.
    """

    def __init__(
        self,
        in_features: int,
        shape: tuple[int, int, int],
        embed_dim: int = 0,
        *,
        channels: int = 32,
        max_channels: int = 256,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        plan = stages(shape[1], shape[2], channels, max_channels)[::-1]
        self.start = plan[0]
        last, h, w = plan[0]
        self.stem = nn.Linear(in_features, last * h * w)
        self.blocks = nn.ModuleList()
        for (before, _, _), (here, _, _) in zip([plan[0], *plan[:-1]], plan, strict=True):
            resample = "up" if self.blocks else "none"
            self.blocks.append(ResBlock(before, here, embed_dim, resample=resample))
            self.blocks.extend(ResBlock(here, here, embed_dim) for _ in range(blocks - 1))
        self.act = activation(plan[-1][0], embed_dim, normalize=True)
        self.out = nn.Conv2d(plan[-1][0], shape[0], 3, padding=1)

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.stem(z).unflatten(1, self.start)
        for block in self.blocks:
            h = block(h, e)
        return self.out(self.act(h, e))
