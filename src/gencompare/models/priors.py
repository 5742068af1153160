"""Distributions of a latent vector: p(z) of a variational autoencoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.diffusion.objectives import log_normal
from gencompare.errors import UserError
from gencompare.models.elbo import kl_from_standard_normal


class Prior(nn.Module, ABC):
    """p(z) for z (n, d)."""

    factorizes: bool
    """Whether the divergence of a posterior is a sum over latent numbers, which free bits need."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, (n,)."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws (n, d)."""

    @abstractmethod
    def kl(self, mean: Tensor, log_var: Tensor, z: Tensor) -> Tensor:
        """KL(N(mean, exp(log_var)) || p) in nats: of each latent number (n, d) where it factorises, and else of all,
        (n, 1), by the one draw ``z`` of the posterior, whose mean is the divergence."""

    @abstractmethod
    def describe(self) -> str:
        """In words for a table."""


class StandardNormal(Prior):
    """N(0, I)."""

    factorizes = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, self.dim, generator=generator, device=generator.device)

    def kl(self, mean: Tensor, log_var: Tensor, z: Tensor) -> Tensor:
        return kl_from_standard_normal(mean, log_var)

    def describe(self) -> str:
        return "N(0, I)"


class MixtureOfGaussians(Prior):
    r"""sum_k pi_k N(mu_k, diag s_k^2), learned with the rest of the model.

    Under a fixed N(0, I) the posteriors of all images together rarely fill the prior, and samples come from where the
    decoder was never trained. The best prior for the bound is their mixture over the data, (1/N) sum_n q(z | x_n)
    (Tomczak and Welling 2018, "VAE with a VampPrior", section 2); this is one with fewer components and parameters of
    its own, the "MoG" of that paper. The bound stays a bound.

    Args:
        dim: d.
        components: K.
    """

    factorizes = False
    GAIN = 10.0
    """Each parameter is GAIN times a weight: Adam moves a weight by about its learning rate a step, too slow for
    components that have as far to go as posteriors lie apart."""

    def __init__(self, dim: int, *, components: int = 100) -> None:
        super().__init__()
        if components < 1:
            raise UserError(f"model.prior.components={components}: a mixture needs at least 1 component.")
        self.weights = nn.Parameter(torch.zeros(components))
        self.places = nn.Parameter(torch.randn(components, dim) / self.GAIN)
        self.spreads = nn.Parameter(torch.zeros(components, dim))

    @property
    def logits(self) -> Tensor:
        """pi before the softmax, (K,)."""
        return self.GAIN * self.weights

    @property
    def means(self) -> Tensor:
        """mu, (K, d)."""
        return self.GAIN * self.places

    @property
    def log_stds(self) -> Tensor:
        """log s, (K, d)."""
        return self.GAIN * self.spreads

    def log_prob(self, z: Tensor) -> Tensor:
        each = log_normal(z[:, None], self.means, self.log_stds.exp()).sum(2)
        return torch.logsumexp(F.log_softmax(self.logits, dim=0) + each, dim=1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        k = torch.multinomial(self.logits.to(device).softmax(0), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, device=device)
        return self.means.to(device)[k] + self.log_stds.to(device)[k].exp() * noise

    def kl(self, mean: Tensor, log_var: Tensor, z: Tensor) -> Tensor:
        entropy = 0.5 * (1 + math.log(2 * math.pi) + log_var).sum(1)
        return (-entropy - self.log_prob(z))[:, None]

    def describe(self) -> str:
        return f"a mixture of {len(self.logits)} Gaussians"
