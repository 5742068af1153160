"""What to say of an option that is not there: what there is in its place."""

from __future__ import annotations

import re
import shlex
from difflib import get_close_matches
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gencompare.overrides import quoted
from gencompare.paths import conf_dir
from gencompare.tasks.checks import TEMPLATE

OF_PLACES = (
    "runs", "run", "resume", "samples", "pretrained", "task.out", "hydra.run.dir", "hydra.sweep.dir", "paths.runs",
    "paths.data", "paths.cache", "data.root",
)  # fmt: skip


def of_absent_option(error: BaseException, words: list[str]) -> str | None:
    """One line about the option that Hydra ``could not override``; None where that is not what went wrong.

    Args:
        words: the command line.
    """
    found = re.match(r"Could not override '([^']+)'", str(error))
    if found is None or found[1].startswith("hydra."):
        return None
    key = found[1]
    if key in TEMPLATE:
        return f"There is no option '{key}': {TEMPLATE[key]}."
    try:
        cfg = _composed_without(key, words)
    except (HydraException, OmegaConfBaseException):
        return None
    inside: Any = cfg
    place: list[str] = []
    *parents, last = key.split(".")
    for name in parents:
        if not isinstance(inside, DictConfig) or inside.get(name) is None:
            last = name
            break
        place, inside = [*place, name], inside[name]
    if not isinstance(inside, DictConfig):
        return f"There is no option '{key}': {'.'.join(place)} is {inside}."
    group = "/".join([*place, last])
    if group in cfg.hydra.runtime.choices:
        options = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        return f"There is no option '{key}', since no {last} is chosen: add {group}={'|'.join(options)}."
    names = [str(name) for name in inside if not str(name).startswith(("_", "hydra"))]
    near = get_close_matches(last, names, 1)
    told = f" Did you mean {'.'.join([*place, *near])}?" if near else ""
    return f"There is no option '{key}': {'.'.join(place) or 'the config'} has {', '.join(names) or 'none'}.{told}"


def of_bare_value(error: BaseException) -> str | None:
    """One line about a value that Hydra's grammar does not take without quotes, with them; None for another error.

    Only of what is a place or a glob: elsewhere brackets and braces are mostly meant as lists.
    """
    key, equals, value = str(getattr(error, "override", None) or "").partition("=")
    if not isinstance(error, OverrideParseException) or not equals or key not in OF_PLACES or value[:1] in "'\"":
        return None
    word = f"{key}={quoted(value)}"
    return f"{key}={value} has signs that Hydra reads otherwise. Quote it: {shlex.quote(word)}"


def _composed_without(key: str, words: list[str]) -> DictConfig:
    """The config of the command line less what it says of ``key``; the first of the values that it sweeps over."""
    assigned = [word for word in words if "=" in word and not word.startswith(("-", "hydra"))]
    overrides = []
    for override in OverridesParser.create().parse_overrides(assigned):
        if override.key_or_group == key:
            continue
        value = next(override.sweep_string_iterator()) if override.is_sweep_override() else None
        overrides.append(f"{override.get_key_element()}={value}" if value is not None else str(override.input_line))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides, return_hydra_config=True)
