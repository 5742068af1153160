"""Callbacks that count steps, images, time and FLOPs, seed each step, and end training."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback

from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.resources import FlopCounter
from gencompare.rng import RandomSource, derive_seed, full_precision
from gencompare.training.budget import Budget


class TrainingClock(Callback):
    """Counts steps, images and time, seeds each step, and ends training when the budget is spent.

    Before step s, the model's ``rng`` and torch's global generator (dropout) are seeded with (seed, s). A resumed run
    is therefore identical to an uninterrupted one, and the noise of each image in the global batch does not depend on
    the number of processes. Dropout masks differ between ranks.

    Lightning has no budget in images, FLOPs or device time, and its `seed_everything` seeds a run once, not each step.
    Other callbacks read the clock as ``pl_module.clock``.

    Args:
        seed: seed of all random numbers of training.
        global_batch_size: images per step, over all processes.
        budget: when to end training.
    """

    order = 0
    """Callbacks run in ascending order of this attribute."""

    def __init__(self, seed: int, global_batch_size: int, budget: Budget) -> None:
        self.seed, self.global_batch_size, self.budget = seed, global_batch_size, budget
        self.step = 0
        """Finished training steps."""
        self.images_per_step = global_batch_size
        """Training images per step; all training images if the model is fitted in closed form."""
        self.images = 0
        """Training images seen, including repetitions."""
        self.seconds = 0.0
        """Wall time of training, over all resumptions."""
        self.device_seconds = 0.0
        """Wall time multiplied by the number of processes at that time."""
        self.flops = 0.0
        """FLOPs of training, counted by `TrainingFlops`."""
        self.evaluated_at = 0
        """The step of the last evaluation."""
        self.exclusions = 0
        """How often time was excluded since the process started."""
        self.best_at = 0
        """The step of the best evaluation so far."""
        self._generator: torch.Generator | None = None
        self._last_time = time.monotonic()

    @property
    def progress(self) -> float:
        """Fraction of the budget that is spent, in [0, 1]."""
        return self.budget.progress(**self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step, "images": self.images, "seconds": self.seconds, "flops": self.flops,
            "device_seconds": self.device_seconds,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.images, self.seconds = state_dict["step"], state_dict["images"], state_dict["seconds"]
        self.device_seconds = state_dict.get("device_seconds", self.seconds)
        self.flops = state_dict["flops"]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        # Under FSDP, Lightning restores callbacks after `on_fit_start`.
        trainer.datamodule.start_step = checkpoint["callbacks"][self.state_key]["step"]  # type: ignore[attr-defined]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.clock = self  # type: ignore[assignment]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning usually restores callbacks before this hook, and requests the training dataloader after it.
        trainer.datamodule.start_step = self.step  # type: ignore[attr-defined]
        assert isinstance(pl_module, TrainedModel)
        self.images_per_step = self.global_batch_size
        if self.budget.by_time and trainer.world_size > 1:
            # Each rank timed the autoencoder stage separately.
            self.budget = trainer.strategy.broadcast(self.budget, src=0)
        if pl_module.closed_form:
            self.budget = Budget(steps=1)
            self.images_per_step = len(trainer.datamodule.train_subset)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._generator = torch.Generator(pl_module.device)
        self._last_time = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, i: int) -> None:
        assert isinstance(pl_module, TrainedModel) and self._generator is not None
        self._generator.manual_seed(derive_seed(self.seed, "step", self.step))
        local_batch_size = self.global_batch_size // trainer.world_size
        start = trainer.global_rank * local_batch_size
        dtype = full_precision(pl_module.dtype)
        pl_module.rng = RandomSource(self._generator, start, start + local_batch_size, self.global_batch_size, dtype)
        pl_module.progress = self.progress
        torch.manual_seed(derive_seed(self.seed, "dropout", self.step, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step += 1
        self.images += self.images_per_step
        now = time.monotonic()
        elapsed, self._last_time = now - self._last_time, now
        if self.budget.by_time and trainer.world_size > 1:
            # All ranks must agree on when a time limit is reached.
            elapsed = float(trainer.strategy.broadcast(elapsed, src=0))
        self.seconds += elapsed
        self.device_seconds += elapsed * trainer.world_size
        self.end_if_spent(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainedModel)
        pl_module.rng = pl_module.progress = self._generator = None  # type: ignore[assignment]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.clock = None  # type: ignore[assignment]

    def end_if_spent(self, trainer: pl.Trainer) -> None:
        """End training if the budget is spent."""
        if self.progress >= 1:
            trainer.should_stop = True

    def exclude_elapsed_time(self) -> None:
        """Exclude the time since the last step, such as an evaluation, from training time."""
        self._last_time = time.monotonic()
        self.exclusions += 1


def clock_of(trainer: pl.Trainer) -> TrainingClock:
    """Return the clock of a run. Raise `UserError` if the Trainer has none."""
    clock = getattr(trainer.lightning_module, "clock", None)
    if not isinstance(clock, TrainingClock):
        raise UserError("This callback needs a TrainingClock among the Trainer's callbacks.")
    return clock


class TrainingFlops(Callback):
    """Adds the FLOPs of every training step, forward and backward, to the clock.

    FLOPs are measured once for each `TrainedModel.step_kind` and assumed equal for all steps of that kind. Lightning's
    `ThroughputMonitor` instead expects the FLOPs of a batch as an input.
    """

    order = 2

    def __init__(self) -> None:
        self.per_image: dict[str, float] = {}
        """FLOPs per training image, by kind of step."""
        self._counter: FlopCounter | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"per_image": self.per_image}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.per_image = state_dict["per_image"]

    @property
    def is_counting(self) -> bool:
        """Whether the FLOPs of the current step are counted."""
        return self._counter is not None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        assert isinstance(pl_module, TrainedModel)
        parts = pl_module.num_micro_batches  # all but one compute their activations twice
        self._kind = pl_module.step_kind if parts == 1 else f"{pl_module.step_kind} in {parts} parts"
        if self._kind not in self.per_image:
            self._counter = FlopCounter()
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clock = clock_of(trainer)
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            flops = self._counter.get_total_flops() * trainer.world_size / clock.images_per_step
            self.per_image[self._kind] = flops
            self._counter = None
            if not flops and clock.budget.flops is not None:
                raise UserError(
                    "budget.flops: the training steps of this model have no countable FLOPs. Set another limit."
                )
        clock.flops += self.per_image[self._kind] * clock.images_per_step
        clock.end_if_spent(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
