r"""MeanFlow: networks that predict the average velocity of a trajectory over a time interval.

The average velocity over [r, t] is :math:`u(x_t, r, t) = \frac{1}{t - r} \int_r^t v(x_\tau, \tau)\, d\tau`, so that
:math:`x_r = x_t - (t - r)\, u(x_t, r, t)` without discretisation error. The network receives t - r as
``cond["interval"]``; without it r = t, and u is the velocity v of the probability-flow ODE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from gencompare.diffusion.denoiser import Cond, Denoiser, DenoiserProtocol
from gencompare.diffusion.objectives import NoisyBatch, Objective
from gencompare.diffusion.ode_samplers import Euler
from gencompare.diffusion.parameterizations import Parameterization, Velocity
from gencompare.diffusion.samplers import Step, linear_combination
from gencompare.diffusion.schedules import CLEAN, GridValues, NoiseSchedule, RectifiedFlow, suppress_jvp_warning
from gencompare.diffusion.times import LogitNormalTimes, TimeDistribution
from gencompare.errors import UserError, check_non_negative, check_number
from gencompare.rng import RandomSource, default_generator, from_state

LOSS_EPS = 1e-3
"""Added to the squared error, summed over an image, in the adaptive weight."""


@dataclass(frozen=True)
class MeanFlow(Objective):
    r"""MeanFlow: the network satisfies the identity of average and instantaneous velocity.

    .. math::
        L = E\, w\, \|u_\theta(x_t, r, t) - sg[u^*]\|^2 / D, \qquad
        u^* = v - (t - r)\, \frac{d}{dt} u_\theta(x_t, r, t), \qquad
        \frac{d}{dt} u_\theta = v\, \partial_x u_\theta + \partial_t u_\theta,

    with :math:`x_t = (1 - t) x_0 + t \epsilon` and :math:`v = \epsilon - x_0`. No gradient flows through the target
    (sg). r is below t in a fraction ``ratio`` of the images; in the others r = t, and the loss is that of flow
    matching. Both times are drawn from ``times``; t is the later one. The weight

    .. math:: w = (\|u_\theta - u^*\|^2 / D + 10^{-3} / D)^{-p}

    has no gradient; p = 0 gives the squared error. Geng et al. (2025), "Mean flows for one-step generative modeling",
    algorithm 1, eq. 9, 11 and 22, https://arxiv.org/abs/2505.13447 (whose loss is multiplied by :math:`D^{1 - p}`),
    with the settings for ImageNet as defaults.

    The derivative is a forward-mode derivative in the direction (v, 0, 1) of (x, r, t), computed without a graph, only
    for the images with r < t. If the network has dropout, it is computed for all images, with the masks of
    :math:`u_\theta`.

    With guidance, the velocity

    .. math::
        w (1 - \kappa)\, v + \kappa\, u_\theta(x_t, t, t \mid c) + (1 - w) (1 - \kappa)\, u_\theta(x_t, t, t)

    replaces v in target and derivative, so that the network learns the average velocity of the field with
    classifier-free guidance of scale w (the same paper, "Mean flows with guidance"). Images whose condition c is
    dropped keep v.

    Args:
        times: distribution of t and r.
        ratio: fraction of the images with r < t.
        p: power of the adaptive weight.
        guidance_scale: w; 1 for no guidance, which ignores :math:`\kappa`.
        guidance_mixing: :math:`\kappa`, in [0, 1).
        drop_cond: replaces the conditions by those without class; set by `with_drop_cond`.
    """

    needs_interval: ClassVar[bool] = True

    times: TimeDistribution = field(default_factory=lambda: LogitNormalTimes(mean=-0.4, std=1.0))
    ratio: float = 0.25
    p: float = 1.0
    guidance_scale: float = 1.0
    guidance_mixing: float = 0.0
    drop_cond: Callable[[Cond], Cond] | None = None

    def __post_init__(self) -> None:
        check_number("objective.ratio", self.ratio)
        if not 0 <= self.ratio <= 1:
            raise UserError(f"objective.ratio={self.ratio} must be in [0, 1].")
        check_non_negative("objective.p", self.p)
        check_non_negative("objective.guidance_scale", self.guidance_scale)
        check_number("objective.guidance_mixing", self.guidance_mixing)
        if not 0 <= self.guidance_mixing < 1:
            raise UserError(f"objective.guidance_mixing={self.guidance_mixing} must be at least 0 and below 1.")

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        if not isinstance(schedule, RectifiedFlow) or not isinstance(parameterization, Velocity):
            raise UserError(
                "MeanFlow trains the average velocity of straight paths, not"
                f" {type(parameterization).__name__} under {type(schedule).__name__}: use model/schedule=rectified and"
                " model/parameterization=velocity, as in model=meanflow."
            )

    def check_conditions(self, *, is_conditional: bool, has_null_cond: bool) -> None:
        if self.guidance_scale == 1:
            return
        if not is_conditional:
            raise UserError(
                f"model.objective.guidance_scale={self.guidance_scale:g} needs a conditional model: add"
                " model.conditional=true model.label_dropout=0.1, or use model.objective.guidance_scale=1."
            )
        if not has_null_cond:
            raise UserError(
                f"model.objective.guidance_scale={self.guidance_scale:g} needs training images without labels: add"
                " model.label_dropout=0.1, or use model.objective.guidance_scale=1."
            )

    def with_drop_cond(self, drop_cond: Callable[[Cond], Cond]) -> MeanFlow:
        return replace(self, drop_cond=drop_cond)

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        t, r = self.times(denoiser.schedule, rng), self.times(denoiser.schedule, rng)
        has_interval, count = self.choose_intervals(rng)
        t, r = t.maximum(r), torch.where(has_interval.to(t.device), t.minimum(r), t.maximum(r))
        eps = rng.normal(x0.shape[1:]).to(x0.dtype)
        batch, v = NoisyBatch.make(x0, eps, t, denoiser.schedule.at(t, x0)), eps - x0

        dropout = default_generator(x0.device)
        masks = dropout.get_state()
        u = denoiser.output(batch.x_t, t, batch.at, {**cond, "interval": t - r})
        # After the call with a gradient, since autocast keeps the weights that it casts (see `ConsistencyTraining`).
        if self.guidance_scale != 1:
            v = self.guided_velocity(denoiser, batch, v, cond)
        target = v
        if count:
            rows = has_interval.to(x0.device).long().argsort(descending=True, stable=True)[:count]
            if _active_dropout(denoiser.network):  # masks are those of the whole batch
                rows = torch.arange(len(x0), device=x0.device)
            x_t, t, r, v = (each[rows] for each in (batch.x_t, t, r, v))
            with from_state(dropout, masks):
                du_dt = time_derivative(denoiser, x_t, t, r, v, {name: each[rows] for name, each in cond.items()})
            interval = (t - r).to(v).view(-1, *[1] * (v.ndim - 1))
            target = target.index_copy(0, rows, v - interval * du_dt)
        mse = (u - target).square().flatten(1).mean(1)
        weight = (mse.detach() + LOSS_EPS / x0[0].numel()) ** -self.p
        return {"loss": weight * mse, "mse": mse.detach()}

    @torch.no_grad()
    def guided_velocity(self, denoiser: Denoiser, batch: NoisyBatch, v: Tensor, cond: Cond) -> Tensor:
        """Compute the velocity (n, C, H, W) that replaces ``v`` (n, C, H, W), without a graph."""
        assert self.drop_cond is not None, "call with_drop_cond() first"
        null, mixing = self.drop_cond(cond), self.guidance_mixing
        is_null = torch.stack([(cond[name] == null[name]).view(len(v), -1).all(1) for name in cond]).all(0)
        with _without_dropout(denoiser.network):
            negative = denoiser.output(batch.x_t, batch.t, batch.at, null)
            guided = (1 - mixing) * (negative + self.guidance_scale * (v - negative))
            if mixing:
                guided = guided + mixing * denoiser.output(batch.x_t, batch.t, batch.at, cond)
        return torch.where(is_null.view(-1, *[1] * (v.ndim - 1)), v, guided)

    def choose_intervals(self, rng: RandomSource) -> tuple[Tensor, int]:
        """Choose the images with r < t, evenly spaced in the global batch from a random one on.

        Their number is the same in every step, so that all steps have the same FLOPs.

        Returns:
            Which images of this process are chosen, (n,), and how many, known without waiting for the device.
        """
        total = rng.total
        count = max(1, round(self.ratio * total)) if self.ratio else 0
        shift = int(rng.shared_uniform("interval") * total)
        spacing = [k * total // count for k in range(count)]
        local = sum(rng.start <= (shift + k) % total < rng.stop for k in spacing)
        index = (shift + torch.arange(count, device=rng.device) * total // max(1, count)) % total
        chosen = torch.zeros(total, dtype=torch.bool, device=rng.device).index_fill(0, index, True)
        return chosen[rng.start : rng.stop], local


def time_derivative(denoiser: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond) -> Tensor:
    r"""Compute :math:`du/dt` along a trajectory, the derivative of u(x, r, t) in the direction (v, 0, 1).

    Args:
        denoiser: a network that predicts the average velocity u, with its schedule and parameterisation.
        x_t: (n, C, H, W).
        t: times, (n,).
        r: ends of the intervals, (n,).
        v: the velocity dx/dt, (n, C, H, W).
        cond: other conditions passed to the network.

    Returns:
        The derivative in full precision, without a graph, (n, C, H, W).
    """
    suppress_jvp_warning()
    # Compiled code, fused attention and convolutions under autocast have no forward-mode derivatives.
    with (
        torch.no_grad(),
        torch.autocast(x_t.device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        forward_ad.dual_level(),
    ):
        x, time = forward_ad.make_dual(x_t, v), forward_ad.make_dual(t, torch.ones_like(t))
        u = denoiser.output(x, time, denoiser.schedule.at(time, x), {**cond, "interval": time - r})
        tangent = forward_ad.unpack_dual(u).tangent
        return torch.zeros_like(v) if tangent is None else tangent


def _active_dropout(network: nn.Module) -> list[nn.Module]:
    return [each for each in network.modules() if isinstance(each, nn.Dropout) and each.p > 0 and each.training]


@contextmanager
def _without_dropout(network: nn.Module) -> Iterator[None]:
    """Switch dropout off in the block."""
    active = _active_dropout(network)
    for each in active:
        each.eval()
    try:
        yield
    finally:
        for each in active:
            each.train()


@dataclass(frozen=True, kw_only=True)
class MeanFlowSampler(Euler):
    r"""MeanFlow sampling: :math:`x_s = x_t - (t - s)\, u(x_t, s, t)` with the average velocity u over the step.

    This is Euler's method with the average instead of the instantaneous velocity, so that its only error is that of the
    network. A single step is a single call of the network. Geng et al. (2025), "Mean flows for one-step generative
    modeling", algorithm 2 and eq. 12, https://arxiv.org/abs/2505.13447.
    """

    order: ClassVar[int | None] = None
    needs_interval: ClassVar[bool] = True

    def trajectory(
        self, denoiser: DenoiserProtocol, x: Tensor, times: Tensor, cond: Cond, generator: torch.Generator
    ) -> Iterator[Step]:
        grid = GridValues(denoiser.schedule, times, x)
        coefficients = grid.coefficients(self._coefficients)
        intervals = (times[:-1] - times[1:].masked_fill(times[1:] == CLEAN, 0.0)).to(x.dtype)
        for k, (t, s, _, _) in enumerate(grid.steps()):
            prediction = denoiser(x, t, {**cond, "interval": intervals[k].expand(len(x))})
            x = linear_combination(*zip(coefficients[k], (x, prediction.x0, prediction.eps), strict=True))
            yield Step(s, x, prediction)
