"""What a model cost, with all that it needed: an autoencoder and the whitening of its latents, guides, its tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gencompare.errors import UserError
from gencompare.records import RunRecord
from gencompare.training.budget import Budget

KINDS = ("images_seen", "steps", "flops", "device_seconds")
"""What is counted, whatever the budget's limit was."""
TRIAL = "trial"
"""The role of the other trials of a search, and of what these needed, for the best of them."""


def own_training_cost(record: RunRecord) -> dict[str, float | None]:
    """What the training of one run took, by kind; None where its record does not say."""
    taken = record.training
    found = {kind: taken.get(kind) for kind in KINDS}
    if found["device_seconds"] is None and taken.get("seconds") is not None:
        found["device_seconds"] = taken["seconds"] * (taken.get("processes") or 1)
    return found


def cost_entry(record: RunRecord, role: str) -> dict[str, Any]:
    """A run that another one needed, as that one's record lists it under ``training.needed``."""
    return {
        "role": role, "run": record.name, "id": record.environment.get("run_id"), "family": record.family,
        **own_training_cost(record)
    }  # fmt: skip


def dependencies(cfg: DictConfig, known: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The trained models without which the model of ``cfg`` is nothing, and those that they needed, each once.

    Args:
        known: what its record has listed before; a run that is resumed may be all that is left of them.
    """
    found = list(known)
    for role, folder in dependency_folders(cfg):
        record = RunRecord.load(folder)
        found += [*record.training.get("dependencies", []), cost_entry(record, role)]
    if cfg.get("whitening"):
        found.append(OmegaConf.to_container(cfg.whitening))  # type: ignore[arg-type]
    return deduplicated(found)


def deduplicated(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of ``parts`` in order, without those that stand there again."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        found.setdefault(part["id"] or part["run"], part)
    return list(found.values())


def dependency_folders(cfg: DictConfig) -> Iterator[tuple[str, Path]]:
    """Role and folder of the runs that a config names: the autoencoder's, and those of guides."""
    if cfg.get("autoencoder_run"):
        yield "autoencoder", Path(cfg.autoencoder_run)
    guidance = OmegaConf.select(cfg, "model.guidance") or {}
    for role, part in guidance.items():
        if OmegaConf.is_dict(part) and part.get("run"):
            yield str(role), Path(part.run)


def guides(cfg: DictConfig) -> list[dict[str, Any]]:
    """Of these, what is needed for the guidance alone: an evaluation may bring a guide that training did not have."""
    return dependencies(OmegaConf.masked_copy(cfg, ["model"]))


def total_training_cost(parts: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """The sum by kind; None where a part is not known."""
    parts = list(parts)
    return {
        kind: None if any(part.get(kind) is None for part in parts) else sum(part[kind] for part in parts)
        for kind in KINDS
    }


def remaining(budget: Budget, parts: list[dict[str, Any]]) -> Budget:
    """What is left of ``budget`` for a model that needed ``parts``. Raises `UserError` where nothing is.

    The other trials of a search are part of what a model cost, and not of what one of its trials may spend.
    """
    parts = [part for part in parts if part["role"] != TRIAL]
    if not parts:
        return budget
    spent = total_training_cost(parts)
    spender = " and ".join(f"the {part['role']} ({part['run']})" for part in parts)
    for kind, limit in (("flops", budget.flops), ("device_seconds", budget.device_minutes)):
        if limit is not None and spent[kind] is None:
            raise UserError(f"What {spender} took in {kind} is not known: its record does not say. Train it again.")
    return budget.after(flops=spent["flops"] or 0.0, device_seconds=spent["device_seconds"] or 0.0, spender=spender)


def print_costs(record: RunRecord) -> None:
    """Write the total into a record that says its own cost, and what its model needed."""
    record.training["total_cost"] = total_training_cost(
        [own_training_cost(record), *record.training.get("dependencies", [])]
    )
