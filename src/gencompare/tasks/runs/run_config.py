"""A run's config: checked for unknown keys, stored in its folder, and read from there."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gencompare.command_line import conf_dir, quote
from gencompare.errors import UserError
from gencompare.files import write_text
from gencompare.migrations import migrate_config, rename_option

OF_PLACES = (
    "runs", "run_dir", "resume", "samples", "pretrained", "task.out", "hydra.run.dir", "hydra.sweep.dir", "paths.runs",
    "paths.data", "paths.cache", "data.root",
)  # fmt: skip


def missing_option_hint(error: BaseException, words: list[str]) -> str | None:
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


def group_value_hint(error: BaseException) -> str | None:
    """One line about a value that Hydra's grammar does not take without quotes, with them; None for another error.

    Only of what is a place or a glob: elsewhere brackets and braces are mostly meant as lists.
    """
    key, equals, value = str(getattr(error, "override", None) or "").partition("=")
    if not isinstance(error, OverrideParseException) or not equals or key not in OF_PLACES or value[:1] in "'\"":
        return None
    word = f"{key}={quote(value)}"
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


ADDED_LATER = {"choices", "out", "sweep_name", "command", "trained_in", "autoencoder_run", "whitening", "hydra"}
"""Top-level keys that this program adds to a composed config."""
INSTEAD = {
    "max_epochs": "budget.images=N",
    "min_epochs": "budget.images=N",
    "max_steps": "budget=steps budget.steps=N",
    "min_steps": "budget=steps budget.steps=N",
    "max_time": "budget=device_minutes budget.device_minutes=N",
    "limit_train_batches": "budget.images=N",
    "overfit_batches": "debug=overfit",
    "fast_dev_run": "debug=fast",
    "accumulate_grad_batches": "trainer.global_batch_size=N",
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
"""Trainer arguments that this program sets itself, and the option that does the same here."""
TEMPLATE = {
    "ckpt_path": "resume=RUN_FOLDER continues a run, task=evaluate run_dir=RUN_FOLDER checkpoint=last measures it",
    "task_name": "a run is named after its folder: hydra.run.dir=DIR",
    "train": "task=train is the default, and task=evaluate run_dir=RUN_FOLDER only evaluates",
    "test": "every run is evaluated at its end, unless evaluation.checkpoints=[]",
    "lr": "model.optimizer.lr=X",
    "batch_size": "trainer.global_batch_size=N",
}
"""Keys of lightning-hydra-template, and the equivalent here."""


def check_keys(cfg: DictConfig) -> None:
    """Refuse, as `UserError`, keys of a freshly composed config that nothing reads."""
    top = OmegaConf.load(conf_dir() / "config.yaml")
    groups = {
        str(key).removeprefix("optional ").removeprefix("override ").split("@")[0]
        for entry in top.defaults if not isinstance(entry, str) for key in entry
    }  # fmt: skip
    known = ({str(key) for key in top} | groups | ADDED_LATER) - {"defaults"}
    _check("", cfg, known, "A label of your own goes into tags=[...].")
    default = OmegaConf.load(conf_dir() / "callbacks" / "default.yaml")
    for name, options in (cfg.get("callbacks") or {}).items():
        if (not options and options != "") or isinstance(options, str):
            continue
        if not isinstance(options, Mapping | DictConfig):
            raise UserError(f"callbacks.{name}={options}: give null to leave it out, or a mapping with _target_.")
        if name in default and options.get("_target_") == default[name]._target_:
            _check(f"callbacks.{name}.", options, map(str, default[name]))
        elif "_target_" not in options:
            raise UserError(
                f"callbacks.{name}: give the class, +callbacks.{name}._target_=CLASS, or the name of an option:"
                f" {', '.join(sorted(p.stem for p in (conf_dir() / 'callbacks').glob('*.yaml')))}."
            )
    evaluation = OmegaConf.load(conf_dir() / "evaluation" / "default.yaml")
    _check("evaluation.", cfg.get("evaluation") or {}, {*map(str, evaluation), "defaults"})


def check_trainer(options: Mapping[str, object], known: Iterable[str]) -> None:
    """Refuse settings of the Trainer that this program makes itself, and those that no Trainer has.

    Args:
        options: of ``trainer``.
        known: what Lightning's Trainer takes.
    """
    _check("trainer.", options, {*known, "global_batch_size"})
    for name in options:
        if name in INSTEAD:
            raise UserError(f"trainer.{name} is set by this program. Use {INSTEAD[name]}.")


def _check(prefix: str, found: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    known = set(known)
    for key in map(str, found):
        if key not in known:
            near = get_close_matches(key, known, 1)
            meant = f" Did you mean {prefix}{near[0]}?" if near else ""
            raise UserError(f"There is no setting '{prefix}{key}'.{meant}{' ' + hint if hint and not near else ''}")


FILE = "config.yaml"
OF_THE_JOB = (
    "task", "run_dir", "resume", "runs", "group_by", "rank_by", "samples", "pretrained", "name", "num_images", "checkpoint", "weights",
    "format", "paths", "evaluation.protocol.cache",
)  # fmt: skip
"""What a job has for itself, whatever the run folder says."""

NOT_INHERITED = ("experiment", "debug", "task", "hydra", "local", "sweep")
"""Groups whose choice in the run folder is not chosen again: what they set is in the frozen config."""


ADDED = {"data/condition": "data.conditions", "evaluation/metric": "evaluation.protocol.metrics"}
"""Groups that a run adds with a plus, and where in the config their options come to stand."""


def rename_options(argv: list[str]) -> list[str]:
    """The command line with today's names of its options; one line on stderr for each old name."""
    renamed = {word: rename_option(word) for word in argv if not word.startswith("-")}
    for old, new in dict.fromkeys(each[1:] for each in renamed.values() if each):
        print(f"{old} is now called {new}; the old name still works.", file=sys.stderr)
    return [found[0] if (found := renamed.get(word)) else word for word in argv]


