"""Augmentation of all that a discriminator is shown, so that it cannot learn a small training set by heart."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.diffusion.augmentation import sample_params, warp
from gencompare.distributed import all_reduce_sum
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.elbo import CosineRamp
from gencompare.rng import RandomSource

BRIGHTNESS = 0.2
"""Standard deviation of what is added, for pixels in [-1, 1]."""
CONTRAST, SATURATION = 0.5, 1.0
"""Standard deviations of the logarithm to base 2 of the factors."""


def sample_color_params(draws: RandomSource, p: float | Tensor) -> Tensor:
    """What `color_transform` does with each image, (n, 5), each with probability ``p`` and else nought.

    Karras et al. (2020), "Training generative adversarial networks with limited data", appendix B: brightness and
    the logarithms to base 2 of contrast and saturation are normal, the hue is turned by an angle uniform over the
    circle, and the luma flip is done half of the time.
    """
    chance, (brightness, contrast, saturation) = draws.uniform((7,)).T, draws.normal((3,)).T
    done = (chance[:5] < p).to(brightness)
    values = [
        BRIGHTNESS * brightness, CONTRAST * contrast, (chance[5] < 0.5).to(brightness),
        (2 * chance[6] - 1) * math.pi, SATURATION * saturation,
    ]  # fmt: skip
    return done.T * torch.stack(values, dim=1)


def color_transform(x: Tensor, a: Tensor) -> Tensor:
    r"""L (x + b) at each pixel, for images (n, C, H, W) with C = 1 or 3 and ``a`` (n, 5); nought leaves them be.

    b is the brightness, and L = S H F c for RGB: contrast c; luma flip F = I - 2 v v' (v = (1, 1, 1) / sqrt 3), which
    makes the light dark and keeps the hue; hue H, a turn about v; saturation S = v v' + s (I - v v'). Grey images are
    multiples of v, so L is c or -c.
    """
    brightness, contrast, flip, hue, saturation = (value[:, None, None, None] for value in a.to(x.dtype).T)
    x = (x + brightness) * torch.exp2(contrast)
    if x.shape[1] == 1:
        return x * (1 - 2 * flip)
    x = x - 2 * flip * _grey(x)
    x = _turned(x, hue)
    # The factor of what is not grey: exactly 1 leaves the image exactly as it is.
    return x + (torch.exp2(saturation) - 1) * (x - _grey(x))


def _grey(x: Tensor) -> Tensor:
    """v v' x: the mean of the three colours, three times."""
    return x.mean(1, keepdim=True)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """x turned about the grey axis v by Rodrigues' formula, written so that an angle of nought changes nothing."""
    red, green, blue = x.chunk(3, dim=1)
    cross = torch.cat([blue - green, red - blue, green - red], dim=1) / math.sqrt(3)  # v x colour
    return x + angle.sin() * cross - (1 - angle.cos()) * (x - _grey(x))


CUTOUT = 0.5
"""Side of the square that a cut-out blanks, as a share of the image's."""


