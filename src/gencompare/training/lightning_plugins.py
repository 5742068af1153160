"""Several processes for models that average their gradients themselves."""

from __future__ import annotations

import torch
from pytorch_lightning.strategies import DDPStrategy


class UnwrappedDDPStrategy(DDPStrategy):
    """DDP's processes without DDP's wrapper.

    The wrapper's reducer expects one backward pass for each forward pass of the whole model. A model that optimises by
    hand, two players in turn, has several; it averages the gradients of the parameters that it steps itself.
    """

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
