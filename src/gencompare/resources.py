"""FLOPs and peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


class FlopCounter(FlopCounterMode):
    """Counts the FLOPs of matrix products, convolutions and attention, forward and backward.

    Unlike its base class it does not count per module. The module hooks of the base class fail when a gradient with
    respect to a module's input is taken, as in classifier guidance and gradient penalties.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _NoModuleTracker()


class _NoModuleTracker:
    """Replaces PyTorch's ``ModuleTracker`` and attributes everything to the global scope."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def flops_per_image(function: Callable[[], object], num_images: int) -> float:
    """Count the FLOPs of ``function()`` per image. A multiply-add counts as two."""
    with FlopCounter() as counter:
        function()
    return counter.get_total_flops() / num_images


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory statistics of a GPU. Do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory allocated by PyTorch on a GPU, or the peak resident set size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
