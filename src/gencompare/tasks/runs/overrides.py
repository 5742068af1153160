"""Rewrite the overrides of a command line before Hydra parses them: old names, ``resume=auto``, ``GROUP=null``, and
the choices of a run folder or a paper."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from gencompare.command_line import conf_dir, config_roots, quote
from gencompare.errors import UserError
from gencompare.migrations import rename_option
from gencompare.records import RECORD_FILE
from gencompare.tasks.runs.run_config import APPENDED_GROUPS, read, value_of
from gencompare.tasks.runs.run_folder import has_checkpoint

GROUPS_NOT_INHERITED = ("experiment", "debug", "task", "hydra", "local", "sweep")
"""Groups whose choices are not inherited from a run folder, since its config contains their values."""
NULL_OPTIONS = {
    "callbacks": "callbacks.NAME=null removes one",
    "evaluation": "evaluation.checkpoints=[] trains without an evaluation at the end",
    "logger": "logger=none logs nothing",
}
"""What to set instead of ``GROUP=null``."""


def rewrite_overrides(argv: list[str]) -> list[str]:
    """Return the command line that Hydra parses.

    Raises:
        UserError: an override names a folder, a group or a paper that does not exist.
    """
    argv = _with_extra_conf(_delete_null_groups(rename_options(argv)))
    return inherit_choices(resolve_auto_resume(add_paper_settings(argv)))


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
    if value_of("resume", argv) != "auto":
        return argv
    folder = value_of("hydra.run.dir", argv)
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
    if value_of("task", argv) != "reproduce":
        return argv
    from gencompare.comparison.published import find_published

    published = find_published(value_of("paper", argv))
    settings: Sequence[str] = published.overrides
    if value_of("run_dir", argv) is not None:
        settings = [each for each in settings if each.startswith("evaluation")]
    elif value_of("samples", argv) is not None:
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
    if "model" in overridden and value_of("model", argv) != choices.get("model"):
        raise UserError(
            f"{folder} is a run of model={choices.get('model')}, not model={value_of('model', argv)}:"
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
        value = value_of(key, argv)
        if value not in (None, "null", ""):
            return Path(_unquote(value))
    return None


def _unquote(value: str) -> str:
    if value[0] not in "'\"":
        return value
    parsed = OverridesParser.create().parse_override(f"key={value}").value()
    return str(OmegaConf.create({"value": str(parsed)}).value)


def _delete_null_groups(argv: list[str]) -> list[str]:
    """Replace ``GROUP=null``, which Hydra accepts only in YAML files, by ``~GROUP``, such as ``~model/guidance``.

    Groups without an option by default, such as ``experiment=null``, are left out.

    Raises:
        UserError: the group is one of those that each run needs.
    """
    defaults = [entry for entry in OmegaConf.load(conf_dir() / "config.yaml").defaults if not isinstance(entry, str)]
    top = {str(group): option for entry in defaults for group, option in entry.items()}
    for group in (arg.removesuffix("=null") for arg in argv if arg.endswith("=null")):
        if top.get(group) is not None:
            options = sorted(path.stem for root in config_roots() for path in (root / group).glob("*.yaml"))
            hint = f" {NULL_OPTIONS[group]}." if group in NULL_OPTIONS else ""
            raise UserError(f"{group}=null: choose one of {', '.join(options)}.{hint}")
    argv = [arg for arg in argv if not (arg.endswith("=null") and arg.removesuffix("=null") in top)]
    return [f"~{arg.removesuffix('=null')}" if re.fullmatch(r"\w+/[\w/@.]+=null", arg) else arg for arg in argv]


def _with_extra_conf(argv: list[str]) -> list[str]:
    """Add ``--config-dir`` with the folder in the environment variable ``GENCOMPARE_CONF`` to ``argv``, if the variable
    is set and ``argv`` contains no such option."""
    extra = os.environ.get("GENCOMPARE_CONF")
    if not extra or any(arg.startswith(("--config-dir", "-cd")) for arg in argv):
        return argv
    if not Path(extra).is_dir():
        raise UserError(f"GENCOMPARE_CONF={extra} is not a folder: set it to the folder of your config groups.")
    return ["--config-dir", extra, *argv]
