"""The evidence lower bound (ELBO): KL terms, KL warm-up, and the importance-weighted bound."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor


def kl_from_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Compute elementwise :math:`KL(N(\mu, \sigma^2) \| N(0, 1))` in nats.

    Kingma and Welling (2014), "Auto-encoding variational Bayes", appendix B, https://arxiv.org/abs/1312.6114.
    """
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def kl_warmup(model: pl.LightningModule, num_steps: int) -> float:
    """Compute the weight of the KL terms, which increases linearly to 1 over the first ``num_steps`` training steps.

    Outside training, the weight is 1. Sonderby et al. (2016), "Ladder variational autoencoders",
    https://arxiv.org/abs/1602.02282.
    """
    if not model.training or not num_steps:
        return 1.0
    # With a single optimiser, `global_step` counts training steps, and a resumed run continues the count.
    return min(1.0, (model.global_step + 1) / num_steps)


def importance_weighted_bound(log_weight: Callable[[], Tensor], num_samples: int) -> Tensor:
    r"""Compute the importance-weighted bound :math:`\log \frac{1}{K} \sum_k w_k` in nats, (n,).

    Its mean is at most :math:`\log p(x)`, increases with K, and is the ELBO for K = 1. Burda et al. (2016), "Importance
    weighted autoencoders", section 3, https://arxiv.org/abs/1509.00519. The sum is accumulated, so memory does not grow
    with K.

    Args:
        log_weight: returns :math:`\log w = \log p(x, z) - \log q(z | x)`, (n,), for a new sample z ~ q at each call.
        num_samples: K, the number of samples.
    """
    total = log_weight()
    for _ in range(num_samples - 1):
        total = torch.logaddexp(total, log_weight())
    return total - math.log(num_samples)
