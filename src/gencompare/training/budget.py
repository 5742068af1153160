"""How long to train: families are compared at an equal cost, whatever its unit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gencompare.errors import UserError


@dataclass(frozen=True)
class Budget:
    """Training ends when the first of the given limits is reached.

    Images, steps and FLOPs are counted, so that training ends after the same step on any number of processes; how much
    fits into a time depends on the machine.

    Args:
        images: training images seen, repeats counted.
        steps: optimiser steps (a GAN's generator and discriminator updates of one batch are one step).
        minutes: wall time of training, over all sittings.
        flops: floating-point operations of the training steps, forward and backward, as `TrainingFlops` counts them.
        device_minutes: wall time times the processes that train, each of which has a device of its own.
    """

    images: int | None = None
    steps: int | None = None
    minutes: float | None = None
    flops: float | None = None
    device_minutes: float | None = None

    def __post_init__(self) -> None:
        if all(limit is None for limit in vars(self).values()):
            raise UserError(
                f"The budget has no limit: set one of {', '.join(f'budget.{name}' for name in vars(self))}."
            )
        for name in ("images", "steps"):
            if vars(self)[name] is not None and not isinstance(vars(self)[name], int):
                raise UserError(f"budget.{name}={vars(self)[name]}: give a whole number, or null.")
        for name, limit in vars(self).items():
            if isinstance(limit, str):
                raise UserError(f"budget.{name}={limit} is no number to YAML: write 1.0e+12 for 1e12.")
            if limit is not None and limit <= 0:
                raise UserError(f"budget.{name}={limit} leaves nothing to train: give a positive number.")

    @property
    def by_time(self) -> bool:
        """Whether a clock decides when training ends."""
        return self.minutes is not None or self.device_minutes is not None

    def progress(
        self, *, images: int, step: int, seconds: float, flops: float = 0.0, device_seconds: float = 0.0
    ) -> float:
        """The share of the budget that is spent, 0 to 1."""
        pairs = (
            (images, self.images), (step, self.steps), (seconds / 60, self.minutes), (flops, self.flops),
            (device_seconds / 60, self.device_minutes),
        )  # fmt: skip
        return min(1.0, max(done / limit for done, limit in pairs if limit is not None))

    def after(self, *, flops: float, device_seconds: float, spender: str) -> Budget:
        """What is left of a budget in FLOPs or device time once the models that this one needs have had their part.

        Their images and steps are another kind than this model's: limits on those are its own, and stay.

        Args:
            flops: what those models spent.
            device_seconds: likewise.
            spender: what they are called in the error, a `UserError`, where nothing is left.
        """
        left: dict[str, float] = {}
        for name, spent in (("flops", flops), ("device_minutes", device_seconds / 60)):
            limit = vars(self)[name]
            if limit is None:
                continue
            left[name] = limit - spent
            if left[name] <= 0:
                raise UserError(
                    f"budget.{name}={limit:.4g} is for all that a model needs, and {spender} took {spent:.4g} of it:"
                    f" nothing is left to train. Raise it above {spent:.4g}, or spend less there"
                    " (model.latent.budget.images for an autoencoder)."
                )
        return replace(self, **left)
