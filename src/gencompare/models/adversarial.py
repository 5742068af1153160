"""What a generator and a discriminator play for: losses on scores (logits that an image is real), image by image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Adversarial(ABC):
    """A pair of losses. Scores are (n,), losses too; each player minimises the mean of its own."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor: ...

    @abstractmethod
    def generator(self, fake: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class NonSaturating(Adversarial):
    """-log S(real) - log(1 - S(fake)), against -log S(fake), S the logistic function (Goodfellow et al. 2014)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real) + F.softplus(fake)

    def generator(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake)


@dataclass(frozen=True)
class Hinge(Adversarial):
    """max(0, 1 - real) + max(0, 1 + fake), against -fake (Lim and Ye 2017; Miyato et al. 2018, eq. 16 and 17)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator(self, fake: Tensor) -> Tensor:
        return -fake


def squared_gradient(scores: Tensor, x: Tensor) -> Tensor:
    """|d scores_i / d x_i|^2, (n,): with x real, the R1 penalty (Mescheder et al. 2018, eq. 9, without gamma / 2).

    Right as long as score i depends on image i alone, so on no statistic of the batch. Differentiable.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)
