"""Image grids for visualisation: latent interpolations and traversals, completions, energy rankings and chains."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gencompare.diffusion.editing import NUM_INTERPOLATION_IMAGES, select_rows
from gencompare.generative_model import Cond
from gencompare.rng import normal_like, uniform_like

TRAVERSAL_RANGE = 3.0
"""Range of a traversal on either side of the mean, in standard deviations of the images' latents."""
MAX_TRAVERSED_DIMS = 10
"""Maximum number of latent dimensions in a traversal."""

Decode = Callable[[Tensor, Cond], Tensor]
"""Maps latents (n, d) and conditions to images (n, C, H, W)."""


def interpolation(decode: Decode, z: Tensor, cond: Cond) -> Tensor:
    """Interpolate linearly between pairs of latents, with the conditions of the nearer end.

    Returns:
        One row per pair, (n // 2, `NUM_INTERPOLATION_IMAGES`, C, H, W).
    """
    first = torch.arange(0, len(z) - 1, 2, device=z.device).repeat_interleave(NUM_INTERPOLATION_IMAGES)
    weight = torch.linspace(0, 1, NUM_INTERPOLATION_IMAGES, device=z.device, dtype=z.dtype).repeat(len(z) // 2)
    interpolated = torch.lerp(z[first], z[first + 1], weight[:, None])
    nearer = torch.where(weight < 0.5, first, first + 1)
    return decode(interpolated, select_rows(cond, nearer)).unflatten(0, (-1, NUM_INTERPOLATION_IMAGES))


def traversal(decode: Decode, z: Tensor, log_var: Tensor, cond: Cond) -> Tensor:
    r"""Vary one latent dimension at a time over its range; the other dimensions stay as in the first latent.

    Higgins et al. (2017), "beta-VAE", figure 1. The dimensions shown are the `MAX_TRAVERSED_DIMS` with the largest
    :math:`\frac{1}{2} \log(1 + \mathrm{Var} \mu / \overline{\sigma^2})`, the capacity of a Gaussian channel, which does
    not depend on the prior.

    Args:
        decode: the decoder.
        z: posterior means of the images, (n, d).
        log_var: posterior log variances of the images, (n, d).
        cond: conditions of the images.

    Returns:
        One row per dimension, most informative first, (rows, `NUM_INTERPOLATION_IMAGES`, C, H, W).
    """
    variance, mean = z.var(0, correction=0), z.mean(0)
    posterior_variance = log_var.exp().mean(0)
    information = torch.log1p(variance / posterior_variance)
    std = (variance + posterior_variance).sqrt()
    dims = information.argsort(descending=True)[:MAX_TRAVERSED_DIMS].repeat_interleave(NUM_INTERPOLATION_IMAGES)
    ends, steps = (-TRAVERSAL_RANGE, TRAVERSAL_RANGE), NUM_INTERPOLATION_IMAGES
    offsets = torch.linspace(*ends, steps, device=z.device, dtype=z.dtype)
    values = mean[dims] + offsets.repeat(len(dims) // steps) * std[dims]
    traversed = z[:1].repeat(len(dims), 1).scatter(1, dims[:, None], values[:, None])
    return decode(traversed, select_rows(cond, torch.zeros_like(dims))).unflatten(0, (-1, NUM_INTERPOLATION_IMAGES))


NUM_COMPLETIONS = 6
"""Number of completions of an image."""


def completions(complete: Decode, x: Tensor, cond: Cond, first_row: int) -> Tensor:
    """Complete images several times.

    Args:
        complete: maps images (n, C, H, W), of which it uses the rows before ``first_row``, and conditions to completed
            images.
        x: images (n, C, H, W).
        cond: conditions of the images.
        first_row: the first missing row.

    Returns:
        One row per image: the image, the part that is given, and `NUM_COMPLETIONS` completions, (n, columns, C, H, W).
    """
    given = x.clone()
    given[:, :, first_row:] = -1
    each = torch.arange(len(x), device=x.device).repeat_interleave(NUM_COMPLETIONS)
    completed = complete(x[each], select_rows(cond, each)).unflatten(0, (-1, NUM_COMPLETIONS))
    return torch.cat([torch.stack([x, given], dim=1), completed.to(x)], dim=1)


NUM_CHAINS = 8
"""Maximum number of chains shown over time."""
NUM_FRAMES = 10
"""Number of states shown per chain, including the first and the last."""
NOISE_STD = 0.3
"""Standard deviation of the Gaussian noise in the noisy images of `corruptions`."""


def corruptions(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images (n, C, H, W) and corrupted versions: noisy, negative, upside down, shuffled pixels, and uniform
    noise."""
    pixels = torch.randperm(x.shape[2] * x.shape[3], generator=generator, device=generator.device).to(x.device)
    uniform = uniform_like(x, generator)
    return {
        "real": x,
        "noisy": x + NOISE_STD * normal_like(x, generator),
        "negative": -x,
        "upside_down": x.flip(2),
        "shuffled": x.flatten(2)[:, :, pixels].view_as(x),
        "uniform": uniform * 2 - 1,
    }


def energy_ranking(
    energy: Callable[[Tensor, Cond], Tensor],
    x: Tensor,
    cond: Cond,
    project: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Order images and their `corruptions` by energy, lowest first.

    Args:
        energy: (images, cond) -> energies (n,).
        x: images (n, C, H, W).
        cond: conditions of the images.
        project: applied to all images before their energies are computed.
        generator: source of random numbers.

    Returns:
        ``kinds``: one row per kind of image, each ordered by energy. ``ordered``: all images ordered together, n per
        row; a good model ranks the real images first.
    """
    kinds = [project(images) for images in corruptions(x, generator).values()]
    energies = torch.stack([energy(images, cond) for images in kinds])
    images = torch.stack(kinds)
    rows = torch.arange(len(kinds), device=x.device)[:, None]
    ordered = images.flatten(0, 1)[energies.flatten().argsort(stable=True)]
    return {
        "kinds": images[rows, energies.argsort(dim=1, stable=True)],
        "ordered": ordered.view_as(images),
    }


def chains_over_time(states: Iterable[Tensor], num_steps: int, *, rows: int) -> Tensor:
    """Select `NUM_FRAMES` states of chains, evenly spaced in log time, since chains change fastest at the start.

    Args:
        states: the initial state and the state after each step, each (n, C, H, W).
        num_steps: number of steps.
        rows: number of chains to show.

    Returns:
        (rows, `NUM_FRAMES`, C, H, W).
    """
    log_spaced = torch.logspace(0, 1, NUM_FRAMES - 1, base=max(num_steps, 1), dtype=torch.float64)
    shown = [0, *log_spaced.round().long().tolist()]
    found = {k: x[:rows] for k, x in enumerate(states) if k in shown}
    return torch.stack([found[k] for k in shown], dim=1)
