"""Floating-point operations of a piece of work, counted by torch."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def flops_per_image(work: Callable[[], object], images: int) -> float:
    """FLOPs (multiplications and additions) of ``work()``, divided by the ``images`` it handles.

    Counts matrix products, convolutions and attention, forward and backward, as torch dispatches them; the rest is
    small beside these.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops() / images
