"""TarFlow: an autoregressive flow of causal transformers over image patches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError, check_counts
from gencompare.networks.bijection import Bijection, check_inverse
from gencompare.networks.causal_transformer import CausalTransformer
from gencompare.networks.conditioning import LabelEmbedding
from gencompare.networks.dit import grid_positions, patchify, unpatchify
from gencompare.networks.layers import at_least_float32


class TarFlow(Bijection):
    r"""The flow of Zhai et al. (2024), "Normalizing flows are capable generative models", sections 2.2 and 2.3
    (https://arxiv.org/abs/2412.06329).

    The image is split into N patches, the tokens. Each of T blocks (`TarFlowBlock`) transforms every token depending on
    the tokens before it, and the order of the tokens is reversed from block to block. `forward` computes all tokens of
    a block at once. `inverse` computes one after another, with a cache of keys and values: T N steps in sequence, with
    the FLOPs of about one forward pass.

    Guidance extrapolates mean and log scale of each token from those without label,
    :math:`u + \mathrm{scale} \, (c - u)` (section 2.6; their w is scale - 1).

    Differences from the published code (https://github.com/apple/ml-tarflow): layer normalisation after the last
    transformer layer of a block, position embeddings that start as sinusoids instead of almost 0, an embedding of its
    own for "no label" instead of the mean of all classes, and guidance of constant strength, which grows along the
    sequence in the published evaluation.

    Args:
        shape: (C, H, W) of x; H and W must be multiples of ``patch_size``.
        num_classes: number of classes, 0 for none. Label ``num_classes`` means "no label".
        patch_size: height and width of a patch.
        num_blocks: T, the number of blocks.
        depth: transformer layers per block.
        hidden_size: features of a token in the transformer, a multiple of ``num_heads``.
        num_heads: number of attention heads.
        mlp_ratio: width of the hidden layer of each MLP as a multiple of ``hidden_size``.
    """

    supports_guidance = True

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        *,
        patch_size: int = 2,
        num_blocks: int = 4,
        depth: int = 2,
        hidden_size: int = 96,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        _check(shape, patch_size, num_blocks, depth, hidden_size, num_heads, mlp_ratio)
        self.patch_size, self.grid = patch_size, (shape[1] // patch_size, shape[2] // patch_size)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.blocks = nn.ModuleList(
            TarFlowBlock(
                self.grid,
                shape[0] * patch_size**2,
                num_classes,
                CausalTransformer(hidden_size, depth, num_heads, mlp_ratio=mlp_ratio),
                hidden_size,
                reverse=bool(k % 2),
            )
            for k in range(num_blocks)
        )

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens, log_det = patchify(x, self.patch_size), x.new_zeros(len(x))
        for block in self._blocks():
            tokens, log_det_block = block(tokens, label)
            log_det = log_det + log_det_block
        return tokens.flatten(1), log_det

    @torch.no_grad()
    def inverse(self, z: Tensor, label: Tensor | None = None, guidance_scale: float = 1.0) -> Tensor:
        """Map latents to images; without gradients, since the cache is overwritten."""
        tokens = z.unflatten(1, (self.num_tokens, -1))
        for k, block in reversed(list(enumerate(self._blocks(), start=1))):
            tokens = check_inverse(block.inverse(tokens, label, guidance_scale), f"block {k} of TarFlow")
        return unpatchify(tokens, self.patch_size, self.grid)

    def nfe_networks(self) -> dict[str, nn.Module]:
        """Return the output layer of each block, which the block calls for each token in sampling."""
        return {f"block_{k}": block.out for k, block in enumerate(self._blocks(), start=1)}

    def describe_inverse(self) -> str:
        return f"{len(self.blocks)} blocks, {self.num_tokens} tokens one after another"

    def _blocks(self) -> Iterator[TarFlowBlock]:
        yield from self.blocks  # type: ignore[misc]


class TarFlowBlock(nn.Module):
    r"""An affine transform of each token, whose parameters a causal transformer computes from the tokens before it.

    .. math:: z_1 = x_1, \quad z_k = (x_k - \mu_k) \odot e^{-\alpha_k}, \quad (\mu_k, \alpha_k) = g(x_1, ..., x_{k - 1})

    so :math:`\log |\det \partial z / \partial x| = -\sum_k \sum_j \alpha_{kj}` (Zhai et al. 2024, section 2.2).
    Position and class embeddings are added to the tokens. The last layer of g is zero at initialisation, so the block
    is the identity.

    Shapes: x (n, tokens, token_dim), label (n,) -> (n, tokens, token_dim), and the log-determinant (n,).

    Args:
        grid: rows and columns of tokens.
        token_dim: values per token.
        num_classes: number of classes, 0 for none.
        transformer: the causal transformer in g.
        hidden_size: its number of features.
        reverse: whether to go from the last token to the first.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        token_dim: int,
        num_classes: int,
        transformer: CausalTransformer,
        hidden_size: int,
        *,
        reverse: bool,
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.stem = nn.Linear(token_dim, hidden_size)
        self.positions = nn.Parameter(grid_positions(*grid, hidden_size)[:-1])
        """One for each token but the last, on which no other depends."""
        self.label = LabelEmbedding(num_classes, hidden_size) if num_classes else None
        self.transformer = transformer
        self.out = nn.Linear(hidden_size, 2 * token_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x.flip(1) if self.reverse else x
        h = self.transformer(self._embed(x[:, :-1], self.positions, label))
        parameters = F.pad(at_least_float32(self.out(h)), (0, 0, 1, 0))  # none for the first token
        mean, log_scale = parameters.chunk(2, dim=2)
        z = (x - mean) * torch.exp(-log_scale)
        return z.flip(1) if self.reverse else z, -log_scale.flatten(1).sum(1)

    def inverse(self, z: Tensor, label: Tensor | None, guidance_scale: float = 1.0) -> Tensor:
        z = z.flip(1) if self.reverse else z
        guided = guidance_scale != 1
        if guided:
            assert self.label is not None and label is not None
            label = torch.cat([label, torch.full_like(label, self.label.no_label)])
        cache = self.transformer.new_cache(len(z) * (2 if guided else 1), len(self.positions))
        x = [z[:, :1]]
        for k in range(len(self.positions)):
            inputs = torch.cat([x[-1], x[-1]]) if guided else x[-1]
            h = self.transformer.step(self._embed(inputs, self.positions[k], label), cache)
            parameters = at_least_float32(self.out(h))
            if guided:
                with_label, without = parameters.chunk(2)
                parameters = without + guidance_scale * (with_label - without)
            mean, log_scale = parameters.chunk(2, dim=2)
            x.append(z[:, k + 1 : k + 2] * torch.exp(log_scale) + mean)
        tokens = torch.cat(x, dim=1)
        return tokens.flip(1) if self.reverse else tokens

    def _embed(self, tokens: Tensor, positions: Tensor, label: Tensor | None) -> Tensor:
        h = self.stem(tokens) + positions
        return h if self.label is None else h + self.label(label)[:, None]


def _check(
    shape: Sequence[int], patch_size: int, num_blocks: int, depth: int, hidden_size: int, num_heads: int, ratio: float
) -> None:
    """Raise `UserError` for invalid sizes."""
    check_counts(
        "model.bijection", patch_size=patch_size, num_blocks=num_blocks, depth=depth, hidden_size=hidden_size,
        num_heads=num_heads,
    )  # fmt: skip
    if not ratio > 0:
        raise UserError(f"model.bijection.mlp_ratio={ratio} must be a positive number.")
    if hidden_size % num_heads:
        raise UserError(
            f"model.bijection.hidden_size={hidden_size} must be a multiple of model.bijection.num_heads={num_heads}."
        )
    height, width = shape[1:]
    if height * width == 1:
        raise UserError("TarFlow needs images of at least two patches; for points, use model=glow.")
    if height % patch_size or width % patch_size or height * width == patch_size**2:
        divisor = math.gcd(patch_size, height, width)
        fits = divisor if height * width > divisor**2 else 1
        raise UserError(
            f"TarFlow with model.bijection.patch_size={patch_size} cannot divide {height}x{width} images into two or"
            f" more patches: use model.bijection.patch_size={fits}."
        )
