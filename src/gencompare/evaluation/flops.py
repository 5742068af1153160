"""Floating-point operations of a piece of work, counted by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
