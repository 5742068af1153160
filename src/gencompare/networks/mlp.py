"""Multilayer perceptrons for points and very small images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import check_counts
from gencompare.networks.conditioning import ConditionEmbedding, SinusoidalEmbedding
from gencompare.networks.mup import lr_factors, rescale_inputs


def mlp(in_features: int, out_features: int, width: int, depth: int) -> nn.Sequential:
    """Build an MLP, (n, in_features) -> (n, out_features), with ``depth`` hidden layers of ``width`` SiLU units."""
    check_counts("mlp", width=width)
    check_counts("mlp", minimum=0, depth=depth)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(in_features, width), nn.SiLU()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, out_features))


def hstack(x: Tensor, e: Tensor | None) -> Tensor:
    """Concatenate x (n, d) and the embedding e (n, k), if any, into (n, d + k)."""
    return x if e is None else torch.cat([x, e], dim=1)


class MLPEncoder(nn.Module):
    """An MLP from images ``(n, *shape)`` and an optional embedding (n, embed_dim) to (n, out_features)."""

    def __init__(
        self, shape: tuple[int, int, int], out_features: int, embed_dim: int = 0, *, width: int = 256, depth: int = 3
    ) -> None:
        super().__init__()
        self.net = mlp(math.prod(shape) + embed_dim, out_features, width, depth)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(hstack(x.flatten(1), e))


class MLPDecoder(nn.Module):
    """An MLP from latents (n, in_features) and an optional embedding (n, embed_dim) to images ``(n, *shape)``."""

    def __init__(
        self, in_features: int, shape: tuple[int, int, int], embed_dim: int = 0, *, width: int = 256, depth: int = 3
    ) -> None:
        super().__init__()
        self.shape = shape
        self.net = mlp(in_features + embed_dim, math.prod(shape), width, depth)

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(hstack(z, e)).unflatten(1, self.shape)


class DenoisingMLP(nn.Module):
    """A residual MLP on the flattened image. Noise level and conditions modulate its blocks.

    The output is zero at initialisation.

    Shapes: x (n, C, H, W), noise_cond (n,), ``cond`` as for `ConditionEmbedding` -> (n, out_channels, H, W).

    Args:
        shape: (C, H, W) of x.
        out_channels: channels of the output.
        num_classes: number of classes, 0 for none. Label ``num_classes`` means "no label".
        width: features of every layer; even, at least 4.
        depth: number of residual blocks, each with two layers.
        base_width: the ``width`` at which the learning rate was found, for muP (`gencompare.networks.mup`); None for
            the standard parametrisation.
        condition_sizes: ``low_res_channels``, ``embedding_dim``, ``augment_dim``, ``coordinate_channels`` and
            ``interval_dim``, see `ConditionEmbedding`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int,
        num_classes: int = 0,
        *,
        width: int = 128,
        depth: int = 3,
        base_width: int | None = None,
        **condition_sizes: int,
    ) -> None:
        super().__init__()
        check_counts("model.network", depth=depth)
        self.out_shape = (out_channels, *shape[1:])
        self.noise = nn.Sequential(SinusoidalEmbedding(width), nn.Linear(width, width), nn.SiLU())
        self.conditions = ConditionEmbedding(width, num_classes, noise_dim=width, **condition_sizes)
        self.stem = nn.Linear((shape[0] + self.conditions.image_channels) * math.prod(shape[1:]), width)
        self.blocks = nn.ModuleList(ModulatedMLPBlock(width) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, math.prod(self.out_shape))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.base_width = base_width
        if base_width is not None:
            check_counts("model.network", base_width=base_width)
            rescale_inputs([each for each in [self.conditions.augment] if each is not None], base_width / width)

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        emb = self.conditions.embed(self.noise, noise_cond, cond)
        h = self.stem(self.conditions.concat_images(x, cond).flatten(1))
        for block in self.blocks:
            h = block(h, emb)
        return self.out(self.norm(h)).unflatten(1, self.out_shape)

    def lr_factors(self) -> dict[str, float]:
        """Return the factor of the learning rate by name of the parameter, where it is not 1."""
        if self.base_width is None:
            return {}
        return lr_factors(self, [self.stem, *self.conditions.children()], self.base_width / self.stem.out_features)


class ModulatedMLPBlock(nn.Module):
    """h + linear(silu(linear((1 + a(emb)) norm(h) + b(emb)))), with a and b linear; h and emb are (n, width).

    The modulation is that of Perez et al. (2018), "FiLM", eq. 1 (https://arxiv.org/abs/1709.07871).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulation(emb).chunk(2, dim=1)
        return h + self.second(F.silu(self.first((1 + scale) * self.norm(h) + shift)))
