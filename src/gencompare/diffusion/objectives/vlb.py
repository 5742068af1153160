"""The variational bound in continuous time, for a fixed schedule and for one that is learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gencompare.diffusion.bound import prior_kl
from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.objectives.base import Noised, Objective
from gencompare.diffusion.parameterization import Parameterization
from gencompare.diffusion.pixels import Pixels
from gencompare.diffusion.schedules import NoiseSchedule, Scales, VariancePreserving
from gencompare.errors import UserError
from gencompare.seeds import Draws


@dataclass(frozen=True)
class VLB(Objective):
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

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        assert self.pixels is not None, "a bound must know its pixels: bound_to() tells it"
        schedule, pixels = denoiser.schedule, self.pixels
        span = schedule.t_max - schedule.t_min
        t = schedule.t_min + span * draws.stratified(x0.dtype)
        learned = any(p.requires_grad for p in schedule.parameters())
        at = EndsAndCourse(schedule, t, x0) if learned else schedule.at(t, x0)
        noised = Noised.make(x0, draws.normal(x0.shape[1:]).to(x0.dtype), t, at)
        out = denoiser.output(noised.x_t, t, at, cond)
        error = noised.eps_error(denoiser, out).flatten(1).sum(1)
        diffusion = pixels.bits(-0.5 * span * at.log_snr_slope.flatten() * error)
        if isinstance(at, EndsAndCourse):
            at.train_course_by_square_of(diffusion)

        first = schedule.at(x0.new_full((), schedule.t_min), x0)
        # x_1 / alpha = x_0 + (sigma / alpha) eps, of which x_0 is told.
        std = first.sigma / first.alpha
        told = x0 + std * draws.normal(x0.shape[1:]).to(x0.dtype)
        reconstruction = pixels.bits(-pixels.log_prob(x0, told, std))
        prior = pixels.bits(prior_kl(schedule, x0))
        terms = {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction}
        return {"loss": prior + diffusion + reconstruction, **{name: term.detach() for name, term in terms.items()}}


class EndsAndCourse(Scales):
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
