r"""The terms of the variational bound, in nats an image:

    -log p(x_0) <= KL(q(x_T | x_0) || p(x_T)) + sum_t E KL(q(x_s | x_t, x_0) || p(x_s | x_t)) + E[-log p(x_0 | x_1)],

the prior, the diffusion and the reconstruction (Ho et al. 2020, eq. 5; Kingma et al. 2021, eq. 11).

Padding: the latents x_t cover padded pixels too, so all of their terms count; what is bounded is the probability of the
real pixels alone, so the reconstruction is theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gencompare.diffusion.parameterization import Prediction
from gencompare.diffusion.pixels import Pixels
from gencompare.diffusion.schedules import NoiseSchedule, Scales
from gencompare.diffusion.times import UniformGrid


def prior_kl(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """KL(N(alpha x_0, sigma^2) || N(0, prior_std^2)) at t_max, (n,)."""
    at, std = schedule.at(x0.new_full((), schedule.t_max), x0), schedule.prior_std
    ratio = (at.sigma / std) ** 2
    return 0.5 * ((at.alpha * x0 / std).square() + ratio - 1 - ratio.log()).flatten(1).sum(1)


def step_kl(prediction: Prediction, eps: Tensor, now: Scales, then: Scales) -> Tensor:
    r"""KL(q(x_s | x_t, x_0) || p(x_s | x_t)), (n,), of a step from t (``now``) to s (``then``), s before t.

    Means differ by alpha_s c (x_0 - x_0_theta), c = 1 - SNR_t / SNR_s, and q has variance c sigma_s^2. Where p has the
    same one, this is (SNR_s / SNR_t - 1) ||eps - eps_theta||^2 / 2. Where it is larger by R^v, R = sigma_t^2 /
    sigma_s^2 and v the ``variance_share``, it is the sum of
    (v log R + R^-v (1 + (SNR_s / SNR_t - 1) (eps - eps_theta)^2) - 1) / 2.
    """
    excess = torch.expm1(then.log_snr - now.log_snr) * (eps - prediction.eps).square()
    if prediction.variance_share is not None:
        larger = prediction.variance_share * 2 * torch.log(now.sigma / then.sigma)
        excess = larger + torch.expm1(-larger) + torch.exp(-larger) * excess
    return 0.5 * excess.flatten(1).sum(1)


def reconstruction(prediction: Prediction, x0: Tensor, first: Scales, pixels: Pixels) -> Tensor:
    """-log p(x_0 | x_t), (n,), at the first time: the last step of a sampler, N(x_0_theta, sigma^2) (Ho et al. 2020,
    section 3.3)."""
    return -pixels.log_prob(x0, prediction.x0, first.sigma)


def chain(schedule: NoiseSchedule, steps: int | None) -> Tensor:
    """The times, rising, of a model of so many steps; None takes the schedule's own, if it has them."""
    return schedule.steps() if steps is None else UniformGrid()(schedule, steps)[:-1].flip(0)
