"""Learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytorch_lightning as pl
from pytorch_lightning import Callback

from gencompare.errors import UserError, check_counts
from gencompare.generative_model import TrainedModel
from gencompare.training.clock import clock_of


@dataclass(frozen=True)
class WarmupDecay:
    r"""Linear warm-up, then a constant learning rate or a decay to a fraction of it.

    At step s, the learning rate of the optimiser is multiplied by

    .. math:: \min(1, (s + 1) / \text{warmup\_steps}) \, (\text{last} + (1 - \text{last}) \, d(p)),

    with :math:`d(p) = 1`, :math:`(1 + \cos \pi p) / 2` or :math:`1 - p` for constant, cosine and linear decay.

    Args:
        warmup_steps: 0 for no warm-up.
        decay: ``constant``, ``cosine`` or ``linear``.
        last: the factor at the end of the decay.
        decay_steps: length of the decay, :math:`p = \min(1, s / \text{decay\_steps})`; if None, p is the spent fraction
            of the budget.
    """

    warmup_steps: int = 0
    decay: str = "constant"
    last: float = 0.0
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "cosine", "linear"):
            raise UserError(f"lr_schedule.decay={self.decay}: choose constant, cosine or linear.")
        check_counts("lr_schedule", minimum=0, warmup_steps=self.warmup_steps)
        if not 0 <= self.last <= 1 or (self.decay_steps is not None and self.decay_steps < 1):
            raise UserError(
                f"lr_schedule: last={self.last} must be in [0, 1], and decay_steps={self.decay_steps} null or positive."
            )

    def __call__(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        p = progress if self.decay_steps is None else min(1.0, step / self.decay_steps)
        decay = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * p)) / 2, "linear": 1 - p}
        return warmup * (self.last + (1 - self.last) * decay[self.decay])


class LearningRateScheduler(Callback):
    """Sets the learning rate of all optimisers before each step, according to ``model.lr_schedule``.

    Lightning steps schedulers only under automatic optimisation. This callback also serves manual optimisation, and
    decays over a budget in any unit. On resuming, the optimiser settings of the config replace those of the
    checkpoint, so that ``resume=DIR model.optimizer.lr=...`` takes effect.
    """

    order = 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainedModel)
        for optimizer, fresh in zip(trainer.optimizers, pl_module.build_optimizers(), strict=True):
            for group, settings in zip(optimizer.param_groups, fresh.param_groups, strict=True):
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
