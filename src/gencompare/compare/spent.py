"""What the training of a model took, with all that the model needed: its autoencoder, its guides, its tuning."""

from __future__ import annotations

from typing import Any

from gencompare.compare import words
from gencompare.records import RunRecord

KINDS = ("images_seen", "steps", "flops", "device_seconds")


def own(record: RunRecord) -> dict[str, float | None]:
    """By kind: what this training took. Device seconds are seconds times devices."""
    found = {kind: words.number(record.training.get(kind)) for kind in KINDS}
    seconds = words.number(record.training.get("seconds"))
    if found["device_seconds"] is None and seconds is not None:
        found["device_seconds"] = seconds * (words.number(record.training.get("processes")) or 1)
    return found


def total(record: RunRecord) -> dict[str, float | None]:
    """By kind: the sum that the record holds; of a record without one, this training and the autoencoder's.

    None where a part is not known: half of a cost is none.
    """
    summed = record.training.get("total")
    if isinstance(summed, dict):
        return {kind: words.number(summed.get(kind)) for kind in KINDS}
    taken = own(record)
    before = first_stage(record)
    if not before:
        return taken
    further = {kind: words.number(before.get(kind)) for kind in KINDS}
    if further["device_seconds"] is None:
        further["device_seconds"] = words.number(before.get("seconds"))
    return {
        kind: a + b if (a := taken[kind]) is not None and (b := further[kind]) is not None else None for kind in KINDS
    }


def needed(record: RunRecord) -> str:
    """The roles of the further trainings that are counted: ``autoencoder``, ``autoencoder and 3 trials``."""
    listed = record.training.get("needed")
    roles = [str(part.get("role")) for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
    roles = roles or (["autoencoder"] if first_stage(record) else [])
    count = {role: roles.count(role) for role in roles}
    return words.listed([role if n == 1 else f"{n} {role}s" for role, n in count.items()]) if count else ""


def first_stage(record: RunRecord) -> dict[str, Any]:
    """What the autoencoder of a latent model cost; empty for any other."""
    found = record.model.get("autoencoder")
    return found if isinstance(found, dict) else {}
