"""Bits/dim of a diffusion model: the variational bound, and the density of the probability-flow ODE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gencompare.dequantization import UNIFORM_DEQUANTIZATION, dequantize, log_bin_volume
from gencompare.diffusion.data_likelihood import DataLikelihood, normal_log_prob
from gencompare.diffusion.denoiser import ClipX0, Cond, DenoiserProtocol
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.diffusion.variational_objectives import (
    chain_times,
    prior_kl,
    reconstruction_nll,
    second_values,
    step_kl,
)
from gencompare.errors import UserError
from gencompare.rng import draw_uniform, normal_like, uniform_like


class LikelihoodMethod(ABC):
    """Base class of methods that compute bits/dim of images under a denoiser."""

    kind: ClassVar[str]
    """``bound`` (in expectation an upper bound on the exact value) or ``estimate``."""

    @abstractmethod
    def terms(
        self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, likelihood: DataLikelihood, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the terms whose sum is bits/dim of the images.

        Args:
            denoiser: the model.
            x0: images, (n, C, H, W).
            cond: conditions passed to the denoiser.
            likelihood: bins and mask of the data, and p(x_0 | mean, std).
            generator: source of all random numbers.

        Returns:
            Terms by name, each (n,).
        """

    def check(self, likelihood: DataLikelihood, schedule: NoiseSchedule) -> None:  # noqa: B027
        """Raise `UserError` if the method cannot use the decoder of ``likelihood`` under ``schedule``."""

    def method(self, likelihood: DataLikelihood) -> str:
        """Describe the treatment of pixels in a few words, such as ``softmax decoder``."""
        return "continuous"

    def __call__(
        self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, likelihood: DataLikelihood, generator: torch.Generator
    ) -> Tensor:
        """Compute bits/dim of the images, -log2 p(x_0) per value, (n,)."""
        return torch.stack(list(self.terms(denoiser, x0, cond, likelihood, generator).values())).sum(0)


