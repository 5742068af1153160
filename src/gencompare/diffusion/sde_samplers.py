"""Solvers of the reverse SDE, and Langevin samplers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import Sampler, Step, posterior, steps_between
from gencompare.diffusion.schedules import ScheduleValues
from gencompare.errors import UserError
from gencompare.rng import normal_like

LONG = 1.0


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(Sampler):
    r"""x_s = x_t - h (f x_t - g^2 score) + g sqrt(h) z, with h = t - s and f, g at t. Weak order 1.

    g^2 h = r sigma^2, where r = -h d lambda / dt is what the log-SNR would rise by at the slope that it has at t.
    """

    order = 1

    def walk(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            h = (t - s).to(x.dtype)
            r = -h * now.log_snr_slope
            kept = 1 - h * now.log_alpha_slope - r
            euler = kept, r * now.alpha, r.sqrt() * now.sigma
            long = (r > LONG) | (then.sigma == 0)
            yield Step(s, x := _moved(x, prediction, _either(long, posterior(now, then), euler), generator), prediction)


@dataclass(frozen=True, kw_only=True)
class ReverseDiffusion(Sampler):
    r"""x_s = (2 - a) x_t + b^2 score + b z, where x_t = a x_s + b z is the forward step. Weak order 1.

    a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2: the reverse SDE in the steps in which the forward one was
    taken (Song et al. 2021, appendix E, eq. 46; appendix F with their a = sqrt(1 - beta) for VP, 1 for VE).
    """

    order = 1

    def walk(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            yield Step(s, x := reverse_diffusion(x, prediction, now, then, generator), prediction)


def reverse_diffusion(
    x: Tensor, prediction: Prediction, now: ScheduleValues, then: ScheduleValues, generator: torch.Generator
) -> Tensor:
    """One step of `ReverseDiffusion`."""
    rise = then.log_snr - now.log_snr
    c = -torch.expm1(-rise)  # = b^2 / sigma_t^2
    reverse = 2 - now.alpha / then.alpha - c, c * now.alpha, c.sqrt() * now.sigma
    return _moved(x, prediction, _either(rise > LONG, posterior(now, then), reverse), generator)


def _moved(x: Tensor, prediction: Prediction, by: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """kept x + gain x_0 + std z. (sigma eps = x - alpha x_0 has the score written in x and x_0.)"""
    kept, gain, std = by
    return kept * x + gain * prediction.x0 + std * normal_like(x, generator)


def _either(condition: Tensor, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Chosen on the device: the host need not wait for it.
    return tuple(torch.where(condition, a, b) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True, kw_only=True)
class PredictorCorrector(Sampler):
    r"""Langevin steps at time t, then a step of `ReverseDiffusion` to s (Song et al. 2021, algorithms 2 to 5).

    A Langevin step is x + k sigma^2 score + sqrt(2 k) sigma z, of a length that is found for each image by itself, so
    that an image does not depend on those drawn with it: k sigma^2 = 2 a (snr ||z|| / ||score||)^2, with a =
    (alpha_t / alpha_s)^2, which is 1 in VE and 1 - beta in VP. k is at most 1: near a mode the score vanishes, and the
    paper's step, averaged over a batch there, would have no bound.

    As in the paper's code, the corrector comes first; so the prior is corrected, and the image is not.

    Args:
        steps: predictor steps.
        corrector_steps: Langevin steps at each time.
        snr: length of the score's part of a Langevin step over that of its noise.
    """

    order = None
    corrector_steps: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.corrector_steps < 1:
            raise UserError(
                f"sampler.corrector_steps={self.corrector_steps}: give at least 1 (ReverseDiffusion has none)."
            )
        if not self.snr > 0:
            raise UserError(f"sampler.snr={self.snr}: give a positive number.")

    def walk(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            for _ in range(self.corrector_steps):
                prediction, z = denoiser(x, t, cond), normal_like(x, generator)
                # ||score|| = ||eps|| / sigma
                ratio = _norm(z) / _norm(prediction.eps).clamp(min=torch.finfo(x.dtype).tiny)
                k = 2 * (now.alpha / then.alpha * self.snr * ratio) ** 2
                x = langevin_step(x, prediction, now, k.clamp(max=1.0), z)
            prediction = denoiser(x, t, cond)
            yield Step(s, x := reverse_diffusion(x, prediction, now, then, generator), prediction)


@dataclass(frozen=True, kw_only=True)
class AnnealedLangevin(Sampler):
    r"""Langevin steps x + step_size sigma^2 / 2 score + sqrt(step_size) sigma z at each time of the grid.

    Song and Ermon (2019), "Generative Modeling by Estimating Gradients of the Data Distribution", algorithm 1: their
    alpha_i = eps sigma_i^2 / sigma_L^2 is ``step_size`` sigma_i^2. Where alpha < 1 the levels are those of p(x_t), and
    from one to the next the predicted image grows by alpha_s - alpha_t, while the noise is left as it is.

    The noise in x lags behind the levels: with k = step_size / 2 and levels a factor g apart, its variance over sigma^2
    settles at r = (1 - a) b / (1 - a g^2), a = (1 - k)^(2 steps_per_level), b = 1 / (1 - k / 2) (technique 4 of Song
    and Ermon 2020, solved for the steady state). A network that was trained at sigma sees sqrt(r) of it.

    Args:
        steps: levels.
        steps_per_level: Langevin steps at each.
        step_size: eps / sigma_L^2, below 4, from where on Langevin steps diverge. The paper's 2e-5 / 0.01^2 is 0.2.
        denoise: end in the predicted image, one more network call, in place of one with the last level's noise
            (Jolicoeur-Martineau et al. 2021, "Adversarial score matching", section 3.1).
    """

    order = None
    steps_per_level: int = 100
    step_size: float = 0.2
    denoise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_per_level < 1:
            raise UserError(f"sampler.steps_per_level={self.steps_per_level}: give at least 1.")
        if not 0 < self.step_size < 4:
            raise UserError(
                f"sampler.step_size={self.step_size}: give a number between 0 and 4; beyond, steps diverge."
            )

    def walk(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        for t, s, now, then in steps_between(times, denoiser.schedule, x):
            prediction = denoiser(x, t, cond)
            for i in range(self.steps_per_level):
                if i:
                    prediction = denoiser(x, t, cond)
                x = langevin_step(x, prediction, now, self.step_size / 2, normal_like(x, generator))
            if self.denoise and then.sigma == 0:
                prediction = denoiser(x, t, cond)
                x = prediction.x0
            else:
                x = x + (then.alpha - now.alpha) * prediction.x0
            yield Step(s, x, prediction)


def langevin_step(x: Tensor, prediction: Prediction, at: ScheduleValues, k: Tensor | float, z: Tensor) -> Tensor:
    """x + k sigma^2 score + sqrt(2 k) sigma z, which leaves p(x_t) unchanged for small k; the score is -eps / sigma."""
    return x - k * at.sigma * prediction.eps + (2 * k) ** 0.5 * at.sigma * z


def _norm(x: Tensor) -> Tensor:
    """Length of each image, (n, 1, ..., 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
