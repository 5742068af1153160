"""The diffusion transformer (DiT)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError, check_counts
from gencompare.networks.conditioning import ConditionEmbedding, SinusoidalEmbedding
from gencompare.networks.layers import attention
from gencompare.networks.mup import lr_factors, rescale_inputs

NOISE_FEATURES = 256
"""Dimension of the sinusoidal embedding of the noise level."""


class DiT(nn.Module):
    """The diffusion transformer of Peebles and Xie (2023), "Scalable diffusion models with transformers", section 3
    (https://arxiv.org/abs/2212.09748).

    The image is split into patches, and each patch becomes a token with a fixed sinusoidal position embedding.
    Transformer blocks, modulated by noise level and conditions, process the tokens, and each token becomes a patch of
    the output. At initialisation every block is the identity and the output is zero (adaLN-Zero, section 3.2).

    With ``token_dropping``, a random part of the tokens of a training image skips the blocks in the middle, which then
    cost less, and joins the other tokens before the last blocks; the loss is over all tokens. Krause et al. (2025),
    "TREAD: token routing for efficient architecture-agnostic diffusion training", https://arxiv.org/abs/2501.04765.
    ``cond["token_scores"]`` (n, tokens), uniform random numbers, selects the tokens: those with the smallest scores are
    kept. If missing, as in sampling and evaluation, all are.

    Shapes: x (n, C, H, W), noise_cond (n,), ``cond`` as for `ConditionEmbedding` -> (n, out_channels, H, W).

    Args:
        shape: (C, H, W) of x; H and W must be multiples of ``patch_size``.
        out_channels: channels of the output.
        num_classes: number of classes, 0 for none. Label ``num_classes`` means "no label".
        patch_size: height and width of a patch.
        hidden_size: features of a token, a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: width of the hidden layer of each MLP as a multiple of ``hidden_size``.
        token_dropping: fraction of the tokens that skip the middle blocks in training: all blocks except the first and
            the last sixth, or the first and the last if there are fewer than 12.
        base_width: the ``hidden_size`` at which the learning rate was found, for muP (`gencompare.networks.mup`); a
            multiple of the size of a head, which stays the same. None for the standard parametrisation.
        condition_sizes: ``low_res_channels``, ``embedding_dim``, ``augment_dim``, ``coordinate_channels`` and
            ``interval_dim``, see `ConditionEmbedding`.
    """

    positions: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int,
        num_classes: int = 0,
        *,
        patch_size: int = 2,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        token_dropping: float = 0.0,
        base_width: int | None = None,
        **condition_sizes: int,
    ) -> None:
        super().__init__()
        _check(shape, patch_size, hidden_size, depth, num_heads, mlp_ratio)
        _check_token_dropping(token_dropping, depth)
        self.patch_size, self.grid = patch_size, (shape[1] // patch_size, shape[2] // patch_size)
        num_tokens = self.grid[0] * self.grid[1]
        self.num_kept_tokens = max(1, round((1 - token_dropping) * num_tokens))
        self.num_token_scores = num_tokens if self.num_kept_tokens < num_tokens else 0
        """Random numbers per training image in ``cond["token_scores"]``; 0 if no tokens are dropped."""
        self.num_outer_blocks = max(1, depth // 6)
        self.noise = nn.Sequential(
            SinusoidalEmbedding(NOISE_FEATURES),
            nn.Linear(NOISE_FEATURES, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.conditions = ConditionEmbedding(hidden_size, num_classes, noise_dim=NOISE_FEATURES, **condition_sizes)
        self.stem = nn.Linear((shape[0] + self.conditions.image_channels) * patch_size**2, hidden_size)
        self.register_buffer("positions", grid_positions(*self.grid, hidden_size), persistent=False)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, int(mlp_ratio * hidden_size)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, out_channels * patch_size**2)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.base_width = base_width
        if base_width is not None:
            _check_base_width(base_width, hidden_size, num_heads)
            noise_layer = self.noise[1]
            assert isinstance(noise_layer, nn.Linear)
            rescale_inputs([self.stem, noise_layer], base_width / hidden_size)
        for last in (self.modulation, self.out, *(block.modulation for block in self.blocks)):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        emb = F.silu(self.conditions.embed(self.noise, noise_cond, cond))  # once, instead of in every block
        h = self.stem(patchify(self.conditions.concat_images(x, cond), self.patch_size)) + self.positions
        blocks, outer = list(self.blocks), self.num_outer_blocks
        if self.num_token_scores and "token_scores" in cond:
            kept = cond["token_scores"].argsort(dim=1)[:, : self.num_kept_tokens, None].expand(-1, -1, h.shape[2])
            h = apply_blocks(blocks[:outer], h, emb)
            h = h.scatter(1, kept, apply_blocks(blocks[outer:-outer], h.gather(1, kept), emb))
            h = apply_blocks(blocks[-outer:], h, emb)
        else:
            h = apply_blocks(blocks, h, emb)
        scale, shift = self.modulation(emb)[:, None].chunk(2, dim=2)
        return unpatchify(self.out((1 + scale) * self.norm(h) + shift), self.patch_size, self.grid)

    def lr_factors(self) -> dict[str, float]:
        """Return the factor of the learning rate by name of the parameter, where it is not 1."""
        if self.base_width is None:
            return {}
        inputs = [self.stem, self.noise[1], *self.conditions.children()]
        return lr_factors(self, inputs, self.base_width / self.stem.out_features)


def apply_blocks(blocks: Sequence[nn.Module], h: Tensor, emb: Tensor) -> Tensor:
    """Apply transformer blocks in turn to tokens h (n, tokens, hidden_size), with emb (n, hidden_size)."""
    for block in blocks:
        h = block(h, emb)
    return h


class DiTBlock(nn.Module):
    r"""Self-attention and an MLP, each modulated by adaLN-Zero.

    .. math::
        h &\leftarrow h + g_1 \, \mathrm{attention}((1 + a_1) \, \mathrm{norm}(h) + b_1) \\
        h &\leftarrow h + g_2 \, \mathrm{mlp}((1 + a_2) \, \mathrm{norm}(h) + b_2)

    :math:`a_i`, :math:`b_i` and :math:`g_i` are linear in ``emb``, to which SiLU has been applied, and zero at
    initialisation (Peebles and Xie 2023, section 3.2 and figure 3).

    Shapes: h (n, tokens, hidden_size), emb (n, hidden_size) -> (n, tokens, hidden_size).
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.qkv, self.mix = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, hidden_size)
        )

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=2)
        h = h + gate1 * self.attention((1 + scale1) * self.norm(h) + shift1)
        return h + gate2 * self.mlp((1 + scale2) * self.norm(h) + shift2)

    def attention(self, h: Tensor) -> Tensor:
        """Apply multi-head self-attention (Vaswani et al. 2017, "Attention is all you need", section 3.2.2)."""
        q, k, v = self.qkv(h).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2).chunk(3, dim=1)
        return self.mix(attention(q, k, v).transpose(1, 2).flatten(2))


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Split an image into patches, row by row: (n, C, H, W) -> (n, H W / patch_size^2, C patch_size^2)."""
    return F.unfold(x, patch_size, stride=patch_size).mT


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Invert `patchify`, given ``grid`` = (rows, columns) of patches."""
    return F.fold(patches.mT, (grid[0] * patch_size, grid[1] * patch_size), patch_size, stride=patch_size)


