"""Augmentation that does not leak into the samples: the network is conditioned on its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.errors import UserError
from gencompare.rng import RandomSource


def resample(x: Tensor, grid: Tensor) -> Tensor:
    """Values of images (n, C, H, W) at the places ``grid`` (n, h, w, 2), by cubic interpolation, (n, C, h, w).

    Places are (right, down) with the outermost pixels' centres at -1 and 1; beyond these the image is mirrored in
    them. It is linear in x. Any number of derivatives with respect to x can be taken, but none with respect to the
    grid. (Of PyTorch's own ``grid_sample`` only the first derivative is there, and a penalty on D's gradient behind an
    augmentation needs the second.)
    """
    return _Resample.apply(x, grid.to(x.dtype))  # type: ignore[no-any-return]


def _read(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=True)


class _Resample(torch.autograd.Function):
    """y = A x, with A given by the grid: its derivative is the transpose A'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.size = x.shape
        return _read(x, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _Transposed.apply(gradients[0], grid, ctx.size), None


class _Transposed(torch.autograd.Function):
    """x = A' y, whose derivative is A again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, grid: Tensor, size: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        with torch.enable_grad():
            x = y.new_zeros(size).requires_grad_()
            (found,) = torch.autograd.grad(_read(x, grid), x, y)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _Resample.apply(gradients[0], grid), None, None


SCALE = ANISOTROPY = 0.2
"""Standard deviation of the logarithm to base 2 of a zoom, and of a stretch."""
SHIFT = 0.125
"""Standard deviation of a shift, as a share of the image's side."""
HUE_AXIS = 0.5
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

    def __call__(self, x: Tensor, draws: RandomSource) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) in [-1, 1] without padding -> the same, moved, and what the network is told, (n, 9)."""
        if min(x.shape[2:]) < 2:
            raise UserError(
                f"Augmentation moves images of at least 2x2 pixels, and these are {x.shape[2]}x{x.shape[3]}: use"
                " model/augmentation=null."
            )
        a = self.parameters(draws).to(x.device)
        return augment(x, a), condition_vector(a)

    def parameters(self, draws: RandomSource) -> Tensor:
        """a_0 to a_7 of each image, (n, 8)."""
        return sample_params(draws, self.p, self.x_flip)


def sample_params(draws: RandomSource, p: float | Tensor, x_flip: float | Tensor) -> Tensor:
    """a_0 to a_7 of each image, (n, 8), with the probabilities of `Augmentation` (numbers, or tensors of one)."""
    # No number of ours goes to the device by itself, for which the host would wait.
    chance, (zoom, stretch, right, down) = draws.uniform((11,)).T, draws.normal((4,)).T
    zooms, turns, stretches, shifts = chance[:4] < p
    flips = (chance[4:6] < 0.5) & torch.stack([chance[6] < x_flip, chance[7] < p])
    turn, axis = (2 * chance[8:10] - 1) * math.pi
    axis = axis * (chance[10] < HUE_AXIS)
    return torch.stack(
        [*flips.to(zoom), zoom * zooms, turn * turns, axis * stretches, stretch * stretches, right * shifts,
         down * shifts],
        dim=1,
    )  # fmt: skip


def condition_vector(a: Tensor) -> Tensor:
    """What the network is told of a_0 to a_7, (n, 8) -> (n, 9): the last column of the table of `Augmentation`."""
    x_flip, y_flip, zoom, turn, axis, stretch, right, down = a.T
    return torch.stack(
        [x_flip, y_flip, zoom, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(), right, down],
        dim=1,
    )


def augment(x: Tensor, a: Tensor) -> Tensor:
    """`warp` images in [-1, 1]: cubic interpolation overshoots at edges, and that is cut off."""
    return warp(x, a).clamp(-1, 1)


def warp(x: Tensor, a: Tensor) -> Tensor:
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
    return torch.where(_rows(a[:, 2:].any(dim=1)), resample(x, grid), x)


def _clockwise(angle: Tensor, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (n, H, W), turned clockwise as seen. (Not by a product of matrices, which autocast would round.)"""
    cos, sin = _shaped(angle.cos()), _shaped(angle.sin())
    return cos * right - sin * down, sin * right + cos * down


def _shaped(values: Tensor) -> Tensor:
    return values[:, None, None]


def _rows(choice: Tensor) -> Tensor:
    return choice[:, None, None, None]
