"""Pictures of what a trained denoiser can do besides sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.editing import decode, encode, inpaint, slerp, trajectory, unit_size
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.times import UniformGrid

BETWEEN = 9
"""Images from one end of an interpolation to the other, ends included."""
ODE_STEPS = 50
"""From image to noise, and back; of two network calls each."""
FILLS = 6
"""Ways in which a hidden half is filled in."""
MOMENTS = 10
"""Times that a trajectory is shown at."""
NOISES = 4
"""Noises whose trajectories are shown."""


def ode_times(denoiser: Denoises, x: Tensor) -> Tensor:
    """Falling times for the way between image and noise: `ODE_STEPS` even ones, or all of a table that has fewer."""
    table = denoiser.schedule.discrete_times
    steps = ODE_STEPS if table is None else min(ODE_STEPS, len(table))
    return UniformGrid()(denoiser.schedule, steps).to(x.device)


def interpolation(denoiser: Denoises, x: Tensor, cond: Cond) -> Tensor:
    """A row for each pair of images, (n // 2, `BETWEEN`, C, H, W), with the conditions of the nearer end."""
    times = ode_times(denoiser, x)
    noise = encode(denoiser, x, times.flip(0), cond)
    first = torch.arange(0, len(x) - 1, 2, device=x.device).repeat_interleave(BETWEEN)
    share = torch.linspace(0, 1, BETWEEN, device=x.device).repeat(len(x) // 2)
    nearer = torch.where(share < 0.5, first, first + 1)
    between = slerp(noise[first], noise[first + 1], share.to(x.dtype))
    return decode(denoiser, between, times, rows(cond, nearer)).unflatten(0, (-1, BETWEEN))


def round_trip(denoiser: Denoises, x: Tensor, cond: Cond) -> Tensor:
    """Three rows: images, the noises that they are encoded to (in units of the prior), and what those decode to."""
    times = ode_times(denoiser, x)
    noise = encode(denoiser, x, times.flip(0), cond)
    return torch.stack([x, noise / denoiser.schedule.prior_std, decode(denoiser, noise, times, cond)])


def inpainting(sampler: Sampler, denoiser: Denoises, x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
    """A row for each image: itself, its upper half, and `FILLS` ways to go on from there."""
    known = torch.zeros(x.shape[1:], dtype=torch.bool, device=x.device)
    known[:, : (x.shape[2] + 1) // 2] = True
    which = torch.arange(len(x), device=x.device).repeat_interleave(FILLS)
    filled = inpaint(sampler, denoiser, x[which], known, rows(cond, which), generator=generator)
    return torch.cat([x[:, None], torch.where(known, x, 0.0)[:, None], filled.unflatten(0, (-1, FILLS))], dim=1)


def way(sampler: Sampler, denoiser: Denoises, x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
    """Two rows for each of `NOISES` noises: the states of the sampler, and the images that the denoiser saw in them."""
    schedule, n = denoiser.schedule, min(NOISES, len(x))
    noise = schedule.prior((n, *x.shape[1:]), generator, x.device, t=sampler.times(schedule)[0])
    cond = {name: value[:n] for name, value in cond.items()}
    found = trajectory(sampler, denoiser, noise, cond, count=MOMENTS, generator=generator)
    states = unit_size(found.states, found.times, schedule)
    return torch.stack([states, found.x0], dim=1).permute(2, 1, 0, 3, 4, 5).flatten(0, 1)


def rows(cond: Cond, index: Tensor) -> Cond:
    """The conditions of some rows, in their order."""
    return {name: value[index] for name, value in cond.items()}
