r"""Search for the times at which a solver with few steps comes closest to the exact solution."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from scipy.optimize import minimize
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.multistep_samplers import AdamsBashforth, DPMSolverPP2M, UniPC
from gencompare.diffusion.ode_samplers import Euler
from gencompare.diffusion.samplers import DDIM, Sampler
from gencompare.diffusion.times import KarrasGrid, LogSNRGrid, TabulatedGrid, TimeGrid, UniformGrid
from gencompare.errors import UserError

INITIAL_GRIDS: tuple[TimeGrid, ...] = (UniformGrid(), LogSNRGrid(), KarrasGrid())
"""Grids that the search improves on. It starts from the best of them."""
FINITE_DIFFERENCE_STEP = 1e-2
"""Relative change of a step size in the finite differences. Rounding in float32 hides much smaller ones."""


@dataclass(frozen=True)
class Problem:
    """Noise, and the images to which the probability-flow ODE maps it."""

    denoiser: DenoiserProtocol
    noise: Tensor
    """Samples of the prior of unit scale: standard normal, (n, C, H, W)."""
    targets: Tensor
    """Solutions that start from this noise, (n, C, H, W)."""
    cond: Cond

    @torch.no_grad()
    def error(self, sampler: Sampler) -> float:
        """Return the root mean squared difference between samples and targets; infinity if sampling fails."""
        try:
            images = solve(sampler, self.denoiser, self.noise, self.cond)
        except UserError:  # not finite, or duplicate times
            return math.inf
        return float((images - self.targets).double().square().mean().sqrt())


@dataclass(frozen=True)
class OptimizedSampler:
    """A sampler with optimised times."""

    sampler: Sampler
    error: float
    """Root mean squared difference from the solution on the validation noise."""
    grid_errors: dict[str, float]
    """The same of the grids that need no search, by name."""


def solve(sampler: Sampler, denoiser: DenoiserProtocol, noise: Tensor, cond: Cond) -> Tensor:
    """Run a deterministic sampler from standard normal ``noise`` (n, C, H, W), scaled to its first time."""
    times = sampler.times(denoiser.schedule).to(noise.dtype)
    x = noise * denoiser.schedule.prior_std_at(times[0].to(noise.device))
    generator = torch.Generator(noise.device)  # a deterministic sampler draws nothing
    return sampler.sample(denoiser, x, cond, generator=generator, times=times)


def check_optimizable(sampler: Sampler) -> None:
    """Raise `UserError` unless the sampler is deterministic and calls the network once a step."""
    one_call = isinstance(sampler, (DDIM, Euler, DPMSolverPP2M, UniPC, AdamsBashforth))
    if not one_call or getattr(sampler, "eta", 0):
        raise UserError(
            f"The times of {type(sampler).__name__} cannot be optimised: choose deterministic samplers with one network"
            " call a step, task.samplers=[ddim,euler,dpmpp_2m,unipc,deis]."
        )


def optimize_times(sampler: Sampler, train: Problem, validation: Problem, *, max_iterations: int) -> OptimizedSampler:
    r"""Find the times that minimise the error of ``sampler`` in its ``num_steps``.

    The first time is t_max, and step k has the size

    .. math:: t_k - t_{k+1} = (t_{max} - t_{min}) \frac{d_k e^{\theta_k}}{\sum_j d_j e^{\theta_j}},

    where :math:`d_k` are the step sizes of the best grid among `INITIAL_GRIDS`, and the last step, to t_min, is
    replaced by a step to clean data. L-BFGS minimises the logarithm of the error over :math:`\theta` with finite
    differences, since the coefficients of the solvers have no gradients at clean data. The result is the best on the
    validation noise of the times found and the grids.

    This is the objective of Tong et al. (2025), "Learning to discretize denoising diffusion ODEs", section 4,
    https://arxiv.org/abs/2405.15506, in pixels and without changing the noise.

    Args:
        sampler: a solver that `check_optimizable` accepts; its grid is ignored.
        train: the problem that the search minimises.
        validation: the problem that the choice between times is based on.
        max_iterations: maximum number of iterations of L-BFGS, each of about ``num_steps + 1`` runs of the sampler.
    """
    check_optimizable(sampler)
    schedule = train.denoiser.schedule

    def with_times(times: Tensor) -> Sampler:
        return replace(sampler, grid=TabulatedGrid(times.tolist()))

    plain, starts = {}, []
    for grid in INITIAL_GRIDS:
        with suppress(UserError):  # the schedule has too few steps
            plain[type(grid).__name__] = with_times(grid(schedule, sampler.num_steps)[:-1])
            starts.append(grid(schedule, sampler.num_steps + 1)[:-2].double())
    if not starts:
        raise UserError(f"The schedule has no {sampler.num_steps + 1} times to choose from: use fewer calls.")
    start = min(starts, key=lambda times: train.error(with_times(times)))
    steps = -torch.cat([start, start.new_tensor([schedule.t_min])]).diff()

    def times_at(theta: list[float]) -> Tensor:
        sizes = steps * torch.tensor(theta, dtype=steps.dtype).exp()
        sizes = sizes / sizes.sum() * (schedule.t_max - schedule.t_min)
        times = schedule.t_max - torch.cat([sizes.new_zeros(1), sizes[:-1].cumsum(0)])
        return times.clamp(min=schedule.t_min)  # against rounding

    def objective(theta: list[float]) -> float:
        error = train.error(with_times(times_at(theta)))
        return math.log(max(error, 1e-12)) if error < math.inf else 1e3

    found = minimize(
        objective,
        [0.0] * len(steps),
        method="L-BFGS-B",
        bounds=[(-3, 3)] * len(steps),
        options={"maxiter": max_iterations, "eps": FINITE_DIFFERENCE_STEP},
    )
    optimized = with_times(times_at(found.x.tolist()))
    grid_errors = {name: validation.error(candidate) for name, candidate in plain.items()}
    errors = [(validation.error(optimized), optimized), *zip(grid_errors.values(), plain.values(), strict=True)]
    error, best = min(errors, key=lambda pair: pair[0])
    return OptimizedSampler(best, error, grid_errors)
