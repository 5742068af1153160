"""A classifier of noisy images, which guides a diffusion model towards a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.contract import Cond, DataSpec, TrainedModel, unpack_batch
from gencompare.diffusion.noise_conditioning import LogSNR, NoiseConditioning
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.diffusion.times import TimeDistribution
from gencompare.errors import UserError
from gencompare.seeds import Draws


class NoisyClassifier(TrainedModel):
    r"""p(y | x_t) for every noise level of a schedule: minimises E -log p(y | alpha x_0 + sigma eps).

    Dhariwal and Nichol (2021), "Diffusion models beat GANs on image synthesis", section 4.1. It guides models that were
    trained under the same schedule. The network sees x_t / sqrt(alpha^2 + sigma^2), which is of about the same size at
    every noise level.

    Args:
        spec: of the data; it must have labels.
        network: a factory ``(shape, num_classes) -> module(x (n, C, H, W), noise_cond (n,)) -> logits``.
        schedule: how noisy images are at each time; it must be a fixed one.
        times: distribution of t in training.
        noise: how the network is told the amount of noise.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        network: Callable[..., nn.Module],
        schedule: NoiseSchedule,
        times: TimeDistribution,
        noise: NoiseConditioning | None = None,
        **training: Any,
    ) -> None:
        if not spec.num_classes:
            raise UserError(f"model=noisy_classifier needs labels, and data '{spec.name}' has none.")
        super().__init__(spec, **training)
        schedule.check()
        if any(True for _ in schedule.parameters()):
            raise UserError("A noisy classifier cannot learn its schedule: choose model/schedule=cosine or another.")
        self.schedule, self.times, self.noise = schedule, times, noise or LogSNR()
        self.network = network(shape=spec.shape, num_classes=spec.num_classes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits (n, num_classes) of p(y | x_t), for ``x_t`` (n, C, H, W) at ``t``, () or (n,)."""
        at = self.schedule.at(t, x_t)
        noise = self.noise(t, at).to(x_t.dtype).expand(len(x_t))
        return self.network(x_t / (at.alpha**2 + at.sigma**2).sqrt(), noise)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits (n, num_classes) of images without noise."""
        x, _ = unpack_batch(batch, self.spec)
        return self(x, x.new_tensor(self.schedule.t_min))

    def losses(self, x: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        t = self.times(self.schedule, draws)
        at = self.schedule.at(t, x)
        x_t = at.alpha * x + at.sigma * draws.normal(x.shape[1:]).to(x.dtype)
        logits = self(x_t, t).to(x.dtype)
        return {
            "loss": F.cross_entropy(logits, cond["label"], reduction="none"),
            "accuracy": (logits.argmax(1) == cond["label"]).float(),
        }

    def used(self, cond: Cond | None) -> Cond:
        """Labels are what a classifier learns from, whether or not anything is steered by them."""
        return cond or {}
