"""Perceptrons with the signatures of the convolutional encoder and decoder, for points and very small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def mlp(features_in: int, features_out: int, width: int, depth: int) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` SiLU units, then a linear layer: (n, features_in) -> (n, features_out)."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(features_in, width), nn.SiLU()]
        features_in = width
    return nn.Sequential(*layers, nn.Linear(features_in, features_out))


def beside(x: Tensor, e: Tensor | None) -> Tensor:
    """x (n, d) and, where there is one, the embedding e (n, k), as (n, d + k)."""
    return x if e is None else torch.cat([x, e], dim=1)


class MLPEncoder(nn.Module):
    """(n, *shape), and an embedding (n, embed_dim), to (n, out_features)."""

    def __init__(
        self, shape: tuple[int, int, int], out_features: int, embed_dim: int = 0, *, width: int = 256, depth: int = 3
    ) -> None:
        super().__init__()
        self.net = mlp(math.prod(shape) + embed_dim, out_features, width, depth)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(beside(x.flatten(1), e))


class MLPDecoder(nn.Module):
    """(n, in_features), and an embedding (n, embed_dim), to (n, *shape)."""

    def __init__(
        self, in_features: int, shape: tuple[int, int, int], embed_dim: int = 0, *, width: int = 256, depth: int = 3
    ) -> None:
        super().__init__()
        self.shape = shape
        self.net = mlp(in_features + embed_dim, math.prod(shape), width, depth)

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(beside(z, e)).unflatten(1, self.shape)
