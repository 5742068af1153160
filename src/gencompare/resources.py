"""FLOPs, FLOP/s and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from functools import cache
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


CEILING_SECONDS = 0.15
"""Time for measuring the speed of matrix products."""
MAX_MATRIX_SIZE = 4096
"""Larger matrices are not faster, and would take memory that the run may need."""


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measure the FLOP/s of matrix products, once per process, device and precision. None on other devices than CPUs
    and CUDA GPUs, which this module cannot wait for.

    Matrices of growing size are multiplied for `CEILING_SECONDS`, and the fastest product counts. TF32 is used if
    torch's settings allow it.
    """
    if device.type not in ("cpu", "cuda"):
        return None
    return _measured_matmul(device, dtype, torch.get_float32_matmul_precision())


@cache
def _measured_matmul(device: torch.device, dtype: torch.dtype, float32_precision: str) -> float:
    begin, fastest, size = time.perf_counter(), 0.0, 256
    a = torch.rand(size, size, device=device).to(dtype)
    torch.mm(a, a)  # the first product also loads libraries
    while time.perf_counter() - begin < CEILING_SECONDS:
        _wait_for(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait_for(device)
        fastest = max(fastest, 2 * size**3 / (time.perf_counter() - start))
        if size < MAX_MATRIX_SIZE and 2 * (2 * size) ** 3 / fastest < CEILING_SECONDS / 5:
            size *= 2
            a = torch.rand(size, size, device=device).to(dtype)
    return fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
