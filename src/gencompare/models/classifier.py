"""Image classifiers: feature extractors, and the noisy classifier for classifier guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.diffusion.parameterizations import LogSNRConditioning, NoiseConditioning
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.diffusion.times import TimeDistribution
from gencompare.errors import UserError, check_counts
from gencompare.generative_model import Cond, DataSpec, TrainedModel, unpack_batch
from gencompare.networks.layers import at_least_float32
from gencompare.rng import RandomSource

NUM_WHITENING_IMAGES = 5000
"""Number of training images used to compute the whitening of the first layer."""


class Classifier(TrainedModel):
    r"""An image classifier, trained with label smoothing and augmentation.

    Minimises the cross-entropy :math:`-\sum_k q_k \log p_k` with smoothed labels
    :math:`q = (1 - \epsilon) \mathrm{onehot}(y) + \epsilon / K` (Szegedy et al. 2016, "Rethinking the Inception
    architecture", section 7, https://arxiv.org/abs/1512.00567). Training images are randomly rotated, shifted and
    partly covered. Held-out images are not augmented, and their labels are not smoothed.

    Args:
        spec: shape and classes of the data, which must have labels.
        network: a factory ``(channels, num_classes) -> nn.Module`` with ``features`` and ``classify``. Its method
            ``whiten(x)``, if any, initialises the first layer from training images before the first step.
        label_smoothing: :math:`\epsilon`, in [0, 1).
        rotate: whether to rotate images by random multiples of 90 degrees (square images only).
        shift: maximum random shift in pixels, in each direction; 0 disables it.
        cutout: side length of the covered square in pixels; 0 disables it.
        kwargs: see `TrainedModel`.
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
        **kwargs: Any,
    ) -> None:
        if not spec.num_classes:
            raise UserError(f"model=classifier needs labels, but data set '{spec.name}' has none.")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing={label_smoothing} must be in [0, 1).")
        check_counts("model", minimum=0, shift=shift, cutout=cutout)
        if rotate and spec.shape[1] != spec.shape[2]:
            raise UserError(f"model.rotate=true needs square images, but those of '{spec.name}' are {spec.shape[1:]}.")
        super().__init__(spec, **kwargs)
        self.net: Any = network(channels=spec.shape[0], num_classes=spec.num_classes)
        self.label_smoothing, self.rotate, self.shift, self.cutout = label_smoothing, rotate, shift, cutout

    def on_train_start(self) -> None:
        # A resumed run loads this layer from its checkpoint.
        if self.global_step == 0 and hasattr(self.net, "whiten"):
            self.net.whiten(self._first_images(NUM_WHITENING_IMAGES).to(self.device))

    def _first_images(self, n: int) -> Tensor:
        """Return at least ``n`` training images, (N, C, H, W), or all if there are fewer."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "train_subset"):
            return data.normalize(data.train_subset[slice(n)].images)
        images: list[Tensor] = []
        for batch in self.trainer.train_dataloader or []:
            images.append(unpack_batch(batch, self.spec)[0])
            if sum(map(len, images)) >= n:
                break
        return torch.cat(images)

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        label = cond["label"]
        if self.training:
            x = self.augment(x, rng)
        logits = at_least_float32(self.logits(x))
        smoothing = self.label_smoothing if self.training else 0.0
        return {
            "loss": F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing),
            "accuracy": (logits.argmax(1) == label).float(),
        }

    def augment(self, x: Tensor, rng: RandomSource) -> Tensor:
        """Apply the random augmentations to each image."""
        x = random_rotate(x, rng) if self.rotate else x
        x = random_shift(x, self.shift, rng) if self.shift else x
        return random_cutout(x, self.cutout, rng) if self.cutout else x

    def select_conditions(self, cond: Cond | None) -> Cond:
        """Keep the labels, which are the targets of a classifier."""
        return cond or {}

    def features(self, x: Tensor) -> Tensor:
        """Compute the features before the logits, (n, d)."""
        return self.net.features(x)

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)


def random_rotate(x: Tensor, rng: RandomSource) -> Tensor:
    """Rotate each image (C, H, H) by a random multiple of 90 degrees."""
    turns = rng.integers(4).to(x.device)[:, None, None, None]
    for k in range(1, 4):
        x = torch.where(turns >= k, x.rot90(1, (2, 3)), x)
    return x


def random_shift(x: Tensor, max_shift: int, rng: RandomSource) -> Tensor:
    """Shift each image by a random number of pixels in [-max_shift, max_shift] along both axes, with black (-1)
    padding."""
    n, _, height, width = x.shape
    offset = rng.integers(2 * max_shift + 1, (2,)).to(x.device)
    padded = F.pad(x, (max_shift,) * 4, value=-1.0)
    rows = offset[:, :1] + torch.arange(height, device=x.device)
    columns = offset[:, 1:] + torch.arange(width, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    # Index tensors on both sides of a slice give (n, H, W, C).
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_cutout(x: Tensor, side: int, rng: RandomSource) -> Tensor:
    """Cover each image with a grey (0) square of ``side`` pixels around a random pixel; part of it may lie outside.

    DeVries and Taylor (2017), "Improved regularization of convolutional neural networks with cutout",
    https://arxiv.org/abs/1708.04552.
    """
    height, width = x.shape[2:]
    top = rng.integers(height).to(x.device)[:, None] - side // 2
    left = rng.integers(width).to(x.device)[:, None] - side // 2
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (row >= top) & (row < top + side)
    inside_columns = (column >= left) & (column < left + side)
    covered = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return x.masked_fill(covered, 0.0)


class NoisyClassifier(TrainedModel):
    r"""A classifier :math:`p(y | x_t)` at all noise levels of a schedule, for classifier guidance.

    Minimises :math:`E[-\log p(y | \alpha_t x_0 + \sigma_t \epsilon)]`: Dhariwal and Nichol (2021), "Diffusion models
    beat GANs on image synthesis", section 4.1, https://arxiv.org/abs/2105.05233. The classifier guides diffusion models
    with the same schedule. The network input is :math:`x_t / \sqrt{\alpha_t^2 + \sigma_t^2}`, which has about unit
    scale at every noise level.

    Args:
        spec: shape and classes of the data, which must have labels.
        network: a factory ``(shape, num_classes) -> module(x (n, C, H, W), noise_cond (n,)) -> logits``.
        schedule: a fixed noise schedule.
        times: distribution of t in training.
        noise_conditioning: maps t to the network input ``noise_cond``; by default the log-SNR.
        kwargs: see `TrainedModel`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        network: Callable[..., nn.Module],
        schedule: NoiseSchedule,
        times: TimeDistribution,
        noise_conditioning: NoiseConditioning | None = None,
        **kwargs: Any,
    ) -> None:
        if not spec.num_classes:
            raise UserError(f"model=noisy_classifier needs labels, but data set '{spec.name}' has none.")
        super().__init__(spec, **kwargs)
        schedule.check()
        if any(True for _ in schedule.parameters()):
            raise UserError(
                "A noisy classifier cannot learn its schedule: choose a fixed schedule, such as model/schedule=cosine."
            )
        self.schedule, self.times = schedule, times
        self.noise_conditioning = noise_conditioning or LogSNRConditioning()
        self.network = network(shape=spec.shape, num_classes=spec.num_classes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute logits (n, num_classes) of p(y | x_t) for ``x_t`` (n, C, H, W) at times ``t``, () or (n,)."""
        at = self.schedule.at(t, x_t)
        noise_cond = self.noise_conditioning(t, at).to(x_t.dtype).expand(len(x_t))
        return self.network(x_t / (at.alpha**2 + at.sigma**2).sqrt(), noise_cond)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute logits (n, num_classes) of clean images."""
        x, _ = unpack_batch(batch, self.spec)
        return self(x, x.new_tensor(self.schedule.t_min))

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        t = self.times(self.schedule, rng)
        at = self.schedule.at(t, x)
        x_t = at.alpha * x + at.sigma * rng.normal(x.shape[1:]).to(x.dtype)
        logits = self(x_t, t).to(x.dtype)
        return {
            "loss": F.cross_entropy(logits, cond["label"], reduction="none"),
            "accuracy": (logits.argmax(1) == cond["label"]).float(),
        }

    def select_conditions(self, cond: Cond | None) -> Cond:
        """Keep the labels, which are the targets of a classifier."""
        return cond or {}
