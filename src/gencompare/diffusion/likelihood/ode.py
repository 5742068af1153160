"""The density that the probability-flow ODE gives a point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torchdiffeq import odeint

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.likelihood.base import LikelihoodMethod
from gencompare.diffusion.pixels import Pixels, log_normal
from gencompare.errors import UserError


@dataclass(frozen=True)
class ODE(LikelihoodMethod):
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
        self, denoiser: Denoises, x0: Tensor, cond: Cond, pixels: Pixels, generator: torch.Generator
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
    def log_density(self, denoiser: Denoises, x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
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
