"""Image grids of what a model has learned: latent interpolations and traversals, energies and chains."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gencompare.diffusion.editing import INTERPOLATION_STEPS, select_rows
from gencompare.generative_model import Cond
from gencompare.rng import normal_like

REACH = 3.0
"""A traversal goes so many standard deviations of the images' latents to either side of their mean."""
NUM_TRAVERSED = 10
"""Latent numbers that a traversal shows, at most."""

Decode = Callable[[Tensor, Cond], Tensor]
"""Latents (n, d) and conditions to images (n, C, H, W)."""


def interpolation(decode: Decode, z: Tensor, cond: Cond) -> Tensor:
    """One row per pair of latents, (n // 2, `INTERPOLATION_STEPS`, C, H, W): the straight line between them, with the
    conditions of the nearer end."""
    first = torch.arange(0, len(z) - 1, 2, device=z.device).repeat_interleave(INTERPOLATION_STEPS)
    share = torch.linspace(0, 1, INTERPOLATION_STEPS, device=z.device).repeat(len(z) // 2)
    between = torch.lerp(z[first], z[first + 1], share[:, None])
    nearer = torch.where(share < 0.5, first, first + 1)
    return decode(between, select_rows(cond, nearer)).unflatten(0, (-1, INTERPOLATION_STEPS))


def traversal(decode: Decode, z: Tensor, log_var: Tensor, cond: Cond) -> Tensor:
    """One row per latent dimension, for the `NUM_TRAVERSED` most informative, (rows, `INTERPOLATION_STEPS`, C, H, W):
    it takes the values of the images' latents, and the others stay as in the first latent (Higgins et al. 2017,
    "beta-VAE", figure 1).

    A number tells images apart as far as its posterior means lie apart beside the width of the posteriors: by
    log(1 + Var mu / mean sigma^2) / 2, the capacity of such a channel, whatever the prior.

    Args:
        z, log_var: means and log variances of the images' posteriors, (n, d).
    """
    spread, middle = z.var(0, correction=0), z.mean(0)
    informative = torch.log1p(spread / log_var.exp().mean(0))
    std = (spread + log_var.exp().mean(0)).sqrt()
    which = informative.argsort(descending=True)[:NUM_TRAVERSED].repeat_interleave(INTERPOLATION_STEPS)
    places = torch.linspace(-REACH, REACH, INTERPOLATION_STEPS, device=z.device).repeat(
        len(which) // INTERPOLATION_STEPS
    )
    values = middle[which] + places * std[which]
    turned = z[:1].repeat(len(which), 1).scatter(1, which[:, None], values[:, None])
    return decode(turned, select_rows(cond, torch.zeros_like(which))).unflatten(0, (-1, INTERPOLATION_STEPS))


CHAINS = 8
"""Chains that are shown over time, at most."""
MOMENTS = 10
"""Times at which they are shown, the start and the end among them."""
NOISE = 0.3
"""Standard deviation of the noise on noisy images."""


def noise_levels(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
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


def energy_ranking(
    energy: Callable[[Tensor, Cond], Tensor],
    x: Tensor,
    cond: Cond,
    held: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """``kinds``: one row per noise level of `noise_levels`, each from the lowest energy to the highest. ``ordered``:
    all of them as one sequence from the lowest energy to the highest, n a row, where a good model has the real images
    first."""
    kinds = [held(images) for images in noise_levels(x, generator).values()]
    energies = torch.stack([energy(images, cond) for images in kinds])
    images = torch.stack(kinds)
    rows = torch.arange(len(kinds), device=x.device)[:, None]
    together = images.flatten(0, 1)[energies.flatten().argsort(stable=True)]
    return {
        "kinds": images[rows, energies.argsort(dim=1, stable=True)],
        "ordered": together.view_as(images),
    }


def chains_over_time(states: Iterable[Tensor], steps: int, *, rows: int) -> Tensor:
    """(rows, `MOMENTS`, C, H, W) from the states before and after each of ``steps`` steps: `MOMENTS` of them, with even
    ratios from the first step to the last, since chains move fastest at the start."""
    ratios = torch.logspace(0, 1, MOMENTS - 1, base=max(steps, 1), dtype=torch.float64)
    shown = [0, *ratios.round().long().tolist()]
    found = {k: x[:rows] for k, x in enumerate(states) if k in shown}
    return torch.stack([found[k] for k in shown], dim=1)
