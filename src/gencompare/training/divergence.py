"""A callback that masks bad gradients, and returns to the last good state when training diverges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor

from gencompare.checkpoint_files import checkpoint_paths, find_checkpoint
from gencompare.distributed import all_reduce_sum
from gencompare.errors import TrainingStopped, UserError
from gencompare.generative_model import TrainedModel
from gencompare.sharding import local_tensor, total_norm
from gencompare.training.clock import clock_of
from gencompare.training.ema import WeightAverage
from gencompare.training.optimizers import match_memory_format


class DivergenceGuard(Callback):
    r"""Masks gradients that are not finite, and rolls back when training diverges.

    A gradient is bad if its norm is not finite, or exceeds ``max_gradient_growth`` times its running mean. It is set to
    zero on the device, without synchronisation, and counted. (A model that skips such steps itself is left alone.)

    A masked step still applies the momentum of the optimiser. Every ``check_every_n_steps`` steps, and before an
    evaluation or a checkpoint for the steps since the last check, training counts as diverged if one of these holds:

    - all gradients of the last ``check_every_n_steps`` steps were bad, or all losses not finite;
    - the magnitude of the mean loss exceeds ``max_loss_growth`` times
      :math:`\max(1, |\text{loss of the first step}|)`;
    - a weight or a running statistic is not finite.

    The weights, their average and the optimisers then return to the last checkpoint (the next older one if that did
    not help), or to the initial state if there is none, and the learning rate is multiplied by ``lr_factor``. Steps,
    images and random numbers go on, so that the cost of the lost steps counts. After ``max_rollbacks`` rollbacks, or at
    the end of the budget, or under ``trainer=fsdp``, training stops with an error instead.

    Lightning's ``detect_anomaly`` and `EarlyStopping(check_finite=True)` can only end a run.

    Args:
        dirpath: folder of the checkpoints.
        check_every_n_steps: steps between checks.
        max_gradient_growth: see above.
        max_loss_growth: see above.
        lr_factor: factor of the learning rate after a rollback, in (0, 1).
        max_rollbacks: rollbacks after which the next divergence ends training.
    """

    order = 4
    """This callback runs after the averaging of the weights, and before all that read or save them."""

    DECAY = 0.99
    """Decay of the running mean of gradient norms."""

    def __init__(
        self,
        dirpath: Path,
        check_every_n_steps: int = 50,
        max_gradient_growth: float = 1e4,
        max_loss_growth: float = 1e3,
        lr_factor: float = 0.5,
        max_rollbacks: int = 3,
    ) -> None:
        key = "callbacks.divergence"
        if check_every_n_steps < 1 or max_rollbacks < 0:
            raise UserError(
                f"{key}: check_every_n_steps={check_every_n_steps} must be at least 1, and"
                f" max_rollbacks={max_rollbacks} at least 0."
            )
        if not (max_gradient_growth > 1 and max_loss_growth > 1 and 0 < lr_factor < 1):
            raise UserError(
                f"{key}: max_gradient_growth={max_gradient_growth} and max_loss_growth={max_loss_growth} must be above"
                f" 1, and lr_factor={lr_factor} in (0, 1)."
            )
        self.dirpath, self.check_every_n_steps = Path(dirpath), check_every_n_steps
        self.max_gradient_growth, self.max_loss_growth = max_gradient_growth, max_loss_growth
        self.lr_factor, self.max_rollbacks = lr_factor, max_rollbacks
        self.masked = 0
        """Gradients that were masked, up to the last check."""
        self.rollbacks: list[dict[str, Any]] = []
        """The ``step``, the step that the weights returned ``to``, and the ``reason`` of each rollback."""
        self._steps = 0
        """Steps since the last check."""
        self._counts = torch.zeros(4)
        """Since the last check: bad gradients, all gradients, finite losses, and the sum of their values."""
        self._norms: dict[int, Tensor] = {}
        """Running mean of the gradient norm, by index of the optimiser."""
        self._first_loss: Tensor | None = None
        self._initial: dict[str, Tensor] | None = None
        """The initial weights, as long as there is no checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "masked": self.masked, "rollbacks": self.rollbacks, "norms": self._norms, "first_loss": self._first_loss,
            "counts": self._counts, "steps": self._steps,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.masked, self.rollbacks = state_dict["masked"], list(state_dict["rollbacks"])
        self._norms, self._first_loss = dict(state_dict["norms"]), state_dict["first_loss"]
        self._counts, self._steps = state_dict["counts"], state_dict["steps"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainedModel)
        device = pl_module.device
        self._counts = self._counts.to(device)
        self._norms = {index: norm.to(device) for index, norm in self._norms.items()}
        self._first_loss = None if self._first_loss is None else self._first_loss.to(device)
        if not self.checkpoint_exists() and not pl_module.is_sharded:
            self._initial = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        self._lower_learning_rate(trainer, times=len(self.rollbacks))  # `LearningRateScheduler` has set the original
        if self.rollbacks and trainer.is_global_zero:
            factor = self.lr_factor ** len(self.rollbacks)
            print(f"The learning rate is multiplied by {factor:g}, after {len(self.rollbacks)} rollbacks.", flush=True)

    def _lower_learning_rate(self, trainer: pl.Trainer, times: int = 1) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] *= self.lr_factor**times
                group["lr"] *= self.lr_factor**times

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, TrainedModel)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients or pl_module.skips_bad_gradients:
            return
        index = next(i for i, each in enumerate(trainer.optimizers) if each is optimizer)
        norm = total_norm(gradients)
        mean = self._norms.get(index, torch.zeros_like(norm))
        # Before the first usable gradient the mean is 0, and only gradients that are not finite are bad.
        bad = ~norm.isfinite() | ((mean > 0) & (norm > self.max_gradient_growth * mean))
        for gradient in gradients:
            local_tensor(gradient).masked_fill_(bad, 0.0)
        updated = torch.where(mean > 0, self.DECAY * mean + (1 - self.DECAY) * norm, norm)
        self._norms[index] = torch.where(bad, mean, updated)
        self._counts[0] += bad
        self._counts[1] += 1

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = _loss(outputs)
        if loss is not None:
            self._first_loss = loss.clone() if self._first_loss is None else self._first_loss
            self._counts[2] += loss.isfinite()
            self._counts[3] += loss.nan_to_num(0.0, posinf=0.0, neginf=0.0)
        self._steps += 1
        if self._steps >= self.check_every_n_steps:
            self.check(trainer, pl_module)

    def check(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Roll back if training has diverged.

        Raises:
            TrainingStopped: there were ``max_rollbacks`` rollbacks before.
        """
        reason = self._reason(trainer, model)
        if self.checkpoint_exists():
            self._initial = None
        if self._steps >= self.check_every_n_steps or reason:
            self.masked += int(self._counts[0])
            self._counts.zero_()
            self._steps = 0
        if reason:
            self._roll_back(trainer, model, reason)

    def checkpoint_exists(self) -> bool:
        return bool(checkpoint_paths(self.dirpath))

    @property
    def num_masked(self) -> int:
        """Gradients that were masked so far. Reading it synchronises with the device."""
        return self.masked + int(self._counts[0])

    def _reason(self, trainer: pl.Trainer, model: pl.LightningModule) -> str:
        """Return why training counts as diverged, or an empty string."""
        first_loss = torch.zeros((), device=model.device) if self._first_loss is None else self._first_loss
        broken = (~is_finite(model)).float()
        local = torch.cat([self._counts, torch.stack([first_loss, broken])])
        bad, gradients, losses, total, first, broken_ranks = (all_reduce_sum(local) / trainer.world_size).tolist()
        limit = self.max_loss_growth * max(1.0, abs(first) if math.isfinite(first) else 1.0)
        if broken_ranks:
            return "a weight is not finite"
        if losses and abs(total / losses) > limit:
            return f"the mean loss is {total / losses:.3g}, {first:.3g} in the first step"
        if self._steps < self.check_every_n_steps:
            return ""
        if gradients and bad == gradients:
            return f"no gradient of the last {self._steps} steps was usable"
        return (
            f"no loss of the last {self._steps} steps is finite" if self._first_loss is not None and not losses else ""
        )

    def _roll_back(self, trainer: pl.Trainer, model: pl.LightningModule, reason: str) -> None:
        step = clock_of(trainer).step
        assert isinstance(model, TrainedModel)
        # In its last step, training would end with the state before; sharded weights cannot be restored here.
        if len(self.rollbacks) >= self.max_rollbacks or trainer.should_stop or model.is_sharded:
            rate = f", after {len(self.rollbacks)} rollbacks with lower learning rates" if self.rollbacks else ""
            raise TrainingStopped(
                f"Training diverged at step {step}: {reason}{rate}",
                "Try a lower learning rate (model.optimizer.lr) or model.grad_clip.",
            )
        to = self._restore(trainer, model)
        self.rollbacks.append({"step": step, "to": to, "reason": reason})
        self._lower_learning_rate(trainer)
        if trainer.is_global_zero:
            print(
                f"Step {step}: training diverged ({reason}). The weights return to step {to}, and the learning rate is"
                f" multiplied by {self.lr_factor:g}.",
                flush=True,
            )

    def _restore(self, trainer: pl.Trainer, model: pl.LightningModule) -> int:
        """Restore weights, average and optimisers from the last checkpoint or the start. Return the step."""
        # If a rollback did not help, an earlier checkpoint may be better.
        previous = self.rollbacks[-1]["to"] if self.rollbacks else None
        found = find_checkpoint(self.dirpath, before=previous) or find_checkpoint(self.dirpath)
        states: list[dict[str, Any]] = [{} for _ in trainer.optimizers]
        if found is not None:
            weights = found.content["state_dict"]
            states = [state["state"] for state in found.content["optimizer_states"]]
            step = found.content["callbacks"]["TrainingClock"]["step"]
            model.on_load_checkpoint(found.content)
        elif self._initial is not None:
            weights, step = self._initial, 0
        else:
            raise TrainingStopped("Training diverged, and its checkpoints are missing", "Start again.")
        model.load_state_dict(weights)
        for optimizer, state in zip(trainer.optimizers, states, strict=True):
            # The current settings, such as the learning rate, stay.
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            match_memory_format(optimizer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAverage):
                callback.restart(model, None if found is None else found.content)
        return step


@torch.no_grad()
def is_finite(model: pl.LightningModule) -> Tensor:
    """Return whether all weights and running statistics of a model are finite, as a scalar on its device."""
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    return total_norm(values).isfinite() if values else torch.ones((), dtype=torch.bool, device=model.device)


def check_divergence(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Let the `DivergenceGuard` of a Trainer check the model, which is about to be saved or evaluated.

    Raises:
        TrainingStopped: a weight is not finite and there is no guard, or the guard gives up.
    """
    guards = [each for each in trainer.callbacks if isinstance(each, DivergenceGuard)]  # type: ignore[attr-defined]
    for guard in guards:
        guard.check(trainer, model)
    if not guards and not is_finite(model):
        raise TrainingStopped(
            f"A weight is not finite at step {clock_of(trainer).step}",
            "Try a lower learning rate (model.optimizer.lr) or model.grad_clip.",
        )


def _loss(outputs: Any) -> Tensor | None:
    """Return the loss in the outputs of a training step, or the sum of the magnitudes of several."""
    losses = {name: value for name, value in (outputs or {}).items() if isinstance(value, Tensor)}
    if "loss" in losses:
        return losses["loss"].detach().float()
    several = [value.detach().float().abs() for name, value in losses.items() if name.endswith("_loss")]
    return torch.stack(several).sum() if several else None
