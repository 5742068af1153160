"""Variational bounds of diffusion models: their terms, and training objectives in continuous and discrete time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gencompare.diffusion.data_likelihood import DataLikelihood
from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.objectives import (
    NoisyBatch,
    Objective,
    SimpleWeighting,
    Weighting,
    check_trains_last_step,
)
from gencompare.diffusion.parameterizations import Parameterization, Prediction
from gencompare.diffusion.schedules import NO_SIGNAL, NoiseSchedule, ScheduleValues, VariancePreserving
from gencompare.diffusion.times import UniformGrid
from gencompare.errors import UserError
from gencompare.rng import RandomSource


def prior_kl(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    r"""Compute :math:`KL(N(\alpha x_0, \sigma^2) \| N(0, prior\_std^2))` at t_max in nats, (n,)."""
    at, std = schedule.at(x0.new_full((), schedule.t_max), x0), schedule.prior_std
    ratio = (at.sigma / std) ** 2
    return 0.5 * ((at.alpha * x0 / std).square() + ratio - 1 - ratio.log()).flatten(1).sum(1)


def step_kl(
    prediction: Prediction, eps: Tensor, at_t: ScheduleValues, at_s: ScheduleValues, x0: Tensor | None = None
) -> Tensor:
    r"""Compute :math:`KL(q(x_s | x_t, x_0) \| p(x_s | x_t))` in nats, (n,), for s < t.

    The means differ by :math:`\alpha_s c\, (x_0 - \hat x_0)` with :math:`c = 1 - SNR_t / SNR_s`, and q has variance
    :math:`c \sigma_s^2`. If p has the same variance, the divergence is

    .. math:: E / 2, \qquad E = (SNR_s / SNR_t - 1)\, \|\epsilon - \epsilon_\theta\|^2.

    If the variance of p is larger by the factor :math:`R^v`, with :math:`R = \sigma_t^2 / \sigma_s^2` and v the
    ``variance_fraction``, the divergence is :math:`(v \log R + R^{-v} (1 + E) - 1) / 2`, summed over the values of an
    image. If :math:`x_t` is pure noise, :math:`E = (SNR_s - SNR_t)\, \|x_0 - \hat x_0\|^2` is used instead, which needs
    the images ``x0``.
    """
    kl = torch.expm1(at_s.log_snr - at_t.log_snr) * (eps - prediction.eps).square()
    if x0 is not None:
        from_x0 = (at_s.log_snr.exp() - at_t.log_snr.exp()) * (x0 - prediction.x0).square()
        kl = torch.where(at_t.log_snr < NO_SIGNAL, from_x0, kl)
    if prediction.variance_fraction is not None:
        log_ratio = prediction.variance_fraction * 2 * torch.log(at_t.sigma / at_s.sigma)  # v log R
        kl = log_ratio + torch.expm1(-log_ratio) + torch.exp(-log_ratio) * kl
    return 0.5 * kl.flatten(1).sum(1)


def reconstruction_nll(
    likelihood: DataLikelihood,
    x0: Tensor,
    x_1: Tensor,
    prediction: Prediction | None,
    at: ScheduleValues,
    at_second: ScheduleValues | None = None,
) -> Tensor:
    r"""Compute :math:`-\log p(x_0 | x_1)` in nats, (n,), where x_1 is x_t at the first time (see `DataLikelihood`)."""
    return -likelihood.log_prob(x0, x_1, prediction, at, at_second)


def second_values(schedule: NoiseSchedule, times: Tensor, x0: Tensor) -> ScheduleValues | None:
    """Return the schedule values at the second of the times of a bound, if there is one."""
    return schedule.at(times[1], x0) if len(times) > 1 else None


def chain_times(schedule: NoiseSchedule, num_timesteps: int | None) -> Tensor:
    """Return the times of ``num_timesteps`` steps in increasing order, (T,). If None, return all times of a discrete
    schedule."""
    if num_timesteps is None:
        return schedule.require_discrete_times()
    return UniformGrid()(schedule, num_timesteps)[:-1].flip(0)


@dataclass(frozen=True)
class ContinuousVLB(Objective):
    r"""The variational bound on :math:`-\log p(x_0)` in continuous time, in bits/dim.

    .. math::
        \underbrace{KL(q(x_T | x_0) \| p(x_T))}_{prior}
        \underbrace{- \tfrac{t_{max} - t_{min}}{2}\, E[\lambda'_t\, \|\epsilon - \epsilon_\theta(x_t)\|^2]}_{diffusion}
        + \underbrace{E[-\log p(x_0 | x_1)]}_{reconstruction}

    :math:`x_T` and :math:`x_1` are x_t at t_max and t_min. Times are uniform and stratified. :math:`p(x_0 | x_1)` is
    the decoder of ``likelihood``, without a network call. Kingma et al. (2021), "Variational Diffusion Models", eq. 11
    and 17, https://arxiv.org/abs/2107.00630.

    The bound depends only on the endpoints of lambda, not on its shape in between (section 5.1). A learned schedule is
    trained jointly: its endpoints minimise the bound, and its shape minimises the variance of the diffusion term D, by
    the gradient of :math:`E[D^2]` (appendix I.2).

    Args:
        likelihood: p(x_0 | x_1); set by `with_likelihood`.
    """

    trains_schedule: ClassVar[bool] = True

    likelihood: DataLikelihood | None = None

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        if any(True for _ in schedule.parameters()) and not isinstance(schedule, VariancePreserving):
            raise UserError(
                f"{type(schedule).__name__} cannot be learned with the bound, since it does not preserve variance."
            )

    def check_likelihood(self, likelihood: DataLikelihood, schedule: NoiseSchedule) -> None:
        remedy = "model/objective=vlb_discrete model.objective.num_timesteps=1000"
        likelihood.check_steps(None, "model.objective", remedy)

    def with_likelihood(self, likelihood: DataLikelihood) -> Objective:
        return replace(self, likelihood=likelihood)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        assert self.likelihood is not None, "call with_likelihood() first"
        schedule, likelihood = denoiser.schedule, self.likelihood
        time_range = schedule.t_max - schedule.t_min
        t = schedule.t_min + time_range * rng.stratified()
        learned = any(p.requires_grad for p in schedule.parameters())
        at = LearnedScheduleGradients(schedule, t, x0) if learned else schedule.at(t, x0)
        batch = NoisyBatch.make(x0, rng.normal(x0.shape[1:]).to(x0.dtype), t, at)
        out = denoiser.output(batch.x_t, t, at, cond)
        error = batch.squared_eps_error(denoiser, out).flatten(1).sum(1)
        diffusion = likelihood.bits_per_dim(-0.5 * time_range * at.dlog_snr_dt.flatten() * error)
        if isinstance(at, LearnedScheduleGradients):
            at.train_shape_on_square_of(diffusion)

        at_t_min = schedule.at(x0.new_full((), schedule.t_min), x0)
        x_1 = at_t_min.alpha * x0 + at_t_min.sigma * rng.normal(x0.shape[1:]).to(x0.dtype)
        reconstruction = likelihood.bits_per_dim(reconstruction_nll(likelihood, x0, x_1, None, at_t_min))
        prior = likelihood.bits_per_dim(prior_kl(schedule, x0))
        terms = {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction}
        return {"loss": prior + diffusion + reconstruction, **{name: term.detach() for name, term in terms.items()}}


class LearnedScheduleGradients(ScheduleValues):
    r"""Values of a learned schedule at given times, with separate gradients for its endpoints and its shape.

    The log-SNR is written as :math:`\lambda_t = \lambda_0 + (\lambda_1 - \lambda_0)\, s(t)`, where s does not depend on
    the endpoints, nor the endpoints on s. The schedule must preserve variance.
    """

    def __init__(self, schedule: NoiseSchedule, t: Tensor, x: Tensor) -> None:
        super().__init__(schedule, t, x)
        self._log_snr_0 = schedule.log_snr(t.new_full((), schedule.t_min))
        self._log_snr_range = schedule.log_snr(t.new_full((), schedule.t_max)) - self._log_snr_0
        at = schedule.at(t)
        self._s = (at.log_snr - self._log_snr_0) / self._log_snr_range
        self._ds_dt = at.dlog_snr_dt / self._log_snr_range

    def train_shape_on_square_of(self, loss: Tensor) -> None:
        """Train the shape s on ``loss``^2 instead of ``loss`` (n,); other gradients are unchanged."""
        for shape in (self._s, self._ds_dt):
            if shape.requires_grad:
                shape.register_hook(lambda gradient: (2 * loss.detach() * gradient).to(gradient))

    @cached_property
    def _logs(self) -> tuple[Tensor, Tensor]:
        log_snr = self._log_snr_0 + self._log_snr_range * self._s
        return logsigmoid(log_snr) / 2, log_snr

    @cached_property
    def dlog_snr_dt(self) -> Tensor:
        return self._broadcast(self._log_snr_range * self._ds_dt)

    @cached_property
    def dlog_alpha_dt(self) -> Tensor:
        return self.dlog_snr_dt * torch.sigmoid(-self.log_snr) / 2


@dataclass(frozen=True)
class DiscreteVLB(Objective):
    r"""The variational bound on :math:`-\log p(x_0)` of a model of T steps, in bits/dim.

    .. math::
        KL(q(x_T | x_0) \| p(x_T)) + T\, E_i[L_i], \qquad
        L_i = KL(q(x_{i-1} | x_i, x_0) \| p(x_{i-1} | x_i)), \quad L_1 = -\log p(x_0 | x_1),

    with one random step i per image. Ho et al. (2020), eq. 5, https://arxiv.org/abs/2006.11239; with `LearnedVariance`,
    this is L_vlb of Nichol and Dhariwal (2021), eq. 4, https://arxiv.org/abs/2102.09672. Otherwise, p has the variance
    of q.

    Args:
        num_timesteps: T. If None, the number of steps of a discrete schedule.
        likelihood: p(x_0 | x_1); set by `with_likelihood`.
    """

    trains_schedule: ClassVar[bool] = True
    trains_variance: ClassVar[bool] = True

    num_timesteps: int | None = None
    likelihood: DataLikelihood | None = None

    def __post_init__(self) -> None:
        if self.num_timesteps is not None and self.num_timesteps < 1:
            raise UserError(f"objective.num_timesteps={self.num_timesteps} must be at least 1.")

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        discrete_times = schedule.discrete_times
        if self.num_timesteps is None and discrete_times is None:
            raise UserError(
                f"The DiscreteVLB objective needs discrete steps, but {type(schedule).__name__} is a continuous-time"
                " schedule: set the number of steps (model.objective.num_timesteps=50), or use model/objective=vlb."
            )
        if self.num_timesteps is not None and discrete_times is not None and self.num_timesteps > len(discrete_times):
            raise UserError(
                f"model.objective.num_timesteps={self.num_timesteps} must be at most {len(discrete_times)},"
                " the number of steps of the schedule."
            )

    def check_likelihood(self, likelihood: DataLikelihood, schedule: NoiseSchedule) -> None:
        num_timesteps = len(chain_times(schedule, self.num_timesteps))
        likelihood.check_steps(num_timesteps, "model.objective", "model.objective.num_timesteps=1000")

    def with_likelihood(self, likelihood: DataLikelihood) -> Objective:
        return replace(self, likelihood=likelihood)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        assert self.likelihood is not None, "call with_likelihood() first"
        schedule, likelihood = denoiser.schedule, self.likelihood
        times = chain_times(schedule, self.num_timesteps).to(x0.device)
        step, batch = sample_step(schedule, times, x0, rng)
        prediction = denoiser(batch.x_t, batch.t, cond)
        terms = likelihood.bits_per_dim(len(times) * vlb_term(prediction, batch, step, times, schedule, likelihood))
        prior = likelihood.bits_per_dim(prior_kl(schedule, x0))
        return {"loss": prior + terms, "prior": prior.detach(), "terms": terms.detach()}


def sample_step(schedule: NoiseSchedule, times: Tensor, x0: Tensor, rng: RandomSource) -> tuple[Tensor, NoisyBatch]:
    """Draw a uniformly random index into ``times`` for each image, (n,), and noise the images to these times."""
    step = (rng.stratified() * len(times)).long().clamp(max=len(times) - 1)
    t = times[step]
    return step, NoisyBatch.make(x0, rng.normal(x0.shape[1:]).to(x0.dtype), t, schedule.at(t, x0))


def vlb_term(
    prediction: Prediction,
    batch: NoisyBatch,
    step: Tensor,
    times: Tensor,
    schedule: NoiseSchedule,
    likelihood: DataLikelihood,
) -> Tensor:
    """Compute the term of each image's step in nats, (n,): the reconstruction at the first step, else the KL."""
    # Step 0 has no earlier step, so its divergence is discarded; a step from 0 to 0 keeps it finite.
    at_s = schedule.at(times[(step - 1).clamp(min=0)], batch.x0)
    kl = step_kl(prediction, batch.eps, batch.at, at_s, batch.x0)
    # The other images are decoded as well, with perfect predictions, so that discarded gradients are finite.
    first = (step == 0).view(-1, *[1] * (batch.x0.ndim - 1))
    decoded = prediction._replace(x0=torch.where(first, prediction.x0, batch.x0))
    at_1, at_2 = schedule.at(times[0], batch.x0), second_values(schedule, times, batch.x0)
    nll = reconstruction_nll(likelihood, batch.x0, batch.x_t, decoded, at_1, at_2)
    return torch.where(step == 0, nll, kl)


@dataclass(frozen=True)
class Hybrid(Objective):
    r""":math:`L_{simple} + w_{vlb} L_{vlb}`, where L_vlb trains only the variance of the reverse steps.

    L_vlb is in bits/dim and uses a detached mean. It is the sum of all T terms without the prior, which has no
    gradient. Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models", eq. 16,
    https://arxiv.org/abs/2102.09672.

    Args:
        vlb_weight: weight of the bound.
        weighting: weight of the squared error in eps in L_simple.
        likelihood: p(x_0 | x_1); set by `with_likelihood`.
    """

    trains_variance: ClassVar[bool] = True

    vlb_weight: float = 0.001
    weighting: Weighting = field(default_factory=SimpleWeighting)
    likelihood: DataLikelihood | None = None

    def __post_init__(self) -> None:
        if not 0 < self.vlb_weight < math.inf:
            raise UserError(
                f"objective.vlb_weight={self.vlb_weight} must be positive; use model/objective=simple to train without"
                " the bound."
            )

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        if not parameterization.learns_variance:
            raise UserError(
                "The Hybrid objective trains the variance of the reverse steps, which this model does not learn: use"
                " model/parameterization=eps_learned_variance, or model/objective=simple."
            )
        if schedule.discrete_times is None:
            raise UserError(
                f"The Hybrid objective needs discrete steps, but {type(schedule).__name__} is a continuous-time"
                " schedule: use a discrete schedule (model/schedule=cosine), or a fixed variance"
                " (model/parameterization=eps model/objective=simple)."
            )
        check_trains_last_step(self.weighting, schedule, parameterization)

    def with_likelihood(self, likelihood: DataLikelihood) -> Objective:
        return replace(self, likelihood=likelihood)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        assert self.likelihood is not None, "call with_likelihood() first"
        times = denoiser.schedule.require_discrete_times()
        step, batch = sample_step(denoiser.schedule, times, x0, rng)
        out = denoiser.output(batch.x_t, batch.t, batch.at, cond)
        eps_mse = batch.squared_eps_error(denoiser, out).flatten(1).mean(1)
        simple = self.weighting(batch.at).flatten() * eps_mse

        prediction = denoiser.parameterization.to_prediction(out, batch.x_t, batch.at)
        fixed_mean = prediction._replace(x0=prediction.x0.detach(), eps=prediction.eps.detach())
        term = vlb_term(fixed_mean, batch, step, times, denoiser.schedule, self.likelihood)
        vlb = self.likelihood.bits_per_dim(len(times) * term)
        return {"loss": simple + self.vlb_weight * vlb, "eps_mse": eps_mse.detach(), "terms": vlb.detach()}
