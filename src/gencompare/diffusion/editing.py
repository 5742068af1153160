"""Applications of a trained denoiser other than sampling: encoding, interpolation, inpainting, and trajectories."""

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
    r"""Encode images to noise along the probability-flow ODE :math:`d(x / \alpha) / d(\sigma / \alpha) = \epsilon`.

    This is `Heun`'s method run from data to noise; `decode` inverts it. Song et al. (2021), "Score-based generative
    modeling", section 4.3, https://arxiv.org/abs/2011.13456. The derivative is undefined at clean data, so the first
    step inverts the last step of `decode`: it solves :math:`x_t = \alpha x_0 + \sigma \epsilon(x_t)` by two fixed-point
    iterations.

    Args:
        denoiser: the model.
        x: images, (n, C, H, W).
        times: strictly increasing times within the schedule; the first may be `CLEAN`. To use the times of a sampler,
            flip ``sampler.times(schedule)``.
        cond: conditions passed to the denoiser.

    Returns:
        The state at ``times[-1]``, (n, C, H, W).
    """
    check_times(times.flip(0), denoiser.schedule)
    cond = cond or {}
    for s, t, at_s, at_t in steps_between(times.to(x.device), denoiser.schedule, x):
        if s == CLEAN:
            guess = euler_step(x, denoiser(at_t.alpha * x, t, cond).eps, at_s, at_t)
            x = euler_step(x, denoiser(guess, t, cond).eps, at_s, at_t)
            continue
        x_s, eps_s = x, denoiser(x, s, cond).eps
        x = euler_step(x_s, eps_s, at_s, at_t)
        if at_s.sigma / at_s.alpha * Heun.MAX_NOISE_RATIO >= at_t.sigma / at_t.alpha:
            x = euler_step(x_s, (eps_s + denoiser(x, t, cond).eps) / 2, at_s, at_t)
    return check_finite(x, "Encoding")


def decode(denoiser: DenoiserProtocol, noise: Tensor, times: Tensor, cond: Cond | None = None) -> Tensor:
    """Decode noise to images along the probability-flow ODE with `Heun`'s method, at decreasing ``times``."""
    return Heun(num_steps=len(times) - 1).sample(denoiser, noise, cond, generator=torch.Generator(), times=times)


def check_finite(x: Tensor, operation: str) -> Tensor:
    """Return ``x``, or raise `UserError` if it contains NaN or infinite values."""
    if not torch.isfinite(x).all():
        raise UserError(f"{operation} gave NaN or infinite values: the network's weights or outputs are not finite.")
    return x


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    r"""Interpolate spherically from a to b, which preserves the norm of noise.

    .. math:: \frac{\sin((1 - s) \theta)}{\sin \theta} a + \frac{\sin(s \theta)}{\sin \theta} b

    :math:`\theta` is the angle between a and b, and s is ``weight`` (n,). Shoemake (1985); Song et al. (2021),
    "Denoising diffusion implicit models", eq. 67, https://arxiv.org/abs/2010.02502.
    """
    cosine = torch.cosine_similarity(a.flatten(1), b.flatten(1))
    angle = torch.arccos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))  # nearly parallel vectors are interpolated linearly
    angle, weight = (value.reshape(-1, *[1] * (a.ndim - 1)) for value in (angle, weight))
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)


def inpaint(
    sampler: Sampler,
    denoiser: DenoiserProtocol,
    image: Tensor,
    known: Tensor,
    cond: Cond | None = None,
    *,
    generator: torch.Generator,
) -> Tensor:
    r"""Inpaint by replacement: sample images that agree with ``image`` where ``known`` is true.

    After each step, the known pixels are replaced by the image, noised to the time reached,
    :math:`\alpha_s x + \sigma_s z`. This works with every sampler and needs no training. The unknown pixels depend on
    the known ones only through their noisy versions, so the samples follow the conditional distribution only
    approximately. Song et al. (2021), "Score-based generative modeling", section 5 and appendix I.2,
    https://arxiv.org/abs/2011.13456.

    Args:
        sampler: the sampling method.
        denoiser: the model.
        image: (n, C, H, W).
        known: bool mask of the known pixels, which broadcasts to ``image``.
        cond: conditions passed to the denoiser.
        generator: source of all random numbers.
    """
    if known.dtype != torch.bool:
        raise UserError("inpaint: `known` must be a bool tensor that marks the known pixels.")
    schedule = denoiser.schedule
    times = sampler.times(schedule).to(image.dtype)

    def replace_known(x: Tensor, t: Tensor) -> Tensor:
        at = schedule.at(t.to(x.device), x)
        return torch.where(known, at.alpha * image + at.sigma * normal_like(image, generator), x)

    x = replace_known(schedule.prior(image.shape, generator, image.device, t=times[0]), times[0])
    for step in sampler.iterate(denoiser, x, cond, generator=generator, times=times):
        # In place: the sampler continues from the tensor that it yields.
        x = step.x.copy_(replace_known(step.x, step.t))
    return check_finite(x, "Inpainting")


class Trajectory(NamedTuple):
    """Selected states of a sampler between noise and image."""

    times: Tensor
    """Times of the selected states, (k,), decreasing."""
    states: Tensor
    """x_t at ``times``, (k, n, C, H, W)."""
    x0: Tensor
    """The latest predicted image before each state, (k, n, C, H, W)."""


