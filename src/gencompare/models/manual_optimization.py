"""Manual optimisation: several optimisers per training step, and rollback of diverged steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from gencompare.distributed import average_gradients
from gencompare.errors import TrainingStopped, UserError


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Freeze the parameters of ``network`` within a context; gradients still flow to its input."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def manual_step(model: pl.LightningModule, optimizer_idx: int, loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Take one step of the optimiser with index ``optimizer_idx``. Return the gradient norm before clipping.

    Under ``trainer.precision=16-mixed`` the gradient scaler skips steps whose scaled gradients overflow; their norm is
    returned as 0.
    """
    optimizers = model.optimizers()  # not a list if there is only one
    optimizer = optimizers[optimizer_idx] if isinstance(optimizers, list) else optimizers
    optimizer.zero_grad()
    model.manual_backward(loss)
    # DDP's reducer expects one backward pass per forward pass, and a manual step has several.
    average_gradients(parameters)
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    # The step itself unscales the gradients. (The property `trainer` raises without a Trainer.)
    scaler = getattr(getattr(model._trainer, "precision_plugin", None), "scaler", None)
    if scaler is not None:
        norm = (norm / scaler.get_scale()).nan_to_num(0.0, posinf=0.0)
    optimizer.step()
    return norm


class Snapshot:
    """A copy of the model and optimiser state, for rollback when training diverges.

    The model reports the outcome of each step. A copy is made before the first step and after each ``every_n_steps``
    successful steps without rollback. After a rollback, training continues with other images and noise, so it may get
    past the point where it diverged. After more than ``max_rollbacks`` rollbacks to the same copy, training stops.

    The state is part of checkpoints (`state_dict`), so a resumed run rolls back like an uninterrupted one.

    Args:
        every_n_steps: number of successful steps between copies.
        max_rollbacks: maximum number of rollbacks to the same copy.
    """

    def __init__(self, every_n_steps: int, max_rollbacks: int) -> None:
        if every_n_steps < 1 or max_rollbacks < 0:
            raise UserError(
                f"model.snapshot_every_n_steps={every_n_steps} must be at least 1, and"
                f" model.max_rollbacks={max_rollbacks} at least 0."
            )
        self.every_n_steps, self.max_rollbacks = every_n_steps, max_rollbacks
        self.saved: dict[str, Any] | None = None
        self.steps_since_saved = 0
        """Number of successful steps since the copy was made or restored."""
        self.consecutive_rollbacks = 0
        """Number of rollbacks to the current copy."""
        self.num_rollbacks = 0
        """Number of rollbacks in the whole run."""

    def begin_step(self, model: pl.LightningModule) -> None:
        """Save the initial state before the first step. Call this before each step."""
        if self.saved is None:
            self._save(model)

    def step_succeeded(self, model: pl.LightningModule) -> None:
        """Count a successful step, and save a copy if due. Call this after each successful step."""
        self.steps_since_saved += 1
        if self.steps_since_saved >= self.every_n_steps:
            self._save(model)

    def rollback(self, model: pl.LightningModule, reason: str) -> None:
        """Restore the copy.

        Raises:
            TrainingStopped: if there were more than ``max_rollbacks`` rollbacks to this copy. The copy is restored
                first.
        """
        assert self.saved is not None, "call begin_step first"
        model.load_state_dict(self.saved["model"])
        optimizer = _optimizer(model)
        optimizer.load_state_dict(
            # Training modifies the restored state in place, so restore a copy. Keep the current learning rates.
            {"state": _copy(self.saved["optimizer"]), "param_groups": optimizer.state_dict()["param_groups"]}
        )
        self.steps_since_saved = 0
        self.consecutive_rollbacks += 1
        self.num_rollbacks += 1
        if self.consecutive_rollbacks > self.max_rollbacks:
            raise TrainingStopped(
                f"{reason}, {self.consecutive_rollbacks} times in a row from the same state",
                "Try a lower model.optimizer.lr, a higher model.energy_l2, model.spectral_norm=true, or a lower"
                " model.langevin.step_size.",
            )

    def state_dict(self) -> dict[str, Any]:
        # Keys of existing checkpoints.
        return {
            "kept": self.saved,
            "since": self.steps_since_saved,
            "in_a_row": self.consecutive_rollbacks,
            "total": self.num_rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved, self.steps_since_saved = state["kept"], state["since"]
        self.consecutive_rollbacks, self.num_rollbacks = state["in_a_row"], state["total"]

    def _save(self, model: pl.LightningModule) -> None:
        self.saved = {
            "model": _copy(model.state_dict()),
            "optimizer": _copy(_optimizer(model).state_dict()["state"]),
        }
        self.steps_since_saved = self.consecutive_rollbacks = 0


def _optimizer(model: pl.LightningModule) -> Any:
    """Return the only optimiser of the model, without Lightning's wrapper."""
    return model.optimizers(use_pl_optimizer=False)


def _copy(tree: Any) -> Any:
    """Copy nested dictionaries of tensors."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
