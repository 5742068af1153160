"""Exponential moving average (EMA) of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gencompare.checkpoint_files import EMA_KEY
from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.sharding import full_tensor, is_sharded, shard_like


class WeightAverage(Callback):
    """Base class of callbacks that average the weights, and can return to the average of an earlier step."""

    order = 3

    def restart(self, pl_module: pl.LightningModule, checkpoint: dict[str, Any] | None) -> None:
        """Continue from the average in ``checkpoint``, which the weights come from, or start again if it is None."""
        raise NotImplementedError


class EMA(WeightAverage):
    r"""Maintains an exponential moving average of ``model.averaged_parameters()``.

    After step s, :math:`\bar w \leftarrow d \bar w + (1 - d) w` with
    :math:`d = \min(\text{decay}, (1 + s) / (10 + s))`: the warm-up of TensorFlow's ExponentialMovingAverage with
    ``num_updates``, which soon discards the initial weights. The average is used for sampling, evaluation and export.
    Checkpoints contain it under ``ema``, in addition to the online weights.

    Lightning's `EMAWeightAveraging` is not used because it has no warm-up, counts a GAN's two optimisers as two steps,
    and swaps the online weights back before the hooks where callbacks sample.

    Args:
        decay: the maximum of d, in [0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay={decay} must be in [0, 1).")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.step = 0
        """Number of updates of the average so far."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.ema = self  # type: ignore[assignment]
        self.average = {name: p.detach().clone() for name, p in averaged_parameters(pl_module).items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = place_like_parameters(self.average, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.average:
            return
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        update_average(self.average, pl_module, decay)

    @torch.no_grad()
    def restart(self, pl_module: pl.LightningModule, checkpoint: dict[str, Any] | None) -> None:
        average = (checkpoint or {}).get(EMA_KEY)
        for name, parameter in averaged_parameters(pl_module).items():
            self.average[name].copy_(parameter if average is None else average[name])

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Use the averaged weights in the model during the block."""
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
        checkpoint[EMA_KEY] = {name: full_tensor(value) for name, value in self.average.items()}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        stored = checkpoint.get(EMA_KEY, {})
        if set(stored) != set(self.average):
            raise UserError("The EMA weights of the checkpoint belong to a model with a different config.")
        parameters = averaged_parameters(pl_module)
        self.average = {name: shard_like(value, parameters[name]) for name, value in stored.items()}
        # Earlier versions stored the number of steps only in the state of the clock.
        self.step = checkpoint["callbacks"].get("TrainingClock", {}).get("step", 0)


@torch.no_grad()
def swap(model: pl.LightningModule, weights: dict[str, Tensor]) -> None:
    """Swap the values of ``weights`` and of the model parameters with the same names in place."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        online = parameters[name].detach().clone()
        parameters[name].copy_(value)
        value.copy_(online)


def averaged_parameters(model: pl.LightningModule) -> dict[str, torch.nn.Parameter]:
    """Return the parameters to average, by state-dict name."""
    assert isinstance(model, TrainedModel)
    return model.averaged_parameters()


def place_like_parameters(average: dict[str, Tensor], model: pl.LightningModule) -> dict[str, Tensor]:
    """Move an average to the device and precision of the model, and shard it as the model is.

    Lightning moves and casts the model after the hook `setup`.
    """
    return {name: shard_like(average[name].to(p), p) for name, p in averaged_parameters(model).items()}


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: pl.LightningModule, decay: float) -> None:
    r"""Update an average by the weights of the model, in place: :math:`\bar w \leftarrow d \bar w + (1 - d) w`."""
    weights = {name: p.detach() for name, p in averaged_parameters(model).items()}
    for sharded in (False, True):  # torch cannot average sharded and other tensors together
        names = [name for name, weight in weights.items() if is_sharded(weight) == sharded]
        if names:
            get_ema_multi_avg_fn(decay)([average[name] for name in names], [weights[name] for name in names], 0)