def trajectory(
    sampler: Sampler,
    denoiser: DenoiserProtocol,
    noise: Tensor,
    cond: Cond | None = None,
    *,
    count: int,
    generator: torch.Generator,
) -> Trajectory:
    """Sample, and return ``count`` evenly spaced steps, with both ends, or all steps if there are fewer."""
    steps = list(sampler.iterate(denoiser, noise, cond, generator=generator))
    check_finite(steps[-1].x, "Sampling")
    selected = [steps[k] for k in torch.linspace(0, len(steps) - 1, min(count, len(steps))).round().long()]
    return Trajectory(
        torch.stack([step.t for step in selected]),
        torch.stack([step.x for step in selected]),
        torch.stack([step.prediction.x0 for step in selected]),
    )


def normalize_states(states: Tensor, times: Tensor, schedule: NoiseSchedule) -> Tensor:
    r"""Divide states by :math:`\sqrt{\alpha^2 + \sigma^2}`, so that they can be displayed under any schedule.

    Args:
        states: (k, n, C, H, W).
        times: (k,).
        schedule: the schedule of the states.
    """
    at = schedule.at(times.to(states.device), states)
    return states / (at.alpha**2 + at.sigma**2).sqrt()


NUM_INTERPOLATION_IMAGES = 9
"""Number of images in an interpolation, including both ends."""
NUM_ODE_STEPS = 50
"""Number of steps between image and noise, each of which takes at most two network calls."""
NUM_INPAINTINGS = 6
"""Number of inpaintings of each image."""
NUM_TRAJECTORY_TIMES = 10
"""Number of times at which a trajectory is shown."""
NUM_TRAJECTORIES = 4
"""Maximum number of trajectories shown."""


def ode_times(denoiser: DenoiserProtocol, x: Tensor) -> Tensor:
    """Return `NUM_ODE_STEPS` evenly spaced times from noise to image, or all discrete times if there are fewer."""
    discrete_times = denoiser.schedule.discrete_times
    num_steps = NUM_ODE_STEPS if discrete_times is None else min(NUM_ODE_STEPS, len(discrete_times))
    return UniformGrid()(denoiser.schedule, num_steps).to(x)


def interpolation(denoiser: DenoiserProtocol, x: Tensor, cond: Cond) -> Tensor:
    """Interpolate between pairs of images in noise space, with the conditions of the nearer end.

    Returns:
        One row per pair, (n // 2, `NUM_INTERPOLATION_IMAGES`, C, H, W).
    """
    times = ode_times(denoiser, x)
    noise = encode(denoiser, x, times.flip(0), cond)
    first = torch.arange(0, len(x) - 1, 2, device=x.device).repeat_interleave(NUM_INTERPOLATION_IMAGES)
    weight = torch.linspace(0, 1, NUM_INTERPOLATION_IMAGES, device=x.device).repeat(len(x) // 2)
    nearer = torch.where(weight < 0.5, first, first + 1)
    interpolated = slerp(noise[first], noise[first + 1], weight.to(x.dtype))
    images = decode(denoiser, interpolated, times, select_rows(cond, nearer))
    return images.unflatten(0, (-1, NUM_INTERPOLATION_IMAGES))


def round_trip(denoiser: DenoiserProtocol, x: Tensor, cond: Cond) -> Tensor:
    """Encode images and decode them again.

    Returns:
        Three rows: the images, their noise (in units of the prior), and the decoded images.
    """
    times = ode_times(denoiser, x)
    noise = encode(denoiser, x, times.flip(0), cond)
    return torch.stack([x, noise / denoiser.schedule.prior_std, decode(denoiser, noise, times, cond)])


def inpainting(
    sampler: Sampler, denoiser: DenoiserProtocol, x: Tensor, cond: Cond, generator: torch.Generator
) -> Tensor:
    """Inpaint the lower half of each image.

    Returns:
        One row per image: the image, its upper half, and `NUM_INPAINTINGS` inpaintings.
    """
    known = torch.zeros(x.shape[1:], dtype=torch.bool, device=x.device)
    known[:, : (x.shape[2] + 1) // 2] = True
    index = torch.arange(len(x), device=x.device).repeat_interleave(NUM_INPAINTINGS)
    inpainted = inpaint(sampler, denoiser, x[index], known, select_rows(cond, index), generator=generator)
    return torch.cat(
        [x[:, None], torch.where(known, x, 0.0)[:, None], inpainted.unflatten(0, (-1, NUM_INPAINTINGS))], dim=1
    )


def trajectory_rows(
    sampler: Sampler, denoiser: DenoiserProtocol, x: Tensor, cond: Cond, generator: torch.Generator
) -> Tensor:
    """Sample at most `NUM_TRAJECTORIES` images.

    Returns:
        Two rows per sample: the states of the sampler, and the predicted images.
    """
    schedule, n = denoiser.schedule, min(NUM_TRAJECTORIES, len(x))
    noise = schedule.prior((n, *x.shape[1:]), generator, x.device, t=sampler.times(schedule)[0].to(x.dtype))
    cond = {name: value[:n] for name, value in cond.items()}
    path = trajectory(sampler, denoiser, noise, cond, count=NUM_TRAJECTORY_TIMES, generator=generator)
    states = normalize_states(path.states, path.times, schedule)
    return torch.stack([states, path.x0], dim=1).permute(2, 1, 0, 3, 4, 5).flatten(0, 1)


def select_rows(cond: Cond, index: Tensor) -> Cond:
    """Select the entries ``index`` of every condition."""
    return {name: value[index] for name, value in cond.items()}
