"""Variational autoencoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.errors import UserError, check_counts, check_non_negative
from gencompare.generative_model import Cond, DataSpec, GenerativeModel, LikelihoodEstimate
from gencompare.models import visualization
from gencompare.models.elbo import importance_weighted_bound, kl_warmup
from gencompare.models.pixel_likelihoods import PixelLikelihood
from gencompare.models.priors import Prior, StandardNormal
from gencompare.networks.layers import at_least_float32
from gencompare.rng import RandomSource, draw_normal


class VAE(GenerativeModel):
    r"""A VAE with a diagonal Gaussian posterior over one latent vector.

    Kingma and Welling (2014), "Auto-encoding variational Bayes", https://arxiv.org/abs/1312.6114. The evidence lower
    bound is

    .. math:: \log p(x) \ge E_q[\log p(x | z)] - KL(q(z | x) \| p(z)), \quad q(z | x) = N(\mu(x), \sigma^2(x)),

    with p(z) = N(0, I) or another ``prior``. The loss, in bits per value, uses one sample of z per image:

    .. math:: -\log p(x | z) + \beta \sum_j \max(KL_j, \lambda).

    :math:`\beta = 1` and :math:`\lambda = 0` give the bound. Higgins et al. (2017), "beta-VAE", introduce
    :math:`\beta`. :math:`\lambda` (``free_bits``) is the information that each latent dimension may carry at no cost:
    Kingma et al. (2016), "Improved variational inference with inverse autoregressive flow", eq. 15,
    https://arxiv.org/abs/1606.04934, here per image, so that the loss is a mean over images. With KL warm-up,
    :math:`\beta` increases linearly over the first ``kl_warmup_steps`` training steps (Sonderby et al. 2016, "Ladder
    variational autoencoders", https://arxiv.org/abs/1602.02282). These options change the training loss only, never the
    reported bound.

    `likelihoods` returns the ELBO and, if ``importance_samples`` is positive, the tighter `importance_weighted_bound`.

    Samples are means of p(x | z) with z ~ p(z), as is usual for VAEs: the noise of a pixelwise likelihood has no
    structure. With ``pixel_noise``, they are samples from p(x | z), the distribution that the bounds refer to.

    Args:
        spec: shape, number of classes and value range of the data.
        encoder: a factory ``(shape, out_features, embed_dim) -> module(x, e)``.
        decoder: a factory ``(in_features, shape, embed_dim) -> module(z, e)``.
        likelihood: a factory ``spec -> PixelLikelihood``.
        prior: a factory ``latent_dim -> Prior``.
        latent_dim: dimension of z.
        label_dim: dimension of the label embedding of a conditional model.
        beta: weight :math:`\beta` of the KL term.
        kl_warmup_steps: training steps over which :math:`\beta` increases from 0; 0 disables warm-up.
        free_bits: :math:`\lambda` in bits.
        importance_samples: samples of z per image for the importance-weighted bound; 0 disables it.
        pixel_noise: whether to sample from p(x | z) instead of taking its mean.
        kwargs: see `TrainedModel`.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(spec, **kwargs)
        check_counts("model", latent_dim=latent_dim, label_dim=label_dim)
        check_non_negative("model.beta", beta)
        check_non_negative("model.free_bits", free_bits)
        if not all(isinstance(n, int) and n >= 0 for n in (kl_warmup_steps, importance_samples)):
            raise UserError(
                f"model.kl_warmup_steps={kl_warmup_steps} and model.importance_samples={importance_samples} must be"
                " non-negative integers (0 disables the option)."
            )
        self.latent_dim, self.beta, self.kl_warmup_steps, self.free_bits = latent_dim, beta, kl_warmup_steps, free_bits
        self.importance_samples, self.pixel_noise = importance_samples, pixel_noise
        self.likelihood, self.prior = likelihood(spec), prior(latent_dim)
        if free_bits and not self.prior.factorizes:
            raise UserError(
                f"model.free_bits={free_bits} needs a KL term for each latent dimension, but under this prior the KL"
                " divergence is not a sum over dimensions: use model/prior=standard_normal, or model.free_bits=0."
            )
        embed_dim = label_dim if self.conditional else 0
        self.labels = nn.Embedding(spec.num_classes, label_dim) if self.conditional else None
        self.encoder = encoder(spec.shape, 2 * latent_dim, embed_dim)
        self.decoder = decoder(latent_dim, (self.likelihood.decoder_channels, *spec.shape[1:]), embed_dim)

    def posterior(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        r"""Compute :math:`\mu` and :math:`\log \sigma^2` of q(z | x), each (n, latent_dim) in full precision."""
        mean, log_var = at_least_float32(self.encoder(x, self._embed_label(cond))).chunk(2, dim=1)
        return mean, log_var

    def decode(self, z: Tensor, cond: Cond) -> Tensor:
        """Compute the decoder output (n, likelihood.decoder_channels, H, W), the parameters of p(x | z)."""
        return self.decoder(z, self._embed_label(cond))

    def terms(self, x: Tensor, cond: Cond, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""Compute the terms of the negative ELBO in nats, with :math:`z = \mu + \sigma \epsilon`.

        Args:
            x: images (n, C, H, W).
            cond: conditions of the images.
            noise: :math:`\epsilon`, (n, latent_dim).

        Returns:
            :math:`-\log p(x | z)`, (n,), and the KL of each latent dimension (n, latent_dim), or the total KL (n, 1);
            see `Prior.kl`.
        """
        mean, log_var = self.posterior(x, cond)
        z = mean + (0.5 * log_var).exp() * noise
        return -self.likelihood.log_prob(self.decode(z, cond), x), self.prior.kl(mean, log_var, z)

    @property
    def current_beta(self) -> float:
        r""":math:`\beta` in the current step, including warm-up; the final value outside training."""
        return self.beta * kl_warmup(self, self.kl_warmup_steps)

    def micro_batched_networks(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute ``loss``, and ``reconstruction`` and ``kl`` in bits per value.

        ``bits_per_dim``, the sum of the last two, is included if the likelihood is that of the data.
        """
        reconstruction, kl = self.terms(x, cond, rng.normal((self.latent_dim,)))
        # A single-sample estimate of the KL may be negative and must not be clamped.
        penalty = (kl.clamp(min=self.free_bits * math.log(2)) if self.free_bits else kl).sum(1)
        kl = kl.sum(1)
        metrics = {"loss": self._bits(reconstruction + self.current_beta * penalty)}
        if self.likelihood.is_data_likelihood:
            metrics["bits_per_dim"] = self._bits(reconstruction + kl)
        return metrics | {"reconstruction": self._bits(reconstruction), "kl": self._bits(kl)}

    def _bits(self, nats: Tensor) -> Tensor:
        """Convert nats per image to bits per value."""
        return nats / (self.spec.num_values * math.log(2))

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        z = self.prior.sample(n, generator).to(self.device, self.dtype)
        h = self.decode(z, self.select_conditions(cond))
        return self.likelihood.mask_padding(
            self.likelihood.sample(h, generator) if self.pixel_noise else self.likelihood.mean(h)
        )

    def sampling_description(self) -> str:
        return f"{'sample of' if self.pixel_noise else 'mean of'} p(x | z), z ~ {self.prior.describe()}"

    @torch.no_grad()
    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        """Compute the mean of p(x | z) at the posterior mean; deterministic."""
        cond = self.select_conditions(cond)
        mean, _ = self.posterior(x, cond)
        return self.decoded_mean(mean, cond)

    def decoded_mean(self, z: Tensor, cond: Cond) -> Tensor:
        """Compute the mean of p(x | z), (n, C, H, W), with black padding."""
        return self.likelihood.mask_padding(self.likelihood.mean(self.decode(z, cond)))

    @torch.no_grad()
    def visualize(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Create reconstructions, interpolations and latent traversals from means of p(x | z); deterministic."""
        cond = self.select_conditions(cond)
        mean, log_var = self.posterior(x, cond)
        return {
            "reconstruction": torch.stack([x, self.decoded_mean(mean, cond)]),
            "interpolation": visualization.interpolation(self.decoded_mean, mean, cond),
            "traversal": visualization.traversal(self.decoded_mean, mean, log_var, cond),
        }

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        if not self.likelihood.is_data_likelihood:
            return {}
        estimates = {"elbo": LikelihoodEstimate("bound", self._elbo)}
        if self.importance_samples:
            estimates[f"iwae_{self.importance_samples}"] = LikelihoodEstimate("bound", self._iwae)
        return estimates

    @torch.no_grad()
    def _elbo(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        reconstruction, kl = self.terms(x, self.select_conditions(cond), self._noise(len(x), generator))
        return {"reconstruction": self._bits(reconstruction), "kl": self._bits(kl.sum(1))}

    @torch.no_grad()
    def _iwae(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        cond = self.select_conditions(cond)
        mean, log_var = self.posterior(x, cond)

        def log_weight() -> Tensor:
            noise = self._noise(len(x), generator)
            z = mean + (0.5 * log_var).exp() * noise
            log_q = -0.5 * (noise.square() + log_var + math.log(2 * math.pi)).sum(1)
            return self.likelihood.log_prob(self.decode(z, cond), x) + self.prior.log_prob(z) - log_q

        return {"iwae": -self._bits(importance_weighted_bound(log_weight, self.importance_samples))}

    def nfe_networks(self) -> dict[str, nn.Module]:
        return {"decoder": self.decoder}

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw standard normal noise (n, latent_dim), generated on the device of the generator."""
        return draw_normal((n, self.latent_dim), generator, self.device, self.dtype)

    def _embed_label(self, cond: Cond) -> Tensor | None:
        label = self.label(cond)
        return None if self.labels is None else self.labels(label)
