"""Learning-rate schedules: factors on the optimiser's own rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytorch_lightning as pl
from pytorch_lightning import Callback

from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.training.clock import clock_of


@dataclass(frozen=True)
class WarmupDecay:
    """Linear warm-up over ``warmup_steps`` steps, then constant, or decay to ``last`` at the end of the budget.

    factor(s, p) = min(1, (s + 1) / warmup_steps) * (last + (1 - last) d(p)), with p the share of the budget that is
    spent and d(p) = 1, (1 + cos(pi p)) / 2 or 1 - p for ``constant``, ``cosine`` and ``linear``. With ``decay_steps``,
    p = min(1, s / decay_steps) whatever the budget.
    """

    warmup_steps: int = 0
    decay: str = "constant"
    last: float = 0.0
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "cosine", "linear"):
            raise UserError(f"lr_schedule.decay={self.decay}: choose constant, cosine or linear.")
        if not 0 <= self.last <= 1 or (self.decay_steps is not None and self.decay_steps < 1):
            raise UserError(
                f"lr_schedule: last={self.last} must be from 0 to 1, decay_steps={self.decay_steps} null or at least 1."
            )

    def __call__(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        p = progress if self.decay_steps is None else min(1.0, step / self.decay_steps)
        decay = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * p)) / 2, "linear": 1 - p}
        return warmup * (self.last + (1 - self.last) * decay[self.decay])


class LearningRateScheduler(Callback):
    """Sets every optimiser's rate before each step, so that one rule serves automatic and manual optimisation.

    A checkpoint brings back an optimiser's settings with its state; those of the config are put in their place, so that
    ``resume=DIR model.optimizer.lr=...`` takes effect.
    """

    order = 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainedModel)
        for optimizer, like in zip(trainer.optimizers, pl_module.build_optimizers(), strict=True):
            for group, settings in zip(optimizer.param_groups, like.param_groups, strict=True):
                group.update({name: value for name, value in settings.items() if name != "params"})
                group["initial_lr"] = settings["lr"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, i: int) -> None:
        assert isinstance(pl_module, TrainedModel)
        if pl_module.lr_schedule is None:
            return
        clock = clock_of(trainer)
        factor = pl_module.lr_schedule(clock.step, clock.progress)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
