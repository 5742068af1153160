"""The encoder, bottleneck and decoder of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.bottlenecks import Bottleneck
from gencompare.rng import RandomSource


class AutoencoderCore(nn.Module):
    """Images (n, C, H, W) to latents (n, c, h, w) and back.

    Args:
        encoder: a factory ``(shape, out_channels) -> module(x)``.
        decoder: a factory ``(in_channels, shape) -> module(z)``, as fine as the encoder is coarse.
        bottleneck: what the latents are held to.
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
                f"The decoder makes images of {tuple(decoded.shape[1:])} from what the encoder makes of {spec.shape}:"
                " give both the same multipliers."
            )
        self.latent_shape: tuple[int, int, int] = (bottleneck.channels, encoded.shape[2], encoded.shape[3])

    def forward(self, x: Tensor, rng: RandomSource) -> tuple[Tensor, dict[str, Tensor]]:
        """Images made again, and the bottleneck's figures."""
        z, figures = self.bottleneck(self.encoder(x), rng)
        return self._images(z), figures

    def encode(self, x: Tensor) -> Tensor:
        """The latents (n, c, h, w) that stand for images; no random numbers."""
        return self.bottleneck.point(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents, black outside of the real pixels; values may lie a little beyond [-1, 1]."""
        return self._images(self.bottleneck.settled(z))

    def _images(self, z: Tensor) -> Tensor:
        return self.decoder(z).float() * self.mask - (1 - self.mask)
