"""A causal transformer, for models that generate tokens one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.layers import attention


@dataclass
class Cache:
    """Keys and values of the tokens that `CausalTransformer.step` has processed, for each block."""

    keys: list[Tensor]
    """Per block: (n, heads, num_tokens, d), of which the first ``length`` tokens are set."""
    values: list[Tensor]
    length: int = 0


class CausalTransformer(nn.Module):
    r"""A transformer in which each token attends to itself and the tokens before it.

    Blocks are those of GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3):
    layer normalisation before self-attention and MLP, and after the last block. Embeddings of tokens and positions, and
    the output layer, belong to the caller. Linear weights are initialised with standard deviation 0.02, those before
    each sum with :math:`0.02 / \sqrt{2 \, \mathrm{depth}}`, and biases with 0.

    Shapes: h (n, tokens, hidden_size) -> (n, tokens, hidden_size).

    Args:
        hidden_size: features of a token, a multiple of ``num_heads``.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: width of the hidden layer of each MLP as a multiple of ``hidden_size``.
        dropout: dropout probability of the output of attention and MLP in training.
    """

    def __init__(
        self, hidden_size: int, depth: int, num_heads: int, *, mlp_ratio: float = 4.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        _check(hidden_size, depth, num_heads, mlp_ratio, dropout)
        self.blocks = nn.ModuleList(
            CausalBlock(hidden_size, num_heads, int(mlp_ratio * hidden_size), dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(hidden_size)
        for block in self.blocks:
            assert isinstance(block, CausalBlock)
            block.initialize(std=0.02, residual_std=0.02 / (2 * depth) ** 0.5)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return self.norm(h)

    def new_cache(self, n: int, num_tokens: int) -> Cache:
        """Create an empty cache for n sequences of up to ``num_tokens`` tokens."""
        weight = self.norm.weight
        sizes = [(n, block.num_heads, num_tokens, len(weight) // block.num_heads) for block in self._blocks()]
        return Cache([weight.new_empty(size) for size in sizes], [weight.new_empty(size) for size in sizes])

    def step(self, h: Tensor, cache: Cache) -> Tensor:
        """Process the next token of each sequence, (n, 1, hidden_size), and add its keys and values to the cache.

        Without autocast, the result is that of `forward` for this token, up to rounding.
        """
        for k, block in enumerate(self._blocks()):
            h = block.step(h, cache.keys[k], cache.values[k], cache.length)
        cache.length += 1
        return self.norm(h)

    def _blocks(self) -> Sequence[CausalBlock]:
        return self.blocks  # type: ignore[return-value]


class CausalBlock(nn.Module):
    r"""Causal self-attention and an MLP:

    .. math::
        h &\leftarrow h + \mathrm{attention}(\mathrm{norm}(h)) \\
        h &\leftarrow h + \mathrm{mlp}(\mathrm{norm}(h))

    Shapes: h (n, tokens, hidden_size) -> (n, tokens, hidden_size).
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.qkv, self.mix = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp_in, self.mlp_out = nn.Linear(hidden_size, mlp_width), nn.Linear(mlp_width, hidden_size)

    def initialize(self, std: float, residual_std: float) -> None:
        for layer in (self.qkv, self.mix, self.mlp_in, self.mlp_out):
            nn.init.normal_(layer.weight, std=residual_std if layer in (self.mix, self.mlp_out) else std)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self._heads(self.norm1(h))
        return self._add_mlp(h, attention(q, k, v, causal=True))

    def step(self, h: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        """Process token ``length`` (n, 1, hidden_size), given keys and values of the tokens before, and add its own."""
        q, k, v = self._heads(self.norm1(h))
        keys[:, :, length : length + 1], values[:, :, length : length + 1] = k, v
        # Under autocast, q, k and v have 16 bits and the cache has 32.
        keys, values = (each[:, :, : length + 1].to(q.dtype) for each in (keys, values))
        return self._add_mlp(h, attention(q, keys, values))

    def _heads(self, h: Tensor) -> tuple[Tensor, ...]:
        """Compute queries, keys and values, each (n, heads, tokens, d)."""
        return self.qkv(h).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2).chunk(3, dim=1)

    def _add_mlp(self, h: Tensor, attended: Tensor) -> Tensor:
        h = h + self._drop(self.mix(attended.transpose(1, 2).flatten(2)))
        return h + self._drop(self.mlp_out(F.gelu(self.mlp_in(self.norm2(h)), approximate="tanh")))

    def _drop(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout, self.training) if self.dropout else h


def _check(hidden_size: int, depth: int, num_heads: int, mlp_ratio: float, dropout: float) -> None:
    """Raise `UserError` for invalid sizes."""
    if min(hidden_size, depth, num_heads) < 1 or int(mlp_ratio * hidden_size) < 1 or hidden_size % num_heads:
        raise UserError(
            "A causal transformer needs hidden_size, depth and num_heads of at least 1, a positive mlp_ratio and a"
            f" hidden_size that is a multiple of num_heads, not hidden_size={hidden_size}, depth={depth},"
            f" num_heads={num_heads}, mlp_ratio={mlp_ratio}."
        )
    if not 0 <= dropout < 1:
        raise UserError(f"The transformer's dropout={dropout} must be at least 0 and below 1.")
