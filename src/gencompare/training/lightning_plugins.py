"""Lightning plugins: atomic checkpoint files, and DDP for manual optimisation."""

from __future__ import annotations

import io
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy

from gencompare.files import atomic_write
from gencompare.migrations import migrate_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and migrates checkpoints from earlier versions on loading."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # Serialised in memory first, because torch hides disk-full errors.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return migrate_checkpoint(super().load_checkpoint(path, *args, **kwargs))


class UnwrappedDDPStrategy(DDPStrategy):
    """DDP processes without the DDP module wrapper, for manual optimisation.

    The wrapper's reducer expects one backward pass per forward pass of the whole model. Models with several optimisers
    run more backward passes, and `manual_step` averages the gradients of the stepped parameters over ranks.
    """

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
