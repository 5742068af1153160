"""Floating-point operations and peak memory of a piece of work."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


class Flops(FlopCounterMode):
    """Counts matrix products, convolutions and attention, forward and backward, as torch dispatches them; the rest is
    small beside these.

    The count is of the whole, not of each module as torch's own: that hooks the inputs of modules, and does not bear
    a gradient with respect to one of them (classifier guidance, gradient penalties).
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _NoModules()


class _NoModules:
    """In place of torch's ``ModuleTracker``: all work is that of the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def flops_per_image(work: Callable[[], object], images: int) -> float:
    """FLOPs (multiplications and additions) of ``work()``, divided by the ``images`` it handles."""
    with Flops() as counter:
        work()
    return counter.get_total_flops() / images


def forget_peak(device: torch.device) -> None:
    """Count anew from here, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """On a GPU what torch allocated there at most, on a CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
