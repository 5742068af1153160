"""Images read off at other places than their pixels' centres, in a way that penalties on gradients can be trained
through."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def resampled(x: Tensor, grid: Tensor) -> Tensor:
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