@dataclass(frozen=True)
class ODELikelihood(LikelihoodMethod):
    r"""Bits/dim from the change of variables along the probability-flow ODE.

    Song et al. (2021), "Score-Based Generative Modeling through SDEs", appendix D.2, https://arxiv.org/abs/2011.13456.
    Under every schedule, the ODE is integrated over the log-SNR :math:`\lambda`, for
    :math:`z = x_t / \sqrt{\alpha^2 + \sigma^2}`, whose scale changes little. With :math:`a^2 = sigmoid(\lambda)` and
    :math:`s^2 = sigmoid(-\lambda)`,

    .. math::
        \frac{dz}{d\lambda} = \frac{s^2 z - s\, \epsilon_\theta}{2}, \qquad
        \frac{d \log p(z)}{d\lambda} = -\mathrm{tr}\left(\frac{\partial}{\partial z} \frac{dz}{d\lambda}\right).

    The integration runs from the data, taken as :math:`x_t / \alpha` at t_min, to N(0, prior_std^2) at t_max, by the
    adaptive Dormand-Prince method with one step size for the whole batch. The trace is estimated with one Rademacher
    vector (Hutchinson's estimator, which is unbiased) or computed exactly.

    Discrete data are dequantised (`gencompare.dequantization`). The result remains an estimate: it ignores the noise at
    t_min, contains the solver error, and includes padding.

    Args:
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        exact_trace: compute the trace exactly, with one backward pass for each value of an image.
    """

    kind: ClassVar[str] = "estimate"

    rtol: float = 1e-5
    atol: float = 1e-5
    exact_trace: bool = False

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise UserError(f"likelihoods.ode: rtol={self.rtol} and atol={self.atol} must be positive.")

    @torch.no_grad()
    def terms(
        self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, likelihood: DataLikelihood, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the single term ``density`` in bits/dim, (n,)."""
        log_volume = log_bin_volume(likelihood.num_bins, x0[0].numel())
        if likelihood.num_bins is not None:
            x0 = dequantize(x0, uniform_like(x0, generator), likelihood.num_bins)
        log_p = self.log_density(denoiser, x0, cond, generator) + log_volume
        return {"density": likelihood.bits_per_dim(-log_p)}

    def method(self, likelihood: DataLikelihood) -> str:
        return super().method(likelihood) if likelihood.num_bins is None else UNIFORM_DEQUANTIZATION

    @torch.no_grad()
    def log_density(self, denoiser: DenoiserProtocol, x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        """Compute log p(x) in nats, (n,), at points x (n, C, H, W)."""
        from torchdiffeq import odeint  # imported on use, since few models need it

        schedule, num_values = denoiser.schedule, x[0].numel()
        probe = torch.randint(2, x.shape, generator=generator, device=generator.device).to(x) * 2 - 1

        def derivatives(log_snr: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            """Compute dz / d lambda and the trace of its Jacobian."""
            t = schedule.t_from_log_snr(log_snr.to(x.dtype))
            at = schedule.at(t, x)
            scale = (at.alpha**2 + at.sigma**2).sqrt()
            with torch.enable_grad():
                x_t = (scale * state[0]).detach().requires_grad_()
                eps = denoiser(x_t, t, cond).eps
                trace = _exact_trace(eps, x_t) if self.exact_trace else _dot(_vjp(eps, x_t, probe), probe)
            s2 = torch.sigmoid(-log_snr).to(x.dtype)
            s = s2.sqrt()
            return (s2 * state[0] - s * eps.detach()) / 2, (s2 * num_values - s * scale * trace) / 2

        log_snr = schedule.log_snr(x.new_tensor([schedule.t_min, schedule.t_max]))
        at_t_max = schedule.at(x.new_full((), schedule.t_max), x)
        start = (torch.sigmoid(log_snr[0]).sqrt() * x, x.new_zeros(len(x)))
        try:
            z, integral = odeint(derivatives, start, log_snr.double(), rtol=self.rtol, atol=self.atol, method="dopri5")
        except AssertionError as error:
            raise UserError(
                f"The probability-flow ODE solver failed ({error}): the network outputs are not finite, or change too"
                " fast for the tolerances of model.likelihoods.ode (rtol, atol)."
            ) from error
        # log p(z) at t_max, then log p(z) at t_min, then log p(x) for x = z / sqrt(sigmoid(lambda)).
        scale = (at_t_max.alpha**2 + at_t_max.sigma**2).sqrt()
        std = torch.as_tensor(schedule.prior_std, device=x.device, dtype=x.dtype)
        prior = normal_log_prob(scale * z[-1], torch.zeros_like(x), std).flatten(1).sum(1) + num_values * scale.log()
        return prior + integral[-1] + num_values * logsigmoid(log_snr[0]) / 2


def _vjp(eps: Tensor, x: Tensor, vector: Tensor) -> Tensor:
    """Compute vector^T d eps / dx, shaped like x."""
    product = torch.autograd.grad(eps, x, vector, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if product is None else product


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _exact_trace(eps: Tensor, x: Tensor) -> Tensor:
    """Compute sum_i d eps_i / d x_i, (n,)."""
    trace = x.new_zeros(len(x))
    for i in range(x[0].numel()):
        unit = torch.zeros_like(x).flatten(1)
        unit[:, i] = 1
        trace += _dot(_vjp(eps, x, unit.view_as(x)), unit.view_as(x))
    return trace


@dataclass(frozen=True)
class VLBLikelihood(LikelihoodMethod):
    r"""The bound :math:`-\log p(x_0) \le` prior + diffusion + reconstruction, in bits/dim.

    The bound is computed for T steps (Ho et al. 2020, eq. 5, https://arxiv.org/abs/2006.11239), or in continuous time
    (Kingma et al. 2021, eq. 17, https://arxiv.org/abs/2107.00630), where the diffusion term is the integral of
    :math:`E\|\epsilon - \epsilon_\theta\|^2 / 2` over the log-SNR. The integral, or the sum over steps, is estimated at
    ``num_samples`` random noise levels per image, stratified over the log-SNR because the integrand varies little with
    it; with uniform times, the standard error would be tens of times larger. It takes ``num_samples`` + 1 network
    calls.

    For discrete data, which lie in [-1, 1], predicted images are clipped to this range.

    Args:
        num_samples: network calls per image for the diffusion term. If None, every discrete step is evaluated once.
        num_timesteps: T. If None, the number of steps of a discrete schedule, or continuous time for any other
            schedule.
    """

    kind: ClassVar[str] = "bound"

    num_samples: int | None = 16
    num_timesteps: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("num_samples", self.num_samples), ("num_timesteps", self.num_timesteps)):
            if value is not None and value < 1:
                raise UserError(f"likelihoods.vlb.{name}={value} must be at least 1.")

    @torch.no_grad()
    def terms(
        self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, likelihood: DataLikelihood, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute ``prior``, ``diffusion`` and ``reconstruction``, each in bits/dim, (n,)."""
        schedule = denoiser.schedule
        if likelihood.num_bins is not None:
            denoiser = ClipX0(denoiser)
        if self._in_continuous_time(schedule):
            times = x0.new_full((1,), schedule.t_min)
            diffusion = self._continuous(denoiser, x0, cond, generator)
        else:
            times = chain_times(schedule, self.num_timesteps).to(x0.device)
            diffusion = self._discrete(denoiser, times, x0, cond, generator)
        at = schedule.at(times[0], x0)
        x_1 = at.alpha * x0 + at.sigma * normal_like(x0, generator)
        prediction = denoiser(x_1, times[0], cond) if likelihood.decoder.uses_network else None
        nll = reconstruction_nll(likelihood, x0, x_1, prediction, at, second_values(schedule, times, x0))
        nats = {"prior": prior_kl(schedule, x0), "diffusion": diffusion, "reconstruction": nll}
        return {name: likelihood.bits_per_dim(term) for name, term in nats.items()}

    def check(self, likelihood: DataLikelihood, schedule: NoiseSchedule) -> None:
        continuous = self._in_continuous_time(schedule)
        num_timesteps = None if continuous else len(chain_times(schedule, self.num_timesteps))
        where = "model.likelihoods.vlb"
        likelihood.check_steps(num_timesteps, where, f"{where}.num_timesteps=1000")

    def method(self, likelihood: DataLikelihood) -> str:
        return super().method(likelihood) if likelihood.num_bins is None else f"{likelihood.decoder.name} decoder"

    def _in_continuous_time(self, schedule: NoiseSchedule) -> bool:
        return self.num_timesteps is None and schedule.discrete_times is None

    def _continuous(self, denoiser: DenoiserProtocol, x0: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        schedule = denoiser.schedule
        if self.num_samples is None:
            raise UserError(
                "likelihoods.vlb.num_samples=null evaluates every discrete step, but this model has a continuous-time"
                " schedule: set num_samples or num_timesteps."
            )
        high, low = schedule.log_snr(x0.new_tensor([schedule.t_min, schedule.t_max]))
        nats = x0.new_zeros(len(x0))
        for u in _stratified_uniform(self.num_samples, x0, generator):
            t = schedule.t_from_log_snr(high + (low - high) * u)
            at, eps = schedule.at(t, x0), normal_like(x0, generator)
            prediction = denoiser(at.alpha * x0 + at.sigma * eps, t, cond)
            nats += (eps - prediction.eps).square().flatten(1).sum(1)
        return nats * (high - low) / (2 * self.num_samples)

    def _discrete(
        self, denoiser: DenoiserProtocol, times: Tensor, x0: Tensor, cond: Cond, generator: torch.Generator
    ) -> Tensor:
        schedule, last = denoiser.schedule, len(times) - 1
        nats = x0.new_zeros(len(x0))
        if self.num_samples is None or self.num_samples >= last:
            steps = [(x0.new_full((len(x0),), i + 1).long(), 1.0) for i in range(last)]
        else:
            # Importance sampling: the probability of a step is the fraction of the log-SNR range that it spans.
            log_snr = schedule.log_snr(times).to(x0.dtype)
            if schedule.ends_in_pure_noise:  # whose span says nothing about the size of its term
                log_snr[-1] = log_snr[-2] - 1
            cdf = (log_snr[0] - log_snr[1:]) / (log_snr[0] - log_snr[-1])
            probability = cdf.diff(prepend=cdf.new_zeros(1))
            uniform = _stratified_uniform(self.num_samples, x0, generator)
            sampled = [torch.searchsorted(cdf, u).clamp(max=last - 1) for u in uniform]
            steps = [(i + 1, 1 / (self.num_samples * probability[i])) for i in sampled]
        for i, weight in steps:
            at_t, at_s, eps = schedule.at(times[i], x0), schedule.at(times[i - 1], x0), normal_like(x0, generator)
            prediction = denoiser(at_t.alpha * x0 + at_t.sigma * eps, times[i], cond)
            nats += weight * step_kl(prediction, eps, at_t, at_s, x0)
        return nats


def _stratified_uniform(num_samples: int, x0: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Draw one uniform number per image from each of ``num_samples`` equal strata, as a list of tensors (n,)."""
    u = draw_uniform((num_samples, len(x0)), generator, x0.device, x0.dtype)
    return list((u + torch.arange(num_samples, device=x0.device)[:, None]) / num_samples)
