"""What models with several optimisers share: players that take turns within one training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from gencompare.models.processes import processes, summed


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network passes gradients on to its input and gathers none itself."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def take_step(model: pl.LightningModule, which: int, loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
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
    if processes() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = summed(torch.cat([g.reshape(-1) for g in gradients])) / processes()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
