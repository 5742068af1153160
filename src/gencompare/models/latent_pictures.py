"""Pictures of a latent space: images and what they are rebuilt as, ways between them, and single numbers turned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gencompare.contract import Cond
from gencompare.diffusion.exploring import BETWEEN, rows

REACH = 3.0
"""A traversal goes so many standard deviations of the images' latents to either side of their mean."""
TURNED = 10
"""Latent numbers that a traversal shows, at most."""

Decode = Callable[[Tensor, Cond], Tensor]
"""Latents (n, d) and conditions to images (n, C, H, W)."""


def interpolation(decode: Decode, z: Tensor, cond: Cond) -> Tensor:
    """A row for each pair of latents, (n // 2, `BETWEEN`, C, H, W): the straight line between them, with the conditions
    of the nearer end."""
    first = torch.arange(0, len(z) - 1, 2, device=z.device).repeat_interleave(BETWEEN)
    share = torch.linspace(0, 1, BETWEEN, device=z.device).repeat(len(z) // 2)
    between = torch.lerp(z[first], z[first + 1], share[:, None])
    nearer = torch.where(share < 0.5, first, first + 1)
    return decode(between, rows(cond, nearer)).unflatten(0, (-1, BETWEEN))


def traversal(decode: Decode, z: Tensor, log_var: Tensor, cond: Cond) -> Tensor:
    """A row for each of the `TURNED` most informative latent numbers, (rows, `BETWEEN`, C, H, W): it goes through what
    the images' latents take, and the others stay as in the first latent (Higgins et al. 2017, "beta-VAE", figure 1).

    A number tells images apart as far as its posterior means lie apart beside the width of the posteriors: by
    log(1 + Var mu / mean sigma^2) / 2, the capacity of such a channel, whatever the prior.

    Args:
        z, log_var: means and log variances of the images' posteriors, (n, d).
    """
    spread, middle = z.var(0, correction=0), z.mean(0)
    informative = torch.log1p(spread / log_var.exp().mean(0))
    std = (spread + log_var.exp().mean(0)).sqrt()
    which = informative.argsort(descending=True)[:TURNED].repeat_interleave(BETWEEN)
    places = torch.linspace(-REACH, REACH, BETWEEN, device=z.device).repeat(len(which) // BETWEEN)
    values = middle[which] + places * std[which]
    turned = z[:1].repeat(len(which), 1).scatter(1, which[:, None], values[:, None])
    return decode(turned, rows(cond, torch.zeros_like(which))).unflatten(0, (-1, BETWEEN))
