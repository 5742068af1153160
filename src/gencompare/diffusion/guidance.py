r"""Guidance: steers a denoiser towards a class, or away from the prediction of a worse model.

Guidance wraps a denoiser, so it works with every sampler. Classifier-free guidance and autoguidance extrapolate from a
negative to a positive prediction,

.. math:: \epsilon = \epsilon_- + w (\epsilon_+ - \epsilon_-),

so scale w = 1 is the positive model alone. Since the score is :math:`-\epsilon / \sigma` and
:math:`x_t = \alpha x_0 + \sigma \epsilon`, x_0 is extrapolated in the same way. A network whose prediction has weight 0
is not called.
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
from gencompare.diffusion.schedules import NO_SIGNAL, NoiseSchedule, ScheduleValues, is_same_schedule
from gencompare.errors import UserError, check_number


@dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """Base class of guidance. A subclass implements ``predict`` and, if it uses other models, ``guides``.

    Args:
        scale: strength of the guidance. 1 samples from the target of the guidance (such as the conditional model), and
            larger values extrapolate beyond it.
    """

    scale: float

    def __post_init__(self) -> None:
        check_number("guidance.scale", self.scale)
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise UserError(f"guidance.scale={self.scale} must be finite and at least 0.")

    @abstractmethod
    def predict(
        self, denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond: Cond, drop_cond: Callable[[Cond], Cond]
    ) -> Prediction:
        """Compute the guided prediction.

        Args:
            denoiser: the denoiser to guide.
            x_t: (n, C, H, W).
            t: time, () or (n,).
            cond: conditions by name.
            drop_cond: replaces the class and the embedding with their null values.

        Returns:
            The prediction, with tensors shaped like x_t.
        """

    def incompatibility(self, *, is_conditional: bool, has_null_cond: bool) -> str | None:
        """Explain why a network cannot be guided in this way; return None if it can.

        Args:
            is_conditional: whether the network receives a class or an embedding.
            has_null_cond: whether it was also trained without them (label dropout).
        """
        return None

    def guides(self) -> dict[str, nn.Module]:
        """Return the guiding models by name. They move to the device of the guided model, and their NFE are counted."""
        return {}

    @property
    def needs_label(self) -> bool:
        """Whether sampling needs labels even if the network is unconditional."""
        return False

    def describe(self) -> str:
        """Return the name and settings, for a table."""
        guides = ", ".join(f" with {_name(guide)}" for guide in self.guides().values())
        return f"{type(self).__name__}{guides}, scale {self.scale:g}"


@dataclass(frozen=True)
class Guided:
    """A denoiser with guidance."""

    denoiser: DenoiserProtocol
    guidance: Guidance
    drop_cond: Callable[[Cond], Cond]

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return self.guidance.predict(self.denoiser, x_t, t, cond, self.drop_cond)


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Guidance):
    r"""Classifier-free guidance: :math:`\epsilon = \epsilon_u + scale\, (\epsilon_c - \epsilon_u)`.

    :math:`\epsilon_c` is the conditional and :math:`\epsilon_u` the unconditional prediction of the same network. Scale
    0 is unconditional and scale 1 conditional, both without extra cost; other scales double the batch of the network
    call. Ho and Salimans (2022), "Classifier-free diffusion guidance", eq. 6 (their w is scale - 1),
    https://arxiv.org/abs/2207.12598.

    Args:
        interval: lowest and highest sigma / alpha with guidance; elsewhere the scale is 1. If None, guidance is always
            applied. Kynkäänniemi et al. (2024), "Applying guidance in a limited interval", eq. 6,
            https://arxiv.org/abs/2404.07724.
    """

    interval: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for end in self.interval or ():
            check_number("guidance.interval", end)
        if self.interval is not None and not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1]):
            raise UserError(
                f"guidance.interval={list(self.interval)} must be [lowest, highest] sigma / alpha, such as [0.3, 3]."
            )

    def incompatibility(self, *, is_conditional: bool, has_null_cond: bool) -> str | None:
        if not is_conditional:
            return (
                "Classifier-free guidance needs a conditional model: train with model.conditional=true"
                " model.label_dropout=0.1, or remove model/guidance."
            )
        if not has_null_cond and self.scale != 1:
            return (
                "Classifier-free guidance needs a model that was also trained without labels: train with"
                " model.label_dropout=0.1."
            )
        return None

    def predict(
        self, denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond: Cond, drop_cond: Callable[[Cond], Cond]
    ) -> Prediction:
        scale = self._scale_at(denoiser.schedule.at(t, x_t))
        if not isinstance(scale, Tensor) and scale in (0, 1):
            return denoiser(x_t, t, cond if scale == 1 else drop_cond(cond))
        unconditional, conditional = _predict_both(denoiser, x_t, t, drop_cond(cond), cond)
        return _extrapolate(unconditional, conditional, scale)

    def _scale_at(self, at: ScheduleValues) -> float | Tensor:
        """Return the scale: one number or, if it differs within the batch, a tensor that broadcasts with x_t."""
        if self.interval is None:
            return self.scale
        low, high = self.interval
        sigma = torch.exp(-at.log_snr / 2)  # relative to alpha
        inside = (sigma >= low) & (sigma <= high)
        if inside.all():
            return self.scale
        if not inside.any():
            return 1.0
        return torch.where(inside, self.scale, 1.0).to(sigma.dtype)

    def describe(self) -> str:
        if self.interval is None:
            return super().describe()
        return f"{super().describe()} where sigma / alpha is {self.interval[0]:g} to {self.interval[1]:g}"


class NoisyClassifier(Protocol):
    """A classifier of noisy images, trained under a schedule."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute the logits (n, num_classes) of p(y | x_t) for ``x_t`` (n, C, H, W) at times ``t``, () or (n,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance(Guidance):
    r"""Classifier guidance: :math:`\epsilon = \epsilon_\theta - scale\, \sigma \nabla_{x_t} \log p(y | x_t)`.

    Here :math:`\epsilon_\theta` is the prediction of the guided model, and y is ``cond["label"]``. With an
    unconditional model, scale 1 gives the conditional score by Bayes' rule. Each denoiser call adds one forward and one
    backward pass through the classifier, except at scale 0. Dhariwal and Nichol (2021), "Diffusion models beat GANs on
    image synthesis", eq. 14 and algorithm 2, https://arxiv.org/abs/2105.05233.

    Args:
        classifier: a classifier of noisy images, trained under the schedule of the guided model.
    """

    classifier: NoisyClassifier

    def guides(self) -> dict[str, nn.Module]:
        return _modules(classifier=self.classifier)

    @property
    def needs_label(self) -> bool:
        return True

    def predict(
        self, denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond: Cond, drop_cond: Callable[[Cond], Cond]
    ) -> Prediction:
        prediction = denoiser(x_t, t, cond)
        if self.scale == 0:
            return prediction
        at = denoiser.schedule.at(t, x_t)
        shift = self.scale * at.sigma * self._gradient(x_t, t, cond["label"])
        shift = torch.where(at.log_snr < NO_SIGNAL, 0.0, shift)  # pure noise says nothing about the class
        return prediction._replace(x0=prediction.x0 + at.sigma / at.alpha * shift, eps=prediction.eps - shift)

    def _gradient(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Compute grad log p(label | x_t), shaped like x_t. This enables gradients, since sampling disables them."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_p = self.classifier(x, t).to(x.dtype).log_softmax(1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, label[:, None]).sum(), x)
        return gradient


@dataclass(frozen=True, kw_only=True)
class AutoGuidance(Guidance):
    r"""Autoguidance: :math:`D = D_{weak} + scale\, (D_{main} - D_{weak})`.

    The weak model is smaller or was trained for less time, on the same data. Scale 1 is the main model alone, and scale
    0 is the weak model alone. Unconditional models can be guided, too. Karras et al. (2024), "Guiding a diffusion model
    with a bad version of itself", eq. 3 (D_0 is the weak model), https://arxiv.org/abs/2406.02507.

    Args:
        weak: the weak denoiser, under the same schedule; it receives the same conditions.
    """

    weak: DenoiserProtocol

    def guides(self) -> dict[str, nn.Module]:
        return _modules(weak=self.weak)

    def predict(
        self, denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond: Cond, drop_cond: Callable[[Cond], Cond]
    ) -> Prediction:
        if self.scale in (0, 1):
            return (denoiser if self.scale == 1 else self.weak)(x_t, t, cond)
        return _extrapolate(self.weak(x_t, t, cond), denoiser(x_t, t, cond), self.scale)


def check_same_schedule(schedule: NoiseSchedule, guidance: Guidance) -> None:
    """Raise `UserError` if a guiding model has a different noise schedule, since noise levels would not match."""
    for name, guide in guidance.guides().items():
        other = guide.schedule
        assert isinstance(other, NoiseSchedule)
        if not is_same_schedule(schedule, other):
            raise UserError(
                f"model.guidance.{name} was trained under a different noise schedule ({type(other).__name__}) from the"
                f" model that it guides ({type(schedule).__name__}), or with different settings: train both with the"
                " same schedule."
            )


def _extrapolate(negative: Prediction, positive: Prediction, scale: float | Tensor) -> Prediction:
    """Compute negative + scale (positive - negative). A learned variance is taken from ``positive``."""
    return positive._replace(
        x0=negative.x0 + scale * (positive.x0 - negative.x0), eps=negative.eps + scale * (positive.eps - negative.eps)
    )


def _predict_both(
    denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond_a: Cond, cond_b: Cond
) -> tuple[Prediction, Prediction]:
    """Predict under two conditions, in one call with a batch of 2n."""
    cond = {name: torch.cat([cond_a[name], cond_b[name]]) for name in cond_b}
    both = denoiser(torch.cat([x_t, x_t]), t.repeat(2) if t.ndim else t, cond)
    halves = [(None, None) if part is None else part.chunk(2) for part in both]
    first, second = zip(*halves, strict=True)
    return Prediction(*first), Prediction(*second)


def _modules(**guides: object) -> dict[str, nn.Module]:
    return {name: guide for name, guide in guides.items() if isinstance(guide, nn.Module)}


def _name(guide: nn.Module) -> str:
    """Return the run that a guiding model was loaded from, or its class name if the run was not recorded."""
    return str(getattr(guide, "origin", type(guide).__name__))
