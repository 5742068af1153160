"""How long to train: families are compared at an equal cost, whatever its unit."""

from __future__ import annotations

from dataclasses import dataclass

from gencompare.errors import UserError


@dataclass(frozen=True)
class Budget:
    """Training ends when the first of the given limits is reached.

    Args:
        images: training images seen, repeats counted.
        steps: optimiser steps (a GAN's generator and discriminator updates of one batch are one step).
        minutes: wall time of training, over all sittings.
    """

    images: int | None = None
    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        limits = {"images": self.images, "steps": self.steps, "minutes": self.minutes}
        if all(limit is None for limit in limits.values()):
            raise UserError("The budget has no limit: set budget.images, budget.steps or budget.minutes.")
        for name in ("images", "steps"):
            if limits[name] is not None and not isinstance(limits[name], int):
                raise UserError(f"budget.{name}={limits[name]}: give a whole number, or null.")
        for name, limit in limits.items():
            if limit is not None and limit <= 0:
                raise UserError(f"budget.{name}={limit} leaves nothing to train: give a positive number.")

    def progress(self, *, images: int, step: int, seconds: float) -> float:
        """The share of the budget that is spent, 0 to 1."""
        spent = [
            done / limit
            for done, limit in ((images, self.images), (step, self.steps), (seconds / 60, self.minutes))
            if limit is not None
        ]
        return min(1.0, max(spent))
