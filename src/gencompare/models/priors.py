"""Priors p(z) of the latent vector of a variational autoencoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.diffusion.data_likelihood import normal_log_prob
from gencompare.errors import UserError
from gencompare.models.elbo import kl_from_standard_normal
from gencompare.rng import draw_normal


class Prior(nn.Module, ABC):
    """Base class of priors p(z) of latents z, (n, d)."""

    factorizes: bool
    """Whether the KL divergence is a sum over latent dimensions, which free bits require."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        r"""Compute :math:`\log p(z)` in nats, (n,)."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` samples, (n, d)."""

    @abstractmethod
    def kl(self, mean: Tensor, log_var: Tensor, z: Tensor) -> Tensor:
        r"""Compute the KL divergence of the posterior :math:`N(\mu, \sigma^2)` from the prior, in nats.

        Args:
            mean: :math:`\mu`, (n, d).
            log_var: :math:`\log \sigma^2`, (n, d).
            z: a sample of the posterior, (n, d).

        Returns:
            The exact divergence of each dimension, (n, d), if the prior `factorizes`; otherwise an unbiased estimate of
            the total from ``z``, (n, 1).
        """

    @abstractmethod
    def describe(self) -> str:
        """Return a short description for a table."""


class StandardNormal(Prior):
    """The standard normal prior N(0, I)."""

    factorizes = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return draw_normal((n, self.dim), generator)

    def kl(self, mean: Tensor, log_var: Tensor, z: Tensor) -> Tensor:
        return kl_from_standard_normal(mean, log_var)

    def describe(self) -> str:
        return "N(0, I)"


class MixtureOfGaussians(Prior):
    r"""A learned mixture :math:`p(z) = \sum_k \pi_k N(z; \mu_k, \mathrm{diag}\, s_k^2)`.

    Under a fixed N(0, I), the posteriors of all images together rarely match the prior, and the decoder is sampled
    where it was never trained. The optimal prior is the mixture of posteriors :math:`\frac{1}{N} \sum_n q(z | x_n)`
    (Tomczak and Welling 2018, "VAE with a VampPrior", section 2, https://arxiv.org/abs/1705.07120). This is the "MoG"
    baseline of that paper, with fewer components and free parameters.

    Args:
        dim: dimension d of z.
        num_components: number of components K.
    """

    factorizes = False
    GAIN = 10.0
    """Each parameter is GAIN times a weight, because Adam changes a weight by about the learning rate per step, which
    is too slow for components that are as far apart as posteriors."""

    def __init__(self, dim: int, *, num_components: int = 100) -> None:
        super().__init__()
        if num_components < 1:
            raise UserError(f"model.prior.num_components={num_components} must be at least 1.")
        self.weights = nn.Parameter(torch.zeros(num_components))
        self.places = nn.Parameter(torch.randn(num_components, dim) / self.GAIN)
        self.spreads = nn.Parameter(torch.zeros(num_components, dim))

    @property
    def logits(self) -> Tensor:
        r"""Logits of :math:`\pi`, (K,)."""
        return self.GAIN * self.weights

    @property
    def means(self) -> Tensor:
        r"""Means :math:`\mu`, (K, d)."""
        return self.GAIN * self.places

    @property
    def log_stds(self) -> Tensor:
        r"""Log standard deviations :math:`\log s`, (K, d)."""
        return self.GAIN * self.spreads

    def log_prob(self, z: Tensor) -> Tensor:
        log_components = normal_log_prob(z[:, None], self.means, self.log_stds.exp()).sum(2)
        return torch.logsumexp(F.log_softmax(self.logits, dim=0) + log_components, dim=1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        device, dtype = generator.device, self.weights.dtype
        k = torch.multinomial(self.logits.to(device).softmax(0), n, replacement=True, generator=generator)
        noise = draw_normal((n, self.means.shape[1]), generator, dtype=dtype)
        return self.means.to(device)[k] + self.log_stds.to(device)[k].exp() * noise

    def kl(self, mean: Tensor, log_var: Tensor, z: Tensor) -> Tensor:
        entropy = 0.5 * (1 + math.log(2 * math.pi) + log_var).sum(1)
        return (-entropy - self.log_prob(z))[:, None]

    def describe(self) -> str:
        return f"a mixture of {len(self.logits)} Gaussians"
