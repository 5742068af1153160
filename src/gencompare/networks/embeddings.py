"""Embeddings that tell a network how much noise there is, and which class is meant."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gencompare.errors import UserError


class SinusoidalEmbedding(nn.Module):
    r"""Sines and cosines of one number at wavelengths from 2 pi to 2 pi 10^4, (n,) -> (n, dim).

    e(t) = [sin(w_0 t), ..., sin(w_{h-1} t), cos(w_0 t), ..., cos(w_{h-1} t)], w_i = 10^{-4 i / (h - 1)}, h = dim / 2:
    Vaswani et al. (2017), "Attention is all you need", section 3.5, in the variant of Ho et al. (2020), whose last
    frequency is 10^{-4} itself. It tells numbers apart that differ by about 1, over a range of thousands.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise UserError(f"A sinusoidal embedding has an even number of channels, at least 4, not {dim}.")
        powers = torch.linspace(0, 1, dim // 2, dtype=torch.float64)
        frequencies = torch.exp(-math.log(10_000) * powers).float()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class LabelEmbedding(nn.Embedding):
    """A learned vector a class, (n,) int64 -> (n, dim), and one more, index ``num_classes``, for "no label".

    The last one serves classifier-free guidance (Ho and Salimans 2022, "Classifier-free diffusion guidance",
    section 3.2), where labels are dropped in training.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes + 1, dim)
        self.no_label = num_classes

    def reset_parameters(self) -> None:
        # As loud at the start as the noise level beside it, which varies by about 0.2 over all times.
        nn.init.normal_(self.weight, std=0.2)
