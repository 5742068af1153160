"""What a trained denoiser can do besides sampling: encode, interpolate, inpaint, and show its trajectories."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.ode_samplers import Heun, euler_step
from gencompare.diffusion.samplers import Sampler, check_times, steps_between
from gencompare.diffusion.schedules import CLEAN, NoiseSchedule
from gencompare.diffusion.times import UniformGrid
from gencompare.errors import UserError
from gencompare.rng import normal_like


def encode(denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond | None = None) -> Tensor:
    r"""The noise that the probability-flow ODE leads to from images ``x``: `Heun`'s method, run from data to noise.

    d(x / alpha) / d(sigma / alpha) = eps (Song et al. 2021, "Score-based generative modeling", section 4.3). `decode`
    leads back. Out of clean data there is no slope, so the first step is the one that `decode` undoes with its last,
    x_t = alpha x_0 + sigma eps(x_t), found by going there twice.

    Args:
        times: rising, within the schedule; the first may be `CLEAN`. A sampler's own are ``sampler.times(schedule)``
            flipped.
    """
    check_times(times.flip(0), denoiser.schedule)
    cond = cond or {}
    for s, t, now, then in steps_between(times.to(x.device), denoiser.schedule, x):
        if s == CLEAN:
            guess = euler_step(x, denoiser(then.alpha * x, t, cond).eps, now, then)
            x = euler_step(x, denoiser(guess, t, cond).eps, now, then)
            continue
        slope = denoiser(x, s, cond).eps
        start, x = x, euler_step(x, slope, now, then)
        if now.sigma / now.alpha * Heun.FURTHEST >= then.sigma / then.alpha:
            x = euler_step(start, (slope + denoiser(x, t, cond).eps) / 2, now, then)
    return finite(x, "Encoding")


def decode(denoiser: DenoiserProtocol, noise: Tensor, times: Tensor, cond: Cond | None = None) -> Tensor:
    """The images that the probability-flow ODE leads to from noise, at falling ``times``: `Heun`'s method."""
    return Heun(steps=len(times) - 1).sample(denoiser, noise, cond, generator=torch.Generator(), times=times)


def finite(x: Tensor, doing: str) -> Tensor:
    """``x``. Raises `UserError` where it holds NaN or infinite values."""
    if not torch.isfinite(x).all():
        raise UserError(f"{doing} gave NaN or infinite values: the network's weights or outputs are not finite.")
    return x


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    r"""From a to b along the arc between them, so that what lies between two noises is as long as noise is.

    sin((1 - s) w) / sin(w) a + sin(s w) / sin(w) b, with w the angle between a and b (Shoemake 1985; Song et al. 2021,
    "Denoising diffusion implicit models", eq. 67). ``share`` s is (n,).
    """
    cosine = torch.cosine_similarity(a.flatten(1), b.flatten(1))
    angle = torch.arccos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))  # where the two are alike, the arc is a straight line
    angle, share = (value.reshape(-1, *[1] * (a.ndim - 1)) for value in (angle, share))
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def inpaint(
    sampler: Sampler,
    denoiser: DenoiserProtocol,
    image: Tensor,
    known: Tensor,
    cond: Cond | None = None,
    *,
    generator: torch.Generator,
) -> Tensor:
    r"""Samples that agree with ``image`` where ``known`` is true, by replacement.

    After each step, known pixels become the image with the noise of that time, alpha_s x + sigma_s z (Song et al. 2021,
    "Score-based generative modeling", section 5 and appendix I.2). It works with every sampler and needs no training;
    as the unknown pixels see the known ones only through their noise, it draws from the conditional distribution
    approximately and not exactly.

    Args:
        known: bool, of a shape that broadcasts to ``image``.
    """
    if known.dtype != torch.bool:
        raise UserError("inpaint: `known` says of each pixel whether it is known: give a tensor of bool.")
    schedule = denoiser.schedule
    times = sampler.times(schedule)

    def replaced(x: Tensor, t: Tensor) -> Tensor:
        at = schedule.at(t.to(x.device), x)
        return torch.where(known, at.alpha * image + at.sigma * normal_like(image, generator), x)

    x = replaced(schedule.prior(image.shape, generator, image.device, t=times[0]).to(image.dtype), times[0])
    for step in sampler.iterate(denoiser, x, cond, generator=generator, times=times):
        # In place: the state that a sampler yields is the one that it goes on from.
        x = step.x.copy_(replaced(step.x, step.t))
    return finite(x, "Inpainting")


class Trajectory(NamedTuple):
    """The way from noise to image, at some of its times."""

    times: Tensor
    """(k,), falling."""
    states: Tensor
    """x_t at those times, (k, n, C, H, W)."""
    x0: Tensor
    """The image that the denoiser saw in it last on the way there, (k, n, C, H, W)."""


