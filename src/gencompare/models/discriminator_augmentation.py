"""Augmentation of discriminator inputs, against overfitting to small training sets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from gencompare.diffusion.augmentation import sample_params, warp
from gencompare.distributed import all_reduce_sum
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.gan_penalties import CosineRamp
from gencompare.rng import RandomSource

BRIGHTNESS_STD = 0.2
"""Standard deviation of the brightness offset, for pixels in [-1, 1]."""
LOG2_CONTRAST_STD, LOG2_SATURATION_STD = 0.5, 1.0
"""Standard deviations of the base-2 logarithms of the contrast and saturation factors."""


def sample_color_params(rng: RandomSource, p: float | Tensor) -> Tensor:
    """Sample the parameters of `color_transform`, (n, 5); each transform is applied with probability ``p``.

    Karras et al. (2020), "Training generative adversarial networks with limited data", appendix B,
    https://arxiv.org/abs/2006.06676: brightness and the base-2 logarithms of contrast and saturation are normal, the
    hue angle is uniform, and the luma is flipped with probability 1/2. Parameters of transforms that are not applied
    are 0.
    """
    u, (brightness, contrast, saturation) = rng.uniform((7,)).T, rng.normal((3,)).T
    applied = (u[:5] < p).to(brightness)
    values = [
        BRIGHTNESS_STD * brightness, LOG2_CONTRAST_STD * contrast, (u[5] < 0.5).to(brightness),
        (2 * u[6] - 1) * math.pi, LOG2_SATURATION_STD * saturation,
    ]  # fmt: skip
    return applied.T * torch.stack(values, dim=1)


def color_transform(x: Tensor, params: Tensor) -> Tensor:
    r"""Transform the colours of each image: :math:`L (x + b)` at each pixel.

    b is the brightness and, for RGB, :math:`L = c S H F`: contrast c; luma flip :math:`F = I - 2 v v^T` with
    :math:`v = (1, 1, 1) / \sqrt 3`, which inverts the luma and keeps the hue; hue H, a rotation about v; saturation
    :math:`S = v v^T + s (I - v v^T)`. Greyscale images are multiples of v, so L is c or -c.

    Args:
        x: images (n, C, H, W), C = 1 or 3.
        params: brightness, log2 contrast, luma flip, hue and log2 saturation, (n, 5); zeros are the identity.
    """
    brightness, contrast, flip, hue, saturation = (value[:, None, None, None] for value in params.to(x.dtype).T)
    x = (x + brightness) * torch.exp2(contrast)
    if x.shape[1] == 1:
        return x * (1 - 2 * flip)
    x = x - 2 * flip * _luma(x)
    x = _rotate_hue(x, hue)
    # In this form, a saturation factor of 1 leaves the image exactly unchanged.
    return x + (torch.exp2(saturation) - 1) * (x - _luma(x))


def _luma(x: Tensor) -> Tensor:
    r"""Project onto the grey axis, :math:`v v^T x`, by taking the mean over channels."""
    return x.mean(1, keepdim=True)


def _rotate_hue(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate about the grey axis v by Rodrigues' formula, in a form where angle 0 is exactly the identity."""
    red, green, blue = x.chunk(3, dim=1)
    cross = torch.cat([blue - green, red - blue, green - red], dim=1) / math.sqrt(3)  # v x RGB
    return x + angle.sin() * cross - (1 - angle.cos()) * (x - _luma(x))


CUTOUT_SIZE = 0.5
"""Side length of the cutout square, as a fraction of the image size."""


