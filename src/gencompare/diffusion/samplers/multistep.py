r"""Multistep solvers of the probability-flow ODE: a higher order with one denoiser call a step.

Both solve the part that is linear in x exactly and carry the predicted image along as a polynomial in half the log-SNR
(their papers' lambda), which rises by h from t to s:

    x_s = sigma_s / sigma_t x_t + alpha_s int_0^h e^(u - h) x_0(u) du.

Where x_0 stands still, this is `DDIM`. So is the step into clean data, where h is infinite, and one more than `STRETCH`
times as long as the step before: a line through two points says nothing that far away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.samplers.base import Sampler, Step, steps_between
from gencompare.errors import UserError

STRETCH = 2.0


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(Sampler):
    r"""x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) (x_0 + h / (2 h') (x_0 - x_0')), primes for the step before.

    Lu et al. (2022), "DPM-Solver++: Fast Solver for Guided Sampling", algorithm 2. The first step has no slope.
    """

    order = 2

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        past: tuple[Tensor, Tensor] | None = None
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            x0, h = prediction.x0, (then.log_snr - now.log_snr) / 2
            image = x0
            if past and h <= STRETCH * past[0]:
                image = x0 + h / (2 * past[0]) * (x0 - past[1])
            past = h, x0
            yield Step(s, x := then.sigma / now.sigma * x - then.alpha * torch.expm1(-h) * image, prediction)


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    r"""A predictor with a line through x_0 at t and before, then a corrector with the parabola through x_0 at s too.

    Zhao et al. (2023), "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", UniPC-2
    in data prediction: their order p = 2 is the predictor's, and the corrector raises it by one (theorem 3.1). What the
    denoiser said of the predicted x_s serves the corrector and the next step, so that a step costs one call. The first
    step has one point less.

    Args:
        variant: their B(h): "bh1" is h, "bh2" is e^h - 1 (in data prediction, 1 - e^-h).
    """

    order = 3
    VARIANTS: ClassVar[tuple[str, ...]] = ("bh1", "bh2")
    variant: str = "bh2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in self.VARIANTS:
            raise UserError(f"sampler.variant={self.variant}: give one of {', '.join(self.VARIANTS)}.")

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        past: tuple[Tensor, Tensor] | None = None
        prediction = denoiser(x, times[0], cond)
        for _, s, now, then in steps_between(times, denoiser.schedule, x):
            x0, h = prediction.x0, (then.log_snr - now.log_snr) / 2
            c = -torch.expm1(-h)
            x = then.sigma / now.sigma * x + then.alpha * c * x0
            if then.sigma > 0:
                b = c if self.variant == "bh2" else h
                slope, bend, lift = torch.zeros_like(x0), 0.0, b / 2
                if past and h <= STRETCH * past[0]:
                    slope = (x0 - past[1]) / past[0]
                    # The integrals of u / h and (u / h)^2 against e^(u - h), and from them what the parabola weighs.
                    first = 1 - c / h
                    second = 1 - 2 * first / h
                    bend = (first - second) / (1 + past[0] / h)
                    lift = first - bend
                elif past:
                    lift = 0.0
                prediction = denoiser(x + then.alpha * b * h / 2 * slope, s, cond)
                x = x + then.alpha * (bend * h * slope + lift * (prediction.x0 - x0))
            past = h, x0
            yield Step(s, x, prediction)
