"""The config of a run, which is stored in the run folder and restored from it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.checksums import read_checked_yaml, write_checked_yaml
from gencompare.command_line import conf_dir
from gencompare.errors import CorruptedFileError, UserError, printable
from gencompare.migrations import migrate_config
from gencompare.private_apis import yaml_loader
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.safe_files import parse_yaml, read_text
from gencompare.tasks.runs.interpolations import (
    at,
    escape,
    find_interpolations,
    is_interpolation,
    map_strings,
    put,
    resolve,
    strings,
    unescape,
)
from gencompare.tasks.runs.run_folder import has_checkpoint
from gencompare.trust import PACKAGES, Opener, check_choices, check_config, current_opener

FILE = "config.yaml"
"""The config in a run folder, with every interpolation resolved, except those that read the environment."""
MAX_SIZE, MAX_INTERPOLATIONS = 1 << 18, 1000
"""Limits of a stored config: its size in bytes, and how often it may contain ``${``."""

JOB_KEYS = (
    "task", "run_dir", "resume", "runs", "group_by", "rank_by", "samples", "pretrained", "name", "num_images",
    "checkpoint", "weights", "format", "paths", "evaluation.protocol.cache", "trust",
)  # fmt: skip
"""Keys that each job sets for itself, never taken from the config of a run folder."""
LOCATION_KEYS = ("out", "resume", "autoencoder_run", "whitening", "teacher_run", "trained_run")
"""Keys that are neither stored nor read from a stored config, since a run folder may be moved."""
TASKS_WITH_LOGGERS = (
    "gencompare.tasks.train.train", "gencompare.tasks.evaluate_run.evaluate_run",
    "gencompare.tasks.reproduce.reproduce",
)  # fmt: skip
"""Tasks that use the callbacks and loggers in a stored config."""
APPENDED_GROUPS = {"data/condition": "data.conditions", "evaluation/metric": "evaluation.protocol.metrics"}
"""Groups that are appended with ``+``, and the config key that receives their options."""
TRAINING_KEYS = ("trainer.global_batch_size", "trainer.precision")
"""Settings of the trainer that another option of its group does not change in a run folder, as they affect what is
trained."""
FIXED_KEY = "model.latent"
"""Setting that trained weights depend on, so it cannot be changed afterwards."""


def complete_config(cfg: DictConfig, hydra_config: Any) -> DictConfig:
    """Complete the config that Hydra composed for a job.

    Add the output folder, the group choices, the sweep name and the command. With ``run_dir`` or ``resume``, the result
    is the config of that run with the overrides of the command line.
    """
    references = _references(OmegaConf.to_container(cfg, resolve=False))
    cfg = resolve(cfg)
    # Not resolved, since the command is stored.
    overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    folder = cfg.run_dir or cfg.resume
    if folder is not None:
        stored = read(Path(folder))
        cfg = _override_stored(stored, cfg, overrides, references, Path(folder))
        trained = has_checkpoint(Path(folder))
        if trained and _raw(cfg, FIXED_KEY) != at(stored, tuple(FIXED_KEY.split("."))):
            raise UserError(
                f"{folder} was trained with a different {FIXED_KEY}, which its weights depend on: keep {FIXED_KEY}, or"
                " train another model."
            )
    with open_dict(cfg):
        if "choices" not in cfg:
            choices = dict(hydra_config.runtime.choices)
            cfg.choices = {g: c for g, c in choices.items() if not g.startswith("hydra/")}
        cfg.out = escape(str(Path(hydra_config.runtime.output_dir).absolute()))
        cfg.sweep_name = None
        if hydra_config.mode is RunMode.MULTIRUN:
            cfg.sweep_name = escape(Path(hydra_config.sweep.dir).name)
        if cfg.get("command") is None:
            cfg.command = [escape(override) for override in overrides]
    return cfg


def trusts_folders(cfg: DictConfig) -> bool:
    """Return ``cfg.trust``. Raise `UserError` if it is not true or false."""
    trust = cfg.get("trust", False)
    if not isinstance(trust, bool):
        raise UserError(f"trust={trust} must be true or false.")
    return trust


def opener(cfg: DictConfig) -> Opener:
    """Return what the user of a composed config has chosen for all run folders that he opens."""
    paths = OmegaConf.to_container(cfg.paths, resolve=True) if "paths" in cfg else {}
    return Opener(trusts_folders(cfg), {str(key): str(value) for key, value in dict(paths).items()})  # type: ignore[arg-type]


def _override_stored(
    raw: dict[str, Any], composed: DictConfig, overrides: list[str], references: dict[str, str], folder: Path
) -> DictConfig:
    """Return the stored config with all settings that ``overrides`` change replaced by their values in ``composed``.

    Args:
        raw: the stored config, from `read`.
        references: see `_references`.
        folder: the run folder.

    Raises:
        UserError: the rest of the stored config names code, or places to write to, that it may not choose.
    """
    stored = as_text(raw)
    merged = stored.copy()
    OmegaConf.set_struct(merged, False)
    overridden = {_config_path(_key(o)) for o in OverridesParser.create().parse_overrides(overrides)}
    groups = {_config_path(str(group)): str(group) for group in stored.get("choices", {})}
    changed = {
        key
        for key in overridden
        if key not in groups or value_of(groups[key], overrides) != stored.choices[groups[key]]
    }
    # Interpolations are resolved in the stored config, so values that refer to a changed key must be changed too.
    changed |= {path for path, source in references.items() if source in changed}
    added_keys = set[str]()
    for group, key in APPENDED_GROUPS.items():
        if group.replace("/", ".") in changed:
            changed.remove(group.replace("/", "."))
            added: Any = _raw(composed, key)
            before: Any = _raw(stored, key) or {}
            both = OmegaConf.merge(OmegaConf.create(added), OmegaConf.create(before))
            OmegaConf.update(merged, key, both, merge=False, force_add=True)
            added_keys |= {f"{key}.{name}" for name in added if name not in before}
    for key in [*JOB_KEYS, *sorted(changed)]:
        OmegaConf.update(merged, key, _raw(composed, key), merge=False, force_add=True)
    for key in TRAINING_KEYS:
        if key not in overridden:
            OmegaConf.update(merged, key, _raw(stored, key))
    own = {*JOB_KEYS, *changed, *added_keys, *use_own_folders(merged, composed, changed)}
    settings: Any = OmegaConf.to_container(merged, resolve=False)
    keys = {tuple(key.split(".")) for key in own}
    trusting, environment = trusts_folders(composed), OmegaConf.to_container(composed, resolve=False)
    unused = {"callbacks", "logger"} if composed.task._target_ not in TASKS_WITH_LOGGERS else set[str]()
    for path, text in find_interpolations(raw):
        names = tuple(map(str, path))
        if path[0] not in {*PACKAGES} - unused or any(names[:k] in keys for k in range(1, len(names) + 1)):
            continue
        if at(environment, path) != text and not trusting:
            key = ".".join(names)
            raise UserError(
                f"{folder / FILE} takes {key} from {text}, which only your own config may do: repeat it,"
                f" {shlex.quote(f'++{key}={text}')}, or set another value."
            )
        put(settings, path, text)
        keys.add(names)
    if not trusting:
        check_config(settings, folder / FILE, keys)
    return DictConfig(settings)


def value_of(key: str, argv: list[str]) -> str | None:
    """Return the last value of a key in ``argv``, or None."""
    for arg in reversed(argv):
        name, equals, value = arg.partition("=")
        if equals and name.lstrip("+") == key:
            return value
    return None


def _raw(cfg: DictConfig, key: str) -> Any:
    """Return the value at a dotted key as plain data, without resolving interpolations."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not OmegaConf.is_config(node):
        return None
    is_index = OmegaConf.is_list(node) and last.isdigit()
    return at(OmegaConf.to_container(node, resolve=False), (int(last) if is_index else last,))


def use_own_folders(stored: DictConfig, composed: DictConfig, changed: Collection[str] = ()) -> set[str]:
    """Replace the folders in a stored config that data are written to by the user's own. Return the replaced keys.

    The stored ``data.root`` is kept if it exists, but nothing is downloaded into it.

    Args:
        stored: the stored config, which is changed.
        composed: the user's own config, which has at least the section ``paths``.
        changed: keys that the user has set.
    """
    data, own = stored.get("data"), set[str]()
    if not OmegaConf.is_dict(data) or "data" in changed:
        return own
    if data.get("cache") is not None and "data.cache" not in changed:
        data.cache = _raw(composed, "data.cache") or _raw(composed, "paths.cache")
        own.add("data.cache")
    if data.get("root") is not None and "data.root" not in changed:
        own_root = _raw(composed, "data.root") or _raw(composed, "paths.data")
        if not isinstance(data.root, str) or not os.path.exists(data.root):
            data.root = own_root  # the stored path may not exist on another machine
        elif data.get("download") and "data.download" not in changed:
            data.download = os.path.realpath(data.root) == os.path.realpath(unescape(str(own_root)))
    return own


def _references(node: Any, path: tuple[str, ...] = ()) -> dict[str, str]:
    """Map keys whose value is an interpolation, ``${a.b}`` or relative ``${..b}``, to the keys that they refer to."""
    if isinstance(node, dict):
        return {key: ref for name, value in node.items() for key, ref in _references(value, (*path, str(name))).items()}
    match = re.fullmatch(r"\$\{(\.*)([\w.]+)\}", node) if isinstance(node, str) else None
    if match is None:
        return {}
    dots, rest = len(match[1]), match[2]
    return {".".join(path): ".".join([*(path[:-dots] if dots else ()), rest])}


def _key(override: Any) -> str:
    return f"{override.key_or_group}@{override.package}" if override.package else override.key_or_group


def _config_path(group: str) -> str:
    """Return the config key that receives an option of a group: a.b for ``a/b``, c.d for ``a/b@c.d``."""
    return group.partition("@")[2] or group.replace("/", ".")


def read(folder: Path) -> dict[str, Any]:
    """Read the config of a run folder as plain data, with old option names replaced.

    Nothing in it is resolved or executed. Strings are those of the file: `as_text` turns them into values.
    """
    path = folder / FILE
    try:
        loaded = _parse(path, folder)
        if sum(text.count("${") for text in strings(loaded)) > MAX_INTERPOLATIONS:  # OmegaConf parses each slowly
            raise UserError(f"{path} is corrupted: it contains more than {MAX_INTERPOLATIONS} interpolations.")
        config = migrate_config(_plain_types(loaded))
        if config.get("choices") is not None:
            check_choices(config["choices"], path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is corrupted: {type(error).__name__}.") from error
    return {key: value for key, value in config.items() if key not in (*LOCATION_KEYS, "hydra")}


def _parse(path: Path, folder: Path) -> dict[str, Any]:
    """Parse a stored config or, if the file is corrupted, the copy of the config in the run's record.

    Raises:
        CorruptedFileError: there is no copy either, or the file looks as if it was edited: it is a config, but does not
            match its checksum.
    """
    try:
        loaded = parse_yaml(path, read_checked_yaml(path, MAX_SIZE), yaml_loader())
        if not isinstance(loaded, dict):
            raise CorruptedFileError(path)
        return loaded
    except (CorruptedFileError, FileNotFoundError, yaml.YAMLError) as error:
        missing = isinstance(error, FileNotFoundError)
        if not missing and _is_config(path):
            advice = f"If you edited it, delete its first line. Otherwise, delete the file: {RECORD_FILE} has a copy."
            raise CorruptedFileError(path, advice) from error
        try:
            config = RunRecord.load(folder).config
        except UserError:
            config = {}
        if "model" not in config:
            if missing:
                raise UserError(f"{folder} is not a run folder: it contains no {FILE}.") from error
            raise CorruptedFileError(path) from error
        _report_copy(path, "missing" if missing else "corrupted")
        return config


def _is_config(path: Path) -> bool:
    """Return whether a file is a complete config, whatever its checksum says."""
    try:
        loaded = parse_yaml(path, read_text(path, MAX_SIZE), yaml_loader())
        return isinstance(loaded, dict) and {"model", "data", "trainer", "callbacks", "evaluation"} <= loaded.keys()
    except (UserError, ValueError, yaml.YAMLError):
        return False


@cache
def _report_copy(path: Path, state: str) -> None:
    print(printable(f"{path} is {state}: using the copy of the config in {RECORD_FILE}."), file=sys.stderr)


def _plain_types(value: Any) -> Any:
    """Return parsed YAML with paths as strings. Raise `TypeError` for other types that JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain_types(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain_types(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} in a config")


def as_text(raw: dict[str, Any]) -> DictConfig:
    """Return a stored config in which no interpolation is resolved: each is the text that it consists of."""
    config = map_strings(raw, lambda text: escape(text) if is_interpolation(text) else text)
    if isinstance(config.get("command"), list):  # a command is text in any case
        config["command"] = [escape(unescape(each)) if isinstance(each, str) else each for each in config["command"]]
    return DictConfig(config)


def load(folder: Path) -> DictConfig:
    """Load the config of a run folder, in order to compare or to show it. Nothing must be built from it: see
    `load_checked`."""
    return as_text(read(folder))


def load_checked(folder: Path, *, trust: bool = False) -> DictConfig:
    """Load the config of a run folder in order to build its data and its model, without a command line.

    Args:
        folder: the run folder.
        trust: whether the folder may name anything. It is also trusted if the user of the current job has set
            ``trust=true``.

    Raises:
        UserError: the config names code, or places to write to, that it may not choose.
    """
    raw = read(folder)
    trust = trust or current_opener().trusting
    config = DictConfig(raw) if trust else as_text(raw)
    own = use_own_folders(config, OmegaConf.create({"paths": own_paths()}))
    if OmegaConf.select(config, "evaluation.protocol.cache") is not None:
        config.evaluation.protocol.cache = own_paths()["cache"]
        own.add("evaluation.protocol.cache")
    if not trust:
        check_config(raw, folder / FILE, {tuple(key.split(".")) for key in own})
        for path, text in find_interpolations(raw):
            if path[0] in ("data", "model"):
                raise UserError(
                    f"{folder / FILE} takes {'.'.join(map(str, path))} from {text}, which is not read for a folder from"
                    " elsewhere: pass trust=True if you trust whoever made it."
                )
    return config


def own_paths() -> dict[str, str]:
    """Return the section ``paths`` of the current user's config."""
    if current_opener().paths:
        return {key: escape(value) for key, value in current_opener().paths.items()}
    files = [conf_dir() / "config.yaml", conf_dir() / "local" / "default.yaml"]
    configs: list[Any] = [OmegaConf.load(file) for file in files if file.is_file()]
    sections = [OmegaConf.create({"paths": config.get("paths") or {}}) for config in configs]
    paths: Any = OmegaConf.to_container(OmegaConf.merge(*sections), resolve=True)
    return {str(key): escape(str(value)) for key, value in paths["paths"].items()}


def read_config(path: Path) -> DictConfig:
    """Read a config that `save` wrote.

    Raises:
        CorruptedFileError: the checksum does not match, or the file contains no config.
    """
    text = read_checked_yaml(path)
    try:
        loaded = OmegaConf.create(text)
    except Exception as error:  # of yaml and of omegaconf
        raise CorruptedFileError(path) from error
    if not isinstance(loaded, DictConfig):
        raise CorruptedFileError(path)
    return loaded


def save(cfg: DictConfig, path: Path) -> None:
    """Write a config atomically and with a checksum, with interpolations resolved, except those of the environment."""
    write_checked_yaml(path, OmegaConf.to_yaml(resolve(cfg)))


def without_locations(cfg: DictConfig) -> DictConfig:
    """Return the config without `LOCATION_KEYS`."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in LOCATION_KEYS])
