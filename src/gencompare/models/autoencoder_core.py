"""The encoder, bottleneck and decoder of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.bottlenecks import Bottleneck
from gencompare.networks.layers import at_least_float32
from gencompare.rng import RandomSource


class AutoencoderCore(nn.Module):
    """Encoder, bottleneck and decoder: the part of an autoencoder that latent diffusion uses.

    Args:
        spec: shape of the images (C, H, W).
        encoder: a factory ``(shape, out_channels) -> module(x)``.
        decoder: a factory ``(in_channels, shape) -> module(z)``, which upsamples by the downsampling factor of the
            encoder.
        bottleneck: regularises the latents.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        bottleneck: Bottleneck,
    ) -> None:
        super().__init__()
        self.encoder = encoder(shape=spec.shape, out_channels=bottleneck.encoded_channels)
        self.bottleneck = bottleneck
        self.decoder = decoder(in_channels=bottleneck.channels, shape=spec.shape)
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor
        with torch.no_grad():
            encoded = self.encoder(torch.zeros(1, *spec.shape))
            decoded = self.decoder(torch.zeros(1, bottleneck.channels, *encoded.shape[2:]))
        if decoded.shape[1:] != spec.shape:
            raise UserError(
                f"The decoder returns images of shape {tuple(decoded.shape[1:])}, but the data have shape"
                f" {spec.shape}: use the same channel_mult for encoder and decoder."
            )
        self.latent_shape: tuple[int, int, int] = (bottleneck.channels, encoded.shape[2], encoded.shape[3])

    def forward(self, x: Tensor, rng: RandomSource) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruct images (n, C, H, W). Return the reconstructions and the bottleneck metrics."""
        z, metrics = self.bottleneck(self.encoder(x), rng)
        return self._decode(z), metrics

    def encode(self, x: Tensor) -> Tensor:
        """Encode images to latents (n, c, h, w); deterministic."""
        return self.bottleneck.mode(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to images (n, C, H, W), with black padding; values may slightly exceed [-1, 1]."""
        return self._decode(self.bottleneck.quantize(z))

    def _decode(self, z: Tensor) -> Tensor:
        return at_least_float32(self.decoder(z)) * self.mask - (1 - self.mask)
