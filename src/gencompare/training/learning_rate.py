"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from gencompare.errors import UserError, check_counts
from gencompare.generative_model import TrainedModel
from gencompare.training.budget import Budget
from gencompare.training.clock import clock_of
from gencompare.training.optimizers import match_memory_format


@dataclass(frozen=True)
class WarmupDecay:
    r"""Linear warm-up, then a constant learning rate or a decay to a fraction of it.

    At step s, the learning rate of the optimiser is multiplied by

    .. math:: \min(1, (s + 1) / \text{warmup\_steps}) \, (\text{last} + (1 - \text{last}) \, d(p)),

    with :math:`d(p) = 1`, :math:`(1 + \cos \pi p) / 2` or :math:`1 - p` for constant, cosine and linear decay. Under
    exponential decay, the second factor is :math:`\text{last}^p`, a constant rate per step.

    Args:
        warmup_steps: 0 for no warm-up.
        decay: ``constant``, ``cosine``, ``linear`` or ``exponential``.
        last: the factor at the end of the decay; positive if it is exponential.
        decay_steps: length of the decay, :math:`p = \min(1, s / \text{decay\_steps})`; if None, p is the spent fraction
            of the budget.
        resumed_budget: what happens if a run is resumed with another budget. ``restart`` decays over the new
            budget, so after a larger one the factor rises again. ``constant`` keeps the decay of the first budget,
            and then stays at ``last``, which must not be 0.
    """

    warmup_steps: int = 0
    decay: str = "constant"
    last: float = 0.0
    decay_steps: int | None = None
    resumed_budget: str = "restart"

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "cosine", "linear", "exponential"):
            raise UserError(f"lr_schedule.decay={self.decay}: choose constant, cosine, linear or exponential.")
        if self.resumed_budget not in ("restart", "constant"):
            raise UserError(f"lr_schedule.resumed_budget={self.resumed_budget}: choose restart or constant.")
        check_counts("lr_schedule", minimum=0, warmup_steps=self.warmup_steps)
        if not 0 <= self.last <= 1 or (self.decay_steps is not None and self.decay_steps < 1):
            raise UserError(
                f"lr_schedule: last={self.last} must be in [0, 1], and decay_steps={self.decay_steps} null or positive."
            )
        if self.decay == "exponential" and not self.last:
            raise UserError(f"lr_schedule.last={self.last} must be positive for an exponential decay, such as 0.01.")

    def __call__(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        p = progress if self.decay_steps is None else min(1.0, step / self.decay_steps)
        if self.decay == "exponential":
            return warmup * self.last**p
        decay = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * p)) / 2, "linear": 1 - p}
        return warmup * (self.last + (1 - self.last) * decay[self.decay])


class LearningRateScheduler(Callback):
    """Sets the learning rate of all optimisers before each step, according to ``model.lr_schedule``.

    Lightning steps schedulers only under automatic optimisation. This callback also serves manual optimisation, and
    decays over a budget in any unit. On resuming, the optimiser settings of the config replace those of the
    checkpoint, so that ``resume=DIR model.optimizer.lr=...`` takes effect. Checkpoints contain the budget over
    which the learning rate decays, for a schedule that keeps it (`WarmupDecay.resumed_budget`).
    """

    order = 1

    def __init__(self) -> None:
        self.budget: Budget | None = None
        """The budget over which the learning rate decays."""
        self._factor = 1.0
        """The factor of the current step."""

    def state_dict(self) -> dict[str, Any]:
        return {} if self.budget is None else {"budget": dict(vars(self.budget))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.budget = Budget(**state_dict["budget"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainedModel)
        if self.budget is None or not keeps_first_budget(pl_module):
            self.budget = clock_of(trainer).budget
        for optimizer, fresh in zip(trainer.optimizers, pl_module.build_optimizers(), strict=True):
            for group, settings in zip(optimizer.param_groups, fresh.param_groups, strict=True):
                group.update({name: value for name, value in settings.items() if name != "params"})
                group["initial_lr"] = settings["lr"]
            match_memory_format(optimizer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, i: int) -> None:
        assert isinstance(pl_module, TrainedModel)
        if pl_module.lr_schedule is None:
            return
        assert self.budget is not None
        clock = clock_of(trainer)
        self._factor = pl_module.lr_schedule(clock.step, self.budget.progress(**clock.state_dict()))
        self._set_learning_rates(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has already set the next rate (`configure_optimizers`), but loggers report that of this step.
        assert isinstance(pl_module, TrainedModel)
        if pl_module.lr_schedule is not None:
            self._set_learning_rates(trainer)

    def _set_learning_rates(self, trainer: pl.Trainer) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self._factor


def keeps_first_budget(model: TrainedModel) -> bool:
    """Return whether the learning rate of ``model`` stays at its last value once the first budget is spent."""
    return getattr(model.lr_schedule, "resumed_budget", "restart") == "constant"


def describe_resumed_schedule(
    model: TrainedModel, counts: Mapping[str, Any], first: Budget, budget: Budget
) -> str | None:
    """Describe how the learning rate goes on if a run is resumed with another budget.

    Args:
        model: the model.
        counts: the state of the `TrainingClock` in the checkpoint.
        first: the budget over which the learning rate has decayed so far.
        budget: the new budget.

    Returns:
        One line for the user; None if the learning rate does not depend on the change.

    Raises:
        UserError: the learning rate would be 0 from now on.
    """
    optimizers = model.build_optimizers()
    if model.lr_schedule is None or not optimizers or model.closed_form:
        return None
    before, after = (each.progress(**counts) for each in (first, budget))
    base = float(optimizers[0].param_groups[0]["lr"])
    old, new = (base * model.lr_schedule(counts["step"], progress) for progress in (before, after))
    if old == new or after >= 1:
        return None
    if not keeps_first_budget(model):
        larger = "larger" if after < before else "smaller"
        constant = "+model.lr_schedule.resumed_budget=constant ++model.lr_schedule.last=0.05"
        advice = f" {constant} keeps the first decay." if isinstance(model.lr_schedule, WarmupDecay) else ""
        return (
            f"The learning rate decays again, over the {larger} budget: it goes from {old:.2g} to {new:.2g}. This is"
            f" not the run that the {larger} budget gives from the start.{advice}"
        )
    if before >= 1 and not old:
        raise UserError(
            "model.lr_schedule.resumed_budget=constant: the learning rate would stay at 0, the last of the first"
            " budget. Set ++model.lr_schedule.last=0.05 (a fraction of the learning rate), or resumed_budget=restart."
        )
    return f"The learning rate keeps the decay of the first budget: it is {old:.2g} now."
