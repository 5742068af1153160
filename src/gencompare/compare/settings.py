"""In which settings runs differ: only these are worth a reader's time."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from gencompare.compare import formatting
from gencompare.compare.load_runs import RunFolder

NOT_SETTINGS = (
    "out", "tags", "command", "sweep_name", "run", "resume", "runs", "by", "metric", "n", "checkpoint", "weights",
    "format", "task", "paths", "logger", "family", "choices.model", "data.root", "data.cache", "hydra",
)  # fmt: skip
"""What a config holds of places and of the task in hand: it differs between runs and changes no figure."""


@dataclass(frozen=True)
class Differences:
    """A table of settings: one row a run, one column a setting."""

    title: str
    names: list[str]
    rows: list[tuple[RunFolder, list[str]]]


def differences(runs: Iterable[RunFolder]) -> list[Differences]:
    """Settings outside the model that differ between any runs, and model settings that differ inside a family.

    Two families share hardly any model setting, so a table of all of them would be one of gaps.
    """
    flat = [(run, flatten(settings_of(run.record.config))) for run in runs if run.record.config]
    outside = [(run, {k: v for k, v in settings.items() if not of_model(k)}) for run, settings in flat]
    tables = [_differing("All runs", outside)]
    for family in sorted({run.record.family for run, _ in flat}):
        inside = [(run, s) for run, s in flat if run.record.family == family]
        tables.append(_differing(family, [(run, {k: v for k, v in s.items() if of_model(k)}) for run, s in inside]))
    return [table for table in tables if table.names]


def of_model(name: str) -> bool:
    return name.startswith(("model.", "choices.model/"))


def settings_of(config: dict[str, Any], without: Container[str] = NOT_SETTINGS, prefix: str = "") -> dict[str, Any]:
    """The config without the dotted names ``without``: what is no setting."""
    kept = {key: value for key, value in config.items() if f"{prefix}{key}" not in without}
    return {
        key: settings_of(value, without, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in kept.items()
    }


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted name, values as text."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _differing(title: str, runs: list[tuple[RunFolder, dict[str, str]]]) -> Differences:
    names = dict.fromkeys(name for _, settings in runs for name in settings)
    kept = [name for name in names if len({settings.get(name) for _, settings in runs}) > 1]
    return Differences(
        title, kept, [(run, [settings.get(name, formatting.NONE) for name in kept]) for run, settings in runs]
    )
