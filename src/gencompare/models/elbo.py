"""The evidence lower bound: its terms, its warm-up, and the importance-weighted bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor

from gencompare.errors import UserError


def kl_from_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) in nats, element by element (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def kl_warmup(model: pl.LightningModule, steps: int) -> float:
    """The share of their weight that divergences have at the step in progress: it rises evenly to 1 over the first
    ``steps`` steps of training (Sonderby et al. 2016, "Ladder variational autoencoders"), and is 1 outside of it."""
    if not model.training or not steps:
        return 1.0
    # With one optimiser Lightning's count is that of training steps, and a resumed run goes on with it.
    return min(1.0, (model.global_step + 1) / steps)


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


@dataclass(frozen=True)
class CosineRamp:
    """first + (last - first) (1 - cos(pi min(1, s / images))) / 2 after s images; ``last`` from then on.

    Args:
        images: training images over which the number changes.
    """

    first: float
    last: float
    images: int

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"A ramp over images={self.images} has no length: give at least 1.")

    def __call__(self, seen: Tensor) -> Tensor:
        """The number after ``seen`` images (a tensor, so that no device is waited for)."""
        share = (seen / self.images).clamp(max=1)
        return self.first + (self.last - self.first) * (1 - (math.pi * share).cos()) / 2
