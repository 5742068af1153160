"""The space that a model works in: pixels, or the latents of a frozen autoencoder, whitened or as tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.autoencoder_core import AutoencoderCore
from gencompare.models.bottlenecks import VectorQuantizer
from gencompare.networks.layers import at_least_float32


class PixelSpace(nn.Module):
    """The space of images, where encoding and decoding are the identity."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.latent_shape = spec.shape
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z


class FrozenAutoencoder(nn.Module, ABC):
    """The space of the latents of a trained autoencoder.

    The autoencoder weights are part of the state dict of the model that works on the latents, so its run folder is
    self-contained. They are neither trained nor averaged.

    Args:
        spec: shape and classes of the images.
        autoencoder: a factory ``spec -> model with a coder``, with the settings used to train the autoencoder.
        autoencoder_stage: ``autoencoder_run``, the folder of a trained autoencoder, and ``budget``, the training budget
            of a new one. Only the training task uses these settings; it passes the trained weights to
            `load_autoencoder`.
    """

    pass_over_images: ClassVar[str]
    """What `load_autoencoder` computes from all training images, for the record of costs."""

    def __init__(self, spec: DataSpec, *, autoencoder: Callable[..., Any], **autoencoder_stage: Any) -> None:
        super().__init__()
        # Build the model without the networks of its loss, and without advancing the global random state.
        with torch.random.fork_rng(devices=[]):
            model = autoencoder(spec=replace(spec, conditions={}), perceptual=None, discriminator=None)
        coder = getattr(model, "coder", None)
        if not isinstance(coder, AutoencoderCore):
            raise UserError(f"{type(model).__name__} is not an autoencoder: latents need model=autoencoder or vqvae.")
        self.coder = coder
        self.latent_shape = coder.latent_shape
        self.perceptual_networks: list[str] = []
        """The pretrained networks in the loss of the autoencoder; set when its weights are loaded."""
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, because the autoencoder is frozen."""
        return super().train(False)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Encode images (n, C, H, W); deterministic."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Decode what `encode` returns, or what a model generates, to images (n, C, H, W)."""

    @torch.no_grad()
    def reconstruct(self, x: Tensor, cond: Any, *, generator: torch.Generator) -> Tensor:
        """Encode and decode images; deterministic."""
        return self.decode(self.encode(x))

    @abstractmethod
    def load_autoencoder(self, coder: AutoencoderCore, batches: Iterable[Tensor]) -> None:
        """Copy the weights of a trained autoencoder, and check or measure its latents of all training images.

        Args:
            coder: the trained autoencoder.
            batches: batches (n, C, H, W) of all training images.

        Raises:
            UserError: if the latents contain too little information.
        """


