"""The config of a run, which is checked for unknown keys, stored in the run folder, and restored from it."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gencompare.checksums import read_checked_yaml, write_checked_yaml
from gencompare.command_line import conf_dir, quote
from gencompare.errors import CorruptedFileError, UserError, printable
from gencompare.migrations import migrate_config, rename_option
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
INTERNAL_KEYS = {
    "choices", "out", "sweep_name", "command", "trained_run", "autoencoder_run", "whitening", "teacher_run", "hydra",
}  # fmt: skip
"""Top-level keys that this program adds to a composed config."""
LOCATION_KEYS = ("out", "resume", "autoencoder_run", "whitening", "teacher_run", "trained_run")
"""Keys that are neither stored nor read from a stored config, since a run folder may be moved."""
TASKS_WITH_LOGGERS = (
    "gencompare.tasks.train.train", "gencompare.tasks.evaluate_run.evaluate_run",
    "gencompare.tasks.reproduce.reproduce",
)  # fmt: skip
"""Tasks that use the callbacks and loggers in a stored config."""
PATH_KEYS = (
    "runs", "run_dir", "resume", "samples", "pretrained", "task.out", "hydra.run.dir", "hydra.sweep.dir", "paths.runs",
    "paths.data", "paths.cache", "data.root",
)  # fmt: skip
"""Keys whose values are paths or globs, where brackets and braces are rarely meant as lists."""

GROUPS_NOT_INHERITED = ("experiment", "debug", "task", "hydra", "local", "sweep")
"""Groups whose choices are not inherited from a run folder, since its config contains their values."""
APPENDED_GROUPS = {"data/condition": "data.conditions", "evaluation/metric": "evaluation.protocol.metrics"}
"""Groups that are appended with ``+``, and the config key that receives their options."""
TRAINING_KEYS = ("trainer.global_batch_size", "trainer.precision")
"""Settings of the trainer that another option of its group does not change in a run folder, as they affect what is
trained."""
FIXED_KEY = "model.latent"
"""Setting that trained weights depend on, so it cannot be changed afterwards."""

TRAINER_EQUIVALENTS = {
    "max_epochs": "budget.images=N",
    "min_epochs": "budget.images=N",
    "max_steps": "budget=steps budget.steps=N",
    "min_steps": "budget=steps budget.steps=N",
    "max_time": "budget=device_minutes budget.device_minutes=N",
    "limit_train_batches": "budget.images=N",
    "overfit_batches": "debug=overfit",
    "fast_dev_run": "debug=fast",
    "accumulate_grad_batches": "trainer.global_batch_size=N and trainer.num_micro_batches=M",
    "gradient_clip_val": "model.grad_clip=X",
    "gradient_clip_algorithm": "model.grad_clip=X",
    "check_val_every_n_epoch": "callbacks.evaluation.num_evaluations=N",
    "val_check_interval": "callbacks.evaluation.num_evaluations=N",
    "limit_val_batches": "callbacks.evaluation.num_val_images=N",
    "num_sanity_val_steps": "debug=fast",
    "log_every_n_steps": "callbacks.metric_logger.log_every_n_steps=N",
    "enable_progress_bar": "callbacks.progress_bar=null",
    "enable_checkpointing": "callbacks.checkpoints.every_minutes=X",
    "callbacks": "+callbacks.NAME._target_=CLASS",
    "logger": "logger=wandb, or +logger.NAME._target_=CLASS",
    "default_root_dir": "hydra.run.dir=DIR",
}
"""Trainer arguments that this program sets itself, and their equivalent overrides."""
TRAINER_ADDITIONS = (
    "global_batch_size", "num_micro_batches", "matmul_precision", "compile", "memory_format", "fused_optimizer",
)  # fmt: skip
"""Settings of the trainer that are not arguments of Lightning's."""
TEMPLATE_EQUIVALENTS = {
    "ckpt_path": "resume=RUN_FOLDER continues a run, task=evaluate run_dir=RUN_FOLDER checkpoint=last evaluates it",
    "task_name": "a run is named after its folder: hydra.run.dir=DIR",
    "train": "task=train is the default, and task=evaluate run_dir=RUN_FOLDER only evaluates",
    "test": "every run is evaluated at its end, unless evaluation.checkpoints=[]",
    "lr": "model.optimizer.lr=X",
    "batch_size": "trainer.global_batch_size=N",
}
"""Keys of lightning-hydra-template, and their equivalents."""


