"""What variational models share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def kl_from_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) in nats, element by element (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def importance_weighted_bound(log_weight: Callable[[], Tensor], samples: int) -> Tensor:
    r"""log 1/K \sum_k w_k in nats, (n,), K = ``samples``: Burda et al. 2016, "Importance weighted autoencoders",
    section 3.

    Each call of ``log_weight`` gives log w = log p(x, z) - log q(z | x) (n,) for a fresh z ~ q. The mean is at most
    log p(x), rises with K, and is the ELBO for K = 1. The sum is kept as it grows, so that memory is that of one draw.
    """
    total = log_weight()
    for _ in range(samples - 1):
        total = torch.logaddexp(total, log_weight())
    return total - math.log(samples)