class DiscriminatorAugmentation(nn.Module, ABC):
    """Base class of random transforms of real images and fakes before the discriminator.

    Karras et al. (2020), "Training generative adversarial networks with limited data", section 2 and appendix B,
    https://arxiv.org/abs/2006.06676. Each transform is applied with probability ``strength``. As long as this
    probability is well below 1, the augmentation does not leak into generated images (section 2.2; up to about 0.8 with
    all transforms of the paper).

    The geometric transforms are those of `diffusion.augmentation`: flip, scaling, rotation, anisotropic scaling and
    translation. Unlike in the paper, there are no separate rotations by 90 degrees or integer translations, and there
    is less filtering. Padding stays black: transforms act within the image. All transforms are twice differentiable in
    the image, as gradient penalties require.

    Args:
        spec: shape of the data.
        color_multiplier: probability multiplier for colour transforms; 0 disables them.
        cutout_multiplier: probability multiplier for covering a square of half the image size with grey. The final
            method of the paper does not use this transform.
    """

    strength: Tensor

    def __init__(self, spec: DataSpec, *, color_multiplier: float = 1.0, cutout_multiplier: float = 0.0) -> None:
        super().__init__()
        for name, value in (("color_multiplier", color_multiplier), ("cutout_multiplier", cutout_multiplier)):
            if not 0 <= value <= 1:
                raise UserError(f"model.discriminator_augmentation.{name}={value} must be in [0, 1].")
        if min(spec.shape[1:]) - 2 * spec.padding < 2:
            raise UserError(
                f"Augmentation needs images of at least 2x2 pixels, but those of data set '{spec.name}' are smaller:"
                " use model/discriminator_augmentation=null."
            )
        if color_multiplier and spec.shape[0] not in (1, 3):
            raise UserError(
                f"Images with {spec.shape[0]} channels are neither greyscale nor RGB: use"
                " model.discriminator_augmentation.color_multiplier=0."
            )
        self.spec, self.color_multiplier, self.cutout_multiplier = spec, color_multiplier, cutout_multiplier
        self.register_buffer("strength", torch.zeros(()))

    def forward(self, x: Tensor, rng: RandomSource) -> Tensor:
        """Augment images (n, C, H, W)."""
        real = self.spec.crop(x)
        real = warp(real, sample_params(rng, self.strength, self.strength).to(x.device))
        if self.color_multiplier:
            real = color_transform(real, sample_color_params(rng, self.color_multiplier * self.strength).to(x.device))
        if self.cutout_multiplier:
            real = real * self._cutout_mask(real, rng)
        return self.spec.pad(real)

    def _cutout_mask(self, x: Tensor, rng: RandomSource) -> Tensor:
        """Create a mask (n, 1, H, W): 0 in the cutout square of an image, 1 elsewhere."""
        u = rng.uniform((3,)).to(x.device)
        down, right = (
            ((torch.arange(side, device=x.device) + 0.5) / side - u[:, k, None]).abs() < CUTOUT_SIZE / 2
            for k, side in enumerate(x.shape[2:])
        )
        applied = u[:, 2] < self.cutout_multiplier * self.strength
        return 1 - (down[:, None, :, None] & right[:, None, None, :] & applied[:, None, None, None]).to(x.dtype)

    @abstractmethod
    def update(self, margin: Tensor, batch_size: int, seen: Tensor) -> None:
        """Set ``strength`` after a discriminator step.

        Args:
            margin: `AdversarialLoss.margin` of this process's images.
            batch_size: size of the global batch.
            seen: number of training images so far.
        """


class ADA(DiscriminatorAugmentation):
    r"""Adaptive discriminator augmentation (Karras et al. 2020, section 3, https://arxiv.org/abs/2006.06676).

    The overfitting heuristic :math:`r_t = E[\mathrm{sign}\, D(x)]` over real training images (eq. 1) is 0 for an
    uninformed discriminator and 1 for one that is always right. Every ``interval`` steps, the strength is raised if
    :math:`r_t` is above ``target`` and lowered if it is below, at a rate of 1 per ``adjustment_images`` images, and
    clamped to [0, 1]. For losses whose scores have no natural zero, the sign is that of D(x) - D(G(z)); see
    `AdversarialLoss.margin`.

    Args:
        spec: shape of the data.
        target: target of :math:`r_t`.
        interval: discriminator steps between adjustments.
        adjustment_images: number of images over which the strength can change from 0 to 1.
        kwargs: see `DiscriminatorAugmentation`.
    """

    signs: Tensor
    steps: Tensor

    def __init__(
        self,
        spec: DataSpec,
        *,
        target: float = 0.6,
        interval: int = 4,
        adjustment_images: int = 500_000,
        **kwargs: float,
    ) -> None:
        super().__init__(spec, **kwargs)
        if not -1 < target < 1 or interval < 1 or adjustment_images < 1:
            raise UserError(
                f"model.discriminator_augmentation: target={target} must be between -1 and 1, and"
                f" interval={interval} and adjustment_images={adjustment_images} at least 1."
            )
        self.target, self.interval, self.adjustment_images = target, interval, adjustment_images
        self.register_buffer("signs", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, margin: Tensor, batch_size: int, seen: Tensor) -> None:
        # A sum of integers is exact, so it does not depend on the number of processes.
        self.signs += all_reduce_sum(margin.sign().sum())
        self.steps += 1
        images = self.interval * batch_size
        step = (self.signs - self.target * images).sign() * (images / self.adjustment_images)
        due = self.steps >= self.interval  # on the device, to avoid a synchronisation
        self.strength.copy_(torch.where(due, (self.strength + step).clamp(0, 1), self.strength))
        self.signs *= ~due
        self.steps *= ~due


class ScheduledAugmentation(DiscriminatorAugmentation):
    """Augmentation with a scheduled strength.

    Huang et al. (2024), "The GAN is dead; long live the GAN!", https://arxiv.org/abs/2501.05441.

    Args:
        spec: shape of the data.
        ramp: strength as a function of the number of training images.
        kwargs: see `DiscriminatorAugmentation`.
    """

    def __init__(self, spec: DataSpec, *, ramp: CosineRamp, **kwargs: float) -> None:
        super().__init__(spec, **kwargs)
        if not (0 <= ramp.start <= 1 and 0 <= ramp.end <= 1):
            raise UserError(
                f"model.discriminator_augmentation.ramp: start={ramp.start} and end={ramp.end} must be in [0, 1]."
            )
        self.ramp = ramp
        self.strength.fill_(ramp.start)

    @torch.no_grad()
    def update(self, margin: Tensor, batch_size: int, seen: Tensor) -> None:
        self.strength.copy_(self.ramp(seen))
