"""What a model needs that keeps something of the whole batch, where several processes share it."""

from __future__ import annotations

import torch
from torch import Tensor


def gathered(rows: Tensor) -> Tensor:
    """The rows of the whole batch, (n W, ...), from the n rows that each of W processes holds; with one, its own.

    Process r holds the r-th part, as batches and `Draws` are shared out, so all processes get the same rows in the same
    order.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
