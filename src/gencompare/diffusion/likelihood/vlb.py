"""The variational bound, term by term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.bound import chain, prior_kl, reconstruction, step_kl
from gencompare.diffusion.denoiser import ClipX0, Cond, Denoises
from gencompare.diffusion.likelihood.base import LikelihoodMethod
from gencompare.diffusion.pixels import Pixels
from gencompare.errors import UserError
from gencompare.seeds import normal_like


@dataclass(frozen=True)
class VLB(LikelihoodMethod):
    r"""The bound -log p(x_0) <= prior + diffusion + reconstruction, in bits/dim (see `bound`).

    Of a model of T steps (Ho et al. 2020, eq. 5), or in continuous time (Kingma et al. 2021, eq. 17), where the
    diffusion is the integral over log-SNR of E||eps - eps_theta||^2 / 2. That integral, or the sum over steps, is taken
    at ``samples`` random places an image, spread evenly over log-SNR, where the integrand varies little: by uniform
    times, as many draws scatter tens of times more. It costs ``samples`` + 1 network calls.

    Images with levels are known to lie in [-1, 1], and predicted ones are held there.

    Args:
        samples: network calls an image for the diffusion; None takes every step once, where there are steps.
        steps: T. None takes the schedule's own steps, or continuous time where it has none.
    """

    kind: ClassVar[str] = "bound"

    samples: int | None = 16
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("steps", self.steps)):
            if value is not None and value < 1:
                raise UserError(f"bits.vlb.{name}={value}: give at least 1.")

    @torch.no_grad()
    def terms(
        self, denoiser: Denoises, x0: Tensor, cond: Cond, pixels: Pixels, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """``prior``, ``diffusion`` and ``reconstruction``, each in bits/dim, (n,)."""
        schedule = denoiser.schedule
        if pixels.levels is not None:
            denoiser = ClipX0(denoiser)
        if self.steps is None and schedule.discrete_times is None:
            first, diffusion = x0.new_full((), schedule.t_min), self._continuous(denoiser, x0, cond, generator)
        else:
            times = chain(schedule, self.steps).to(x0.device)
            first, diffusion = times[0], self._discrete(denoiser, times, x0, cond, generator)
        at = schedule.at(first, x0)
        prediction = denoiser(at.alpha * x0 + at.sigma * normal_like(x0, generator), first, cond)
        found = {
            "prior": prior_kl(schedule, x0),
            "diffusion": diffusion,
            "reconstruction": reconstruction(prediction, x0, at, pixels),
        }
        return {name: pixels.bits(nats) for name, nats in found.items()}

    def _continuous(self, denoiser: Denoises, x0: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        schedule = denoiser.schedule
        if self.samples is None:
            raise UserError("bits.vlb.samples=null takes every step, and this model has none: give samples or steps.")
        high, low = schedule.log_snr(x0.new_tensor([schedule.t_min, schedule.t_max]))
        nats = x0.new_zeros(len(x0))
        for u in _spread(self.samples, x0, generator):
            t = schedule.t_from_log_snr(high + (low - high) * u)
            at, eps = schedule.at(t, x0), normal_like(x0, generator)
            prediction = denoiser(at.alpha * x0 + at.sigma * eps, t, cond)
            nats += (eps - prediction.eps).square().flatten(1).sum(1)
        return nats * (high - low) / (2 * self.samples)

    def _discrete(
        self, denoiser: Denoises, times: Tensor, x0: Tensor, cond: Cond, generator: torch.Generator
    ) -> Tensor:
        schedule, last = denoiser.schedule, len(times) - 1
        nats = x0.new_zeros(len(x0))
        if self.samples is None or self.samples >= last:
            steps = [(x0.new_full((len(x0),), i + 1).long(), 1.0) for i in range(last)]
        else:
            # A step is drawn as often as its share of the log-SNR's fall, and counts the less for it.
            log_snr = schedule.log_snr(times).to(x0.dtype)
            fallen = (log_snr[0] - log_snr[1:]) / (log_snr[0] - log_snr[-1])
            share = fallen.diff(prepend=fallen.new_zeros(1))
            drawn = [torch.searchsorted(fallen, u).clamp(max=last - 1) for u in _spread(self.samples, x0, generator)]
            steps = [(i + 1, 1 / (self.samples * share[i])) for i in drawn]
        for i, weight in steps:
            now, then, eps = schedule.at(times[i], x0), schedule.at(times[i - 1], x0), normal_like(x0, generator)
            prediction = denoiser(now.alpha * x0 + now.sigma * eps, times[i], cond)
            nats += weight * step_kl(prediction, eps, now, then)
        return nats


def _spread(samples: int, x0: Tensor, generator: torch.Generator) -> list[Tensor]:
    """``samples`` uniform numbers an image, one in each of so many equal parts of [0, 1): a list of (n,)."""
    u = torch.rand(samples, len(x0), generator=generator, device=generator.device, dtype=x0.dtype).to(x0.device)
    return list((u + torch.arange(samples, device=x0.device)[:, None]) / samples)
