"""Where a diffusion model works: on the pixels themselves, or on the whitened latents of a frozen autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.autoencoder_core import AutoencoderCore


class PixelSpace(nn.Module):
    """The images themselves: nothing is encoded."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.latent_shape = spec.shape
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z


class Latents(nn.Module):
    r"""The whitened latents of a frozen autoencoder: w = (z - m_c) / s_c, with mean and standard deviation of each
    channel over the training images.

    Rombach et al. (2022), "High-resolution image synthesis with latent diffusion models", appendix G, divide by one
    standard deviation of the first batch; here every channel has mean 0 and variance 1 over the training split, so that
    a noise schedule means the same whatever the autoencoder.

    The autoencoder's weights and the whitening are part of the state dict of the model that holds this module, so that
    its run folder is enough; nothing trains or averages them.

    Args:
        autoencoder: a factory ``spec -> model with a coder``, the first stage as it was trained.
        run: folder of a trained one, whose weights `take` puts in here (as ``task=train`` does).
        budget: of the first stage.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: DataSpec, *, autoencoder: Callable[..., Any], **first_stage: Any) -> None:
        super().__init__()
        # Without the networks that its loss looks at, and without moving anyone's random numbers.
        with torch.random.fork_rng(devices=[]):
            trained = autoencoder(spec=replace(spec, conditions={}), perceptual=None, discriminator=None)
        coder = getattr(trained, "coder", None)
        if not isinstance(coder, AutoencoderCore):
            raise UserError(f"{type(trained).__name__} is no autoencoder: latents need model=autoencoder or vqvae.")
        self.coder = coder
        self.latent_shape = coder.latent_shape
        self.perceptual_networks: list[str] = []
        """What the first stage's loss looked at; set with its weights."""
        self.register_buffer("mask", torch.ones(1, *self.latent_shape[1:]), persistent=False)
        self.mask: Tensor
        self.register_buffer("mean", torch.zeros(self.latent_shape[0], 1, 1))
        self.register_buffer("std", torch.ones(self.latent_shape[0], 1, 1))
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Latents:
        """Always in eval mode: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        # In full precision, as the whitening was measured.
        with torch.autocast(x.device.type, enabled=False):
            return (self.coder.encode(x.float()) - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.coder.decode(z.float() * self.std + self.mean)

    def same_as(self, other: Latents) -> bool:
        """Whether these are the latents of the same autoencoder: whitening by the same numbers tells."""
        return torch.equal(self.mean, other.mean) and torch.equal(self.std, other.std)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, cond: Any, *, generator: torch.Generator) -> Tensor:
        """What of an image passes the first stage: no random numbers."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def take(self, coder: AutoencoderCore, batches: Iterable[Tensor]) -> None:
        """Take over a trained autoencoder, and measure the whitening on ``batches`` of all training images."""
        self.coder.load_state_dict(coder.state_dict())
        count, first, second = 0, torch.zeros(()), torch.zeros(())
        for x in batches:
            z = self.coder.encode(x.to(self.mean.device)).double()
            count += z[:, 0].numel()
            first = first.to(z) + z.sum((0, 2, 3))
            second = second.to(z) + z.square().sum((0, 2, 3))
        mean = first / count
        variance = second / count - mean.square()
        if not (variance > 1e-12).all():
            raise UserError(
                "A channel of the autoencoder's latents is the same for all images, so that there is nothing to learn"
                " in it: train it for longer, or with fewer latent channels."
            )
        self.mean.copy_(mean[:, None, None])
        self.std.copy_(variance.sqrt()[:, None, None])