class DiscriminatorAugmentation(nn.Module, ABC):
    """Real images and fakes go through the same random transforms before the discriminator sees them.

    Karras et al. (2020), "Training generative adversarial networks with limited data", section 2 and appendix B. Each
    transform is done with probability ``strength`` and else skipped. As long as images are often enough shown as they
    are, fakes look like augmented real images only where the fakes themselves look like real ones: nothing leaks into
    samples (their section 2.2; with all of their transforms, strengths up to about 0.8).

    The moves are those that diffusion models are trained with here (`diffusion.augmentation`), which stem from the
    same paper: mirroring, zoom, turn, stretch, shift. Theirs has steps of 90 degrees and of whole pixels as transforms
    of their own too, and filters more finely. Padding stays black: images are moved within their frame.

    Every transform is differentiable in the image, twice where a penalty asks for it.

    Args:
        spec: of the data.
        colours: the probability of a change of colour, as a share of ``strength``; 0 leaves colours alone.
        cutout: the same of a grey square of half the side (which the paper left out of its final set).
    """

    strength: Tensor

    def __init__(self, spec: DataSpec, *, colours: float = 1.0, cutout: float = 0.0) -> None:
        super().__init__()
        for name, share in (("colours", colours), ("cutout", cutout)):
            if not 0 <= share <= 1:
                raise UserError(f"model.discriminator_augmentation.{name}={share}: give a share from 0 to 1.")
        if min(spec.shape[1:]) - 2 * spec.padding < 2:
            raise UserError(
                f"Augmentation moves images of at least 2x2 pixels, and those of data '{spec.name}' are smaller: use"
                " model/discriminator_augmentation=null."
            )
        if colours and spec.shape[0] not in (1, 3):
            raise UserError(
                f"Images of {spec.shape[0]} channels are neither grey nor RGB: use"
                " model.discriminator_augmentation.colours=0."
            )
        self.spec, self.colours, self.cutout = spec, colours, cutout
        self.register_buffer("strength", torch.zeros(()))

    def forward(self, x: Tensor, draws: RandomSource) -> Tensor:
        """Images (n, C, H, W), as a discriminator should see them."""
        real = self.spec.crop(x)
        real = warp(real, sample_params(draws, self.strength, self.strength).to(x.device))
        if self.colours:
            real = color_transform(real, sample_color_params(draws, self.colours * self.strength).to(x.device))
        if self.cutout:
            real = real * self._kept(real, draws)
        return F.pad(real, (self.spec.padding,) * 4, value=-1.0)

    def _kept(self, x: Tensor, draws: RandomSource) -> Tensor:
        """(n, 1, H, W): 0 in the square that is cut out of an image, 1 elsewhere."""
        chance = draws.uniform((3,)).to(x.device)
        down, right = (
            ((torch.arange(side, device=x.device) + 0.5) / side - chance[:, k, None]).abs() < CUTOUT / 2
            for k, side in enumerate(x.shape[2:])
        )
        done = chance[:, 2] < self.cutout * self.strength
        return 1 - (down[:, None, :, None] & right[:, None, None, :] & done[:, None, None, None]).to(x.dtype)

    @abstractmethod
    def update(self, margin: Tensor, batch: int, seen: Tensor) -> None:
        """Set ``strength`` after a step of the discriminator.

        Args:
            margin: `Adversarial.margin` of this process's rows.
            batch: rows of all processes together.
            seen: training images so far.
        """


class ADA(DiscriminatorAugmentation):
    """A strength that follows how much the discriminator overfits (section 3 of the paper).

    r_t = E[sign D(x)] over real training images is 0 for a discriminator that knows nothing and 1 for one that never
    errs (their eq. 1). Every ``interval`` steps the strength goes up where r_t is above ``target``, and down where it
    is below, by as much as would bring it from 0 to 1 within ``horizon`` images; it stays in [0, 1].

    Of a loss whose scores have no zero of their own, the sign is that of D(x) - D(G(z)) (`Adversarial.margin`).
    """

    signs: Tensor
    steps: Tensor

    def __init__(
        self, spec: DataSpec, *, target: float = 0.6, interval: int = 4, horizon: int = 500_000, **shares: float
    ) -> None:
        super().__init__(spec, **shares)
        if not -1 < target < 1 or interval < 1 or horizon < 1:
            raise UserError(
                f"model.discriminator_augmentation: target={target} must lie between -1 and 1, interval={interval} and"
                f" horizon={horizon} be at least 1."
            )
        self.target, self.interval, self.horizon = target, interval, horizon
        self.register_buffer("signs", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, margin: Tensor, batch: int, seen: Tensor) -> None:
        # Signs are whole numbers: their sum is exact, in whatever order and number of processes.
        self.signs += all_reduce_sum(margin.sign().sum())
        self.steps += 1
        images = self.interval * batch
        step = (self.signs - self.target * images).sign() * (images / self.horizon)
        due = self.steps >= self.interval  # decided on the device: nobody waits for it
        self.strength.copy_(torch.where(due, (self.strength + step).clamp(0, 1), self.strength))
        self.signs *= ~due
        self.steps *= ~due


class ScheduledAugmentation(DiscriminatorAugmentation):
    """A strength that is set beforehand, as in Huang et al. (2024), "The GAN is dead; long live the GAN!".

    Args:
        ramp: the strength as a function of the training images seen.
    """

    def __init__(self, spec: DataSpec, *, ramp: CosineRamp, **shares: float) -> None:
        super().__init__(spec, **shares)
        if not (0 <= ramp.first <= 1 and 0 <= ramp.last <= 1):
            raise UserError(
                f"model.discriminator_augmentation.ramp: {ramp.first} and {ramp.last} must be probabilities."
            )
        self.ramp = ramp
        self.strength.fill_(ramp.first)

    @torch.no_grad()
    def update(self, margin: Tensor, batch: int, seen: Tensor) -> None:
        self.strength.copy_(self.ramp(seen))
