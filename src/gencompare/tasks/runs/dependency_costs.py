"""The training cost of a model, including its dependencies: autoencoder, whitening, teacher, guides, tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gencompare.errors import UserError
from gencompare.records import RunRecord
from gencompare.training.budget import Budget

COST_KINDS = ("images_seen", "steps", "flops", "device_seconds", "energy_joules")
"""Kinds of training cost. All of them are counted, even if the budget limits only one."""
TRIAL_ROLE = "trial"
"""Value of ``role`` for the other trials of a search and their dependencies, in the costs of the best trial."""


def own_training_cost(record: RunRecord) -> dict[str, float | None]:
    """Return the training cost of one run for each of `COST_KINDS`. Kinds that are missing in its record are None."""
    training = record.training
    cost = {kind: training.get(kind) for kind in COST_KINDS}
    if cost["device_seconds"] is None and training.get("seconds") is not None:
        cost["device_seconds"] = training["seconds"] * (training.get("processes") or 1)
    return cost


def cost_entry(record: RunRecord, role: str) -> dict[str, Any]:
    """Return the entry for a run in ``training.dependencies`` of another run's record."""
    return {
        "role": role, "run": record.name, "id": record.environment.get("run_id"), "family": record.family,
        **own_training_cost(record)
    }  # fmt: skip


def dependencies(cfg: DictConfig, known: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return the runs that this run depends on, directly or indirectly, as deduplicated cost entries.

    Args:
        known: entries from the run's own record, since the folders of dependencies may be gone when it is resumed.
    """
    entries = list(known)
    for role, folder in _dependency_folders(cfg):
        record = RunRecord.load(folder)
        entries += [*record.training.get("dependencies", []), cost_entry(record, role)]
    if cfg.get("whitening"):
        entries.append(OmegaConf.to_container(cfg.whitening))  # type: ignore[arg-type]
    return deduplicate(entries)


def guide_dependencies(cfg: DictConfig) -> list[dict[str, Any]]:
    """Return only the dependencies of guidance, since an evaluation may use guidance that training did not use."""
    return dependencies(OmegaConf.masked_copy(cfg, ["model"]))


def deduplicate(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the first entry of each run, in order."""
    unique: dict[str, dict[str, Any]] = {}
    for entry in entries:
        unique.setdefault(entry["id"] or entry["run"], entry)
    return list(unique.values())


def _dependency_folders(cfg: DictConfig) -> Iterator[tuple[str, Path]]:
    """Yield role and folder of the runs that a config refers to: its autoencoder, its teacher and its guiding models.

    The weights of the first two are in the run's checkpoints, so they are named only when training starts.
    """
    for role in ("autoencoder", "teacher"):
        if cfg.get(f"{role}_run"):
            yield role, Path(cfg[f"{role}_run"])
    guidance = OmegaConf.select(cfg, "model.guidance") or {}
    for role, part in guidance.items():
        if OmegaConf.is_dict(part) and part.get("run"):
            yield str(role), Path(part.run)


def sum_costs(entries: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """Sum costs by kind. The sum is None if the cost of an entry is unknown."""
    entries = list(entries)
    return {
        kind: None if any(entry.get(kind) is None for entry in entries) else sum(entry[kind] for entry in entries)
        for kind in COST_KINDS
    }


def remaining_budget(budget: Budget, entries: list[dict[str, Any]]) -> Budget:
    """Subtract the cost of a model's dependencies from its budget.

    The other trials of a search count towards the cost of the best trial, but not against the budget of any trial.

    Raises:
        UserError: the dependencies used up the budget, or their cost is unknown.
    """
    entries = [entry for entry in entries if entry["role"] != TRIAL_ROLE]
    if not entries:
        return budget
    spent = sum_costs(entries)
    spender = " and ".join(f"the {entry['role']} ({entry['run']})" for entry in entries)
    for kind, limit in (("flops", budget.flops), ("device_seconds", budget.device_minutes)):
        if limit is not None and spent[kind] is None:
            raise UserError(f"The record of {spender} has no {kind}. Train it again.")
    return budget.after(flops=spent["flops"] or 0.0, device_seconds=spent["device_seconds"] or 0.0, spender=spender)


def update_total_cost(record: RunRecord) -> None:
    """Set ``training.total_cost`` of a record to the cost of its training and dependencies."""
    record.training["total_cost"] = sum_costs([own_training_cost(record), *record.training.get("dependencies", [])])
