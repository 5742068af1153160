"""Embeddings that tell a network how much noise there is, which class is meant, and pixels to the last digit."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierEmbedding(nn.Module):
    r"""Sines and cosines of one number at random frequencies that stay as they were drawn, (n,) -> (n, 2 channels).

    e(t) = [sin(2 pi w t), cos(2 pi w t)], w ~ N(0, scale^2), one for each channel: Tancik et al. (2020), "Fourier
    features let networks learn high frequency functions", section 6, as Song et al. (2021), "Score-based generative
    modeling through stochastic differential equations", appendix H.1, use it with scale 16 for t = log sigma. It tells
    numbers apart that differ by about 1 / (2 pi scale), so it wants log sigma, or that over 4, and no timestep.
    """

    frequencies: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        if channels < 1 or not scale > 0:
            raise UserError(f"A Fourier embedding needs a positive scale, not {scale}, and at least 1 channel.")
        self.register_buffer("frequencies", scale * torch.randn(channels))
        self.dim = 2 * channels

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * math.pi * t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierFeatures(nn.Module):
    r"""Each pixel with sin(2^n pi x) and cos(2^n pi x) for each exponent n beside it, (n, C, H, W) -> (n, C', H, W).

    C' = C (1 + 2 len(exponents)). Kingma et al. (2021), "Variational diffusion models", appendix C, with n = 7 and 8:
    neighbouring values of 8-bit pixels, 2/255 apart, then look quite different, which likelihoods need.
    """

    def __init__(self, exponents: Sequence[int]) -> None:
        super().__init__()
        self.exponents = tuple(exponents)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.cat([2**n * math.pi * x for n in self.exponents], dim=1)
        return torch.cat([x, angles.sin(), angles.cos()], dim=1)


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
