"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor

from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.hyperparameters import EMA_KEY


class EMA(Callback):
    r"""Keeps \bar w <- d \bar w + (1 - d) w after each step, on the device, for ``model.averaged_parameters()``.

    The rate warms up, d = min(decay, (1 + s) / (10 + s)) at step s, so that the first weights are soon forgotten
    (as in TensorFlow's ExponentialMovingAverage with ``num_updates``). The average is what is sampled, evaluated and
    exported; checkpoints hold it under ``ema`` beside the raw weights, and resuming restores both.

    Lightning's own averaging is not used: it counts a GAN's two optimisers wrongly, has no warm-up, and swaps the raw
    weights back before the hook in which one would sample.

    Args:
        decay: d, in [0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay={decay}: give a number from 0 up to, not including, 1.")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.step = 0
        """Training steps that the average has seen."""

    order = 3

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.ema = self  # type: ignore[assignment]
        self.average = {name: p.detach().clone() for name, p in _parameters(pl_module).items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning has moved the model to its device by now.
        self.average = {name: self.average[name].to(p.device) for name, p in _parameters(pl_module).items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.average:
            return
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        weights = [p.detach() for p in _parameters(pl_module).values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)  # type: ignore[attr-defined]

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """The model with the average in place of its weights, which come back when the block ends."""
        swap(pl_module, self.average)
        try:
            yield
        finally:
            swap(pl_module, self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint[EMA_KEY] = self.average

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        stored = checkpoint.get(EMA_KEY, {})
        if set(stored) != set(self.average):
            raise UserError("The checkpoint's averaged weights do not fit the model: it is of another configuration.")
        self.average = dict(stored)
        # Checkpoints of earlier versions have the steps with the clock alone.
        self.step = checkpoint["callbacks"].get("TrainingClock", {}).get("step", 0)


@torch.no_grad()
def swap(model: pl.LightningModule, weights: dict[str, Tensor]) -> None:
    """Exchange, in place, the values of ``weights`` and of the model's parameters of the same names."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        kept = parameters[name].detach().clone()
        parameters[name].copy_(value)
        value.copy_(kept)


def _parameters(model: pl.LightningModule) -> dict[str, torch.nn.Parameter]:
    assert isinstance(model, TrainedModel)
    return model.averaged_parameters()
