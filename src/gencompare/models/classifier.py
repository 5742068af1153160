"""Image classifiers: the feature extractors, and the noisy classifier that guides a diffusion model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.diffusion.parameterizations import LogSNRConditioning, NoiseConditioning
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.diffusion.times import TimeDistribution
from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec, TrainedModel, unpack_batch
from gencompare.rng import RandomSource

WHITENED = 5000
"""Training images that a first layer is fitted to."""


class Classifier(TrainedModel):
    r"""Predicts the class of an image: minimises the cross-entropy -sum_k q_k log p_k with smoothed labels.

    q = (1 - e) one_hot(y) + e / K, with e the label smoothing and K the number of classes (Szegedy et al. 2016,
    "Rethinking the Inception architecture", section 7). Training images are turned, shifted and partly covered at
    random; held-out images are left as they are, and their labels are not smoothed.

    Args:
        spec: of the data; it must have labels.
        network: ``(channels, num_classes) -> nn.Module`` with ``features`` and ``classify``;
            ``whiten(x)``, if it has it, fits its first layer to training images before the first step.
        label_smoothing: e, in [0, 1).
        rotate: whether images are turned by 0, 90, 180 or 270 degrees (square images alone).
        shift: largest random shift in pixels, each way; 0 for none.
        cutout: side of the square that is covered, in pixels; 0 for none.
        common: see `TrainedModel`.
    """

    def __init__(
        self,
        spec: DataSpec,
        network: Callable[..., nn.Module],
        *,
        label_smoothing: float = 0.0,
        rotate: bool = False,
        shift: int = 0,
        cutout: int = 0,
        **common: Any,
    ) -> None:
        if not spec.num_classes:
            raise UserError(f"model=classifier needs labels, and data '{spec.name}' has none.")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing={label_smoothing}: give a number from 0 up to, not including, 1.")
        if shift < 0 or cutout < 0:
            raise UserError(f"model.shift={shift} and model.cutout={cutout} cannot be negative (0 leaves them out).")
        if rotate and spec.shape[1] != spec.shape[2]:
            raise UserError(f"model.rotate=true needs square images, and data '{spec.name}' has {spec.shape[1:]}.")
        super().__init__(spec, **common)
        self.net: Any = network(channels=spec.shape[0], num_classes=spec.num_classes)
        self.label_smoothing, self.rotate, self.shift, self.cutout = label_smoothing, rotate, shift, cutout

    def on_train_start(self) -> None:
        # A run that is resumed has this layer in its checkpoint.
        if self.global_step == 0 and hasattr(self.net, "whiten"):
            self.net.whiten(self._first_images(WHITENED).to(self.device))

    def _first_images(self, n: int) -> Tensor:
        """At least ``n`` training images, (N, C, H, W), or all of them where there are fewer."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "training"):
            return data.normalize(data.training[slice(n)].images)
        found: list[Tensor] = []
        for batch in self.trainer.train_dataloader or []:
            found.append(unpack_batch(batch, self.spec)[0])
            if sum(map(len, found)) >= n:
                break
        return torch.cat(found)

    def losses(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        label = cond["label"]
        if self.training:
            x = self.augment(x, draws)
        logits = self.logits(x).float()
        smoothing = self.label_smoothing if self.training else 0.0
        return {
            "loss": F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing),
            "accuracy": (logits.argmax(1) == label).float(),
        }

    def augment(self, x: Tensor, draws: RandomSource) -> Tensor:
        """Each image changed at random, as the settings say."""
        x = rotated(x, draws) if self.rotate else x
        x = shifted(x, self.shift, draws) if self.shift else x
        return with_cutout(x, self.cutout, draws) if self.cutout else x

    def used(self, cond: Cond | None) -> Cond:
        """Labels are what a classifier learns from, whether or not it has other conditions."""
        return cond or {}

    def features(self, x: Tensor) -> Tensor:
        """(n, d): the layer before the logits."""
        return self.net.features(x)

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)


def rotated(x: Tensor, draws: RandomSource) -> Tensor:
    """Each image (C, H, H) turned by its own multiple of 90 degrees."""
    turns = draws.integers(4).to(x.device)[:, None, None, None]
    for k in range(1, 4):
        x = torch.where(turns >= k, x.rot90(1, (2, 3)), x)
    return x


def shifted(x: Tensor, most: int, draws: RandomSource) -> Tensor:
    """Each image moved by its own whole number of pixels in [-most, most] each way; black (-1) comes in."""
    n, _, height, width = x.shape
    offset = draws.integers(2 * most + 1, (2,)).to(x.device)
    padded = F.pad(x, (most,) * 4, value=-1.0)
    rows = offset[:, :1] + torch.arange(height, device=x.device)
    columns = offset[:, 1:] + torch.arange(width, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    # Indices on both sides of a slice come first: (n, H, W, C).
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def with_cutout(x: Tensor, side: int, draws: RandomSource) -> Tensor:
    """Each image with a grey (0) square of ``side`` pixels around one of its pixels; part of it may lie outside.

    DeVries and Taylor (2017), "Improved regularization of convolutional neural networks with cutout",
    https://arxiv.org/abs/1708.04552.
    """
    height, width = x.shape[2:]
    top = draws.integers(height).to(x.device)[:, None] - side // 2
    left = draws.integers(width).to(x.device)[:, None] - side // 2
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (row >= top) & (row < top + side)
    inside_columns = (column >= left) & (column < left + side)
    covered = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return x.masked_fill(covered, 0.0)


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
        self.schedule, self.times, self.noise = schedule, times, noise or LogSNRConditioning()
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

    def losses(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
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
