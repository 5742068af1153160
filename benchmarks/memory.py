"""Peak memory of this process, on Linux."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any


def reset_peak() -> None:
    """Set the peak to the current resident size."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> int:
    """Return the largest resident size since `reset_peak`, or of the whole process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def with_added_memory(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """Return the result of ``function(*args)`` and how far it raises the peak of this process, in MiB."""
    reset_peak()
    before = peak_mib()
    result = function(*args)
    return result, peak_mib() - before


def in_new_process(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """Run `with_added_memory` in a new process, whose allocator keeps nothing of earlier measurements.

    The process is a fork, which needs no imports, so this process must not have used torch's threads before.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(with_added_memory, (function, *args))
