"""Which noise goes with which image of a training batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Coupling(ABC):
    """Pairs the images of a batch with its noise."""

    @abstractmethod
    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The rows of ``eps`` (n, C, H, W) in the order in which they go with ``x0`` (n, C, H, W)."""


@dataclass(frozen=True)
class Independent(Coupling):
    """Any noise with any image: q(x_0) N(eps; 0, I)."""

    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps


@dataclass(frozen=True)
class MinibatchOT(Coupling):
    r"""The pairing of least sum ||x_0 - eps||^2 within the batch, found exactly.

    Tong et al. (2023), "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport",
    section 3.2. Paths from noise to image then cross less, and few sampling steps go further. The score of such a model
    is no longer that of p(x_t): sample it with deterministic samplers. Each process pairs its own rows, so what is
    trained depends on the number of processes. O(n^3) on the CPU: some 10 ms for 256 images.
    """

    @torch.no_grad()
    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        # ||x_0||^2 and ||eps||^2 add up to the same whatever the pairing.
        cost = -(x0.flatten(1).double() @ eps.flatten(1).double().T)
        _, column = linear_sum_assignment(cost.cpu().numpy())
        return eps[torch.as_tensor(column, device=eps.device)]
