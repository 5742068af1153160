"""From what a model draws to what would lie on a disk: whole grey levels as uint8, without the padding."""

from __future__ import annotations

import torch
from torch import Tensor

from gencompare.contract import DataSpec
from gencompare.errors import UserError

OVERSHOOT = 0.05
"""Values beyond [-1, 1] by no more than this (rounding of other programs) are clamped; further out is refused."""


def to_uint8(x: Tensor, spec: DataSpec) -> Tensor:
    """Images in [-1, 1], (n, C, H, W), as uint8 0 to 255 on the CPU, padding cropped.

    Values are rounded to the data's own ``L = num_levels`` levels first (256 for continuous data), then spread over
    0 to 255: level = round((x + 1) / 2 (L - 1)), byte = round(255 level / (L - 1)). Digits have 17 levels, and an
    image of that set can hold no others.

    Raises `UserError` for NaN, infinite values, and values further than `OVERSHOOT` outside [-1, 1].
    """
    x = unpadded(x, spec)
    check_finite(x)
    most = float(x.abs().max()) if x.numel() else 0.0
    if most > 1 + OVERSHOOT:
        raise UserError(f"Samples must lie in [-1, 1], and these reach {most:.4g}: scale them, or give uint8 images.")
    steps = (spec.num_levels or 256) - 1
    level = x.float().clamp(-1, 1).add(1).mul(steps / 2).round()
    return spread(level, steps)


def as_stored(x: Tensor, spec: DataSpec) -> Tensor:
    """What an extractor is given: `to_uint8` for images, float32 as it is for continuous data (``num_levels`` None).

    uint8 images (0 to 255, as they are on a disk) are brought to the data's own levels too.
    """
    if spec.num_levels is None:
        x = unpadded(x, spec).float()
        check_finite(x)
        return x.cpu()
    if x.dtype == torch.uint8:
        steps = spec.num_levels - 1
        return spread(unpadded(x, spec).float().mul(steps / 255).round(), steps)
    if not x.is_floating_point():
        raise UserError(f"Images must be uint8 in 0 to 255 or float in [-1, 1], not {x.dtype}.")
    return to_uint8(x, spec)


def stored_split(images: Tensor, spec: DataSpec) -> Tensor:
    """The images of a split (levels 0 to ``num_levels`` - 1, unpadded) in the same form."""
    return images if spec.num_levels is None else spread(images.float(), spec.num_levels - 1)


def levels_of(images: Tensor, spec: DataSpec) -> Tensor:
    """The way back from `spread`: uint8 images of 0 to 255 to the levels of a split."""
    assert spec.num_levels is not None
    return images.float().mul((spec.num_levels - 1) / 255).round()


def spread(level: Tensor, steps: int) -> Tensor:
    """Levels 0 to ``steps`` as uint8 0 to 255 on the CPU."""
    return level.mul(255 / steps).round().to(torch.uint8).cpu()


def unpadded(x: Tensor, spec: DataSpec) -> Tensor:
    """Images of ``spec.shape`` without their padding; images that have none already pass as they are."""
    channels, height, width = spec.shape
    real = (channels, height - 2 * spec.padding, width - 2 * spec.padding)
    shape = tuple(x.shape[1:])
    if x.ndim == 4 and shape == real:
        return x
    if x.ndim == 4 and shape == tuple(spec.shape):
        return spec.crop(x)
    raise UserError(f"Data '{spec.name}' has images of shape {real} (channels, height, width), not {shape}.")


def check_finite(x: Tensor) -> None:
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(x)} samples hold NaN or infinite values: the model has diverged. "
            "Evaluate an earlier checkpoint (checkpoint=best), or train with a lower learning rate."
        )
