"""Settings that differ between runs."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from gencompare.comparison import formatting
from gencompare.comparison.load_runs import RunFolder

NON_SETTINGS = (
    "out", "tags", "paper", "command", "sweep_name", "run", "run_dir", "resume", "ckpt_path", "runs", "by", "group_by",
    "metric", "rank_by", "n", "num_images", "checkpoint", "weights", "format", "trust", "task", "paths", "logger",
    "family", "choices.model", "data.root", "data.cache", "hydra",
)  # fmt: skip
"""Config keys of paths and task options, which may differ between runs without changing any metric."""


@dataclass(frozen=True)
class SettingsTable:
    """Settings of several runs, with one row per run and one column per setting."""

    title: str
    names: list[str]
    rows: list[tuple[RunFolder, list[str]]]


def differing_settings(runs: Iterable[RunFolder]) -> list[SettingsTable]:
    """Tabulate the settings that differ: one table of settings outside the model, and one of model settings per family.

    Families share few model settings, so a single table would be mostly empty.
    """
    flat = [(run, flatten(config_settings(run.record.config))) for run in runs if run.record.config]
    shared = [(run, {k: v for k, v in settings.items() if not is_model_setting(k)}) for run, settings in flat]
    tables = [_differing("All runs", shared)]
    for family in sorted({run.record.family for run, _ in flat}):
        own = [
            (run, {k: v for k, v in settings.items() if is_model_setting(k)})
            for run, settings in flat
            if run.record.family == family
        ]
        tables.append(_differing(family, own))
    return [table for table in tables if table.names]


def is_model_setting(name: str) -> bool:
    """Return whether a dotted config key belongs to the model."""
    return name.startswith(("model.", "choices.model/"))


def config_settings(config: dict[str, Any], exclude: Container[str] = NON_SETTINGS, prefix: str = "") -> dict[str, Any]:
    """Return the config without the dotted keys in ``exclude``. Integers and equal floats, 0 and 0.0, are the same."""
    kept = {key: value for key, value in config.items() if f"{prefix}{key}" not in exclude}
    return {
        key: config_settings(value, exclude, f"{prefix}{key}.") if isinstance(value, dict) else _canonical(value)
        for key, value in kept.items()
    }


def _canonical(value: Any) -> Any:
    if isinstance(value, list):
        return [_canonical(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to dotted keys and string values."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _differing(title: str, runs: list[tuple[RunFolder, dict[str, str]]]) -> SettingsTable:
    names = dict.fromkeys(name for _, settings in runs for name in settings)
    differing = [name for name in names if len({settings.get(name) for _, settings in runs}) > 1]
    rows = [(run, [settings.get(name, formatting.MISSING) for name in differing]) for run, settings in runs]
    return SettingsTable(title, differing, rows)
