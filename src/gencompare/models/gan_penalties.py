"""Penalties on the discriminator gradient, which stabilise GAN training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.rng import RandomSource


@dataclass(frozen=True)
class CosineRamp:
    r"""A value that changes with the number of training images along a cosine.

    .. math:: start + (end - start) (1 - \cos(\pi \min(1, s / N))) / 2

    after s images, where N = ``num_images``.

    Args:
        start: value at the first image.
        end: value from ``num_images`` images on.
        num_images: number of training images over which the value changes.
    """

    start: float
    end: float
    num_images: int

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UserError(f"CosineRamp: num_images={self.num_images} must be at least 1.")

    def __call__(self, seen: Tensor) -> Tensor:
        """Compute the value after ``seen`` images, as a scalar tensor to avoid a device synchronisation."""
        fraction = (seen / self.num_images).clamp(max=1)
        return self.start + (self.end - self.start) * (1 - (math.pi * fraction).cos()) / 2


@dataclass(frozen=True)
class DiscriminatorStep:
    """The input of a `Penalty`: real images, the same number of fakes, and their discriminator scores."""

    real: Tensor
    """Real images (n, C, H, W), which require gradients."""
    fake: Tensor
    """Fakes (n, C, H, W), which require gradients."""
    real_scores: Tensor
    """Scores D(real), (n,), differentiable with respect to ``real``."""
    fake_scores: Tensor
    """Scores D(fake), (n,), differentiable with respect to ``fake``."""
    score: Callable[[Tensor], Tensor]
    """D with augmentation and conditions, for other images (n, C, H, W)."""
    rng: RandomSource


@dataclass(frozen=True)
class Penalty(ABC):
    """A term ``scale * weight * mean(penalty)`` of the discriminator loss.

    Args:
        weight: a constant, or a function of the number of training images.
    """

    weight: float | CosineRamp

    scale: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        smallest = min(self.weight.start, self.weight.end) if isinstance(self.weight, CosineRamp) else self.weight
        if not 0 <= smallest < math.inf:
            raise UserError(f"model.penalty: weight={smallest} must be finite and at least 0.")

    def factor(self, seen: Tensor) -> Tensor | float:
        """Compute ``scale * weight`` after ``seen`` training images."""
        return self.scale * (self.weight(seen) if isinstance(self.weight, CosineRamp) else self.weight)

    @abstractmethod
    def __call__(self, step: DiscriminatorStep) -> Tensor:
        """Compute the penalty per sample, (n,), without ``scale`` and ``weight``, differentiable in D's parameters."""


class R1(Penalty):
    r"""Gradient penalty at real images, :math:`\frac{w}{2} |\nabla_x D(x)|^2`.

    Mescheder et al. (2018), "Which training methods for GANs do actually converge?", eq. 9,
    https://arxiv.org/abs/1801.04406.
    """

    scale = 0.5

    def __call__(self, step: DiscriminatorStep) -> Tensor:
        return squared_gradient(step.real_scores, step.real)


class R2(Penalty):
    r"""Gradient penalty at fakes, :math:`\frac{w}{2} |\nabla_x D(G(z))|^2`.

    Mescheder et al. (2018), "Which training methods for GANs do actually converge?", eq. 10,
    https://arxiv.org/abs/1801.04406.
    """

    scale = 0.5

    def __call__(self, step: DiscriminatorStep) -> Tensor:
        return squared_gradient(step.fake_scores, step.fake)


class WassersteinGP(Penalty):
    r"""Gradient penalty of WGAN-GP, :math:`w (|\nabla_x D(\hat x)| - 1)^2`.

    The gradient is taken at :math:`\hat x = u x + (1 - u) G(z)`, with u uniform in [0, 1) for each pair. Gulrajani et
    al. (2017), "Improved training of Wasserstein GANs", eq. 3 and algorithm 1 (w = 10),
    https://arxiv.org/abs/1704.00028.
    """

    def __call__(self, step: DiscriminatorStep) -> Tensor:
        u = step.rng.uniform((1, 1, 1)).to(step.real)
        interpolated = (u * step.real + (1 - u) * step.fake).detach().requires_grad_()
        # The derivative of the root is infinite at 0, so a constant discriminator would get NaN gradients.
        norm = (squared_gradient(step.score(interpolated), interpolated) + 1e-12).sqrt()
        return (norm - 1).square()


def squared_gradient(scores: Tensor, x: Tensor) -> Tensor:
    r"""Compute squared gradient norms :math:`|\partial s_i / \partial x_i|^2`, (n,), differentiable.

    Score i must depend on image i alone, so D must not use batch statistics.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)
