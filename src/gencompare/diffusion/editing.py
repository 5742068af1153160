r"""What a trained denoiser can do besides sampling: encode, interpolate, fill in, and show its way from noise to image.

Functions of a denoiser and a sampler; they know neither network nor trainer. Images and noise are (n, C, H, W).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.samplers import Heun, Sampler
from gencompare.diffusion.samplers.base import check_times, steps_between
from gencompare.diffusion.samplers.ode import along
from gencompare.diffusion.schedules import CLEAN, NoiseSchedule
from gencompare.errors import UserError
from gencompare.seeds import normal_like


def encode(denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond | None = None) -> Tensor:
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
            guess = along(x, denoiser(then.alpha * x, t, cond).eps, now, then)
            x = along(x, denoiser(guess, t, cond).eps, now, then)
            continue
        slope = denoiser(x, s, cond).eps
        start, x = x, along(x, slope, now, then)
        if now.sigma / now.alpha * Heun.FURTHEST >= then.sigma / then.alpha:
            x = along(start, (slope + denoiser(x, t, cond).eps) / 2, now, then)
    return finite(x, "Encoding")


def decode(denoiser: Denoises, noise: Tensor, times: Tensor, cond: Cond | None = None) -> Tensor:
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
    denoiser: Denoises,
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
    denoiser: Denoises,
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