def grid_positions(rows: int, columns: int, dim: int) -> Tensor:
    r"""Compute two-dimensional sinusoidal position embeddings, (rows * columns, dim).

    Half of the features encode the column and half the row, each as :math:`[\sin(\omega_i p), \cos(\omega_i p)]` with
    :math:`\omega_i = 10^{-4 i / (\mathrm{dim} / 4)}`. This extends Vaswani et al. (2017), section 3.5, to two
    dimensions, as discussed in Dosovitskiy et al. (2021), "An image is worth 16x16 words", appendix D.4
    (https://arxiv.org/abs/2010.11929).
    """
    quarter = dim // 4
    omega = torch.exp(-math.log(10_000) / quarter * torch.arange(quarter, dtype=torch.float64))

    def embed(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row = embed(rows)[:, None].expand(-1, columns, -1)
    column = embed(columns)[None].expand(rows, -1, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()


def _check(
    shape: Sequence[int], patch_size: int, hidden_size: int, depth: int, num_heads: int, mlp_ratio: float
) -> None:
    """Raise `UserError` for invalid sizes."""
    if min(patch_size, depth, num_heads) < 1 or hidden_size < 4 or int(mlp_ratio * hidden_size) < 1:
        raise UserError(
            "A DiT needs patch_size, depth and num_heads of at least 1, a hidden_size of at least 4 and a positive"
            f" mlp_ratio, not patch_size={patch_size}, hidden_size={hidden_size}, depth={depth},"
            f" num_heads={num_heads}, mlp_ratio={mlp_ratio}."
        )
    if shape[1] % patch_size or shape[2] % patch_size:
        raise UserError(
            f"A DiT with patch_size={patch_size} cannot divide {shape[1]}x{shape[2]} images into patches: use"
            f" model.network.patch_size={math.gcd(patch_size, shape[1], shape[2])}."
        )
    if hidden_size % 4 or hidden_size % num_heads:
        raise UserError(
            f"The DiT's hidden_size={hidden_size} must be a multiple of 4 and of num_heads={num_heads}: change"
            " either of them."
        )


def _check_token_dropping(token_dropping: float, depth: int) -> None:
    if not 0 <= token_dropping < 1:
        raise UserError(f"The DiT's token_dropping={token_dropping} must be at least 0 and below 1.")
    if token_dropping and depth < 3:
        raise UserError(
            f"The DiT's token_dropping={token_dropping} drops tokens between the first and the last block, so it needs"
            f" a depth of at least 3, not {depth}: use model.network.token_dropping=0."
        )


def _check_base_width(base_width: int, hidden_size: int, num_heads: int) -> None:
    """Raise `UserError` unless a DiT of the base width can have heads of the same size."""
    check_counts("model.network", base_width=base_width)
    if base_width % (hidden_size // num_heads):
        raise UserError(
            f"model.network.base_width={base_width} must be a multiple of the size of a head,"
            f" hidden_size / num_heads = {hidden_size // num_heads}: change num_heads in proportion to hidden_size."
        )
