r"""Guidance: steering a denoiser towards a class, or away from what a worse model would say.

Guidance takes a denoiser and gives one, so it works with every sampler. Each kind moves along a difference of scores,

    score = score_away + scale (score_towards - score_away),

and scale 1 is the model that it guides towards. As the score is -eps / sigma and x_t = alpha x_0 + sigma eps, both
halves of a prediction mix in the same way. Costs are as they are: where the scale makes one side count for nothing,
its network is not called.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.schedules import NoiseSchedule, ScheduleValues
from gencompare.errors import UserError, check_number


@dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """Base of every kind of guidance; a subclass writes ``predict`` and, where another model takes part, ``guides``.

    Args:
        scale: how far to go; 1 is the model guided towards, more goes beyond it.
    """

    scale: float

    def __post_init__(self) -> None:
        check_number("guidance.scale", self.scale)
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise UserError(f"guidance.scale={self.scale}: give 0 or a positive number.")

    @abstractmethod
    def predict(
        self, denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond: Cond, unlabelled: Callable[[Cond], Cond]
    ) -> Prediction:
        """What the guided denoiser says. ``unlabelled`` takes the class out of conditions."""

    def problem(self, *, takes_labels: bool, knows_no_label: bool) -> str | None:
        """Why a network cannot be guided so; None where it can.

        Args:
            takes_labels: whether the network is told the class.
            knows_no_label: whether it has also learned to go without.
        """
        return None

    def guides(self) -> dict[str, nn.Module]:
        """Other models that take part, by name: their calls count, and they go to the device of the guided one."""
        return {}

    @property
    def needs_label(self) -> bool:
        """Whether the class steers the samples even of a network that is not told it."""
        return False

    def describe(self) -> str:
        """Name and settings, in words for a table."""
        guides = ", ".join(f" with {_name(guide)}" for guide in self.guides().values())
        return f"{type(self).__name__}{guides}, scale {self.scale:g}"


@dataclass(frozen=True)
class Guided:
    """A denoiser under guidance."""

    denoiser: DenoiserProtocol
    guidance: Guidance
    unlabelled: Callable[[Cond], Cond]

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return self.guidance.predict(self.denoiser, x_t, t, cond, self.unlabelled)


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Guidance):
    r"""eps = eps_u + scale (eps_c - eps_u), with eps_u what the same network says when it is told no class.

    Ho and Salimans (2022), "Classifier-free diffusion guidance", eq. 6, whose w is scale - 1. Scale 0 is unconditional
    and scale 1 conditional; both cost one row a sample, and any other two rows, in one call.

    Args:
        interval: lowest and highest sigma / alpha (Karras's sigma) at which to guide; elsewhere the scale is 1.
            Kynkaanniemi et al. (2024), "Applying guidance in a limited interval", eq. 6. None guides everywhere.
    """

    interval: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for end in self.interval or ():
            check_number("guidance.interval", end)
        if self.interval is not None and not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1]):
            raise UserError(
                f"guidance.interval={list(self.interval)}: give the lowest and the highest sigma / alpha, as [0.3, 3]."
            )

    def problem(self, *, takes_labels: bool, knows_no_label: bool) -> str | None:
        if not takes_labels:
            return (
                "Classifier-free guidance needs a conditional model: train with model.conditional=true"
                " model.label_dropout=0.1, or leave model/guidance out."
            )
        if not knows_no_label and self.scale != 1:
            return (
                "Classifier-free guidance needs a model that was also trained without labels: train with"
                " model.label_dropout=0.1."
            )
        return None

    def predict(
        self, denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond: Cond, unlabelled: Callable[[Cond], Cond]
    ) -> Prediction:
        scale = self._scale(denoiser.schedule.at(t, x_t))
        if not isinstance(scale, Tensor) and scale in (0, 1):
            return denoiser(x_t, t, cond if scale == 1 else unlabelled(cond))
        away, towards = _both(denoiser, x_t, t, unlabelled(cond), cond)
        return _beyond(away, towards, scale)

    def _scale(self, at: ScheduleValues) -> float | Tensor:
        """The scale at these noise levels: one number, or, where rows differ, one a row, shaped to meet x_t."""
        if self.interval is None:
            return self.scale
        low, high = self.interval
        level = torch.exp(-at.log_snr / 2)
        inside = (level >= low) & (level <= high)
        if inside.all():
            return self.scale
        if not inside.any():
            return 1.0
        return torch.where(inside, self.scale, 1.0).to(level.dtype)

    def describe(self) -> str:
        if self.interval is None:
            return super().describe()
        return f"{super().describe()} where sigma / alpha is {self.interval[0]:g} to {self.interval[1]:g}"


class NoisyClassifier(Protocol):
    """A classifier of noisy images, trained under a schedule."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits (n, num_classes) of p(y | x_t), for ``x_t`` (n, C, H, W) at ``t``, () or (n,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance(Guidance):
    r"""eps = eps_theta - scale sigma grad_{x_t} log p(y | x_t), with y = ``cond["label"]``.

    Dhariwal and Nichol (2021), "Diffusion models beat GANs on image synthesis", eq. 14 (algorithm 2); here it is what
    every sampler sees. On an unconditional network, scale 1 is Bayes's rule: the conditional score. Each step costs one
    pass of the classifier forward and one back; scale 0 costs none.

    Args:
        classifier: of noisy images, trained under the schedule of the model that it guides.
    """

    classifier: NoisyClassifier

    def guides(self) -> dict[str, nn.Module]:
        return _modules(classifier=self.classifier)

    @property
    def needs_label(self) -> bool:
        return True

    def predict(
        self, denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond: Cond, unlabelled: Callable[[Cond], Cond]
    ) -> Prediction:
        prediction = denoiser(x_t, t, cond)
        if self.scale == 0:
            return prediction
        at = denoiser.schedule.at(t, x_t)
        shift = self.scale * at.sigma * self._gradient(x_t, t, cond["label"])
        return prediction._replace(x0=prediction.x0 + at.sigma / at.alpha * shift, eps=prediction.eps - shift)

    def _gradient(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """grad log p(label | x_t), like x_t. Samplers run without gradients: here they are needed for a moment."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_p = self.classifier(x, t).to(x.dtype).log_softmax(1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, label[:, None]).sum(), x)
        return gradient


@dataclass(frozen=True, kw_only=True)
class AutoGuidance(Guidance):
    r"""D = D_weak + scale (D_main - D_weak), with the weak model a smaller or an earlier one of the same data.

    Karras et al. (2024), "Guiding a diffusion model with a bad version of itself", eq. 3 with D_0 the weak one. Scale 1
    is the main model alone and 0 the weak one alone. It guides unconditional models too.

    Args:
        weak: the worse denoiser, under the same schedule; it is told the same class.
    """

    weak: DenoiserProtocol

    def guides(self) -> dict[str, nn.Module]:
        return _modules(weak=self.weak)

    def predict(
        self, denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond: Cond, unlabelled: Callable[[Cond], Cond]
    ) -> Prediction:
        if self.scale in (0, 1):
            return (denoiser if self.scale == 1 else self.weak)(x_t, t, cond)
        return _beyond(self.weak(x_t, t, cond), denoiser(x_t, t, cond), self.scale)


@torch.no_grad()
def check_same_schedule(schedule: NoiseSchedule, guidance: Guidance, points: int = 9) -> None:
    """Raises `UserError` where a guide was trained under another schedule: it would be told wrong noise levels."""
    for name, guide in guidance.guides().items():
        other = guide.schedule
        assert isinstance(other, NoiseSchedule)
        if not torch.allclose(_curve(schedule, points), _curve(other, points), rtol=1e-3, atol=1e-3):
            raise UserError(
                f"model.guidance.{name} was trained under another noise schedule ({type(other).__name__}) than the"
                f" model that it guides ({type(schedule).__name__}), or with other settings of it: train both alike."
            )


def _curve(schedule: NoiseSchedule, points: int) -> Tensor:
    """Times, log-SNR and log alpha at some of them, from end to end."""
    t = torch.linspace(schedule.t_min, schedule.t_max, points, device=schedule.device)
    return torch.stack([t, schedule.log_snr(t), schedule.log_alpha(t)]).float().cpu()


def _beyond(away: Prediction, towards: Prediction, scale: float | Tensor) -> Prediction:
    """away + scale (towards - away). A learned variance stays that of ``towards``."""
    return towards._replace(
        x0=away.x0 + scale * (towards.x0 - away.x0), eps=away.eps + scale * (towards.eps - away.eps)
    )


def _both(denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, one: Cond, two: Cond) -> tuple[Prediction, Prediction]:
    """Predictions under two conditions, in one call of 2n rows."""
    cond = {name: torch.cat([one[name], two[name]]) for name in two}
    joint = denoiser(torch.cat([x_t, x_t]), t.repeat(2) if t.ndim else t, cond)
    halves = [(None, None) if part is None else part.chunk(2) for part in joint]
    first, second = zip(*halves, strict=True)
    return Prediction(*first), Prediction(*second)


def _modules(**guides: object) -> dict[str, nn.Module]:
    return {name: guide for name, guide in guides.items() if isinstance(guide, nn.Module)}


def _name(guide: nn.Module) -> str:
    """The run that a guide comes from, where whoever loaded it wrote that down."""
    return str(getattr(guide, "origin", type(guide).__name__))