def trajectory(
    sampler: Sampler,
    denoiser: DenoiserProtocol,
    noise: Tensor,
    cond: Cond | None = None,
    *,
    count: int,
    generator: torch.Generator,
) -> Trajectory:
    """``count`` evenly chosen steps of a sampler (all of them where it has fewer), the last among them."""
    steps = list(sampler.iterate(denoiser, noise, cond, generator=generator))
    finite(steps[-1].x, "Sampling")
    chosen = [steps[k] for k in torch.linspace(0, len(steps) - 1, min(count, len(steps))).round().long()]
    return Trajectory(
        torch.stack([step.t for step in chosen]),
        torch.stack([step.x for step in chosen]),
        torch.stack([step.prediction.x0 for step in chosen]),
    )


def unit_size(states: Tensor, times: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_t / sqrt(alpha^2 + sigma^2), which can be looked at whatever the schedule: (k, n, C, H, W) at times (k,)."""
    at = schedule.at(times.to(states.device), states)
    return states / (at.alpha**2 + at.sigma**2).sqrt()


INTERPOLATION_STEPS = 9
"""Images from one end of an interpolation to the other, ends included."""
ODE_STEPS = 50
"""From image to noise, and back; of two network calls each."""
NUM_INPAINTINGS = 6
"""Ways in which a hidden half is filled in."""
MOMENTS = 10
"""Times that a trajectory is shown at."""
NOISES = 4
"""Noises whose trajectories are shown."""


def ode_times(denoiser: DenoiserProtocol, x: Tensor) -> Tensor:
    """Falling times for the way between image and noise: `ODE_STEPS` even ones, or all of a table that has fewer."""
    table = denoiser.schedule.discrete_times
    steps = ODE_STEPS if table is None else min(ODE_STEPS, len(table))
    return UniformGrid()(denoiser.schedule, steps).to(x.device)


def interpolation(denoiser: DenoiserProtocol, x: Tensor, cond: Cond) -> Tensor:
    """One row per pair of images, (n // 2, `INTERPOLATION_STEPS`, C, H, W); conditions are those of the nearer end."""
    times = ode_times(denoiser, x)
    noise = encode(denoiser, x, times.flip(0), cond)
    first = torch.arange(0, len(x) - 1, 2, device=x.device).repeat_interleave(INTERPOLATION_STEPS)
    share = torch.linspace(0, 1, INTERPOLATION_STEPS, device=x.device).repeat(len(x) // 2)
    nearer = torch.where(share < 0.5, first, first + 1)
    between = slerp(noise[first], noise[first + 1], share.to(x.dtype))
    return decode(denoiser, between, times, select_rows(cond, nearer)).unflatten(0, (-1, INTERPOLATION_STEPS))


def round_trip(denoiser: DenoiserProtocol, x: Tensor, cond: Cond) -> Tensor:
    """Three rows: images, the noises that they are encoded to (in units of the prior), and what those decode to."""
    times = ode_times(denoiser, x)
    noise = encode(denoiser, x, times.flip(0), cond)
    return torch.stack([x, noise / denoiser.schedule.prior_std, decode(denoiser, noise, times, cond)])


def inpainting(
    sampler: Sampler, denoiser: DenoiserProtocol, x: Tensor, cond: Cond, generator: torch.Generator
) -> Tensor:
    """A row for each image: itself, its upper half, and `NUM_INPAINTINGS` ways to go on from there."""
    known = torch.zeros(x.shape[1:], dtype=torch.bool, device=x.device)
    known[:, : (x.shape[2] + 1) // 2] = True
    which = torch.arange(len(x), device=x.device).repeat_interleave(NUM_INPAINTINGS)
    filled = inpaint(sampler, denoiser, x[which], known, select_rows(cond, which), generator=generator)
    return torch.cat(
        [x[:, None], torch.where(known, x, 0.0)[:, None], filled.unflatten(0, (-1, NUM_INPAINTINGS))], dim=1
    )


def trajectory_rows(
    sampler: Sampler, denoiser: DenoiserProtocol, x: Tensor, cond: Cond, generator: torch.Generator
) -> Tensor:
    """Two rows for each of `NOISES` noises: the states of the sampler, and the images that the denoiser saw in them."""
    schedule, n = denoiser.schedule, min(NOISES, len(x))
    noise = schedule.prior((n, *x.shape[1:]), generator, x.device, t=sampler.times(schedule)[0])
    cond = {name: value[:n] for name, value in cond.items()}
    found = trajectory(sampler, denoiser, noise, cond, count=MOMENTS, generator=generator)
    states = unit_size(found.states, found.times, schedule)
    return torch.stack([states, found.x0], dim=1).permute(2, 1, 0, 3, 4, 5).flatten(0, 1)


def select_rows(cond: Cond, index: Tensor) -> Cond:
    """The conditions of some rows, in their order."""
    return {name: value[index] for name, value in cond.items()}
