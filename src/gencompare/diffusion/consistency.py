r"""Consistency models: networks that map every point of a trajectory of the probability-flow ODE to its image.

A consistency function :math:`f(x_t, t)` is the prediction of :math:`x_0` by a denoiser's network, schedule and
parameterisation. Its boundary condition is :math:`f(x_t, t) \to x_t / \alpha_t` as :math:`\sigma_t \to 0`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoiser, DenoiserProtocol
from gencompare.diffusion.objectives import NoisyBatch, Objective
from gencompare.diffusion.parameterizations import Parameterization
from gencompare.diffusion.samplers import Sampler, Step, linear_combination, steps_between
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.diffusion.times import LogNormalTimes, TimeDistribution
from gencompare.errors import UserError, check_counts, check_non_negative, check_number, check_positive
from gencompare.rng import RandomSource, default_generator, from_state, normal_like

MAX_BOUNDARY_GAIN = 0.2
"""Largest derivative of the predicted image with respect to the network output, at the smallest noise, with which the
boundary condition is considered to hold. It is sigma / alpha for most parameterisations, and 1 if the network predicts
the image itself."""


@dataclass(frozen=True)
class ConsistencyTraining(Objective):
    r"""Easy consistency tuning (ECT): predictions at two noise levels of the same image and noise are made equal.

    .. math::
        L = E\, \frac{d(f(x_t, t), sg[f(x_r, r)])}{s_t - s_r}, \qquad
        d(a, b) = \sqrt{\|a - b\|^2 / D + c^2} - c,

    with the same :math:`x_0`, :math:`\epsilon` and dropout masks in :math:`x_t` and :math:`x_r`, without a gradient
    through the second prediction (sg). :math:`s = \sigma / \alpha` is the noise level, so that t and r have the same
    meaning under every schedule, and

    .. math::
        s_r = s_t\, \max(0,\; 1 - n(s_t) / q^a), \qquad n(s) = 1 + k\, sigmoid(-b s).

    In the first of ``num_stages`` equal parts of training a = 1, in the last ``num_stages``: the levels approach each
    other. If :math:`s_r` is below the lowest level of the schedule, it is 0, and the prediction there is :math:`x_0`:
    where this is always so, the loss is that of a diffusion model, so that training may start from scratch or from the
    weights of a diffusion model.

    Geng et al. (2024), "Consistency models made easy", https://arxiv.org/abs/2406.14548, with the constants of the
    published code for CIFAR-10 (https://github.com/locuslab/ect), which has c = 0; c and the pseudo-Huber distance d
    are those of Song and Dhariwal (2023), "Improved techniques for training consistency models", section 3.3,
    https://arxiv.org/abs/2310.14189. Here d is divided by :math:`\sqrt D`, for the D values of an image; their c is
    :math:`0.00054 \sqrt D`.

    Losses of images in evaluation are those of the end of training, a = ``num_stages``.

    Args:
        times: distribution of t.
        q: factor by which each stage divides the distance of the levels.
        num_stages: number of stages.
        k: how much further apart low noise levels are.
        b: how soon this ends with increasing noise.
        c: where d changes from a squared to an absolute error, as a root mean square over the values of an image.
        progress: fraction of training that is done, in [0, 1]; set by `at_progress`.
    """

    trains_denoiser: ClassVar[bool] = False

    times: TimeDistribution = field(default_factory=lambda: LogNormalTimes(mean=-1.1, std=2.0))
    q: float = 2.0
    num_stages: int = 8
    k: float = 8.0
    b: float = 1.0
    c: float = 0.00054
    progress: float = 1.0

    def __post_init__(self) -> None:
        check_number("objective.q", self.q)
        if not 1 < self.q < math.inf:
            raise UserError(f"objective.q={self.q} must be above 1: it divides the distance of the noise levels.")
        check_counts("objective", num_stages=self.num_stages)
        for name in ("k", "b", "c"):
            check_non_negative(f"objective.{name}", getattr(self, name))
        check_positive("objective.c", self.c)

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        if schedule.ends_in_pure_noise:
            raise UserError(
                f"{type(schedule).__name__} ends in pure noise (zero terminal SNR), a level that ConsistencyTraining"
                " does not train: use model/schedule=vp, rectified or karras."
            )
        if parameterization.noise_conditioning.num_levels(schedule) is not None:
            raise UserError(
                "ConsistencyTraining compares noise levels between those of the schedule, but"
                f" {type(parameterization.noise_conditioning).__name__} passes the index of a level to the network: use"
                " the noise conditioning LogSNRConditioning."
            )
        at = schedule.at(torch.tensor(schedule.t_min, device=schedule.device, dtype=schedule.dtype))
        gain = float(parameterization.eps_jacobian(at) * at.sigma / at.alpha)
        if not gain < MAX_BOUNDARY_GAIN:
            raise UserError(
                "A consistency model must leave an image without noise as it is, but with"
                f" {type(parameterization).__name__} under {type(schedule).__name__} its network determines {gain:.2g}"
                " of it there: use model/parameterization=karras, velocity or v, and a schedule that starts at low"
                " noise."
            )

    def at_progress(self, progress: float) -> ConsistencyTraining:
        return replace(self, progress=progress)

    def lower_level(self, s: Tensor) -> Tensor:
        """Compute the noise level s_r (n,) for s_t = ``s`` (n,)."""
        stage = min(1 + math.floor(self.progress * self.num_stages), self.num_stages)
        n = 1 + self.k * torch.sigmoid(-self.b * s)
        return s * (1 - n / self.q**stage).clamp(min=0.0)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        schedule = denoiser.schedule
        t = self.times(schedule, rng)
        eps = rng.normal(x0.shape[1:]).to(x0.dtype)
        s_t = torch.exp(-0.5 * schedule.log_snr(t))
        lowest = torch.exp(-0.5 * schedule.log_snr(t.new_full((), schedule.t_min)))
        s_r = self.lower_level(s_t)
        is_clean = s_r < lowest
        s_r = s_r.masked_fill(is_clean, 0.0)
        r = schedule.t_from_log_snr(-2 * s_r.maximum(lowest).log())

        dropout = default_generator(x0.device)
        masks = dropout.get_state()
        # The prediction with a gradient comes first, since autocast keeps the weights that it casts: without a
        # gradient, if the first call had none.
        prediction = denoiser(NoisyBatch.make(x0, eps, t, schedule.at(t, x0)).x_t, t, cond).x0
        with torch.no_grad(), from_state(dropout, masks):
            target = denoiser(NoisyBatch.make(x0, eps, r, schedule.at(r, x0)).x_t, r, cond).x0
            target = torch.where(is_clean.view(-1, *[1] * (x0.ndim - 1)), x0, target)
        squared = (prediction - target).square().flatten(1).mean(1)
        distance = squared / ((squared + self.c**2).sqrt() + self.c)  # sqrt(squared + c^2) - c
        return {"loss": distance / (s_t - s_r).to(distance.dtype), "distance": distance.detach()}


@dataclass(frozen=True, kw_only=True)
class MultistepConsistency(Sampler):
    r"""Multistep consistency sampling: :math:`x_s = \alpha_s f(x_t, t) + \sigma_s z` with :math:`z \sim N(0, I)`.

    Each step predicts the image and adds new noise; the last one, into clean data, adds none. A single step is a single
    call of the network. Song et al. (2023), "Consistency models", algorithm 1, https://arxiv.org/abs/2303.01469 (whose
    f returns x_t at the lowest level instead of the image). Any denoiser can be sampled in this way, but only a
    consistency function makes the samples exact.
    """

    order = None

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, _, at_s in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            x = linear_combination((at_s.alpha, prediction.x0), (at_s.sigma, normal_like(x, generator)))
            yield Step(s, x, prediction)
