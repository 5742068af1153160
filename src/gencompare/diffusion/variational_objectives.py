"""The variational bound of diffusion models: its terms, and training objectives in continuous and discrete time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.objectives import NoisyBatch, Objective, Pixels, SimpleWeighting, Weighting
from gencompare.diffusion.parameterizations import Parameterization, Prediction
from gencompare.diffusion.schedules import NoiseSchedule, ScheduleValues, VariancePreserving
from gencompare.diffusion.times import UniformGrid
from gencompare.errors import UserError
from gencompare.rng import RandomSource


def prior_kl(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """KL(N(alpha x_0, sigma^2) || N(0, prior_std^2)) at t_max, (n,)."""
    at, std = schedule.at(x0.new_full((), schedule.t_max), x0), schedule.prior_std
    ratio = (at.sigma / std) ** 2
    return 0.5 * ((at.alpha * x0 / std).square() + ratio - 1 - ratio.log()).flatten(1).sum(1)


def step_kl(prediction: Prediction, eps: Tensor, now: ScheduleValues, then: ScheduleValues) -> Tensor:
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


def reconstruction(prediction: Prediction, x0: Tensor, first: ScheduleValues, pixels: Pixels) -> Tensor:
    """-log p(x_0 | x_t), (n,), at the first time: the last step of a sampler, N(x_0_theta, sigma^2) (Ho et al. 2020,
    section 3.3)."""
    return -pixels.log_prob(x0, prediction.x0, first.sigma)


def chain(schedule: NoiseSchedule, steps: int | None) -> Tensor:
    """The times, rising, of a model of so many steps; None takes the schedule's own, if it has them."""
    return schedule.steps() if steps is None else UniformGrid()(schedule, steps)[:-1].flip(0)


@dataclass(frozen=True)
class ContinuousVLB(Objective):
    r"""The bound on -log p(x_0) in bits/dim, with infinitely many steps (Kingma et al. 2021, eq. 11 and 17):

        KL(q(x_T | x_0) || p(x_T)) - (t_max - t_min) / 2 E[lambda' ||eps - eps_theta(x_t)||^2] + E[-log p(x_0 | x_1)],

    x_T and x_1 being x_t at t_max and t_min, t uniform and low-discrepancy, p(x_0 | x_1) in proportion to q(x_1 | x_0),
    here with the mass of each pixel's bin. Only the ends of lambda matter to it, not its course (their section 5.1).

    A schedule with weights is trained along: its ends for the bound, as the network is, its course for a small variance
    of the diffusion term D, by the gradient of E[D^2] (their appendix I.2).
    """

    trains_schedule: ClassVar[bool] = True

    pixels: Pixels | None = None

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        if any(True for _ in schedule.parameters()) and not isinstance(schedule, VariancePreserving):
            raise UserError(
                f"Schedule {type(schedule).__name__} cannot be learned by the bound: it must preserve variance."
            )

    def bound_to(self, pixels: Pixels) -> Objective:
        return replace(self, pixels=pixels)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        assert self.pixels is not None, "a bound must know its pixels: bound_to() tells it"
        schedule, pixels = denoiser.schedule, self.pixels
        span = schedule.t_max - schedule.t_min
        t = schedule.t_min + span * draws.stratified(x0.dtype)
        learned = any(p.requires_grad for p in schedule.parameters())
        at = LearnedScheduleGradients(schedule, t, x0) if learned else schedule.at(t, x0)
        noised = NoisyBatch.make(x0, draws.normal(x0.shape[1:]).to(x0.dtype), t, at)
        out = denoiser.output(noised.x_t, t, at, cond)
        error = noised.eps_error(denoiser, out).flatten(1).sum(1)
        diffusion = pixels.bits(-0.5 * span * at.log_snr_slope.flatten() * error)
        if isinstance(at, LearnedScheduleGradients):
            at.train_course_by_square_of(diffusion)

        first = schedule.at(x0.new_full((), schedule.t_min), x0)
        # x_1 / alpha = x_0 + (sigma / alpha) eps, of which x_0 is told.
        std = first.sigma / first.alpha
        told = x0 + std * draws.normal(x0.shape[1:]).to(x0.dtype)
        reconstruction = pixels.bits(-pixels.log_prob(x0, told, std))
        prior = pixels.bits(prior_kl(schedule, x0))
        terms = {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction}
        return {"loss": prior + diffusion + reconstruction, **{name: term.detach() for name, term in terms.items()}}


class LearnedScheduleGradients(ScheduleValues):
    r"""A learned schedule at given times, written lambda = lambda_0 + (lambda_1 - lambda_0) s(t) with lambda_0 and
    lambda_1 its ends, so that the gradients of the ends and of the course s between them can go different ways.

    s is found from lambda, and does not change with the ends, as the ends do not with s. The schedule must preserve
    variance.
    """

    def __init__(self, schedule: NoiseSchedule, t: Tensor, x: Tensor) -> None:
        super().__init__(schedule, t, x)
        self._first = schedule.log_snr(t.new_full((), schedule.t_min))
        self._fall = schedule.log_snr(t.new_full((), schedule.t_max)) - self._first
        at = schedule.at(t)
        self._share = (at.log_snr - self._first) / self._fall
        self._share_slope = at.log_snr_slope / self._fall

    def train_course_by_square_of(self, loss: Tensor) -> None:
        """From here on ``loss`` (n,) sends the gradient of its square to the course, and its own to all else."""
        for course in (self._share, self._share_slope):
            if course.requires_grad:
                course.register_hook(lambda gradient: (2 * loss.detach() * gradient).to(gradient))

    @cached_property
    def _logs(self) -> tuple[Tensor, Tensor]:
        log_snr = self._first + self._fall * self._share
        return logsigmoid(log_snr) / 2, log_snr

    @cached_property
    def log_snr_slope(self) -> Tensor:
        return self._shaped(self._fall * self._share_slope)

    @cached_property
    def log_alpha_slope(self) -> Tensor:
        return self.log_snr_slope * torch.sigmoid(-self.log_snr) / 2


