"""What training costs in floating-point operations, counted by torch while steps really happen."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from gencompare.contract import TrainedModel
from gencompare.errors import UserError
from gencompare.evaluation.flops import Flops
from gencompare.training.clock import clock_of


class TrainingFlops(Callback):
    """Counts the first step of each of a model's kinds (`TrainedModel.step_kind`): forward, backward, and whatever else
    a family does in a step. Every step adds what its kind costs to the clock's FLOPs."""

    def __init__(self) -> None:
        self.per_image: dict[str, float] = {}
        """FLOPs of a training image, by the kind of step."""
        self._counter: Flops | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"per_image": self.per_image}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.per_image = state_dict["per_image"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        assert isinstance(pl_module, TrainedModel)
        self._kind = pl_module.step_kind
        if self._kind not in self.per_image:
            self._counter = Flops()
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clock = clock_of(trainer)
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            counted = self._counter.get_total_flops() * trainer.world_size / clock.images_a_step
            self.per_image[self._kind] = counted
            self._counter = None
            if not counted and clock.budget.flops is not None:
                raise UserError("budget.flops: a step of this model has nothing that is counted. Set another limit.")
        clock.flops += self.per_image[self._kind] * clock.images_a_step
        clock.end_if_spent(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
