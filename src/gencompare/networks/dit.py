"""The diffusion transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.conditioning import ConditionEmbedding, SinusoidalEmbedding

NOISE_FEATURES = 256
"""Sines and cosines of the noise level, whatever the width."""


class DiT(nn.Module):
    """The DiT of Peebles and Xie (2023), "Scalable diffusion models with transformers", section 3.

    The image is cut into patches; each is a token that knows its place by fixed sines and cosines; blocks of attention
    and perceptron, steered by noise level and conditions, work on them; and each token becomes a patch of the output.
    At the start every block is the identity and the output is nought ("adaLN-Zero", section 3.2).

    Shapes: x (n, C, H, W), noise_cond (n,), ``cond`` as `ConditionEmbedding` has it -> (n, out_channels, H, W).

    Args:
        shape: (C, H, W) of x; the patch's side divides H and W.
        num_classes: 0 for a network without labels; num_classes itself means "no label".
        patch: side of a patch.
        width: features of a token, a multiple of 4 and of ``heads``.
        depth: blocks.
        heads: of each attention.
        mlp_ratio: width of the perceptron's hidden layer, as a multiple of ``width``.
        low_res: channels of the image ``cond["low_res"]``, 0 for none.
        embedding_dim: length of ``cond["embedding"]``, 0 for none.
        augment_dim: length of ``cond["augment"]``, 0 for none.
    """

    positions: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int,
        num_classes: int = 0,
        *,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        low_res: int = 0,
        embedding_dim: int = 0,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        _check(shape, patch, width, depth, heads, mlp_ratio)
        self.patch, self.grid = patch, (shape[1] // patch, shape[2] // patch)
        self.noise = nn.Sequential(
            SinusoidalEmbedding(NOISE_FEATURES), nn.Linear(NOISE_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.conditions = ConditionEmbedding(
            width,
            num_classes,
            low_res=low_res,
            embedding_dim=embedding_dim,
            augment_dim=augment_dim,
            noise_dim=NOISE_FEATURES,
        )
        self.stem = nn.Linear((shape[0] + low_res) * patch**2, width)
        self.register_buffer("positions", grid_positions(*self.grid, width), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, int(mlp_ratio * width)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out_channels * patch**2)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for last in (self.modulation, self.out, *(block.modulation for block in self.blocks)):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        emb = F.silu(self.conditions.with_noise(self.noise, noise_cond, cond))  # every modulation begins with it
        h = self.stem(patchify(self.conditions.beside(x, cond), self.patch)) + self.positions
        for block in self.blocks:
            h = block(h, emb)
        scale, shift = self.modulation(emb)[:, None].chunk(2, dim=2)
        return unpatchify(self.out((1 + scale) * self.norm(h) + shift), self.patch, self.grid)


class DiTBlock(nn.Module):
    """h + g attention(m(norm(h))), then h + g perceptron(m(norm(h))), with m(u) = (1 + a) u + b.

    a, b and g of each half are linear in silu(emb), which is given, and nought at the start: Peebles and Xie (2023),
    section 3.2 and figure 3. h is (n, tokens, width), emb (n, width).
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=2)
        h = h + gate1 * self.attention((1 + scale1) * self.norm(h) + shift1)
        return h + gate2 * self.mlp((1 + scale2) * self.norm(h) + shift2)

    def attention(self, h: Tensor) -> Tensor:
        """Vaswani et al. (2017), "Attention is all you need", section 3.2.2: (n, tokens, width) -> the same."""
        q, k, v = self.qkv(h).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        return self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def patchify(x: Tensor, patch: int) -> Tensor:
    """The patches of an image row by row, (n, C, H, W) -> (n, H W / patch^2, C patch^2)."""
    return F.unfold(x, patch, stride=patch).mT


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The image of so many rows and columns of patches: the inverse of `patchify`."""
    return F.fold(tokens.mT, (grid[0] * patch, grid[1] * patch), patch, stride=patch)


def grid_positions(rows: int, columns: int, dim: int) -> Tensor:
    r"""(rows columns, dim): sines and cosines of the column, then of the row, each in half of the features.

    [sin(w_i p), cos(w_i p)] with w_i = 10^{-4 i / (dim / 4)}: Vaswani et al. (2017), section 3.5, in two dimensions
    (Dosovitskiy et al. 2021, "An image is worth 16x16 words", appendix D.4, name the choice).
    """
    quarter = dim // 4
    w = torch.exp(-math.log(10_000) / quarter * torch.arange(quarter, dtype=torch.float64))

    def embed(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * w
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row = embed(rows)[:, None].expand(-1, columns, -1)
    column = embed(columns)[None].expand(rows, -1, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()


def _check(shape: Sequence[int], patch: int, width: int, depth: int, heads: int, mlp_ratio: float) -> None:
    """Raises `UserError` on sizes that cannot be."""
    if min(patch, depth, heads) < 1 or width < 4 or int(mlp_ratio * width) < 1:
        raise UserError(
            f"A DiT needs patch, depth and heads of at least 1, a width of at least 4 and a positive mlp_ratio, not"
            f" patch={patch}, width={width}, depth={depth}, heads={heads}, mlp_ratio={mlp_ratio}."
        )
    if shape[1] % patch or shape[2] % patch:
        raise UserError(
            f"A DiT with patch={patch} cannot cut images of {shape[1]}x{shape[2]}: use"
            f" model.network.patch={math.gcd(patch, shape[1], shape[2])}."
        )
    if width % 4 or width % heads:
        raise UserError(f"The DiT's width={width} must be a multiple of 4 and of heads={heads}: change one of the two.")