@dataclass(frozen=True)
class DiscreteVLB(Objective):
    r"""The bound on -log p(x_0) in bits/dim of a model of T steps, one of its T terms an image at random, times T.

    Ho et al. (2020), eq. 5; with `LearnedVariance`, L_vlb of Nichol and Dhariwal (2021), eq. 4. Else the variance is
    that of q(x_s | x_t, x_0).

    Args:
        steps: T; None takes every step of a schedule that has steps.
    """

    trains_schedule: ClassVar[bool] = True
    trains_variance: ClassVar[bool] = True

    steps: int | None = None
    pixels: Pixels | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"objective.steps={self.steps}: give at least 1.")

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        table = schedule.discrete_times
        if self.steps is None and table is None:
            raise UserError(
                f"The objective DiscreteVLB bounds a model of steps, and schedule {type(schedule).__name__} runs in"
                " continuous time: say how many there are (model.objective.steps=50), or use model/objective=vlb."
            )
        if self.steps is not None and table is not None and self.steps > len(table):
            raise UserError(f"model.objective.steps={self.steps}: the schedule has no more than {len(table)} steps.")

    def bound_to(self, pixels: Pixels) -> Objective:
        return replace(self, pixels=pixels)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        assert self.pixels is not None, "a bound must know its pixels: bound_to() tells it"
        schedule = denoiser.schedule
        times = chain(schedule, self.steps).to(x0.device)
        step, noised = at_random_step(schedule, times, x0, draws)
        prediction = denoiser(noised.x_t, noised.t, cond)
        term = self.pixels.bits(len(times) * chain_term(prediction, noised, step, times, schedule, self.pixels))
        prior = self.pixels.bits(prior_kl(schedule, x0))
        return {"loss": prior + term, "prior": prior.detach(), "terms": term.detach()}


def at_random_step(
    schedule: NoiseSchedule, times: Tensor, x0: Tensor, draws: RandomSource
) -> tuple[Tensor, NoisyBatch]:
    """A step for each image, (n,) from 0, each equally likely, and the image noised to its time."""
    step = (draws.stratified() * len(times)).long().clamp(max=len(times) - 1)
    t = times[step]
    return step, NoisyBatch.make(x0, draws.normal(x0.shape[1:]).to(x0.dtype), t, schedule.at(t, x0))


def chain_term(
    prediction: Prediction, noised: NoisyBatch, step: Tensor, times: Tensor, schedule: NoiseSchedule, pixels: Pixels
) -> Tensor:
    """The term of each image's step in nats, (n,): of the first the reconstruction, of the others the divergence."""
    # Before the first step comes clean data, infinitely sure: a step to itself stands in, and is not used.
    then = schedule.at(times[(step - 1).clamp(min=0)], noised.x0)
    kl = step_kl(prediction, noised.eps, noised.at, then)
    return torch.where(step == 0, reconstruction(prediction, noised.x0, noised.at, pixels), kl)


@dataclass(frozen=True)
class Hybrid(Objective):
    r"""L_simple + ``vlb`` L_vlb, where L_vlb trains the variance alone (Nichol and Dhariwal 2021, eq. 16).

    L_vlb is in bits/dim, all T terms of it (its prior has no gradient); the mean in it is held fixed.

    Args:
        vlb: weight of the bound.
        weighting: how errors of the noise count in L_simple.
    """

    trains_variance: ClassVar[bool] = True

    vlb: float = 0.001
    weighting: Weighting = field(default_factory=SimpleWeighting)
    pixels: Pixels | None = None

    def __post_init__(self) -> None:
        if self.vlb <= 0:
            raise UserError(f"objective.vlb={self.vlb}: give a positive number, or take model/objective=simple.")

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        if not parameterization.learns_variance:
            raise UserError(
                "The objective Hybrid trains the variance of the reverse steps, which this model does not learn: use"
                " model/parameterization=eps_learned_variance, or model/objective=simple."
            )
        if schedule.discrete_times is None:
            raise UserError(
                f"The objective Hybrid trains a model of steps, and schedule {type(schedule).__name__} runs in"
                " continuous time: use a table (model/schedule=cosine), or a fixed variance"
                " (model/parameterization=eps model/objective=simple)."
            )

    def bound_to(self, pixels: Pixels) -> Objective:
        return replace(self, pixels=pixels)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        assert self.pixels is not None, "a bound must know its pixels: bound_to() tells it"
        times = denoiser.schedule.steps()
        step, noised = at_random_step(denoiser.schedule, times, x0, draws)
        out = denoiser.output(noised.x_t, noised.t, noised.at, cond)
        eps_mse = noised.eps_error(denoiser, out).flatten(1).mean(1)
        prediction = denoiser.parameterization.invert(out, noised.x_t, noised.at)
        fixed = prediction._replace(x0=prediction.x0.detach(), eps=prediction.eps.detach())
        term = chain_term(fixed, noised, step, times, denoiser.schedule, self.pixels)
        bound = self.pixels.bits(len(times) * term)
        simple = self.weighting(noised.at).flatten() * eps_mse
        return {"loss": simple + self.vlb * bound, "eps_mse": eps_mse.detach(), "terms": bound.detach()}