def rename_options(argv: list[str]) -> list[str]:
    """Replace old option names in the command line. Print one line on stderr for each old name."""
    renamed = {arg: rename_option(arg) for arg in argv if not arg.startswith("-")}
    for old, new in dict.fromkeys(each[1:] for each in renamed.values() if each):
        print(f"{old} is now called {new}; the old name still works.", file=sys.stderr)
    return [found[0] if (found := renamed.get(arg)) else arg for arg in argv]


def resolve_auto_resume(argv: list[str]) -> list[str]:
    """Replace ``resume=auto`` by the run in ``hydra.run.dir``, or remove it if there is no run yet.

    So the command of a job that a scheduler may start again is the same each time.
    """
    if _value_of("resume", argv) != "auto":
        return argv
    folder = _value_of("hydra.run.dir", argv)
    if folder is None:
        raise UserError("resume=auto continues the run in hydra.run.dir, if there is one: set hydra.run.dir=DIR.")
    rest = [arg for arg in argv if arg != "resume=auto"]
    path = Path(_unquote(folder))
    exists = (path / RECORD_FILE).exists() or has_checkpoint(path)
    return [*rest, f"resume={quote(str(path))}"] if exists else rest


def add_paper_settings(argv: list[str]) -> list[str]:
    """Add the settings of ``paper=NAME`` to the command line of ``task=reproduce``, unless it overrides them.

    Only those of the evaluation are added if nothing is trained (``run_dir``, ``samples``). Published weights
    (``pretrained``) need those of the model, too.

    Raises:
        UserError: there is no such paper.
    """
    if _value_of("task", argv) != "reproduce":
        return argv
    from gencompare.comparison.published import find_published

    published = find_published(_value_of("paper", argv))
    settings: Sequence[str] = published.overrides
    if _value_of("run_dir", argv) is not None:
        settings = [each for each in settings if each.startswith("evaluation")]
    elif _value_of("samples", argv) is not None:
        settings = [f"data={published.data}", *(each for each in settings if each.startswith("evaluation"))]
    overridden = {_name(arg) for arg in argv}
    settings = [each for each in settings if _name(each) not in overridden]
    return _beside(argv, ("task",), settings)


