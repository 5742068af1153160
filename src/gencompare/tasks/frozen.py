"""A run folder is enough: its frozen config is the base, and only what the command line names is composed anew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.errors import UserError
from gencompare.files import write_text
from gencompare.overrides import quoted

FILE = "config.yaml"
OF_THE_JOB = (
    "task", "run", "resume", "runs", "by", "metric", "samples", "pretrained", "name", "n", "checkpoint", "weights",
    "format", "paths", "evaluation.protocol.cache",
)  # fmt: skip
"""What a job has for itself, whatever the run folder says."""

NOT_INHERITED = ("experiment", "debug", "task", "hydra", "local", "sweep")
"""Groups whose choice in the run folder is not chosen again: what they set is in the frozen config."""


ADDED = {"data/condition": "data.conditions", "evaluation/metric": "evaluation.protocol.metrics"}
"""Groups that a run adds with a plus, and where in the config their options come to stand."""


def base_on_run_folder(argv: list[str]) -> list[str]:
    """With ``run=DIR`` or ``resume=DIR``: the same choices of groups as that run made, unless ``argv`` makes its own.

    So ``model.sampler.steps=18`` is known to the config of a run whose sampler has steps, whatever the default model.
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
    place = quoted(str(folder))
    inherited += [f"hydra.run.dir={place}", f"hydra.sweep.dir={place}", "hydra.sweep.subdir=."]
    return [*argv, *[word for word in inherited if word.lstrip("+").split("=")[0] not in named]]


SETTLED = "model.latent"
"""What a trained model's weights stand on: another one would want another training."""


def thaw(cfg: DictConfig | Path, hydra_config: Any = None) -> DictConfig:
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
    folder = cfg.run or cfg.resume
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
    return loaded


def save(cfg: DictConfig, path: Path) -> None:
    """Write the config of a job, with its place, every interpolation resolved, whole or not at all."""
    write_text(path, OmegaConf.to_yaml(cfg, resolve=True))


def without_place(cfg: DictConfig) -> DictConfig:
    """The config less the folders that it ran in and took its weights or its autoencoder from (run folders may move),
    and what it took to put that in."""
    places = ("out", "resume", "autoencoder_run", "whitening", "trained_in")
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in places])


def _folder_in(argv: list[str]) -> Path | None:
    for key in ("run", "resume"):
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
