"""Solvers of the probability-flow ODE, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.samplers.base import Sampler, Step, steps_between
from gencompare.diffusion.schedules import Scales


@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    r"""Heun's method on the probability-flow ODE d(x / alpha) / d(sigma / alpha) = eps.

    Karras et al. (2022), "Elucidating the Design Space", algorithm 1, which has alpha = 1. Two denoiser calls a step.
    Where sigma / alpha falls more than `FURTHEST`-fold in one step the mean of two slopes says nothing, and the step is
    Euler's, with one call: the step into clean data, and the first one of schedules that end in almost pure noise.
    """

    order = 2
    FURTHEST: ClassVar[float] = 100.0

    def walk(
        self, denoiser: Denoises, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            start, slope = x, prediction.eps
            x = along(start, slope, now, then)
            if then.sigma / then.alpha * self.FURTHEST >= now.sigma / now.alpha:
                prediction = denoiser(x, s, cond)
                x = along(start, (slope + prediction.eps) / 2, now, then)
            yield Step(s, x, prediction)


def along(x: Tensor, slope: Tensor, now: Scales, then: Scales) -> Tensor:
    """x / alpha moved along ``slope`` by the change of sigma / alpha, times the new alpha."""
    return then.alpha / now.alpha * x + (then.sigma - then.alpha * now.sigma / now.alpha) * slope
