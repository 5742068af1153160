"""Penalties on the discriminator's gradient: what keeps the game steady."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.models.elbo import CosineRamp
from gencompare.rng import RandomSource


@dataclass(frozen=True)
class DiscriminatorStep:
    """What a penalty may look at: one batch of real images and as many fakes, and what D says of them.

    Images (n, C, H, W) ask for gradients; scores (n,) hang on them. ``score`` is D as it is trained, augmentation and
    conditions included, for images that a penalty makes itself.
    """

    real: Tensor
    fake: Tensor
    real_scores: Tensor
    fake_scores: Tensor
    score: Callable[[Tensor], Tensor]
    draws: RandomSource


@dataclass(frozen=True)
class Penalty(ABC):
    """``scale * weight`` times the mean of `__call__` is added to the discriminator's loss.

    Args:
        weight: a number, or one that changes with the images seen.
    """

    weight: float | CosineRamp

    scale: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        least = min(self.weight.first, self.weight.last) if isinstance(self.weight, CosineRamp) else self.weight
        if not 0 <= least < math.inf:
            raise UserError(f"model.penalty: weight={least}: a penalty's weight must be finite and cannot be negative.")

    def factor(self, seen: Tensor) -> Tensor | float:
        """``scale * weight`` after ``seen`` images."""
        return self.scale * (self.weight(seen) if isinstance(self.weight, CosineRamp) else self.weight)

    @abstractmethod
    def __call__(self, duel: DiscriminatorStep) -> Tensor:
        """What is penalised, (n,); differentiable in D's parameters."""


class R1(Penalty):
    """weight / 2 |grad_x D(x)|^2 at real images (Mescheder et al. 2018, eq. 9)."""

    scale = 0.5

    def __call__(self, duel: DiscriminatorStep) -> Tensor:
        return squared_gradient(duel.real_scores, duel.real)


class R2(Penalty):
    """weight / 2 |grad_x D(x)|^2 at fakes (Mescheder et al. 2018, eq. 10)."""

    scale = 0.5

    def __call__(self, duel: DiscriminatorStep) -> Tensor:
        return squared_gradient(duel.fake_scores, duel.fake)


class WassersteinGP(Penalty):
    """weight (|grad_x D(x)| - 1)^2 at x = u x_real + (1 - u) x_fake, u uniform in [0, 1) for each pair.

    Gulrajani et al. 2017, "Improved training of Wasserstein GANs", eq. 3 and algorithm 1 (where weight = 10).
    """

    def __call__(self, duel: DiscriminatorStep) -> Tensor:
        u = duel.draws.uniform((1, 1, 1)).to(duel.real)
        between = (u * duel.real + (1 - u) * duel.fake).detach().requires_grad_()
        # The root has no derivative at nought, where a discriminator that is constant would be stuck with NaN.
        norm = (squared_gradient(duel.score(between), between) + 1e-12).sqrt()
        return (norm - 1).square()


def squared_gradient(scores: Tensor, x: Tensor) -> Tensor:
    """|d scores_i / d x_i|^2, (n,).

    Right as long as score i depends on image i alone, so on no statistic of the batch. Differentiable.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)