class Latents(FrozenAutoencoder):
    r"""The whitened latents of a frozen autoencoder: :math:`w = (z - m_c) / s_c` for each channel c.

    :math:`m_c` and :math:`s_c` are the mean and the standard deviation over the training split. A noise schedule
    therefore has the same meaning for every autoencoder. (Rombach et al. (2022), "High-resolution image synthesis with
    latent diffusion models", appendix G, https://arxiv.org/abs/2112.10752, divide by one standard deviation, estimated
    on the first batch.)

    The whitening is part of the state dict, like the weights of the autoencoder.
    """

    pass_over_images = "whitening"

    mean: Tensor
    std: Tensor

    def __init__(self, spec: DataSpec, *, autoencoder: Callable[..., Any], **autoencoder_stage: Any) -> None:
        super().__init__(spec, autoencoder=autoencoder, **autoencoder_stage)
        self.register_buffer("mask", torch.ones(1, *self.latent_shape[1:]), persistent=False)
        self.mask: Tensor
        self.register_buffer("mean", torch.zeros(self.latent_shape[0], 1, 1))
        self.register_buffer("std", torch.ones(self.latent_shape[0], 1, 1))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        # Encode in full precision, like the whitening.
        with torch.autocast(x.device.type, enabled=False):
            return (self.coder.encode(at_least_float32(x)) - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.coder.decode(at_least_float32(z) * self.std + self.mean)

    def has_same_whitening(self, other: Latents) -> bool:
        """Return whether mean and standard deviation are equal, which identifies the autoencoder."""
        return torch.equal(self.mean, other.mean) and torch.equal(self.std, other.std)

    @torch.no_grad()
    def load_autoencoder(self, coder: AutoencoderCore, batches: Iterable[Tensor]) -> None:
        """Copy the weights of a trained autoencoder and compute the whitening; see `FrozenAutoencoder`.

        Raises:
            UserError: if a latent channel is constant.
        """
        self.coder.load_state_dict(coder.state_dict())
        count, total, total_squares = 0, torch.zeros(()), torch.zeros(())
        for x in batches:
            z = self.coder.encode(x.to(self.mean)).double()
            count += z[:, 0].numel()
            total = total.to(z) + z.sum((0, 2, 3))
            total_squares = total_squares.to(z) + z.square().sum((0, 2, 3))
        mean = total / count
        variance = total_squares / count - mean.square()
        if not (variance > 1e-12).all():
            raise UserError(
                "A channel of the autoencoder's latents is constant over all images and contains no information: train"
                " the autoencoder for longer, or with fewer latent channels."
            )
        self.mean.copy_(mean[:, None, None])
        self.std.copy_(variance.sqrt()[:, None, None])


class Tokens(FrozenAutoencoder):
    """The latents of a frozen vector-quantised autoencoder, as the indices of their codes.

    van den Oord et al. (2017), "Neural discrete representation learning", section 3.3,
    https://arxiv.org/abs/1711.00937. Tokens are in raster order. For the arguments, see `FrozenAutoencoder`.
    """

    pass_over_images = "code usage"

    def __init__(self, spec: DataSpec, *, autoencoder: Callable[..., Any], **autoencoder_stage: Any) -> None:
        super().__init__(spec, autoencoder=autoencoder, **autoencoder_stage)
        if not isinstance(self.coder.bottleneck, VectorQuantizer):
            raise UserError(
                f"Tokens need an autoencoder with a codebook, not a {type(self.coder.bottleneck).__name__}:"
                " use model@model.latent.autoencoder=vqvae, or model=ldm for other autoencoders."
            )
        self.num_codes = self.quantizer.num_codes
        self.num_tokens = self.latent_shape[1] * self.latent_shape[2]

    @property
    def quantizer(self) -> VectorQuantizer:
        assert isinstance(self.coder.bottleneck, VectorQuantizer)
        return self.coder.bottleneck

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Encode images (n, C, H, W) to tokens (n, num_tokens), int64."""
        with torch.autocast(x.device.type, enabled=False):
            vectors = self.coder.encode(at_least_float32(x)).movedim(1, -1)
            return self.quantizer.nearest(vectors.flatten(0, -2)).view(len(x), -1)

    def decode(self, z: Tensor) -> Tensor:
        """Decode tokens (n, num_tokens) to images (n, C, H, W)."""
        with torch.autocast(z.device.type, enabled=False):
            codes = self.quantizer.codebook[z].mT
            return self.coder.decode(codes.unflatten(2, self.latent_shape[1:]))

    @torch.no_grad()
    def load_autoencoder(self, coder: AutoencoderCore, batches: Iterable[Tensor]) -> None:
        """Copy the weights of a trained autoencoder and count the codes in use; see `FrozenAutoencoder`.

        Raises:
            UserError: if the training images use only a few codes (see `VectorQuantizer`).
        """
        self.coder.load_state_dict(coder.state_dict())
        like = self.quantizer.codebook
        used = torch.zeros(self.num_codes, dtype=torch.bool, device=like.device)
        for x in batches:
            used[self.encode(x.to(like)).flatten()] = True
        if (count := int(used.sum())) <= self.quantizer.few:
            raise UserError(
                f"The codebook of the autoencoder has collapsed: the training images use {count} of {self.num_codes}"
                " codes. Train another one, with a lower model.latent.autoencoder.optimizer.lr, a smaller"
                " model.latent.autoencoder.bottleneck.commitment or a larger model.latent.budget."
            )
