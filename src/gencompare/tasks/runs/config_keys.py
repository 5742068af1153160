"""Check a composed config for unknown keys, and explain Hydra's errors about overrides in one line."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gencompare.command_line import conf_dir, quote
from gencompare.errors import UserError
from gencompare.tasks.runs.run_config import APPENDED_GROUPS

INTERNAL_KEYS = {
    "choices", "out", "sweep_name", "command", "trained_run", "autoencoder_run", "whitening", "teacher_run", "hydra",
}  # fmt: skip
"""Top-level keys that this program adds to a composed config."""
PATH_KEYS = (
    "runs", "run_dir", "resume", "samples", "pretrained", "task.out", "hydra.run.dir", "hydra.sweep.dir", "paths.runs",
    "paths.data", "paths.cache", "data.root",
)  # fmt: skip
"""Keys whose values are paths or globs, where brackets and braces are rarely meant as lists."""

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
