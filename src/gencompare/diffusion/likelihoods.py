"""Bits/dim of a diffusion model: the variational bound, and the density of the probability-flow ODE."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torchdiffeq import odeint

from gencompare.diffusion.denoiser import ClipX0, Cond, DenoiserProtocol
from gencompare.diffusion.objectives import Pixels, log_normal
from gencompare.diffusion.variational_objectives import chain, prior_kl, reconstruction, step_kl
from gencompare.errors import UserError
from gencompare.rng import normal_like


class LikelihoodMethod(ABC):
    """Bits/dim of images under a denoiser."""

    kind: ClassVar[str]
    """``bound`` (never better than the truth, in expectation) or ``estimate``."""

    @abstractmethod
    def terms(
        self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, pixels: Pixels, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """By name what adds up to -log2 p(x_0) per real value, (n,) each, for images (n, C, H, W); random numbers from
        ``generator`` alone."""

    def __call__(
        self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, pixels: Pixels, generator: torch.Generator
    ) -> Tensor:
        """-log2 p(x_0) per real value, (n,)."""
        return torch.stack(list(self.terms(denoiser, x0, cond, pixels, generator).values())).sum(0)


@dataclass(frozen=True)
class ODELikelihood(LikelihoodMethod):
    r"""-log2 p(x_0) by the change of variables along the probability-flow ODE (Song et al. 2021, appendix D.2).

    Under every schedule alike it is integrated over lambda, in z = x_t / sqrt(alpha^2 + sigma^2), whose size changes
    little: with a^2 = sigmoid(lambda) and s^2 = sigmoid(-lambda),

        dz / d lambda = (s^2 z - s eps_theta) / 2,    d log p(z) / d lambda = -tr(d (dz / d lambda) / dz),

    from the data, taken for x_t / alpha at t_min, to N(0, prior_std^2) at t_max, by the adaptive method of Dormand and
    Prince (the step is chosen for the whole batch). The trace is estimated with one random vector of +-1 (Hutchinson;
    unbiased) or summed value by value.

    Images with levels are given uniform noise of one level's width first, so that in expectation their probability is
    not overstated (Theis et al. 2016, "A note on the evaluation of generative models", section 3.1). It stays an
    estimate: noise below t_min is left out, the solver errs by ``rtol``, and what the network makes of padding counts.

    Args:
        rtol, atol: relative and absolute tolerance of the solver.
        exact_trace: sum the trace value by value: one more backward pass for each value of an image.
    """

    kind: ClassVar[str] = "estimate"

    rtol: float = 1e-5
    atol: float = 1e-5
    exact_trace: bool = False

    def __post_init__(self) -> None:
        if self.rtol <= 0 or self.atol <= 0:
            raise UserError(f"bits.ode.rtol={self.rtol}, bits.ode.atol={self.atol}: give positive numbers.")

    @torch.no_grad()
    def terms(
        self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, pixels: Pixels, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """``density`` alone, in bits/dim, (n,)."""
        nats = x0.new_zeros(len(x0))
        values = x0[0].numel()
        if pixels.levels is not None:
            width = 2 / (pixels.levels - 1)
            noise = torch.rand(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype).to(x0.device)
            x0, nats = x0 + width * (noise - 0.5), nats - values * math.log(width)
        return {"density": pixels.bits(nats - self.log_density(denoiser, x0, cond, generator))}

    @torch.no_grad()
    def log_density(self, denoiser: DenoiserProtocol, x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        """log p(x) in nats of points (n, C, H, W), (n,)."""
        schedule, values = denoiser.schedule, x[0].numel()
        probe = torch.randint(2, x.shape, generator=generator, device=generator.device).to(x) * 2 - 1

        def speed(log_snr: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            t = schedule.t_from_log_snr(log_snr.to(x.dtype))
            at = schedule.at(t, x)
            length = (at.alpha**2 + at.sigma**2).sqrt()
            with torch.enable_grad():
                x_t = (length * state[0]).detach().requires_grad_()
                eps = denoiser(x_t, t, cond).eps
                trace = _exact_trace(eps, x_t) if self.exact_trace else _dot(_pulled_back(eps, x_t, probe), probe)
            s2 = torch.sigmoid(-log_snr).to(x.dtype)
            s = s2.sqrt()
            return (s2 * state[0] - s * eps.detach()) / 2, (s2 * values - s * length * trace) / 2

        ends = schedule.log_snr(x.new_tensor([schedule.t_min, schedule.t_max]))
        last = schedule.at(x.new_full((), schedule.t_max), x)
        start = (torch.sigmoid(ends[0]).sqrt() * x, x.new_zeros(len(x)))
        try:
            path, widened = odeint(speed, start, ends.double(), rtol=self.rtol, atol=self.atol, method="dopri5")
        except AssertionError as error:
            raise UserError(
                f"The probability-flow ODE could not be followed ({error}): the network's outputs are not finite, or"
                " change too fast for bits.ode.rtol and bits.ode.atol."
            ) from error
        # log p of z at the end, of z at the start, and of x itself, which is z over sqrt(sigmoid(lambda)).
        length = (last.alpha**2 + last.sigma**2).sqrt()
        std = torch.as_tensor(schedule.prior_std, device=x.device, dtype=x.dtype)
        final = log_normal(length * path[-1], torch.zeros_like(x), std).flatten(1).sum(1) + values * length.log()
        return final + widened[-1] + values * logsigmoid(ends[0]) / 2


def _pulled_back(eps: Tensor, x: Tensor, vector: Tensor) -> Tensor:
    """vector^T d eps / dx, like x."""
    found = torch.autograd.grad(eps, x, vector, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _exact_trace(eps: Tensor, x: Tensor) -> Tensor:
    """sum_i d eps_i / d x_i, (n,)."""
    trace = x.new_zeros(len(x))
    for i in range(x[0].numel()):
        unit = torch.zeros_like(x).flatten(1)
        unit[:, i] = 1
        trace += _dot(_pulled_back(eps, x, unit.view_as(x)), unit.view_as(x))
    return trace


@dataclass(frozen=True)
class VLBLikelihood(LikelihoodMethod):
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
        self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, pixels: Pixels, generator: torch.Generator
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

    def _continuous(self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
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
        self, denoiser: DenoiserProtocol, times: Tensor, x0: Tensor, cond: Cond, generator: torch.Generator
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
