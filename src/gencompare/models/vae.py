"""The variational autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.contract import Cond, DataSpec, GenerativeModel, Likelihood
from gencompare.errors import UserError
from gencompare.models.likelihoods import PixelLikelihood
from gencompare.seeds import Draws


def kl_from_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) in nats, element by element (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


class VAE(GenerativeModel):
    r"""A VAE with a Gaussian posterior over one latent vector (Kingma and Welling 2014).

    log p(x) >= E_q[log p(x | z)] - KL(q(z | x) || p(z)),  q(z | x) = N(mu(x), diag sigma^2(x)),  p(z) = N(0, I).

    What is minimised, in bits per real pixel value, is

        -log p(x | z) + beta sum_j max(KL_j, free_bits),

    one draw of z an image. beta = 1 and free_bits = 0 give the bound; beta as in Higgins et al. 2017 ("beta-VAE");
    free_bits is the information, in bits, that each latent number may hold at no cost (Kingma et al. 2016, "Improved
    variational inference with inverse autoregressive flow", eq. 15, here image by image, so that the loss is a mean
    over images). Both change only what is trained on: the reported bound is always the bound.

    Samples are the mean of p(x | z) with z ~ N(0, I), as pictures of VAEs usually are, since the noise of a pixel-wise
    likelihood has no structure; ``pixel_noise`` draws from p(x | z) instead, so from the very distribution that the
    bound scores.

    Args:
        encoder: a factory ``(shape, out_features, embed_dim) -> module(x, e)``.
        decoder: a factory ``(in_features, shape, embed_dim) -> module(z, e)``.
        likelihood: a factory ``spec -> PixelLikelihood``.
        latent_dim: numbers in z.
        label_dim: size of the label's embedding, for a conditional model.
        pixel_noise: whether samples are draws from p(x | z).
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        likelihood: Callable[..., PixelLikelihood],
        latent_dim: int = 32,
        label_dim: int = 32,
        beta: float = 1.0,
        free_bits: float = 0.0,
        pixel_noise: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        if latent_dim < 1:
            raise UserError(f"model.latent_dim={latent_dim}: a latent needs at least 1 number.")
        if beta < 0 or free_bits < 0:
            raise UserError(f"model.beta={beta}, model.free_bits={free_bits}: neither may be negative.")
        self.latent_dim, self.beta, self.free_bits, self.pixel_noise = latent_dim, beta, free_bits, pixel_noise
        self.likelihood = likelihood(spec)
        embed_dim = label_dim if self.conditional else 0
        self.labels = nn.Embedding(spec.num_classes, label_dim) if self.conditional else None
        self.encoder = encoder(spec.shape, 2 * latent_dim, embed_dim)
        self.decoder = decoder(latent_dim, (self.likelihood.maps, *spec.shape[1:]), embed_dim)

    def posterior(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """mu and log sigma^2 of q(z | x), each (n, latent_dim) in float32."""
        mean, log_var = self.encoder(x, self._embedded(cond)).float().chunk(2, dim=1)
        return mean, log_var

    def decode(self, z: Tensor, cond: Cond) -> Tensor:
        """The parameters of p(x | z)."""
        return self.decoder(z, self._embedded(cond))

    def terms(self, x: Tensor, cond: Cond, noise: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(x | z) in nats (n,), with z = mu + sigma noise, and the KL of each latent number (n, latent_dim)."""
        mean, log_var = self.posterior(x, cond)
        z = mean + (0.5 * log_var).exp() * noise
        return -self.likelihood.log_prob(self.decode(z, cond), x), kl_from_standard_normal(mean, log_var)

    def losses(self, x: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        """``loss``, and in bits/dim the bound and its two parts: ``bits_per_dim = reconstruction + kl``."""
        reconstruction, kl = self.terms(x, cond, draws.normal((self.latent_dim,)))
        penalty = kl.clamp(min=self.free_bits * math.log(2)).sum(1)
        kl = kl.sum(1)
        bits = 1 / (self.spec.dims * math.log(2))
        return {
            "loss": (reconstruction + self.beta * penalty) * bits,
            "bits_per_dim": (reconstruction + kl) * bits,
            "reconstruction": reconstruction * bits,
            "kl": kl * bits,
        }

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.latent_dim, generator=generator, device=generator.device)
        h = self.decode(z.to(self.device), self.used(cond))
        return self._picture(self.likelihood.sample(h, generator) if self.pixel_noise else self.likelihood.mean(h))

    def sampling_description(self) -> str:
        return f"{'draw from' if self.pixel_noise else 'mean of'} p(x | z), z ~ N(0, I)"

    @torch.no_grad()
    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        """The mean of p(x | z) at the posterior's mean: no random numbers."""
        cond = self.used(cond)
        mean, _ = self.posterior(x, cond)
        return self._picture(self.likelihood.mean(self.decode(mean, cond)))

    def likelihoods(self) -> dict[str, Likelihood]:
        return {"elbo": Likelihood("bound", self._elbo)}

    @torch.no_grad()
    def _elbo(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn(len(x), self.latent_dim, generator=generator, device=generator.device).to(x.device)
        reconstruction, kl = self.terms(x, self.used(cond), noise)
        bits = 1 / (self.spec.dims * math.log(2))
        return {"reconstruction": reconstruction * bits, "kl": kl.sum(1) * bits}

    def counted_networks(self) -> dict[str, nn.Module]:
        return {"decoder": self.decoder}

    def _embedded(self, cond: Cond) -> Tensor | None:
        if self.labels is None:
            return None
        if "label" not in cond:
            raise UserError("This VAE is conditional: it needs a class for each image, cond['label'].")
        return self.labels(cond["label"])

    def _picture(self, x: Tensor) -> Tensor:
        """Black where there are no real pixels: nothing was learned there."""
        mask = self.likelihood.mask
        return x * mask - (1 - mask)
