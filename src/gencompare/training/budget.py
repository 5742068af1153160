"""The training budget of a run. Model families are compared at equal budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gencompare.errors import UserError


@dataclass(frozen=True)
class Budget:
    """Limits on training. Training ends when the first limit is reached.

    With limits on images, steps or FLOPs, training ends at the same step on any number of processes. With a time limit,
    the last step depends on the machine.

    Args:
        images: training images seen, including repetitions.
        steps: training steps. A GAN updates its generator and its discriminator in one step.
        minutes: wall time of training, over all resumptions.
        flops: floating-point operations of the training steps, forward and backward, as counted by `TrainingFlops`.
        device_minutes: wall time multiplied by the number of processes, each of which has one device.
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
                raise UserError(f"budget.{name}={vars(self)[name]} must be a whole number or null.")
        for name, limit in vars(self).items():
            if isinstance(limit, str):
                raise UserError(f"budget.{name}={limit} is not a number in YAML: write 1.0e+12 for 1e12.")
            if limit is not None and limit <= 0:
                raise UserError(f"budget.{name}={limit} must be positive.")

    @property
    def by_time(self) -> bool:
        """Whether there is a time limit."""
        return self.minutes is not None or self.device_minutes is not None

    def progress(
        self, *, images: int, step: int, seconds: float, flops: float = 0.0, device_seconds: float = 0.0
    ) -> float:
        """Return the fraction of the budget that is spent, in [0, 1]."""
        spent = (
            (images, self.images), (step, self.steps), (seconds / 60, self.minutes), (flops, self.flops),
            (device_seconds / 60, self.device_minutes),
        )  # fmt: skip
        return min(1.0, max(done / limit for done, limit in spent if limit is not None))

    def after(self, *, flops: float, device_seconds: float, spender: str) -> Budget:
        """Return the remaining budget after the models that this one depends on were trained.

        Only the limits on FLOPs and device time decrease; images and steps of other models do not count.

        Args:
            flops: FLOPs spent by those models.
            device_seconds: device time spent by those models.
            spender: description of those models in the error message.

        Raises:
            UserError: no budget is left.
        """
        left: dict[str, float] = {}
        for name, spent in (("flops", flops), ("device_minutes", device_seconds / 60)):
            limit = vars(self)[name]
            if limit is None:
                continue
            left[name] = limit - spent
            if left[name] <= 0:
                raise UserError(
                    f"budget.{name}={limit:.4g} includes the models that this one depends on, and {spender} used"
                    f" {spent:.4g}: nothing is left. Raise it above {spent:.4g}, or reduce the budget of those models"
                    " (model.latent.budget.images for an autoencoder)."
                )
        return replace(self, **left)
