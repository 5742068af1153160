"""The training clock: steps, images, seconds and FLOPs so far, and the random numbers of each step."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback

from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.resources import FlopCounter
from gencompare.rng import RandomSource, derive_seed
from gencompare.training.budget import Budget


class TrainingClock(Callback):
    """Counts what was trained, ends training with the budget, and makes each step's randomness a function of the seed.

    Before step s the model's ``draws`` and torch's global generator (dropout) are seeded with (seed, s). So a resumed
    run meets the numbers that an unbroken one would have met, and 1, 2 or 4 processes draw the same noise for the same
    image of the global batch. (Dropout masks differ between ranks, as they must.)

    Other callbacks read it as ``pl_module.clock``.

    Args:
        seed: of all random numbers of training.
        global_batch_size: images of a step, over all processes.
        budget: ends training.
    """

    order = 0
    """Counts a step before any other callback acts on it."""

    def __init__(self, seed: int, global_batch_size: int, budget: Budget) -> None:
        self.seed, self.global_batch_size, self.budget = seed, global_batch_size, budget
        self.step = 0
        """Finished training steps."""
        self.images_a_step = global_batch_size
        """Training images that a step sees; all of them, where a model is fitted in closed form."""
        self.images = 0
        """Training images seen, repeats counted."""
        self.seconds = 0.0
        """Wall seconds spent in training, over all sittings."""
        self.device_seconds = 0.0
        """The same, times the processes of each sitting."""
        self.flops = 0.0
        """FLOPs of training so far, as `TrainingFlops` adds them up."""
        self.evaluated_at = 0
        """The step of the last evaluation."""
        self.best_at = 0
        """The step of the best evaluation so far."""
        self._generator: torch.Generator | None = None
        self._since = time.monotonic()

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.clock = self  # type: ignore[assignment]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning restores the callbacks before this hook and asks for the training stream after it.
        trainer.datamodule.start_step = self.step  # type: ignore[attr-defined]
        assert isinstance(pl_module, TrainedModel)
        self.images_a_step = self.global_batch_size
        if self.budget.by_time and trainer.world_size > 1:
            # What is left of it after a first stage was measured by each process for itself.
            self.budget = trainer.strategy.broadcast(self.budget, src=0)
        if pl_module.closed_form:
            self.budget = Budget(steps=1)
            self.images_a_step = len(trainer.datamodule.train_subset)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._generator = torch.Generator(pl_module.device)
        self._since = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, i: int) -> None:
        assert isinstance(pl_module, TrainedModel) and self._generator is not None
        self._generator.manual_seed(derive_seed(self.seed, "step", self.step))
        share = self.global_batch_size // trainer.world_size
        start = trainer.global_rank * share
        pl_module.rng = RandomSource(self._generator, start, start + share, self.global_batch_size)
        pl_module.progress = self.progress
        torch.manual_seed(derive_seed(self.seed, "dropout", self.step, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step += 1
        self.images += self.images_a_step
        now = time.monotonic()
        taken, self._since = now - self._since, now
        if self.budget.by_time and trainer.world_size > 1:
            # Ranks must agree on when a budget of time is spent.
            taken = float(trainer.strategy.broadcast(taken, src=0))
        self.seconds += taken
        self.device_seconds += taken * trainer.world_size
        self.end_if_spent(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainedModel)
        pl_module.rng = pl_module.progress = self._generator = None  # type: ignore[assignment]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.clock = None  # type: ignore[assignment]

    def end_if_spent(self, trainer: pl.Trainer) -> None:
        if self.progress >= 1:
            trainer.should_stop = True

    def pause(self) -> None:
        """Leave the time since the last step out of ``seconds`` (looks at the model are not training)."""
        self._since = time.monotonic()


def clock_of(trainer: pl.Trainer) -> TrainingClock:
    """The clock of the run that ``trainer`` trains. Raises `UserError` where it has none."""
    clock = getattr(trainer.lightning_module, "clock", None)
    if not isinstance(clock, TrainingClock):
        raise UserError("This callback needs a TrainingClock among the Trainer's callbacks.")
    return clock


class TrainingFlops(Callback):
    """Counts the first step of each of a model's kinds (`TrainedModel.step_kind`): forward, backward, and whatever else
    a family does in a step. Every step adds the cost of its kind to the clock's FLOPs."""

    order = 2

    def __init__(self) -> None:
        self.per_image: dict[str, float] = {}
        """FLOPs of a training image, by the kind of step."""
        self._counter: FlopCounter | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"per_image": self.per_image}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.per_image = state_dict["per_image"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        assert isinstance(pl_module, TrainedModel)
        self._kind = pl_module.step_kind
        if self._kind not in self.per_image:
            self._counter = FlopCounter()
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
