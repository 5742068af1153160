"""Solvers of the reverse SDE, and Langevin samplers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import (
    Sampler,
    Step,
    ancestral_step,
    linear_combination,
    read_on_host,
    select,
)
from gencompare.diffusion.schedules import GridValues, ScheduleValues
from gencompare.errors import UserError
from gencompare.rng import normal_like

MAX_LOG_SNR_STEP = 1.0
"""Largest increase of the log-SNR in one step of an SDE solver. Larger steps are `Ancestral` steps, whose noise has the
exact variance."""


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(Sampler):
    r"""Euler-Maruyama on the reverse SDE, with :math:`h = t - s` and f, g evaluated at t. Weak order 1.

    .. math:: x_s = x_t - h (f x_t - g^2 \nabla \log p(x_t)) + g \sqrt{h}\, z

    In terms of the log-SNR, :math:`g^2 h = r \sigma_t^2` with :math:`r = -h\, d\lambda / dt`. Song et al. (2021),
    "Score-Based Generative Modeling through SDEs", https://arxiv.org/abs/2011.13456.
    """

    order = 1

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(self._coefficients)
        for k, (t, s, _, _) in enumerate(grid.steps()):
            prediction = denoiser(x, t, cond)
            x = _apply_step(x, prediction, coefficients[k], generator)
            yield Step(s, x, prediction)

    @staticmethod
    def _coefficients(at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, ...]:
        """Compute the coefficients of x_t, x_0 and z."""
        h = (at_t.t - at_s.t).to(at_t.alpha.dtype)
        r = -h * at_t.dlog_snr_dt
        coef_x_t = 1 - h * at_t.dlog_alpha_dt - r
        euler_maruyama = coef_x_t, r * at_t.alpha, r.sqrt() * at_t.sigma
        use_ancestral = (r > MAX_LOG_SNR_STEP) | (at_s.sigma == 0)
        return select(use_ancestral, ancestral_step(at_t, at_s), euler_maruyama)


@dataclass(frozen=True, kw_only=True)
class ReverseDiffusion(Sampler):
    r"""The reverse diffusion sampler: :math:`x_s = (2 - a) x_t + b^2 \nabla \log p(x_t) + b z`. Weak order 1.

    The reverse SDE is discretised like the forward process :math:`x_t = a x_s + b z`, with
    :math:`a = \alpha_t / \alpha_s` and :math:`b^2 = \sigma_t^2 - a^2 \sigma_s^2`. Song et al. (2021), "Score-Based
    Generative Modeling through SDEs", appendix E, eq. 46, and appendix F (there a = sqrt(1 - beta) for VP and 1 for
    VE), https://arxiv.org/abs/2011.13456.
    """

    order = 1

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(reverse_diffusion_step)
        for k, (t, s, _, _) in enumerate(grid.steps()):
            prediction = denoiser(x, t, cond)
            x = _apply_step(x, prediction, coefficients[k], generator)
            yield Step(s, x, prediction)


def reverse_diffusion_step(at_t: ScheduleValues, at_s: ScheduleValues) -> tuple[Tensor, ...]:
    """Compute a `ReverseDiffusion` step from t to s: the coefficients of x_t, x_0 and standard normal noise."""
    r = at_s.log_snr - at_t.log_snr
    c = -torch.expm1(-r)  # b^2 / sigma_t^2
    reverse_diffusion = 2 - at_t.alpha / at_s.alpha - c, c * at_t.alpha, c.sqrt() * at_t.sigma
    return select(r > MAX_LOG_SNR_STEP, ancestral_step(at_t, at_s), reverse_diffusion)


def _apply_step(
    x: Tensor, prediction: Prediction, coefficients: tuple[Tensor, ...], generator: torch.Generator
) -> Tensor:
    """Compute coef_x_t x + coef_x0 x_0 + std z. (The score is written in x and x_0, as sigma eps = x - alpha x_0.)"""
    tensors = x, prediction.x0, normal_like(x, generator)
    return linear_combination(*zip(coefficients, tensors, strict=True))


@dataclass(frozen=True, kw_only=True)
class PredictorCorrector(Sampler):
    r"""Langevin corrector steps at time t, then a `ReverseDiffusion` predictor step to s.

    A corrector step is :math:`x + k \sigma^2 \nabla \log p(x) + \sqrt{2 k}\, \sigma z` with
    :math:`k \sigma^2 = 2 a\, (snr\, \|z\| / \|\nabla \log p(x)\|)^2` and :math:`a = (\alpha_t / \alpha_s)^2`, which is
    1 for VE and 1 - beta for VP. Song et al. (2021), "Score-Based Generative Modeling through SDEs", algorithms 2 to 5,
    https://arxiv.org/abs/2011.13456.

    Two choices differ from the paper: k is computed for each image and not as a batch average, so that an image does
    not depend on the rest of the batch; and k is at most 1, because the score vanishes near a mode. As in the paper's
    code, the corrector comes first, so it corrects the prior but not the final image.

    Args:
        num_steps: number of predictor steps.
        num_corrector_steps: number of Langevin steps per predictor step.
        snr: ratio of the norms of the score term and the noise term of a Langevin step.
    """

    order = None
    num_corrector_steps: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_corrector_steps < 1:
            raise UserError(
                f"sampler.num_corrector_steps={self.num_corrector_steps} must be at least 1; use ReverseDiffusion to"
                " sample without a corrector."
            )
        if not self.snr > 0:
            raise UserError(f"sampler.snr={self.snr} must be positive.")

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(reverse_diffusion_step)
        for j, (t, s, at_t, at_s) in enumerate(grid.steps()):
            for _ in range(self.num_corrector_steps):
                prediction, z = denoiser(x, t, cond), normal_like(x, generator)
                # ||score|| = ||eps|| / sigma
                ratio = _norm(z) / _norm(prediction.eps).clamp(min=torch.finfo(x.dtype).tiny)
                k = 2 * (at_t.alpha / at_s.alpha * self.snr * ratio) ** 2
                x = langevin_step(x, prediction, at_t, k.clamp(max=1.0), z)
            prediction = denoiser(x, t, cond)
            x = _apply_step(x, prediction, coefficients[j], generator)
            yield Step(s, x, prediction)


@dataclass(frozen=True, kw_only=True)
class AnnealedLangevin(Sampler):
    r"""Annealed Langevin dynamics: Langevin steps at each noise level, from the largest to the smallest.

    A Langevin step is :math:`x + \tfrac{\delta}{2} \sigma^2 \nabla \log p(x) + \sqrt{\delta}\, \sigma z` with
    :math:`\delta` = ``step_size``; the paper's :math:`\alpha_i = \epsilon \sigma_i^2 / \sigma_L^2` is
    :math:`\delta \sigma_i^2`. Song and Ermon (2019), "Generative Modeling by Estimating Gradients of the Data
    Distribution", algorithm 1, https://arxiv.org/abs/1907.05600. If alpha < 1, the levels are those of p(x_t): from one
    level to the next, the weight of the predicted image increases by :math:`\alpha_s - \alpha_t`, and the noise is
    unchanged.

    The noise in x lags behind the levels: with :math:`k = \delta / 2`, M Langevin steps per level and levels a factor g
    apart, its variance over :math:`\sigma^2` converges to

    .. math:: r = \frac{(1 - a)\, b}{1 - a g^2}, \qquad a = (1 - k)^{2 M}, \qquad b = \frac{1}{1 - k / 2}

    (technique 4 of Song and Ermon 2020, solved for the steady state, https://arxiv.org/abs/2006.09011). A network
    trained at sigma therefore sees noise of standard deviation :math:`\sqrt r\, \sigma`.

    Args:
        num_steps: number of noise levels.
        num_langevin_steps: M, the number of Langevin steps per level.
        step_size: :math:`\epsilon / \sigma_L^2`, which must be below 4, or Langevin steps diverge. The paper's 2e-5 /
            0.01^2 is 0.2.
        denoise: use one more network call to return the predicted image instead of a sample with the noise of the last
            level (Jolicoeur-Martineau et al. 2021, "Adversarial score matching and improved sampling for image
            generation", https://arxiv.org/abs/2009.05475).
    """

    order = None
    num_langevin_steps: int = 100
    step_size: float = 0.2
    denoise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_langevin_steps < 1:
            raise UserError(f"sampler.num_langevin_steps={self.num_langevin_steps} must be at least 1.")
        if not 0 < self.step_size < 4:
            raise UserError(f"sampler.step_size={self.step_size} must be between 0 and 4; larger steps diverge.")

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        noise, _ = read_on_host(grid)
        for k, (t, s, at_t, at_s) in enumerate(grid.steps()):
            prediction = denoiser(x, t, cond)
            for i in range(self.num_langevin_steps):
                if i:
                    prediction = denoiser(x, t, cond)
                x = langevin_step(x, prediction, at_t, self.step_size / 2, normal_like(x, generator))
            if self.denoise and noise[k + 1] == 0:
                prediction = denoiser(x, t, cond)
                x = prediction.x0
            else:
                x = x + (at_s.alpha - at_t.alpha) * prediction.x0
            yield Step(s, x, prediction)


def langevin_step(x: Tensor, prediction: Prediction, at: ScheduleValues, k: Tensor | float, z: Tensor) -> Tensor:
    r"""Compute :math:`x + k \sigma^2 \nabla \log p(x) + \sqrt{2 k}\, \sigma z`.

    The score is :math:`-\epsilon / \sigma`. For small k, the step leaves p(x_t) invariant.
    """
    return x - k * at.sigma * prediction.eps + (2 * k) ** 0.5 * at.sigma * z


def _norm(x: Tensor) -> Tensor:
    """Compute the norm of each image, (n, 1, ..., 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
