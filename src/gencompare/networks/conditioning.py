"""How a network is conditioned: embeddings of noise level, class and other conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
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


class ConditionEmbedding(nn.Module):
    r"""Class, precomputed embedding and low-resolution image of each row, as far as a network is made for them.

    - ``cond["label"]`` (n,) int64: a learned vector a class is added to the embedding e of the noise level. Index
      ``num_classes`` means no label.
    - ``cond["embedding"]`` (n, embedding_dim) float: W c is added to e. W c has no constant, so c = 0 means no
      embedding, as it does where guidance drops it.
    - ``cond["low_res"]`` (n, low_res, h, w) float in [-1, 1]: resized to the image by bilinear interpolation and laid
      beside it as further channels (Nichol and Dhariwal 2021, "Improved denoising diffusion probabilistic models";
      Saharia et al. 2021, "Image super-resolution via iterative refinement", section 2.4). h x w may be any size; a row
      of noughts means no image.
    - ``cond["augment"]`` (n, augment_dim) float: W a is added to the features from which e is made, where it says how a
      training image was moved (Karras et al. 2022, "Elucidating the design space of diffusion-based generative models",
      appendix F.2). Without it nothing was moved, a = 0.

    Entries of ``cond`` that the network was not made for are not looked at; any other that is missing is a `UserError`.

    Args:
        emb_dim: length of the network's embedding e.
        num_classes: 0 for none.
        low_res: channels of the low-resolution image, 0 for none.
        embedding_dim: length of the precomputed embedding, 0 for none.
        augment_dim: length of what is said of an augmented image, 0 for none.
        noise_dim: length of the features of the noise level from which e is made.
    """

    def __init__(
        self,
        emb_dim: int,
        num_classes: int = 0,
        *,
        low_res: int = 0,
        embedding_dim: int = 0,
        augment_dim: int = 0,
        noise_dim: int = 0,
    ) -> None:
        super().__init__()
        if min(num_classes, low_res, embedding_dim, augment_dim) < 0:
            raise UserError(
                f"low_res={low_res}, embedding_dim={embedding_dim} and augment_dim={augment_dim} of the network count"
                " channels and features: give 0 for none, or a positive number."
            )
        self.low_res, self.embedding_dim = low_res, embedding_dim
        self.label = LabelEmbedding(num_classes, emb_dim) if num_classes else None
        self.embedding = nn.Linear(embedding_dim, emb_dim, bias=False) if embedding_dim else None
        if self.embedding is not None:
            # As loud as a label, where the given features have unit variance.
            nn.init.normal_(self.embedding.weight, std=0.2 * embedding_dim**-0.5)
        self.augment = nn.Linear(augment_dim, noise_dim, bias=False) if augment_dim else None
        if self.augment is not None:
            nn.init.xavier_uniform_(self.augment.weight)

    def augmented(self, features: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Features of the noise level, (n, noise_dim), with what is said of an augmented image added to them."""
        if self.augment is None or "augment" not in cond:
            return features
        return features + self.augment(cond["augment"].to(features.dtype))

    def with_noise(self, noise: nn.Sequential, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """e (n, emb_dim) of noise level and conditions; the first layer of ``noise`` makes the level's features."""
        features = self.augmented(noise[0](noise_cond), cond)
        return self.embed(noise[1:](features), cond)

    def embed(self, emb: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The embedding (n, emb_dim) of the noise level, with label and embedding added to it."""
        if self.label is not None:
            no_label = self.label.no_label
            label = _given(cond, "label", f"{no_label} classes", f", where {no_label} means no label")
            emb = emb + self.label(label)
        if self.embedding is not None:
            given = _given(cond, "embedding", "precomputed embeddings")
            if given.shape[-1] != self.embedding_dim:
                raise UserError(
                    f"cond['embedding'] has {given.shape[-1]} features, and the network was made for"
                    f" {self.embedding_dim}: use model.network.embedding_dim={given.shape[-1]}."
                )
            emb = emb + self.embedding(given.to(emb.dtype))
        return emb

    def beside(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(n, C + low_res, H, W): the noisy image, and the low-resolution one where there is one."""
        if not self.low_res:
            return x
        image = _given(cond, "low_res", "a low-resolution image")
        if image.shape[1] != self.low_res:
            raise UserError(
                f"cond['low_res'] has {image.shape[1]} channels, and the network was made for {self.low_res}: use"
                f" model.network.low_res={image.shape[1]}."
            )
        resized = F.interpolate(image.to(x.dtype), size=x.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([x, resized], dim=1)


def _given(cond: Mapping[str, Tensor], name: str, what: str, hint: str = "") -> Tensor:
    if name not in cond:
        raise UserError(f"This network was made for {what}: give cond['{name}']{hint}.")
    return cond[name]
