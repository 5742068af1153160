"""Adversarial losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor


class AdversarialLoss(ABC):
    """Base class of adversarial losses. Discriminator and generator each minimise the mean of their own loss.

    Arguments ``real`` and ``fake`` are discriminator scores :math:`D(x_i)` of real images and :math:`D(G(z_i))` of the
    same number of fakes, of shape (n,), or (n, patches) if the loss does not pair them. Losses have the same shape.
    """

    needs_real_scores: ClassVar[bool] = False
    """Whether the generator loss depends on the scores of real images."""

    @abstractmethod
    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Compute the loss :math:`L_D` of each pair of scores.

        Args:
            real: scores of real images.
            fake: scores of fakes, of the same shape.

        Returns:
            The loss, shaped like the scores.
        """

    @abstractmethod
    def generator_loss(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """Compute the loss :math:`L_G` of each fake.

        Args:
            real: scores of real images; None unless `needs_real_scores`.
            fake: scores of fakes.

        Returns:
            The loss, shaped like the scores.
        """

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        """Compute how confidently the discriminator classifies real images as real, (n,); positive if correct."""
        return real


@dataclass(frozen=True)
class NonSaturating(AdversarialLoss):
    r"""The non-saturating loss of Goodfellow et al. (2014), "Generative adversarial nets".

    :math:`L_D = -\log S(D(x)) - \log(1 - S(D(G(z))))` and :math:`L_G = -\log S(D(G(z)))` with the logistic function S
    (https://arxiv.org/abs/1406.2661).
    """

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real) + F.softplus(fake)

    def generator_loss(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return F.softplus(-fake)


@dataclass(frozen=True)
class Hinge(AdversarialLoss):
    r"""The hinge loss :math:`L_D = \max(0, 1 - D(x)) + \max(0, 1 + D(G(z)))`, :math:`L_G = -D(G(z))`.

    Lim and Ye (2017), "Geometric GAN", https://arxiv.org/abs/1705.02894; Miyato et al. (2018), "Spectral normalization
    for GANs", eq. 16 and 17, https://arxiv.org/abs/1802.05957.
    """

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator_loss(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return -fake


@dataclass(frozen=True)
class Wasserstein(AdversarialLoss):
    r"""The critic loss of Arjovsky et al. (2017), "Wasserstein GAN", algorithm 1, https://arxiv.org/abs/1701.07875.

    :math:`L_D = D(G(z)) - D(x)` and :math:`L_G = -D(G(z))`. :math:`-L_D` estimates a distance if D is 1-Lipschitz,
    which a penalty (``wgan_gp``) or spectral normalisation enforces. Adding a constant to D changes nothing, so the
    sign of a score means nothing, and `margin` is the difference of scores.
    """

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real

    def generator_loss(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return -fake

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        return real - fake


@dataclass(frozen=True)
class Relativistic(AdversarialLoss):
    r"""The relativistic pairing loss of Jolicoeur-Martineau (2019), https://arxiv.org/abs/1807.00734.

    :math:`L_D = -\log S(D(x_i) - D(G(z_i)))` and :math:`L_G = -\log S(D(G(z_i)) - D(x_i))`: Huang et al. (2024), "The
    GAN is dead; long live the GAN!", eq. 2 with :math:`f(t) = -\log(1 + e^{-t})`, https://arxiv.org/abs/2501.05441.
    Each fake is compared with its own real image, so the generator cannot lower its loss by dropping modes (section
    2.1).
    """

    needs_real_scores = True

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real)

    def generator_loss(self, real: Tensor | None, fake: Tensor) -> Tensor:
        assert real is not None
        return F.softplus(real - fake)

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        return real - fake
