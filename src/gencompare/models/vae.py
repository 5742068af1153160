"""The variational autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec, GenerativeModel, LikelihoodEstimate
from gencompare.models import visualization
from gencompare.models.elbo import importance_weighted_bound, kl_warmup
from gencompare.models.pixel_likelihoods import PixelLikelihood
from gencompare.models.priors import Prior, StandardNormal
from gencompare.rng import RandomSource


class VAE(GenerativeModel):
    r"""A VAE with a Gaussian posterior over one latent vector (Kingma and Welling 2014).

    log p(x) >= E_q[log p(x | z)] - KL(q(z | x) || p(z)),  q(z | x) = N(mu(x), diag sigma^2(x)),

    with p(z) = N(0, I) or another ``prior``. What is minimised, in bits per real pixel value, is

        -log p(x | z) + beta sum_j max(KL_j, free_bits),

    one draw of z an image. beta = 1 and free_bits = 0 give the bound; beta as in Higgins et al. 2017 ("beta-VAE");
    free_bits is the information, in bits, that each latent number may hold at no cost (Kingma et al. 2016, "Improved
    variational inference with inverse autoregressive flow", eq. 15, here image by image, so that the loss is a mean
    over images). With KL warm-up, beta rises in even steps over the first ``kl_warmup_steps`` steps of training
    (the warm-up of Sonderby et al. 2016, "Ladder variational autoencoders"). All of these change only what is trained
    on: the reported bound is always the bound.

    ``likelihoods()`` are the bound, and the importance-weighted one of ``importance_samples`` draws
    (`importance_weighted_bound`), which is nearer to log p(x).

    Samples are the mean of p(x | z) with z ~ p(z), as pictures of VAEs usually are, since the noise of a pixel-wise
    likelihood has no structure; ``pixel_noise`` draws from p(x | z) instead, so from the very distribution that the
    bound scores.

    Args:
        encoder: a factory ``(shape, out_features, embed_dim) -> module(x, e)``.
        decoder: a factory ``(in_features, shape, embed_dim) -> module(z, e)``.
        likelihood: a factory ``spec -> PixelLikelihood``.
        prior: a factory ``latent_dim -> Prior``.
        latent_dim: numbers in z.
        label_dim: size of the label's embedding, for a conditional model.
        importance_samples: draws of z an image, for the importance-weighted bound; 0 leaves it out.
        pixel_noise: whether samples are draws from p(x | z).
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        likelihood: Callable[..., PixelLikelihood],
        prior: Callable[[int], Prior] = StandardNormal,
        latent_dim: int = 32,
        label_dim: int = 32,
        beta: float = 1.0,
        kl_warmup_steps: int = 0,
        free_bits: float = 0.0,
        importance_samples: int = 0,
        pixel_noise: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        if latent_dim < 1 or label_dim < 1:
            raise UserError(f"model.latent_dim={latent_dim}, model.label_dim={label_dim}: both must be at least 1.")
        if not (beta >= 0 and free_bits >= 0):
            raise UserError(f"model.beta={beta}, model.free_bits={free_bits}: neither may be negative.")
        if not all(isinstance(n, int) and n >= 0 for n in (kl_warmup_steps, importance_samples)):
            raise UserError(
                f"model.kl_warmup_steps={kl_warmup_steps}, model.importance_samples={importance_samples}: give whole"
                " numbers, not negative (0 leaves it out)."
            )
        self.latent_dim, self.beta, self.kl_warmup_steps, self.free_bits = latent_dim, beta, kl_warmup_steps, free_bits
        self.importance_samples, self.pixel_noise = importance_samples, pixel_noise
        self.likelihood, self.prior = likelihood(spec), prior(latent_dim)
        if free_bits and not self.prior.factorizes:
            raise UserError(
                f"model.free_bits={free_bits} is an allowance for each latent number, and under this prior the"
                " divergence is no sum over them: use model/prior=standard_normal, or model.free_bits=0."
            )
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
        """-log p(x | z) in nats (n,), with z = mu + sigma noise, and the KL of each latent number (n, latent_dim), or
        of all as (n, 1): `Prior.kl`."""
        mean, log_var = self.posterior(x, cond)
        z = mean + (0.5 * log_var).exp() * noise
        return -self.likelihood.log_prob(self.decode(z, cond), x), self.prior.kl(mean, log_var, z)

    @property
    def beta_now(self) -> float:
        """beta at the step in progress, warmed up; beta itself outside of training."""
        return self.beta * kl_warmup(self, self.kl_warmup_steps)

    def losses(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """``loss``, and in bits a real pixel value the two parts of the bound; where these are bits/dim of the data,
        the bound itself: ``bits_per_dim = reconstruction + kl``."""
        reconstruction, kl = self.terms(x, cond, draws.normal((self.latent_dim,)))
        # What is estimated from one draw may be negative, and must not be cut off.
        penalty = (kl.clamp(min=self.free_bits * math.log(2)) if self.free_bits else kl).sum(1)
        kl = kl.sum(1)
        figures = {"loss": self._bits(reconstruction + self.beta_now * penalty)}
        if self.likelihood.gives_bits:
            figures["bits_per_dim"] = self._bits(reconstruction + kl)
        return figures | {"reconstruction": self._bits(reconstruction), "kl": self._bits(kl)}

    def _bits(self, nats: Tensor) -> Tensor:
        return nats / (self.spec.dims * math.log(2))

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        z = self.prior.sample(n, generator).to(self.device)
        h = self.decode(z, self.used(cond))
        return self.likelihood.picture(
            self.likelihood.sample(h, generator) if self.pixel_noise else self.likelihood.mean(h)
        )

    def sampling_description(self) -> str:
        return f"{'draw from' if self.pixel_noise else 'mean of'} p(x | z), z ~ {self.prior.describe()}"

    @torch.no_grad()
    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        """The mean of p(x | z) at the posterior's mean: no random numbers."""
        cond = self.used(cond)
        mean, _ = self.posterior(x, cond)
        return self.decoded_mean(mean, cond)

    def decoded_mean(self, z: Tensor, cond: Cond) -> Tensor:
        """The mean of p(x | z), as a picture."""
        return self.likelihood.picture(self.likelihood.mean(self.decode(z, cond)))

    @torch.no_grad()
    def pictures(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """What `Explores` asks for, as means of p(x | z): no random numbers."""
        cond = self.used(cond)
        mean, log_var = self.posterior(x, cond)
        return {
            "reconstruction": torch.stack([x, self.decoded_mean(mean, cond)]),
            "interpolation": visualization.interpolation(self.decoded_mean, mean, cond),
            "traversal": visualization.traversal(self.decoded_mean, mean, log_var, cond),
        }

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        if not self.likelihood.gives_bits:
            return {}
        found = {"elbo": LikelihoodEstimate("bound", self._elbo)}
        if self.importance_samples:
            found[f"iwae_{self.importance_samples}"] = LikelihoodEstimate("bound", self._iwae)
        return found

    @torch.no_grad()
    def _elbo(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        reconstruction, kl = self.terms(x, self.used(cond), self._noise(len(x), generator))
        return {"reconstruction": self._bits(reconstruction), "kl": self._bits(kl.sum(1))}

    @torch.no_grad()
    def _iwae(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        cond = self.used(cond)
        mean, log_var = self.posterior(x, cond)

        def log_weight() -> Tensor:
            noise = self._noise(len(x), generator)
            z = mean + (0.5 * log_var).exp() * noise
            log_q = -0.5 * (noise.square() + log_var + math.log(2 * math.pi)).sum(1)
            return self.likelihood.log_prob(self.decode(z, cond), x) + self.prior.log_prob(z) - log_q

        return {"iwae": -self._bits(importance_weighted_bound(log_weight, self.importance_samples))}

    def counted_networks(self) -> dict[str, nn.Module]:
        return {"decoder": self.decoder}

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Standard normal numbers (n, latent_dim), drawn where the generator lives."""
        return torch.randn(n, self.latent_dim, generator=generator, device=generator.device).to(self.device)

    def _embedded(self, cond: Cond) -> Tensor | None:
        label = self.label(cond)
        return None if self.labels is None else self.labels(label)
