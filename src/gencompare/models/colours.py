"""Random changes of colour and brightness, for what a discriminator is shown."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gencompare.seeds import Draws

BRIGHTNESS = 0.2
"""Standard deviation of what is added, for pixels in [-1, 1]."""
CONTRAST, SATURATION = 0.5, 1.0
"""Standard deviations of the logarithm to base 2 of the factors."""


def drawn_colours(draws: Draws, p: float | Tensor) -> Tensor:
    """What `recoloured` does with each image, (n, 5), each with probability ``p`` and else nought.

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


def recoloured(x: Tensor, a: Tensor) -> Tensor:
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
