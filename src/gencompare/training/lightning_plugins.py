"""Plugins for Lightning: checkpoints that are written whole, and DDP for manual optimisation."""

from __future__ import annotations

import io
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy

from gencompare.files import atomic_write
from gencompare.migrations import migrate_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints under a temporary name first, synced and renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # Through memory: torch hides a full disk behind an error of its own.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return migrate_checkpoint(super().load_checkpoint(path, *args, **kwargs))


class UnwrappedDDPStrategy(DDPStrategy):
    """DDP's processes without DDP's wrapper.

    The wrapper's reducer expects one backward pass for each forward pass of the whole model. A model that optimises by
    hand, two players in turn, has several; it averages the gradients of the parameters that it steps itself.
    """

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