def base_on_run_folder(argv: list[str]) -> list[str]:
    """With ``run_dir=DIR`` or ``resume=DIR``: the same choices of groups as that run made, unless ``argv`` makes its own.

    So ``model.sampler.num_steps=18`` is known to the config of a run whose sampler has steps, whatever the default model.
    """
    folder = _folder_in(argv)
    if folder is None:
        return argv
    choices = load(folder).get("choices", {})
    named = {word.lstrip("+~").split("=")[0] for word in argv}
    inherited = [
        f"{'+' if group in ADDED else ''}{group}={choice}"
        for group, choice in choices.items()
        if choice is not None and group not in named and group.split("/")[0] not in NOT_INHERITED
    ]
    clash = [group for group in ("model",) if group in named and _value(argv, group) != choices.get(group)]
    if clash:
        raise UserError(
            f"{folder} holds a run of model={choices.get('model')}, not model={_value(argv, 'model')}:"
            " leave model= out, or name another run."
        )
    place = quote(str(folder))
    inherited += [f"hydra.run.dir={place}", f"hydra.sweep.dir={place}", "hydra.sweep.subdir=."]
    return [*argv, *[word for word in inherited if word.lstrip("+").split("=")[0] not in named]]


SETTLED = "model.latent"
"""What a trained model's weights stand on: another one would want another training."""


def restore(cfg: DictConfig | Path, hydra_config: Any = None) -> DictConfig:
    """The config of this job, plain and complete.

    From a file (for the further processes of a job): as it is. From Hydra's composition: with the output folder,
    the group choices and the sweep in it, and on the base of the frozen config where ``run`` or ``resume`` names one.
    """
    if isinstance(cfg, Path):
        loaded = OmegaConf.load(cfg)
        assert isinstance(loaded, DictConfig)
        return loaded
    followers = _followers(OmegaConf.to_container(cfg, resolve=False))
    OmegaConf.resolve(cfg)
    words = list(hydra_config.overrides.task)
    folder = cfg.run_dir or cfg.resume
    if folder is not None:
        before = load(Path(folder))
        cfg = _rebased(cfg, before, words, followers)
        trained = (Path(folder) / "checkpoints" / "last.ckpt").exists()
        if trained and OmegaConf.select(cfg, SETTLED) != OmegaConf.select(before, SETTLED):
            raise UserError(
                f"{folder} was trained with another {SETTLED}, which its weights stand on: leave {SETTLED} as it is, or"
                " train another model."
            )
    with open_dict(cfg):
        if "choices" not in cfg:
            choices = dict(hydra_config.runtime.choices)
            cfg.choices = {g: c for g, c in choices.items() if not g.startswith("hydra/")}
        cfg.out = str(Path(hydra_config.runtime.output_dir).absolute())
        cfg.sweep_name = Path(hydra_config.sweep.dir).name if hydra_config.mode is RunMode.MULTIRUN else None
        if cfg.get("command") is None:
            cfg.command = words
    return cfg


