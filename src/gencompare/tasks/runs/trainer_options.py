"""Which settings of ``cfg.trainer`` each model takes. All others are refused in one line, before training starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gencompare.compilation import has_compiler
from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
"""Values of ``trainer.precision``."""
SHORT_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
"""Lightning's short names of precisions."""
CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "precision": PRECISIONS,
    "strategy": ("auto", "ddp", "fsdp"),
    "matmul_precision": ("highest", "high", "medium"),
    "compile": (None, "auto", "default", "reduce-overhead", "max-autotune-no-cudagraphs"),
    "memory_format": (None, "channels_last"),
    "fused_optimizer": (False, True),
}
"""All values of settings that have a fixed set of them, the default first."""


def complete_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``trainer`` part of a config with defaults and full names, checked without a model.

    Raises:
        UserError: a setting has a value that no model takes.
    """
    options = {"num_micro_batches": 1, **{name: values[0] for name, values in CHOICES.items()}, **options}
    options["precision"] = precision = full_precision_name(options["precision"])
    for name, values in CHOICES.items():
        if options[name] not in values or isinstance(options[name], bool) != isinstance(values[0], bool):
            known = ", ".join("null" if value is None else str(value).lower() for value in values)
            reason = ""
            if name == "precision" and precision.endswith("-true"):
                reason = " It would round noise schedules and EMA weights to 16 bits."
            raise UserError(f"trainer.{name}={_text(options[name])}: choose one of {known}.{reason}")
    count = options["num_micro_batches"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"trainer.num_micro_batches={_text(count)} must be at least 1.")
    return options


def full_precision_name(precision: str | int | None) -> str:
    """Return the full name of a precision, such as 16-mixed for 16."""
    return "32-true" if precision is None else SHORT_PRECISIONS.get(str(precision), str(precision))


def check_model(options: Mapping[str, Any], model: TrainedModel) -> None:
    """Raise `UserError` if the model does not take the settings of `complete_options`."""
    name, precision = type(model).__name__, options["precision"]
    if options["num_micro_batches"] > 1 and not model.micro_batched_networks():
        raise UserError(
            f"trainer.num_micro_batches={options['num_micro_batches']}: {name} has no networks that map each sample on"
            " its own in training. Lower trainer.global_batch_size instead."
        )
    if options["compile"] not in (None, "auto") and not model.blocks():
        raise UserError(
            f"trainer.compile={options['compile']} compiles the blocks of diffusion models with a UNet, a DiT or an"
            f" MLP, and this {name} has none: use trainer.compile=null, or auto to compile where possible."
        )
    if precision == "16-mixed" and any(
        group.get("fused") for optimizer in model.build_optimizers() for group in optimizer.param_groups
    ):
        raise UserError(
            "trainer.precision=16-mixed scales gradients, which a fused optimiser undoes only after they are clipped:"
            " use trainer.precision=bf16-mixed, or trainer.fused_optimizer=false and model.optimizer.fused=false."
        )
    if options["strategy"] == "fsdp":
        _check_sharding(options, model)


def _check_sharding(options: Mapping[str, Any], model: TrainedModel) -> None:
    if model.sharded_network() is None:
        raise UserError(
            f"trainer.strategy=fsdp divides the weights of diffusion models with a UNet, a DiT or an MLP, not"
            f" those of this {type(model).__name__}: use trainer=ddp."
        )
    if not isinstance(options["devices"], int):
        raise UserError("trainer=fsdp needs the number of processes on each node: trainer.devices=N.")
    for name, values in {
        "precision": ("32-true", "bf16-mixed"), "compile": (None, "auto"), "memory_format": (None,)
    }.items():  # fmt: skip
        if options[name] not in values:
            known = " or ".join(map(_text, values))
            raise UserError(f"trainer.{name}={options[name]} does not work with divided weights: use {known}.")


def compiled_mode(options: Mapping[str, Any], model: TrainedModel) -> str | None:
    """Return the mode of ``torch.compile`` for the blocks of a model, or None to run them eagerly."""
    if options["compile"] != "auto":
        return options["compile"]
    return "default" if model.blocks() and options["strategy"] != "fsdp" and has_compiler() else None


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
