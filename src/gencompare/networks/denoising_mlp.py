"""A denoising perceptron, for points and very small images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.embeddings import LabelEmbedding, SinusoidalEmbedding


class DenoisingMLP(nn.Module):
    """Residual blocks over all values of an image at once, each told the noise level and the class.

    Shapes: x (n, C, H, W), noise_cond (n,), ``cond["label"]`` (n,) int64 -> (n, out_channels, H, W). At the start the
    output is nought.

    Args:
        shape: (C, H, W) of x.
        num_classes: 0 for a network without labels.
        width: features of every layer, an even number of at least 4.
        depth: residual blocks, of two layers each.
    """

    def __init__(
        self, shape: Sequence[int], out_channels: int, num_classes: int = 0, *, width: int = 128, depth: int = 3
    ) -> None:
        super().__init__()
        if depth < 1:
            raise UserError(f"network.depth={depth}: a denoising MLP needs at least 1 block.")
        self.out_shape = (out_channels, *shape[1:])
        self.noise = nn.Sequential(SinusoidalEmbedding(width), nn.Linear(width, width), nn.SiLU())
        self.label = LabelEmbedding(num_classes, width) if num_classes else None
        self.stem = nn.Linear(math.prod(shape), width)
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, math.prod(self.out_shape))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        emb = self.noise(noise_cond)
        if self.label is not None:
            emb = emb + self.label(cond["label"])
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = block(h, emb)
        return self.out(self.norm(h)).unflatten(1, self.out_shape)


class ModulatedBlock(nn.Module):
    """h + linear(silu(linear((1 + a(emb)) norm(h) + b(emb)))), with a and b linear; h and emb are (n, width).

    The modulation is that of Perez et al. (2018), "FiLM", eq. 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulation(emb).chunk(2, dim=1)
        return h + self.second(F.silu(self.first((1 + scale) * self.norm(h) + shift)))