def _name(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def inherit_choices(argv: list[str]) -> list[str]:
    """Add the config group choices of the run in ``run_dir`` or ``resume`` to ``argv``, unless it overrides them.

    For example, ``model.sampler.num_steps=18`` is then a valid override if the run's sampler has ``num_steps``, even if
    the default model has no such option. Choices in groups that do not exist here are left out: the stored config
    contains their settings.
    """
    folder = _run_folder_in(argv)
    if folder is None:
        return argv
    choices = read(folder).get("choices") or {}
    overridden = {_name(arg) for arg in argv}
    inherited = [
        f"{'+' if group in APPENDED_GROUPS else ''}{group}={_choice_text(choice)}"
        for group, choice in choices.items()
        if choice is not None and group not in overridden and group.split("/")[0] not in GROUPS_NOT_INHERITED
        and _is_group(group.partition("@")[0], argv)
    ]  # fmt: skip
    if "model" in overridden and _value_of("model", argv) != choices.get("model"):
        raise UserError(
            f"{folder} is a run of model={choices.get('model')}, not model={_value_of('model', argv)}:"
            " omit model=, or choose another run."
        )
    path = quote(str(folder))
    inherited += [f"hydra.run.dir={path}", f"hydra.sweep.dir={path}", "hydra.sweep.subdir=."]
    return _beside(argv, ("run_dir", "resume"), [arg for arg in inherited if _name(arg) not in overridden])


def _beside(argv: list[str], keys: Collection[str], overrides: Iterable[str]) -> list[str]:
    """Insert overrides before the one of a key in ``keys``: argparse wants them side by side, before or after flags."""
    place = next(k for k, arg in enumerate(argv) if _name(arg) in keys)
    return [*argv[:place], *overrides, *argv[place:]]


def _choice_text(choice: str | list[str]) -> str:
    return choice if isinstance(choice, str) else f"[{','.join(choice)}]"


def _is_group(group: str, argv: list[str]) -> bool:
    """Return whether there is a folder of a config group in ``conf/`` or in the user's folders of groups."""
    folders = [str(conf_dir())]
    for k, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders.append(value if equals else argv[k + 1] if k + 1 < len(argv) else "")
        elif flag.lstrip("+") == "hydra.searchpath":
            folders += re.findall(r"file://([^,\]'\"]+)", value)
    return any((Path(folder) / group).is_dir() for folder in folders if folder)


def _run_folder_in(argv: list[str]) -> Path | None:
    for key in ("run_dir", "resume"):
        value = _value_of(key, argv)
        if value not in (None, "null", ""):
            return Path(_unquote(value))
    return None


def _value_of(key: str, argv: list[str]) -> str | None:
    """Return the last value of a key in ``argv``, or None."""
    for arg in reversed(argv):
        name, equals, value = arg.partition("=")
        if equals and name.lstrip("+") == key:
            return value
    return None


def _unquote(value: str) -> str:
    if value[0] not in "'\"":
        return value
    parsed = OverridesParser.create().parse_override(f"key={value}").value()
    return str(OmegaConf.create({"value": str(parsed)}).value)


def check_keys(cfg: DictConfig) -> None:
    """Raise `UserError` if a composed config contains an unknown key."""
    top = OmegaConf.load(conf_dir() / "config.yaml")
    groups = {
        str(key).removeprefix("optional ").removeprefix("override ").split("@")[0]
        for entry in top.defaults if not isinstance(entry, str) for key in entry
    }  # fmt: skip
    known = ({str(key) for key in top} | groups | INTERNAL_KEYS) - {"defaults"}
    for key in cfg:
        if key in TEMPLATE_EQUIVALENTS and key not in known:
            raise UserError(_template_equivalent(str(key)))
    _refuse_unknown("", cfg, known, "Use tags=[...] to label a run.")
    check_callbacks(cfg, complete=not (cfg.get("run_dir") or cfg.get("resume")))
    evaluation = OmegaConf.load(conf_dir() / "evaluation" / "default.yaml")
    package = "The first line of a metric's YAML file must be: # @package evaluation.protocol.metrics.NAME"
    hint = package if "metric" in (cfg.get("evaluation") or {}) else ""
    _refuse_unknown("evaluation.", cfg.get("evaluation") or {}, {*map(str, evaluation), "defaults"}, hint)


def check_callbacks(cfg: DictConfig, *, complete: bool) -> None:
    """Raise `UserError` if ``cfg.callbacks`` contains something other than callbacks, or an unknown argument of one.

    Args:
        cfg: the config.
        complete: whether each callback must have a class, which a stored config may contain otherwise.
    """
    default = OmegaConf.load(conf_dir() / "callbacks" / "default.yaml")
    for name, options in (cfg.get("callbacks") or {}).items():
        if (not options and options != "") or isinstance(options, str):
            continue
        if not isinstance(options, Mapping | DictConfig):
            raise UserError(f"callbacks.{name}={options} must be null, or a mapping with _target_.")
        if name in default and options.get("_target_") == default[name]._target_:
            _refuse_unknown(f"callbacks.{name}.", options, map(str, default[name]))
        elif complete and "_target_" not in options:
            raise callback_without_class(str(name))


def callback_without_class(name: str) -> UserError:
    """Return the error for a callback that is neither a mapping with a class nor the name of an option."""
    return UserError(
        f"callbacks.{name} needs a class, +callbacks.{name}._target_=CLASS, or the name of an option:"
        f" {', '.join(sorted(p.stem for p in (conf_dir() / 'callbacks').glob('*.yaml')))}."
    )


def check_trainer(options: Mapping[str, object], known: Iterable[str]) -> None:
    """Raise `UserError` for Trainer arguments that do not exist or that this program sets itself.

    Args:
        options: the ``trainer`` part of a config.
        known: the arguments of Lightning's Trainer.
    """
    _refuse_unknown("trainer.", options, {*known, *TRAINER_ADDITIONS})
    for name in options:
        if name in TRAINER_EQUIVALENTS:
            raise UserError(f"trainer.{name} is set by this program. Use {TRAINER_EQUIVALENTS[name]}.")


def _template_equivalent(key: str) -> str:
    return f"There is no option '{key}': {TEMPLATE_EQUIVALENTS[key]}."


def _refuse_unknown(prefix: str, keys: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    known = set(known)
    for key in map(str, keys):
        if key not in known:
            close = get_close_matches(key, known, 1)
            advice = f" Did you mean {prefix}{close[0]}?" if close else f" {hint}" if hint else ""
            raise UserError(f"There is no setting '{prefix}{key}'.{advice}")


def missing_option_hint(error: BaseException, argv: list[str]) -> str | None:
    """Explain in one line why Hydra ``could not override`` an option. Return None for any other error.

    Args:
        argv: the command line.
    """
    match = re.match(r"Could not override '([^']+)'", str(error))
    if match is None or match[1].startswith("hydra."):
        return None
    key = match[1]
    if key in TEMPLATE_EQUIVALENTS:
        return _template_equivalent(key)
    try:
        cfg = _compose_without(key, argv)
    except (HydraException, OmegaConfBaseException):
        return None
    if key in APPENDED_GROUPS:
        return f"{key} adds options, which needs a plus sign: +{key}=NAME."
    if "/" in key:
        parent, _, last = key.rpartition("/")
        groups = sorted(name for name in cfg.hydra.runtime.choices if name.startswith(f"{parent}/"))
        choice = cfg.hydra.runtime.choices.get(parent)
        return f"{parent}={choice} has no {last}: it has {', '.join(groups) or 'no further groups'}."
    node: Any = cfg
    path: list[str] = []
    *parents, last = key.split(".")
    for name in parents:
        if not isinstance(node, DictConfig) or node.get(name) is None:
            last = name
            break
        path, node = [*path, name], node[name]
    if not isinstance(node, DictConfig):
        return f"There is no option '{key}': {'.'.join(path)} is {node}."
    if isinstance(node.get(last), DictConfig):  # Hydra cannot add keys to a mapping without a plus sign
        return f"'{key}={{...}}' adds keys to a mapping, which needs plus signs: '++{key}={{...}}'."
    group = "/".join([*path, last])
    if group in cfg.hydra.runtime.choices:
        options = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        return f"There is no option '{key}', because no {last} is chosen: add {group}={'|'.join(options)}."
    if path == ["trainer"] and last in _trainer_arguments():
        return f"trainer.{last} is an argument of Lightning's Trainer that the config does not set: add +{key}=VALUE."
    names = [str(name) for name in node if not str(name).startswith(("_", "hydra"))]
    close = get_close_matches(last, names, 1)
    advice = f" Did you mean {'.'.join([*path, *close])}?" if close else ""
    return f"There is no option '{key}': {'.'.join(path) or 'the config'} has {', '.join(names) or 'none'}.{advice}"


def _trainer_arguments() -> set[str]:
    from pytorch_lightning import Trainer  # slow to import

    return set(inspect.signature(Trainer).parameters)


def _compose_without(key: str, argv: list[str]) -> DictConfig:
    """Compose the config without the override of ``key``, using the first value of each key in a sweep."""
    assignments = [arg for arg in argv if "=" in arg and not arg.startswith(("-", "hydra"))]
    overrides = []
    for override in OverridesParser.create().parse_overrides(assignments):
        if override.key_or_group == key:
            continue
        value = next(override.sweep_string_iterator()) if override.is_sweep_override() else None
        overrides.append(f"{override.get_key_element()}={value}" if value is not None else str(override.input_line))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides, return_hydra_config=True)


def quoting_hint(error: BaseException) -> str | None:
    """Suggest quotes if a path or glob has characters that Hydra parses. Return None for any other error."""
    key, equals, value = str(getattr(error, "override", None) or "").partition("=")
    if not isinstance(error, OverrideParseException) or not equals or key not in PATH_KEYS or value[:1] in "'\"":
        return None
    quoted = f"{key}={quote(value)}"
    shell = shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'
    return f"{key}={value} contains characters that Hydra parses specially. Quote it: {shell}"


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
        if key not in groups or _value_of(groups[key], overrides) != stored.choices[groups[key]]
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
