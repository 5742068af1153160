"""What a model needs that looks at the whole batch, where several processes share it."""

from __future__ import annotations

import torch
from torch import Tensor


def processes() -> int:
    """How many processes train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes; with one, the values themselves."""
    if processes() == 1:
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


def gathered(rows: Tensor) -> Tensor:
    """The rows of the whole batch, (n W, ...), from the n rows that each of W processes holds; with one, its own.

    Process r holds the r-th part, as batches and `Draws` are shared out, so all processes get the same rows in the same
    order.
    """
    if processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(processes())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
