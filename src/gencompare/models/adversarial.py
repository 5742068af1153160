"""What a generator and a discriminator play for: losses on scores, pair by pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor


class Adversarial(ABC):
    """A pair of losses. Scores are (n,), or (n, patches) where images are not paired, and losses too; each player
    minimises the mean of its own.

    ``real`` and ``fake`` are the discriminator's scores D(x_i) of real images and D(G(z_i)) of as many fakes.
    """

    pairs: ClassVar[bool] = False
    """Whether the generator's loss looks at the real images' scores too, which are then worked out for it."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor: ...

    @abstractmethod
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """``real`` is None unless ``pairs``."""

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        """By how much the discriminator takes real images for real, (n,): its sign says whether it is right."""
        return real


@dataclass(frozen=True)
class NonSaturating(Adversarial):
    """-log S(real) - log(1 - S(fake)), against -log S(fake), S the logistic function (Goodfellow et al. 2014)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real) + F.softplus(fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return F.softplus(-fake)


@dataclass(frozen=True)
class Hinge(Adversarial):
    """max(0, 1 - real) + max(0, 1 + fake), against -fake (Lim and Ye 2017; Miyato et al. 2018, eq. 16 and 17)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return -fake


@dataclass(frozen=True)
class Wasserstein(Adversarial):
    """fake - real, against -fake (Arjovsky et al. 2017, "Wasserstein GAN", algorithm 1).

    It estimates a distance as long as D is 1-Lipschitz, which a penalty (``wgan_gp``) or spectral norm sees to. A
    constant added to D changes nothing, so its sign alone says nothing: `margin` is the difference.
    """

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return -fake

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        return real - fake


@dataclass(frozen=True)
class Relativistic(Adversarial):
    """-log S(real - fake), against -log S(fake - real): is x_i more real than its partner G(z_i)?

    The relativistic pairing loss of Jolicoeur-Martineau (2019), with f(t) = -log(1 + e^-t) as in Huang et al. (2024),
    "The GAN is dead; long live the GAN!", eq. 2. No fake can win by being far from all real ones, as each is judged
    beside its partner, which is what keeps modes from being dropped (their section 2.1).
    """

    pairs = True

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        assert real is not None
        return F.softplus(real - fake)

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        return real - fake
