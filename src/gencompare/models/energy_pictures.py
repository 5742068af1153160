"""Pictures of what an energy tells: which images are likely, and where chains go."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gencompare.contract import Cond
from gencompare.seeds import normal_like

CHAINS = 8
"""Chains that are shown over time, at most."""
MOMENTS = 10
"""Times at which they are shown, the start and the end among them."""
NOISE = 0.3
"""Standard deviation of the noise on noisy images."""


def corrupted(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Images (n, C, H, W) and what is none: noisy ones, negatives, upside down, pixels in another order, and noise."""
    pixels = torch.randperm(x.shape[2] * x.shape[3], generator=generator, device=generator.device).to(x.device)
    uniform = torch.rand(x.shape, generator=generator, device=generator.device).to(x)
    return {
        "real": x,
        "noisy": x + NOISE * normal_like(x, generator),
        "negative": -x,
        "upside_down": x.flip(2),
        "shuffled": x.flatten(2)[:, :, pixels].view_as(x),
        "uniform": uniform * 2 - 1,
    }


def by_energy(
    energy: Callable[[Tensor, Cond], Tensor],
    x: Tensor,
    cond: Cond,
    held: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """``kinds``: a row for each of `corrupted`, in its order, each from the lowest energy to the highest. ``ordered``:
    all of them as one sequence from the lowest energy to the highest, n a row, where a good model has the real images
    first."""
    kinds = [held(images) for images in corrupted(x, generator).values()]
    energies = torch.stack([energy(images, cond) for images in kinds])
    images = torch.stack(kinds)
    rows = torch.arange(len(kinds), device=x.device)[:, None]
    together = images.flatten(0, 1)[energies.flatten().argsort(stable=True)]
    return {
        "kinds": images[rows, energies.argsort(dim=1, stable=True)],
        "ordered": together.view_as(images),
    }


def over_time(states: Iterable[Tensor], steps: int, *, rows: int) -> Tensor:
    """(rows, `MOMENTS`, C, H, W) from the states before and after each of ``steps`` steps: `MOMENTS` of them, with even
    ratios from the first step to the last, since chains move fastest at the start."""
    ratios = torch.logspace(0, 1, MOMENTS - 1, base=max(steps, 1), dtype=torch.float64)
    shown = [0, *ratios.round().long().tolist()]
    found = {k: x[:rows] for k, x in enumerate(states) if k in shown}
    return torch.stack([found[k] for k in shown], dim=1)
