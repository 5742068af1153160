r"""Augmentation that does not leak into the samples: images are moved, and the network is told how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.resampled import resampled
from gencompare.errors import UserError
from gencompare.seeds import Draws

SCALE = ANISOTROPY = 0.2
"""Standard deviation of the logarithm to base 2 of a zoom, and of a stretch."""
SHIFT = 0.125
"""Standard deviation of a shift, as a share of the image's side."""
TURNED_AXIS = 0.5
"""How often the axis of a stretch is turned; else it is horizontal."""


@dataclass(frozen=True)
class Augmentation:
    r"""Six transforms of training images, each done or not by chance, and a vector that says what was done.

    Karras et al. (2022), "Elucidating the design space of diffusion-based generative models", appendix F.2 and table 6,
    with the amplitudes of the code published with it. In their order, with a_2, a_5, a_6, a_7 ~ N(0, 1) and a_3, a_4
    uniform over the circle, all nought where a transform is not done:

    | transform | done | the network is told |
    |---|---|---|
    | mirrored left to right | a_0 in {0, 1} | a_0 |
    | mirrored top to bottom | a_1 in {0, 1} | a_1 |
    | zoom by 2^(0.2 a_2) | | a_2 |
    | turned left by a_3 | | cos a_3 - 1, sin a_3 |
    | stretch by 2^(0.2 a_5) along an axis at a_4, by the inverse across it | | a_5 cos a_4, a_5 sin a_4 |
    | shift to the right by a_6 / 8 of the width and down by a_7 / 8 of the height | | a_6, a_7 |

    The vector is nought for an image that is as it was, and for no other. So a network that is told nought, as in
    sampling and evaluation, knows of such images alone.

    Args:
        p: probability with which each transform but the first is switched on. (A mirroring that is switched on is
            done half of the time.)
        x_flip: the same of mirroring left to right, which they switch on always. Data that are mirrored beforehand
            without the network being told (``data.flip``) should not be.
    """

    dim: ClassVar[int] = 9
    """Length of the vector."""

    p: float = 0.12
    x_flip: float = 1.0

    def __post_init__(self) -> None:
        for name, share in (("p", self.p), ("x_flip", self.x_flip)):
            if not 0 <= share <= 1:
                raise UserError(f"augmentation.{name}={share}: give a probability from 0 to 1.")

    def __call__(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) in [-1, 1] without padding -> the same, moved, and what the network is told, (n, 9)."""
        if min(x.shape[2:]) < 2:
            raise UserError(
                f"Augmentation moves images of at least 2x2 pixels, and these are {x.shape[2]}x{x.shape[3]}: use"
                " model/augmentation=null."
            )
        a = self.parameters(draws).to(x.device)
        return moved(x, a), told(a)

    def parameters(self, draws: Draws) -> Tensor:
        """a_0 to a_7 of each image, (n, 8)."""
        return drawn(draws, self.p, self.x_flip)


def drawn(draws: Draws, p: float | Tensor, x_flip: float | Tensor) -> Tensor:
    """a_0 to a_7 of each image, (n, 8), with the probabilities of `Augmentation` (numbers, or tensors of one)."""
    # No number of ours goes to the device by itself, for which the host would wait.
    chance, (zoom, stretch, right, down) = draws.uniform((11,)).T, draws.normal((4,)).T
    zooms, turns, stretches, shifts = chance[:4] < p
    flips = (chance[4:6] < 0.5) & torch.stack([chance[6] < x_flip, chance[7] < p])
    turn, axis = (2 * chance[8:10] - 1) * math.pi
    axis = axis * (chance[10] < TURNED_AXIS)
    return torch.stack(
        [*flips.to(zoom), zoom * zooms, turn * turns, axis * stretches, stretch * stretches, right * shifts,
         down * shifts],
        dim=1,
    )  # fmt: skip


def told(a: Tensor) -> Tensor:
    """What the network is told of a_0 to a_7, (n, 8) -> (n, 9): the last column of the table of `Augmentation`."""
    x_flip, y_flip, zoom, turn, axis, stretch, right, down = a.T
    return torch.stack(
        [x_flip, y_flip, zoom, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(), right, down],
        dim=1,
    )


def moved(x: Tensor, a: Tensor) -> Tensor:
    """`warped` images in [-1, 1]: cubic interpolation overshoots at edges, and that is cut off."""
    return warped(x, a).clamp(-1, 1)


def warped(x: Tensor, a: Tensor) -> Tensor:
    """Images (n, C, H, W) after the transforms of ``a``, (n, 8); a row of noughts leaves its image as it is, exactly.

    Linear in x. All but the mirrorings are one map, by cubic interpolation, about the centre of the image. What comes
    in from outside is the image mirrored in the centres of its outermost pixels.
    """
    height, width = x.shape[2:]
    x_flip, y_flip, zoom, turn, axis, stretch, right, down = a.T
    x = torch.where(_rows(x_flip > 0), x.flip(3), x)
    x = torch.where(_rows(y_flip > 0), x.flip(2), x)

    # Where each pixel comes from, to the right and down: the inverse of shift(stretch(turn(zoom(.)))).
    rows, columns = (torch.arange(side, device=x.device) - (side - 1) / 2 for side in (height, width))
    place = (columns - SHIFT * width * right[:, None])[:, None, :], (rows - SHIFT * height * down[:, None])[:, :, None]
    narrow = _shaped(torch.exp2(-ANISOTROPY * stretch))
    along, across = _clockwise(axis, *place)
    place = _clockwise(-axis, narrow * along, across / narrow)
    to_right, to_bottom = (_shaped(torch.exp2(-SCALE * zoom)) * offset for offset in _clockwise(turn, *place))
    # The outermost centres are at -1 and 1.
    grid = torch.stack([to_right * (2 / (width - 1)), to_bottom * (2 / (height - 1))], dim=3)
    return torch.where(_rows(a[:, 2:].any(dim=1)), resampled(x, grid), x)


def _clockwise(angle: Tensor, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (n, H, W), turned clockwise as seen. (Not by a product of matrices, which autocast would round.)"""
    cos, sin = _shaped(angle.cos()), _shaped(angle.sin())
    return cos * right - sin * down, sin * right + cos * down


def _shaped(values: Tensor) -> Tensor:
    return values[:, None, None]


def _rows(choice: Tensor) -> Tensor:
    return choice[:, None, None, None]
