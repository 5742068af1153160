"""A transformer over the tokens of a vector-quantised autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError, check_positive
from gencompare.generative_model import Cond, DataSpec, GenerativeModel, SupportsReconstruction
from gencompare.models import visualization
from gencompare.models.latents import Tokens
from gencompare.networks.gpt import GPT
from gencompare.networks.layers import at_least_float32
from gencompare.rng import RandomSource, draw_categorical


class TokenTransformer(GenerativeModel):
    r"""An autoregressive prior over the tokens of a frozen autoencoder with a codebook.

    van den Oord et al. (2017), "Neural discrete representation learning", section 3.3
    (https://arxiv.org/abs/1711.00937), fit a PixelCNN to the tokens; Esser et al. (2021), "Taming transformers for
    high-resolution image synthesis", section 3.2 (https://arxiv.org/abs/2012.09841), a transformer:

    .. math:: p(s) = \prod_k p(s_k | s_1, \dots, s_{k - 1}, c)

    for tokens s in raster order and class c, which is the first input. The loss is the cross-entropy
    :math:`-\log_2 p(s) / K` in bits per token, for K tokens. It is not a likelihood of pixels, and depends on the
    autoencoder.

    Sampling draws one token after another, one evaluation of the network each, and decodes them.

    Args:
        spec: shape, number of classes and value range of the data.
        network: a factory ``(num_tokens, num_codes, num_classes) -> GPT``; ``num_classes`` is 0 for an unconditional
            model.
        latent: a factory ``spec -> Tokens``.
        temperature: divides the logits while sampling; 1 samples from the model.
        top_k: number of most probable codes that may be sampled (Esser et al. 2021); None for all.
        kwargs: see `TrainedModel`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        network: Callable[..., GPT],
        latent: Callable[..., Tokens] | None,
        temperature: float = 1.0,
        top_k: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(spec, **kwargs)
        check_positive("model.temperature", temperature)
        check_positive("model.top_k", top_k, null="all codes")
        space = None if latent is None else latent(spec=spec)
        if not isinstance(space, Tokens):
            raise UserError("A TokenTransformer works on the tokens of an autoencoder: use model/latent=tokens.")
        self.space = space
        self.network = network(
            num_tokens=self.space.num_tokens,
            num_codes=self.space.num_codes,
            num_classes=spec.num_classes if self.conditional else 0,
        )
        self.temperature, self.top_k = temperature, top_k

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute ``loss`` and ``bits_per_token``, which are equal."""
        bits = self.bits_per_token(self.space.encode(x), self.label(cond))
        return {"loss": bits, "bits_per_token": bits}

    def bits_per_token(self, tokens: Tensor, label: Tensor | None) -> Tensor:
        r"""Compute :math:`-\log_2 p(s) / K` of sequences (n, K) of tokens, (n,)."""
        inputs = torch.cat([self.network.start(len(tokens), label), tokens[:, :-1]], dim=1)
        logits = at_least_float32(self.network(inputs))
        return F.cross_entropy(logits.mT, tokens, reduction="none").mean(1) / math.log(2)

    def micro_batched_networks(self) -> list[nn.Module]:
        return [self.network]

    def sharded_network(self) -> nn.Module:
        return self.network

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        label = self.label(self.select_conditions(cond))
        return self.space.decode(self.sample_tokens(n, label, generator)).clamp(-1, 1)

    @torch.no_grad()
    def sample_tokens(
        self, n: int, label: Tensor | None, generator: torch.Generator, *, given: Tensor | None = None
    ) -> Tensor:
        """Sample sequences of tokens, (n, num_tokens), int64.

        Args:
            n: number of sequences.
            label: class of each sequence, (n,), or None.
            generator: source of random numbers.
            given: the first tokens of each sequence, (n, k).
        """
        inputs, past = self.network.start(n, label), self.network.new_past(n)
        num_given = 0 if given is None else given.shape[1]
        tokens = []
        for position in range(self.space.num_tokens):
            logits = self.network(inputs, past, position)
            if given is not None and position < num_given:
                inputs = given[:, position : position + 1]
            else:
                inputs = self._draw(logits, generator)
            tokens.append(inputs)
        return torch.cat(tokens, dim=1)

    def _draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the next token, (n, 1), given its logits (n, 1, num_codes)."""
        logits = at_least_float32(logits) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[2]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k, dim=2).values[..., -1:], -math.inf)
        return draw_categorical(logits, generator, dim=2)

    def sampling_description(self) -> str:
        options = [f"temperature {self.temperature:g}"] if self.temperature != 1 else []
        options += [f"top {self.top_k}"] if self.top_k is not None else []
        return ", ".join(["one token after another", *options])

    @torch.no_grad()
    def visualize(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Reconstruct images, and complete them from the upper half of their tokens."""
        cond, (_, rows, columns) = self.select_conditions(cond), self.space.latent_shape
        half = rows // 2

        def complete(x: Tensor, cond: Cond) -> Tensor:
            given = self.space.encode(x)[:, : half * columns]
            return self.space.decode(self.sample_tokens(len(x), self.label(cond), generator, given=given))

        reconstruction = self.space.reconstruct(x, cond, generator=generator)
        return {
            "reconstruction": torch.stack([x, reconstruction.to(x)]),
            "completion": visualization.completions(complete, x, cond, half * x.shape[2] // rows),
        }

    @property
    def perceptual_networks(self) -> list[str]:
        return self.space.perceptual_networks

    def autoencoder(self) -> SupportsReconstruction:
        return self.space

    def nfe_networks(self) -> dict[str, nn.Module]:
        return {"network": self.network, "decoder": self.space.coder.decoder}
