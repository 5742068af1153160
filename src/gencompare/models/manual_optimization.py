"""Manual optimisation: alternating optimisers within a training step, and rollback of diverged steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from gencompare.distributed import all_reduce_sum, world_size
from gencompare.errors import TrainingStopped, UserError


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network passes gradients on to its input and gathers none itself."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def manual_step(model: pl.LightningModule, which: int, loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """One step of the model's optimiser number ``which``; returns the norm of its gradient before clipping.

    Under ``trainer.precision=16-mixed`` the loss is scaled up, now and then so far that gradients overflow; the scaler
    then leaves the step out and takes a smaller scale. Such a step has no gradient, and its norm is given as 0.
    """
    optimizers = model.optimizers()  # an only one comes without a list
    optimizer = optimizers[which] if isinstance(optimizers, list) else optimizers
    optimizer.zero_grad()
    model.manual_backward(loss)
    average_gradients(parameters)
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    # The scale comes off in the step itself. (`trainer` raises without one.)
    scaler = getattr(getattr(model._trainer, "precision_plugin", None), "scaler", None)
    if scaler is not None:
        norm = (norm / scaler.get_scale()).nan_to_num(0.0, posinf=0.0)
    optimizer.step()
    return norm


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients; with one process, nothing.

    Each process's loss is a mean over an equal part of the batch, so this is the whole batch's gradient. (DDP's own
    reducer expects one backward pass for each forward pass of the wrapped model; here players take turns in one.)
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = all_reduce_sum(torch.cat([g.reshape(-1) for g in gradients])) / world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class Snapshot:
    """A copy of what training changes (the model's state and its optimiser's), to go back to.

    The model says after each step whether it went well. A copy is made at the start, and whenever ``every`` steps in a
    row did. Going back puts the last copy in place; the next step meets other images and other noise, and so may well
    pass where the one before it did not. Where ``most`` returns brought no new copy, training ends.

    All of this is a part of checkpoints (`state_dict`), so that a resumed run would go back as an unbroken one.

    Args:
        every: good steps from one copy to the next.
        most: returns without a new copy between them that are made before training ends.
    """

    def __init__(self, every: int, most: int) -> None:
        if every < 1 or most < 0:
            raise UserError(f"model.keep_every={every}, model.max_rollbacks={most}: at least 1, and at least 0.")
        self.every, self.most = every, most
        self.kept: dict[str, Any] | None = None
        self.since = 0
        """Good steps since the copy was made or put back."""
        self.in_a_row = 0
        """Returns to this copy."""
        self.total = 0
        """Returns in the whole run."""

    def begin(self, model: pl.LightningModule) -> None:
        """Before a step: the first one leaves a copy of the first weights."""
        if self.kept is None:
            self._keep(model)

    def passed(self, model: pl.LightningModule) -> None:
        """A step went well."""
        self.since += 1
        if self.since >= self.every:
            self._keep(model)

    def go_back(self, model: pl.LightningModule, why: str) -> None:
        """Undo everything since the copy. Raises `TrainingStopped`, with the copy in place, where that is no help."""
        assert self.kept is not None, "begin() comes before a step"
        model.load_state_dict(self.kept["model"])
        optimizer = _optimizer(model)
        optimizer.load_state_dict(
            # What is put in is trained on, and the copy must stay as it is. Rates are not a part of the state.
            {"state": _copied(self.kept["optimizer"]), "param_groups": optimizer.state_dict()["param_groups"]}
        )
        self.since = 0
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row > self.most:
            raise TrainingStopped(
                f"{why}, {self.in_a_row} times in a row from the same state",
                "Try a lower model.optimizer.lr, a higher model.energy_l2, model.spectral_norm=true, or a lower"
                " model.langevin.step.",
            )

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "since": self.since, "in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.since = state["kept"], state["since"]
        self.in_a_row, self.total = state["in_a_row"], state["total"]

    def _keep(self, model: pl.LightningModule) -> None:
        self.kept = {
            "model": _copied(model.state_dict()),
            "optimizer": _copied(_optimizer(model).state_dict()["state"]),
        }
        self.since = self.in_a_row = 0


def _optimizer(model: pl.LightningModule) -> Any:
    """The model's only optimiser, without Lightning's wrapper."""
    return model.optimizers(use_pl_optimizer=False)


def _copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
