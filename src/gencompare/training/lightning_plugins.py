"""Lightning plugins: atomic checkpoint files, DDP for manual optimisation, and sharded weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

from gencompare.checkpoint_files import read_checkpoint, write_checkpoint
from gencompare.errors import DiskFullError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically and with a checksum, which is verified on loading."""

    deferred: DiskFullError | None = None
    """The last error of the block `errors_deferred`."""

    def __init__(self) -> None:
        super().__init__()
        self._defers = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            write_checkpoint(path, checkpoint)
        except DiskFullError as error:
            if not self._defers:
                raise
            self.deferred = error

    @contextmanager
    def errors_deferred(self) -> Iterator[None]:
        """Store a `DiskFullError` of the block in `deferred` instead of raising it.

        Lightning waits for all ranks after rank 0 has written, so rank 0 must get there.
        """
        self.deferred, self._defers = None, True
        try:
            yield
        finally:
            self._defers = False

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location)


class UnwrappedDDPStrategy(DDPStrategy):
    """DDP processes without the DDP module wrapper, for manual optimisation.

    The wrapper's reducer expects one backward pass per forward pass of the whole model. Models with several optimisers
    run more backward passes, and `manual_step` averages the gradients of the stepped parameters over ranks.
    """

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP: the weights, their average and the optimiser state are divided among all processes.

    Checkpoints are the same files as with one process: each contains the whole model.
    """

    def __init__(self, num_processes: int) -> None:
        super().__init__(data_parallel_size=num_processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        return super().load_checkpoint(checkpoint_path, weights_only=True)
