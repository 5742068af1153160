"""Commands that train or evaluate a run under a given evaluation protocol."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gencompare.command_line import override, quote, run_command
from gencompare.comparison.load_runs import RunFolder
from gencompare.records import Measurement, Result

OPTION_OF_FIELD = {
    "num_images": "evaluation.num_images",
    "reference": "evaluation.protocol.reference",
    "chunk_size": "evaluation.protocol.chunk_size",
}
"""Config key for each `Measurement` field that can be set on its own."""

PRESET_FIELDS = {"extractor", "extractor_hash", "resize"}
"""`Measurement` fields that the preset ``evaluation=NAME`` sets."""

FIXED_FIELDS = {"data", "conditioning", "quantization"}
"""`Measurement` fields that no evaluation setting can change."""


METRIC_OVERRIDE = "+evaluation/metric="
"""Prefix of overrides that add a metric to the evaluation."""


def protocol_overrides(measurement: Measurement, target: Measurement, preset: str) -> list[str] | None:
    """Return the overrides that change the protocol ``measurement`` into ``target``, or None if that is impossible.

    Args:
        preset: evaluation preset of ``target``.
    """
    differing = set(measurement.differences(target))
    if differing & FIXED_FIELDS or ("reference_hash" in differing and "reference" not in differing):
        return None
    needs_preset = bool(differing & PRESET_FIELDS)
    options = [name for name in OPTION_OF_FIELD if name in differing or needs_preset]
    return [*([override("evaluation", preset)] if needs_preset else []), *_protocol_options(target, options)]


def _protocol_options(target: Measurement, names: Iterable[str]) -> list[str]:
    fields = {OPTION_OF_FIELD[name]: getattr(target, name) for name in names}
    return [f"{key}={quote(value) if isinstance(value, str) else value}" for key, value in fields.items()]


def evaluation_preset(run: RunFolder) -> str:
    """Return the evaluation preset in the config of ``run``."""
    choices = run.record.config.get("choices", {})
    return (choices.get("evaluation") if isinstance(choices, dict) else None) or "default"


def evaluation_command(run: RunFolder, result: Result, overrides: list[str]) -> str:
    """Return the command that evaluates the checkpoint of ``result`` again with ``overrides``."""
    checkpoint = result.generation.checkpoint
    # Every value is quoted, since records are untrusted and users paste this into a shell.
    chosen = [f"checkpoint={checkpoint}"] if checkpoint == "best" else []
    return run_command("task=evaluate", override("run_dir", run.folder), *overrides, *chosen)


def training_command(family: str, measurement: Measurement, run: RunFolder) -> str:
    """Return the command that trains ``family`` on the data of ``run`` and evaluates it under ``measurement``.

    The new run folder is next to that of ``run``, so repeating the comparison with a glob includes it.
    """
    choices = run.record.config.get("choices", {})
    data = choices.get("data") if isinstance(choices, dict) else None
    # Data settings, the extractor's weights and further metrics may come from the command line of the run. Records are
    # untrusted, so no override is repeated that names code to call or a folder to write to.
    repeated = [
        each
        for each in run.record.overrides
        if each.startswith(("data.", "evaluation.weights=", METRIC_OVERRIDE)) and _is_plain(each)
    ]
    overrides = [override("model", family), override("data", data or measurement.data), *repeated]
    if evaluation_preset(run) != "default":
        overrides.append(override("evaluation", evaluation_preset(run)))
    overrides += _protocol_options(measurement, OPTION_OF_FIELD)
    if measurement.conditioning == "labels":
        overrides.append("model.conditional=true")
    return run_command(*overrides, override("hydra.run.dir", _unused(run.folder.parent / family)))


SET_BY_SEEDS = ("seed=", "evaluation.num_images=", "hydra.", "paths.", "task", "run_dir=", "resume=", "runs=")
"""Prefixes of overrides that `seeds_command` sets itself or that belong to one run."""


def seeds_command(run: RunFolder, seeds: Iterable[int], num_images: int) -> str:
    """Return the command that trains the config of ``run`` with other seeds, and evaluates ``num_images`` images."""
    kept = [each for each in run.record.overrides if not each.startswith(SET_BY_SEEDS) and _is_plain(each)]
    return run_command("-m", *kept, f"seed={','.join(map(str, seeds))}", f"evaluation.num_images={num_images}")


def _is_plain(text: str) -> bool:
    """Return whether an override of a record, which is untrusted, names no code to call and no folder to write to."""
    return not re.search(r"\._|^data\.(cache|download)\b|\$\{", text)


def _unused(folder: Path) -> Path:
    """Return ``folder``, with a number appended if it exists."""
    k, candidate = 1, folder
    while candidate.exists():
        k += 1
        candidate = folder.with_name(f"{folder.name}_{k}")
    return candidate
