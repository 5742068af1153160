"""Non-leaking augmentation: the network is conditioned on the augmentation parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.errors import UserError
from gencompare.rng import RandomSource

LOG2_SCALE_STD = 0.2
"""Standard deviation of the base-2 logarithm of the isotropic scale."""
LOG2_STRETCH_STD = 0.2
"""Standard deviation of the base-2 logarithm of the anisotropic stretch."""
SHIFT_STD = 0.125
"""Standard deviation of a translation, as a fraction of the image width or height."""
ROTATED_AXIS_PROB = 0.5
"""Probability that the stretch axis is rotated; otherwise it is horizontal."""


@dataclass(frozen=True)
class Augmentation:
    r"""EDM's augmentation: six random transforms of training images, and a vector of their parameters for the network.

    Karras et al. (2022), "Elucidating the design space of diffusion-based generative models", appendix F.2 and table 6,
    https://arxiv.org/abs/2206.00364, with the amplitudes of the published code. The transforms are applied in this
    order, with a_2, a_5, a_6, a_7 ~ N(0, 1) and a_3 uniform over the circle; a_4 is uniform over the circle or, with
    probability 1/2, 0. The parameters of a disabled transform are 0.

    =======================================================================  =============  ========================
    transform                                                                parameters     conditioning vector
    =======================================================================  =============  ========================
    horizontal flip                                                          a_0 in {0, 1}  a_0
    vertical flip                                                            a_1 in {0, 1}  a_1
    scaling by 2^(0.2 a_2)                                                   a_2            a_2
    counterclockwise rotation by a_3                                         a_3            cos a_3 - 1, sin a_3
    stretch by 2^(0.2 a_5) at angle a_4, by the inverse perpendicular to it  a_4, a_5       a_5 cos a_4, a_5 sin a_4
    translation by a_6 / 8 of the width right, a_7 / 8 of the height down    a_6, a_7       a_6, a_7
    =======================================================================  =============  ========================

    The vector is 0 if and only if the image is unchanged. A network that receives 0, as in sampling and evaluation,
    therefore models only unchanged images.

    Args:
        p: probability of enabling each transform except the horizontal flip. (An enabled flip is applied half of the
            time.)
        x_flip: the same for the horizontal flip; the published setting is 1. Set it to 0 if the data are already
            flipped without conditioning (``data.random_flip``).
    """

    dim: ClassVar[int] = 9
    """Length of the conditioning vector."""

    p: float = 0.12
    x_flip: float = 1.0

    def __post_init__(self) -> None:
        for name, probability in (("p", self.p), ("x_flip", self.x_flip)):
            if not 0 <= probability <= 1:
                raise UserError(f"augmentation.{name}={probability} must be in [0, 1].")

    def __call__(self, x: Tensor, rng: RandomSource) -> tuple[Tensor, Tensor]:
        """Augment unpadded images (n, C, H, W) in [-1, 1].

        Returns:
            The transformed images, and the conditioning vectors, (n, 9).
        """
        if min(x.shape[2:]) < 2:
            raise UserError(
                f"Augmentation needs images of at least 2x2 pixels, but these are {x.shape[2]}x{x.shape[3]}: use"
                " model/augmentation=null."
            )
        params = self.sample_params(rng).to(x.device)
        return augment(x, params), condition_vector(params)

    def sample_params(self, rng: RandomSource) -> Tensor:
        """Sample a_0 to a_7 for each image, (n, 8)."""
        return sample_params(rng, self.p, self.x_flip)


def sample_params(rng: RandomSource, p: float | Tensor, x_flip: float | Tensor) -> Tensor:
    """Sample a_0 to a_7 for each image, (n, 8), with probabilities as in `Augmentation` (numbers or scalar tensors)."""
    # Avoid copying host values to the device, which would synchronise.
    uniform, (scale, stretch, right, down) = rng.uniform((11,)).T, rng.normal((4,)).T
    use_scale, use_rotation, use_stretch, use_shift = uniform[:4] < p
    flips = (uniform[4:6] < 0.5) & torch.stack([uniform[6] < x_flip, uniform[7] < p])
    angle, axis = (2 * uniform[8:10] - 1) * math.pi
    axis = axis * (uniform[10] < ROTATED_AXIS_PROB)
    return torch.stack(
        [*flips.to(scale), scale * use_scale, angle * use_rotation, axis * use_stretch, stretch * use_stretch,
         right * use_shift, down * use_shift],
        dim=1,
    )  # fmt: skip


def condition_vector(params: Tensor) -> Tensor:
    """Compute conditioning vectors (n, 9) from parameters (n, 8), as in the last column of the `Augmentation` table."""
    x_flip, y_flip, scale, angle, axis, stretch, right, down = params.T
    return torch.stack(
        [x_flip, y_flip, scale, angle.cos() - 1, angle.sin(), stretch * axis.cos(), stretch * axis.sin(), right, down],
        dim=1,
    )


def augment(x: Tensor, params: Tensor) -> Tensor:
    """Apply `warp` to images in [-1, 1], and clamp the result because cubic interpolation overshoots at edges."""
    return warp(x, params).clamp(-1, 1)


def warp(x: Tensor, params: Tensor) -> Tensor:
    """Apply the transforms given by ``params`` (n, 8) to images (n, C, H, W).

    An image whose parameters are all 0 is returned exactly unchanged. The result is linear in x. All transforms except
    the flips are one affine map about the image centre, with cubic interpolation; outside the image, pixels are
    reflected about the centres of the outermost pixels.
    """
    height, width = x.shape[2:]
    x_flip, y_flip, scale, angle, axis, stretch, right, down = params.T
    x = torch.where(_per_image(x_flip > 0), x.flip(3), x)
    x = torch.where(_per_image(y_flip > 0), x.flip(2), x)

    # Source position of each pixel relative to the centre, by the inverse of shift(stretch(rotate(scale(.)))).
    rows, columns = (torch.arange(side, device=x.device) - (side - 1) / 2 for side in (height, width))
    position = (
        (columns - SHIFT_STD * width * right[:, None])[:, None, :],
        (rows - SHIFT_STD * height * down[:, None])[:, :, None],
    )
    shrink = _per_pixel(torch.exp2(-LOG2_STRETCH_STD * stretch))
    along, across = _rotate_clockwise(axis, *position)
    position = _rotate_clockwise(-axis, shrink * along, across / shrink)
    zoom = _per_pixel(torch.exp2(-LOG2_SCALE_STD * scale))
    source_x, source_y = (zoom * offset for offset in _rotate_clockwise(angle, *position))
    # In the coordinates of `resample`, the centres of the outermost pixels are at -1 and 1.
    grid = torch.stack([source_x * (2 / (width - 1)), source_y * (2 / (height - 1))], dim=3)
    return torch.where(_per_image(params[:, 2:].any(dim=1)), resample(x, grid), x)


def _rotate_clockwise(angle: Tensor, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate offsets (n, H, W) clockwise. (This avoids a matrix product, which autocast would compute in 16 bits.)"""
    cos, sin = _per_pixel(angle.cos()), _per_pixel(angle.sin())
    return cos * right - sin * down, sin * right + cos * down


