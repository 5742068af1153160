"""Denoisers: the interface between a network and the samplers. A denoiser predicts x_0 and eps from x_t."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gencompare.diffusion.parameterizations import Parameterization, Prediction
from gencompare.diffusion.schedules import NoiseSchedule, ScheduleValues

Cond = Mapping[str, Tensor]


class DenoiserProtocol(Protocol):
    """Interface of a network with a schedule, or of a wrapper around one (guidance, clipping)."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """Predict x_0 and eps.

        Args:
            x_t: (n, C, H, W).
            t: time in [t_min, t_max], () or (n,).
            cond: conditions passed to the network, by name, each (n, ...).

        Returns:
            The prediction, with tensors shaped like x_t.
        """
        ...


@dataclass(frozen=True)
class Denoiser:
    """A network with its schedule and parameterisation.

    It is not a module: network and schedule belong to the model that trains them.
    """

    network: nn.Module
    """Maps (x (n, C, H, W), noise_cond (n,), cond) to (n, output_multiplier C, H, W)."""
    schedule: NoiseSchedule
    parameterization: Parameterization

    def output(self, x_t: Tensor, t: Tensor, at: ScheduleValues, cond: Cond) -> Tensor:
        """Compute the raw network output, cast to the dtype of x_t (autocast may lower its precision)."""
        return self.network(*self.parameterization.network_input(x_t, t, at), cond).to(x_t.dtype)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        at = self.schedule.at(t, x_t)
        return self.parameterization.to_prediction(self.output(x_t, t, at, cond), x_t, at)


@dataclass(frozen=True)
class ClipX0:
    r"""A wrapper that clips the predicted image to [-1, 1], the range of the data, and adjusts eps to match.

    Without clipping, a small error in eps at high noise, divided by a small alpha, moves x_0 far out of range. Ho et
    al. (2020) clip in their sampler; wrapping the denoiser gives every sampler the same behaviour.

    With ``dynamic_threshold``, each image is clipped to [-s, s] and divided by s, where s is this quantile of its
    absolute values, but at least 1. Strong guidance then saturates fewer pixels. Saharia et al. (2022), "Photorealistic
    Text-to-Image Diffusion Models with Deep Language Understanding", section 2.3, https://arxiv.org/abs/2205.11487.

    Args:
        denoiser: the denoiser.
        dynamic_threshold: the quantile, in (0, 1]; None clips to [-1, 1].
    """

    denoiser: DenoiserProtocol
    dynamic_threshold: float | None = None

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        prediction = self.denoiser(x_t, t, cond)
        at = self.schedule.at(t, x_t)
        x0 = self._clip(prediction.x0)
        # Shift eps by the change in x_0, which is exact where nothing is clipped, however small sigma is.
        eps = torch.addcmul(prediction.eps, at.derive(_alpha_over_sigma), prediction.x0 - x0)
        return prediction._replace(x0=x0, eps=eps)

    def _clip(self, x0: Tensor) -> Tensor:
        if self.dynamic_threshold is None:
            return x0.clamp(-1, 1)
        values = x0.flatten(1).abs().sort(dim=1).values  # torch.quantile is limited to 16M values
        position = self.dynamic_threshold * (values.shape[1] - 1)
        low, high = values[:, math.floor(position)], values[:, math.ceil(position)]
        threshold = low.lerp(high, position % 1).clamp(min=1).reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-threshold, threshold) / threshold


def _alpha_over_sigma(at: ScheduleValues) -> Tensor:
    return at.alpha / at.sigma