def _rebased(cfg: DictConfig, frozen: DictConfig, words: list[str], followers: dict[str, str]) -> DictConfig:
    merged = frozen.copy()
    OmegaConf.set_struct(merged, False)
    named = {_place(_key(o)) for o in OverridesParser.create().parse_overrides(words)}
    groups = {_place(str(group)): str(group) for group in frozen.get("choices", {})}
    typed = {key for key in named if key not in groups or _value(words, groups[key]) != frozen.choices[groups[key]]}
    # What takes its value from a key that was typed: in the frozen config it is a value of its own.
    typed |= {path for path, source in followers.items() if source in typed}
    for group, place in ADDED.items():
        if group.replace("/", ".") in typed:
            typed.remove(group.replace("/", "."))
            both = OmegaConf.merge(OmegaConf.select(cfg, place), OmegaConf.select(frozen, place) or {})
            OmegaConf.update(merged, place, both, merge=False, force_add=True)
    for key in [*OF_THE_JOB, *sorted(typed)]:
        OmegaConf.update(merged, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    for key in ("data.root", "data.cache"):
        # On another machine the files lie elsewhere; where the old place is still there, it is the right one.
        old = OmegaConf.select(merged, key)
        if old is not None and key not in named and not Path(old).exists():
            OmegaConf.update(merged, key, OmegaConf.select(cfg, key))
    return merged


def _followers(node: Any, way: tuple[str, ...] = ()) -> dict[str, str]:
    """By path: the path that a value is taken from, as ``${a.b}`` or from the place above as ``${..b}``."""
    if isinstance(node, dict):
        return {path: s for key, value in node.items() for path, s in _followers(value, (*way, str(key))).items()}
    match = re.fullmatch(r"\$\{(\.*)([\w.]+)\}", node) if isinstance(node, str) else None
    if match is None:
        return {}
    dots, rest = len(match[1]), match[2]
    return {".".join(way): ".".join([*(way[:-dots] if dots else ()), rest])}


def _key(override: Any) -> str:
    return f"{override.key_or_group}@{override.package}" if override.package else override.key_or_group


def _place(group: str) -> str:
    """Where in the config the option of a group stands: ``a/b`` at a.b, ``a/b@c.d`` at c.d."""
    return group.partition("@")[2] or group.replace("/", ".")


def load(folder: Path) -> DictConfig:
    """The frozen config of a run folder."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it holds no {FILE}.")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}.") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} is damaged: it holds no config.")
    return DictConfig(migrate_config(OmegaConf.to_container(loaded)))


def save(cfg: DictConfig, path: Path) -> None:
    """Write the config of a job, with its place, every interpolation resolved, whole or not at all."""
    write_text(path, OmegaConf.to_yaml(cfg, resolve=True))


def without_place(cfg: DictConfig) -> DictConfig:
    """The config less the folders that it ran in and took its weights or its autoencoder from (run folders may move),
    and what it took to put that in."""
    places = ("out", "resume", "autoencoder_run", "whitening", "trained_in")
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in places])


def _folder_in(argv: list[str]) -> Path | None:
    for key in ("run_dir", "resume"):
        value = _value(argv, key)
        if value not in (None, "null", ""):
            return Path(_unquoted(value))
    return None


def _unquoted(value: str) -> str:
    if value[0] not in "'\"":
        return value
    parsed = OverridesParser.create().parse_override(f"key={value}").value()
    return str(OmegaConf.create({"value": str(parsed)}).value)


def _value(argv: list[str], key: str) -> str | None:
    for word in reversed(argv):
        name, equals, value = word.partition("=")
        if equals and name.lstrip("+") == key:
            return value
    return None