def _per_pixel(values: Tensor) -> Tensor:
    return values[:, None, None]


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def resample(x: Tensor, grid: Tensor) -> Tensor:
    """Sample images (n, C, H, W) at the positions ``grid`` (n, h, w, 2) by cubic interpolation, giving (n, C, h, w).

    Positions are (right, down), with the centres of the outermost pixels at -1 and 1; beyond them the image is
    reflected. The result is linear in x. Derivatives of any order with respect to x are supported, but none with
    respect to the grid. (``F.grid_sample`` supports only first derivatives, but a gradient penalty on augmented
    discriminator inputs needs second derivatives.)
    """
    return _Resample.apply(x, grid.to(x.dtype))  # type: ignore[no-any-return]


def _grid_sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=True)


class _Resample(torch.autograd.Function):
    """y = A x, where the matrix A depends on the grid; the backward pass multiplies by the transpose A'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.size = x.shape
        return _grid_sample(x, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _ResampleTransposed.apply(gradients[0], grid, ctx.size), None


class _ResampleTransposed(torch.autograd.Function):
    """x = A' y; the backward pass multiplies by A."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, grid: Tensor, size: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        with torch.enable_grad():
            x = y.new_zeros(size).requires_grad_()
            (product,) = torch.autograd.grad(_grid_sample(x, grid), x, y)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _Resample.apply(gradients[0], grid), None, None
