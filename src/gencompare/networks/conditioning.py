"""Embeddings of the noise level, the class label and other conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError


class SinusoidalEmbedding(nn.Module):
    r"""Sines and cosines at fixed frequencies, (n,) -> (n, dim).

    .. math::
        e(t) = [\sin(\omega_0 t), ..., \sin(\omega_{h-1} t), \cos(\omega_0 t), ..., \cos(\omega_{h-1} t)], \quad
        \omega_i = 10^{-4 i / (h - 1)}, \quad h = \mathrm{dim} / 2

    Vaswani et al. (2017), "Attention is all you need", section 3.5 (https://arxiv.org/abs/1706.03762), in the variant
    of Ho et al. (2020), whose last frequency is exactly :math:`10^{-4}`. The embedding resolves differences of about 1
    over a range of thousands.

    Args:
        dim: dimension of the embedding; even, at least 4.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise UserError(f"The dimension of a sinusoidal embedding must be even and at least 4, not {dim}.")
        powers = torch.linspace(0, 1, dim // 2, dtype=torch.float64)
        frequencies = torch.exp(-math.log(10_000) * powers).float()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


INTERVAL_FEATURES = 64
"""Dimension of the sinusoidal embedding of a time interval."""
INTERVAL_WEIGHT, AUGMENT_WEIGHT = "conditions.interval.weight", "conditions.augment.weight"
"""Weights of optional conditions of a network. With a weight of 0, it ignores the interval; without the augmentation
parameters, it models unchanged images whether it has the other weight or not."""


class FourierEmbedding(nn.Module):
    r"""Sines and cosines at random, fixed frequencies, (n,) -> (n, 2 channels).

    .. math:: e(t) = [\sin(2 \pi \omega t), \cos(2 \pi \omega t)], \quad \omega \sim N(0, \mathrm{scale}^2)

    with one frequency per channel. Tancik et al. (2020), "Fourier features let networks learn high frequency
    functions", section 6 (https://arxiv.org/abs/2006.10739); Song et al. (2021), "Score-based generative modeling
    through stochastic differential equations", appendix H.1 (https://arxiv.org/abs/2011.13456), use a scale of 16 for
    :math:`t = \log \sigma`. The embedding resolves differences of about 1 / (2 pi scale), so it suits log sigma and
    log(sigma) / 4, but not timesteps.

    Args:
        channels: number of frequencies.
        scale: standard deviation of the frequencies.
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
    r"""Append :math:`\sin(2^n \pi x)` and :math:`\cos(2^n \pi x)` to an image as channels, for several exponents n.

    Kingma et al. (2021), "Variational diffusion models", appendix C (https://arxiv.org/abs/2107.00630), use n = 7 and
    8. Neighbouring values of 8-bit pixels, 2/255 apart, then differ strongly, which helps likelihoods.

    Shapes: (n, C, H, W) -> (n, C (1 + 2 len(exponents)), H, W).
    """

    def __init__(self, exponents: Sequence[int]) -> None:
        super().__init__()
        self.exponents = tuple(exponents)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.cat([2**n * math.pi * x for n in self.exponents], dim=1)
        return torch.cat([x, angles.sin(), angles.cos()], dim=1)


class LabelEmbedding(nn.Embedding):
    """A learned vector per class and one for "no label" (index ``num_classes``), (n,) int64 -> (n, dim).

    Classifier-free guidance needs the "no label" vector because it drops labels in training (Ho and Salimans 2022,
    "Classifier-free diffusion guidance", section 3.2, https://arxiv.org/abs/2207.12598).
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes + 1, dim)
        self.no_label = num_classes

    def reset_parameters(self) -> None:
        # Initialised to the scale of the noise-level embedding, whose standard deviation over time is about 0.2.
        nn.init.normal_(self.weight, std=0.2)


class ConditionEmbedding(nn.Module):
    r"""Embeds the conditions of a network: class, precomputed embedding, low-resolution image, augmentation, position,
    interval.

    - ``cond["label"]`` (n,) int64: a learned vector per class is added to the noise-level embedding e. Index
      ``num_classes`` means no label.
    - ``cond["embedding"]`` (n, embedding_dim) float: W c is added to e. The projection has no bias, so c = 0 means no
      embedding, as when guidance drops it.
    - ``cond["low_res"]`` (n, low_res_channels, h, w) float in [-1, 1]: resized bilinearly to the size of the noisy
      image and concatenated to it along the channels (Nichol and Dhariwal 2021, "Improved denoising diffusion
      probabilistic models", https://arxiv.org/abs/2102.09672; Saharia et al. 2021, "Image super-resolution via
      iterative refinement", section 2.4, https://arxiv.org/abs/2104.07636). h and w are arbitrary; zeros mean no image.
    - ``cond["augment"]`` (n, augment_dim) float: augmentation parameters a of a training image. W a is added to the
      features that e is computed from (Karras et al. 2022, "Elucidating the design space of diffusion-based generative
      models", appendix F.2, https://arxiv.org/abs/2206.00364). If missing, a = 0 (no augmentation).
    - ``cond["coordinates"]`` (n, 2, H, W) float: coordinates of the pixels of a crop in its image, from -1 to 1,
      concatenated to the noisy image (Wang et al. 2023, "Patch diffusion", section 3.1,
      https://arxiv.org/abs/2304.12526). If missing, the noisy image is a whole image.
    - ``cond["interval"]`` (n,) float: t - r, the time over which the network predicts the average velocity (Geng et al.
      2025, "Mean flows for one-step generative modeling", section 4.3, https://arxiv.org/abs/2505.13447). W s is added
      to the features that e is computed from, with the sinusoidal embedding s of t - r and W = 0 at initialisation. If
      missing, t - r = 0: the network predicts the velocity at time t.

    Other entries of ``cond`` are ignored. Any missing entry except the last three raises `UserError`.

    Args:
        emb_dim: dimension of e.
        num_classes: number of classes, 0 for none.
        low_res_channels: channels of the low-resolution image, 0 for none.
        embedding_dim: dimension of the precomputed embedding, 0 for none.
        augment_dim: number of augmentation parameters, 0 for none.
        coordinate_channels: 2 for the coordinates of the pixels, 0 for none.
        interval_dim: 1 for the time interval, 0 for none.
        noise_dim: dimension of the noise-level features that e is computed from.
    """

    def __init__(
        self,
        emb_dim: int,
        num_classes: int = 0,
        *,
        low_res_channels: int = 0,
        embedding_dim: int = 0,
        augment_dim: int = 0,
        coordinate_channels: int = 0,
        interval_dim: int = 0,
        noise_dim: int = 0,
    ) -> None:
        super().__init__()
        if min(num_classes, low_res_channels, embedding_dim, augment_dim) < 0:
            raise UserError(
                f"The network's low_res_channels={low_res_channels}, embedding_dim={embedding_dim} and"
                f" augment_dim={augment_dim} must be at least 0 (0: not used)."
            )
        if coordinate_channels not in (0, 2):
            raise UserError(f"The network's coordinate_channels={coordinate_channels} must be 0 or 2.")
        if interval_dim not in (0, 1):
            raise UserError(f"The network's interval_dim={interval_dim} must be 0 or 1.")
        self.low_res_channels, self.embedding_dim = low_res_channels, embedding_dim
        self.coordinate_channels = coordinate_channels
        self.label = LabelEmbedding(num_classes, emb_dim) if num_classes else None
        self.embedding = nn.Linear(embedding_dim, emb_dim, bias=False) if embedding_dim else None
        if self.embedding is not None:
            # The scale of the label vectors if the embeddings have unit variance.
            nn.init.normal_(self.embedding.weight, std=0.2 * embedding_dim**-0.5)
        self.augment = nn.Linear(augment_dim, noise_dim, bias=False) if augment_dim else None
        if self.augment is not None:
            nn.init.xavier_uniform_(self.augment.weight)
        self.interval_features = SinusoidalEmbedding(INTERVAL_FEATURES) if interval_dim else None
        self.interval = nn.Linear(INTERVAL_FEATURES, noise_dim, bias=False) if interval_dim else None
        if self.interval is not None:
            nn.init.zeros_(self.interval.weight)

    def embed(self, noise_mlp: nn.Sequential, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Compute the embedding e (n, emb_dim) of noise level and conditions.

        The first layer of ``noise_mlp`` maps ``noise_cond`` (n,) to features (n, noise_dim). The other layers map these
        features to e.
        """
        features = self.add_augmentation_and_interval(noise_mlp[0](noise_cond), cond)
        return self.add_label_and_embedding(noise_mlp[1:](features), cond)

    def add_augmentation_and_interval(self, features: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Add the augmentation parameters and the interval, if any, to the noise-level features (n, noise_dim)."""
        if self.augment is not None and "augment" in cond:
            features = features + self.augment(cond["augment"].to(features.dtype))
        if self.interval is not None and self.interval_features is not None:
            interval = cond.get("interval", features.new_zeros(len(features)))
            features = features + self.interval(self.interval_features(interval.to(features.dtype)))
        return features

    def add_label_and_embedding(self, emb: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Add the label and the precomputed embedding to the noise-level embedding (n, emb_dim)."""
        if self.label is not None:
            no_label = self.label.no_label
            label = _required(cond, "label", f"{no_label} classes", f", where {no_label} means no label")
            emb = emb + self.label(label)
        if self.embedding is not None:
            precomputed = _required(cond, "embedding", "precomputed embeddings")
            if precomputed.shape[-1] != self.embedding_dim:
                raise UserError(
                    f"cond['embedding'] has {precomputed.shape[-1]} features, but the network was built for"
                    f" {self.embedding_dim}: use model.network.embedding_dim={precomputed.shape[-1]}."
                )
            emb = emb + self.embedding(precomputed.to(emb.dtype))
        return emb

    @property
    def image_channels(self) -> int:
        """Number of channels that `concat_images` adds to the noisy image."""
        return self.low_res_channels + self.coordinate_channels

    def concat_images(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the low-resolution image and the coordinates, if any, to the noisy image:
        (n, C + image_channels, H, W)."""
        images = [x]
        if self.low_res_channels:
            images.append(self._resized_low_res(x, cond))
        if self.coordinate_channels:
            whole_image = pixel_coordinates(*x.shape[2:], like=x).expand(len(x), -1, -1, -1)
            images.append(cond.get("coordinates", whole_image).to(x.dtype))
        return x if len(images) == 1 else torch.cat(images, dim=1)

    def _resized_low_res(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        low_res = _required(cond, "low_res", "a low-resolution image")
        if low_res.shape[1] != self.low_res_channels:
            raise UserError(
                f"cond['low_res'] has {low_res.shape[1]} channels, but the network was built for"
                f" {self.low_res_channels}: use model.network.low_res_channels={low_res.shape[1]}."
            )
        return F.interpolate(low_res.to(x.dtype), size=x.shape[2:], mode="bilinear", align_corners=False)


def pixel_coordinates(height: int, width: int, like: Tensor) -> Tensor:
    """Return the coordinates (right, down) of each pixel, (2, H, W), from -1 to 1 over the centres of the pixels, with
    the type and device of ``like``."""
    rows, columns = (torch.linspace(-1, 1, side, device=like.device, dtype=like.dtype) for side in (height, width))
    return torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)])


def _required(cond: Mapping[str, Tensor], name: str, description: str, hint: str = "") -> Tensor:
    if name not in cond:
        raise UserError(f"This network was built for {description}: pass cond['{name}']{hint}.")
    return cond[name]
