"""What a training step costs in floating-point operations, counted once by torch while the step really happens."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from gencompare.errors import UserError
from gencompare.evaluation.flops import Flops
from gencompare.training.clock import clock_of


class TrainingFlops(Callback):
    """Counts the first step of a run: forward, backward, and whatever else a family does in a step."""

    def __init__(self) -> None:
        self.per_image: float | None = None
        self._counter: Flops | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"per_image": self.per_image}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.per_image = state_dict["per_image"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        clock_of(trainer).flops_per_image = self.per_image

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        if self.per_image is None:
            self._counter = Flops()
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            clock = clock_of(trainer)
            self.per_image = self._counter.get_total_flops() * trainer.world_size / clock.images_a_step
            self._counter = None
            if not self.per_image and clock.budget.flops is not None:
                raise UserError("budget.flops: a step of this model has nothing that is counted. Set another limit.")
            # The clock acted before this count was known.
            clock.flops_per_image = self.per_image
            clock.end_if_spent(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
