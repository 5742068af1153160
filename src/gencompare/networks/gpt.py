"""A network that predicts the next token of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gencompare.errors import check_counts
from gencompare.networks.causal_transformer import Cache, CausalTransformer

Past = tuple[list[Tensor], list[Tensor]]
"""Keys and values of the tokens so far, for each block; see `Cache`."""


class GPT(nn.Module):
    r"""Logits of each token of a sequence, given the tokens before it and the class.

    Radford et al. (2019), "Language models are unsupervised multitask learners"; for images, Chen et al. (2020),
    "Generative pretraining from pixels". Tokens and positions have learned embeddings, which are added. The first input
    is a start token, one for each class; the input at position k is token k - 1.

    Shapes: inputs (n, t), int64 -> logits (n, t, num_codes), where input k is `start` for k = 0 and token k - 1
    otherwise.

    Args:
        num_tokens: length of a sequence.
        num_codes: number of values of a token.
        num_classes: number of classes, 0 for none.
        hidden_size: features of a token, a multiple of ``num_heads``.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: width of the hidden layer of each MLP as a multiple of ``hidden_size``.
        dropout: probability of dropping a feature of the embeddings, and of the output of attention and MLP.
    """

    def __init__(
        self,
        num_tokens: int,
        num_codes: int,
        num_classes: int = 0,
        *,
        hidden_size: int = 256,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts("model.network", hidden_size=hidden_size, depth=depth, num_heads=num_heads)
        self.num_tokens, self.num_codes = num_tokens, num_codes
        self.transformer = CausalTransformer(hidden_size, depth, num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
        self.embedding = nn.Embedding(num_codes + max(1, num_classes), hidden_size)
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, hidden_size))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden_size, num_codes, bias=False)
        for layer in (self.embedding, self.out):
            nn.init.normal_(layer.weight, std=0.02)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.blocks

    def start(self, n: int, label: Tensor | None) -> Tensor:
        """Return the first input of n sequences, (n, 1), for the class ``label`` (n,) of each."""
        if label is None:
            return torch.full((n, 1), self.num_codes, device=self.out.weight.device)
        return self.num_codes + label[:, None]

    def forward(self, inputs: Tensor, past: Past | None = None, position: int = 0) -> Tensor:
        """Compute logits of whole sequences, or of the next token.

        Args:
            inputs: (n, t); (n, 1) for the next token.
            past: for the next token, the keys and values of earlier inputs from `new_past`, to which its own are added;
                None for whole sequences.
            position: position of the first input.
        """
        h = self.dropout(self.embedding(inputs) + self.positions[position : position + inputs.shape[1]])
        if past is None:
            return self.out(self.transformer(h))
        return self.out(self.transformer.step(h, Cache(*past, length=position)))

    def new_past(self, n: int) -> Past:
        """Create storage for the keys and values of n sequences."""
        cache = self.transformer.new_cache(n, self.num_tokens)
        return cache.keys, cache.values
