"""What a run folder from somebody else may make this program do. This module does not import torch.

The config of a run names classes and functions by their import path, and building the run calls them. In the user's own
config this may be anything. A config that comes with a run folder, like the arguments in a checkpoint, may name only
what this package, torch and Lightning define for the purpose, and it chooses no file or address to write to. The user
may trust further packages, with the environment variable `VARIABLE`, or a whole folder (``trust=true``).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from gencompare.command_line import conf_dir
from gencompare.errors import UserError

VARIABLE = "GENCOMPARE_TRUSTED_PACKAGES"
"""Environment variable with the user's own packages, separated by commas, that a stored config may name."""

_DIFFUSION = "gencompare.diffusion"
_LIGHTNING = ("pytorch_lightning", "lightning.pytorch")
PACKAGES: dict[str, tuple[str, ...]] = {
    "model": (
        _DIFFUSION, "gencompare.generative_model", "gencompare.models", "gencompare.networks",
        "gencompare.training.learning_rate", "gencompare.tasks.runs.loading.guide", "torch.optim", "torch.nn",
    ),
    "data": ("gencompare.data",),
    "evaluation": ("gencompare.evaluation", _DIFFUSION),
    "budget": ("gencompare.training.budget",),
    "callbacks": ("gencompare.training", *(f"{each}.callbacks" for each in _LIGHTNING)),
    "logger": ("gencompare.training.loggers", *(f"{each}.loggers" for each in _LIGHTNING)),
    "trainer": tuple(f"{each}.{name}" for each in _LIGHTNING for name in ("Trainer", "trainer", "strategies")),
    "task": ("gencompare.tasks", "gencompare.models"),
}  # fmt: skip
"""Packages whose classes each section of a stored config may name. Other sections name nothing. The classes in
``model``, which checkpoints may name too, write no files."""
FUNCTION_MODULES = ("torch.nn.functional",)
"""Modules whose functions may be named. Of this package, only functions that are options in ``conf/`` may be named."""
_KNOWN = ("gencompare", "hydra", "torch", "pytorch_lightning", "lightning")
GETTERS = tuple(f"hydra.utils.get_{name}" for name in ("class", "method", "object", "static_method"))
"""Functions that return what their argument ``path`` names."""

WRITING_SECTIONS = ("callbacks", "logger", "trainer")
"""Sections of a config whose classes write files or send data."""
LOCATION_KEY = re.compile(
    r"(?:^|_)(?:paths?|folder|root|files?|location|uris?|urls?|host|endpoint|proxy|proxies|settings|registry|config"
    r"|key|token|workspace)$"
    r"|dir$|directory$|dirpath$"
)
"""Arguments of callbacks and loggers that say where to write or to send."""
OWN_LOGGERS = "gencompare.training.loggers."
OWN_LOGGER_KEYS = frozenset(
    (
        "_target_",
        "_partial_",
        "project",
        "entity",
        "group",
        "job_type",
        "mode",
        "name",
        "notes",
        "tags",
        "log_model",
        "init_timeout",
        "finish_timeout",
    )
)
"""Arguments of this package's loggers that a stored config may set. They choose no file or address."""

PLAIN_NAME = re.compile(r"\w[\w-]*")
GROUP = re.compile(r"\w+(?:/\w+)*(?:@[\w.]+)?")
"""A config group, with the config key that receives it if that is not the usual one."""
OPTION = re.compile(r"\w[\w+-]*(?:\.\w[\w+-]*)*(?:/\w[\w+-]*(?:\.\w[\w+-]*)*)*")
"""An option of a config group: no flag, no value of another kind, and no path to another folder."""

KeyPath = tuple[str, ...]


# The user who opens a folder


@dataclass(frozen=True)
class Opener:
    """What the user who opens run folders has chosen himself."""

    trusting: bool = False
    """Whether folders may name anything (``trust=true``)."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """The section ``paths`` of his config, or nothing if he uses the Python API."""


_opener: ContextVar[Opener | None] = ContextVar("opener", default=None)


@contextmanager
def opened_by(opener: Opener) -> Iterator[None]:
    """Open run folders for ``opener`` inside the block, such as those of guiding models."""
    token = _opener.set(opener)
    try:
        yield
    finally:
        _opener.reset(token)


def current_opener() -> Opener:
    """Return the `Opener` of the innermost block of `opened_by`."""
    return _opener.get() or Opener()


def trusted_packages() -> tuple[str, ...]:
    """Return the packages in the environment variable `VARIABLE`."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    for name in filter(None, names):
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{VARIABLE}: {name} is not a Python package. Separate several by commas.")
    return tuple(filter(None, names))


# Import paths


class NotTrusted(Exception):
    """Raised for an import path that a stored config or a checkpoint may not name. The message completes "which"."""


@cache
def shipped_targets() -> frozenset[str]:
    """Return the import paths that the options in ``conf/`` name."""
    paths = conf_dir().rglob("*.yaml")
    found = (re.findall(r"\b_target_:\s*([\w.]+)", path.read_text(encoding="utf-8")) for path in paths)
    return frozenset(name for names in found for name in names)


def check_target(path: Any, section: str = "model") -> None:
    """Raise `NotTrusted` unless the ``section`` of a stored config may name ``path``."""
    if not isinstance(path, str) or path not in shipped_targets() or not _inside(path, PACKAGES.get(section, ())):
        import_trusted(path, section)


def import_trusted(path: Any, section: str = "model") -> Any:
    """Import the class or function at ``path``.

    Modules import others, so the path of a foreign function may start with the name of a trusted package. It is where
    the function is defined that counts.

    Args:
        path: the import path.
        section: section of the config that names it; checkpoints name what ``model`` may name.

    Raises:
        NotTrusted: it may not be named, or it does not exist.
    """
    if not isinstance(path, str):
        raise NotTrusted("is not an import path")
    own, packages = trusted_packages(), PACKAGES.get(section, ())
    if not _inside(path, own + packages):
        part = "not part of gencompare" if not path.startswith("gencompare.") else f"not for {section}"
        raise NotTrusted(f"is {part}")
    found = locate(path)
    if found is None:
        raise NotTrusted("cannot be imported here")
    module = str(getattr(found, "__module__", ""))
    if isinstance(found, type | FunctionType):
        if _inside(path, own) and _inside(module, own):
            return found
        name = f"{module}.{found.__qualname__}"
        is_option = name in shipped_targets() or module in FUNCTION_MODULES
        if _inside(name, packages) and "." not in found.__qualname__ and (isinstance(found, type) or is_option):
            return found
    raise NotTrusted("is not a class or function for this purpose")


def locate(path: str) -> Any:
    """Return what Hydra would find at an import path, or None: an attribute precedes a module of the same name."""
    first, *rest = path.split(".")
    try:
        found: Any = import_module(first)
        for k, part in enumerate(rest, 1):
            if isinstance(found, ModuleType) and not hasattr(found, part):
                found = import_module(".".join([first, *rest[:k]]))
            else:
                found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        return None
    return found


def _inside(path: str, packages: Iterable[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


# Stored configs


def check_config(config: Mapping[str, Any], file: Path, exempt: Iterable[KeyPath] = ()) -> None:
    """Check the config of a run folder before anything is built from it.

    Args:
        config: the config as plain data.
        file: the file that it comes from, for error messages; its folder is the run folder.
        exempt: keys whose values the user has set himself.

    Raises:
        UserError: it names code that it may not name, or a file or address to write to.
    """
    exempt = set(exempt)
    for path, value, parent in _leaves(config, (), config, exempt, file):
        _check_leaf(path, value, parent, config, file, exempt)


def _leaves(
    node: Any, path: KeyPath, parent: Any, exempt: set[KeyPath], file: Path
) -> Iterator[tuple[KeyPath, Any, Any]]:
    """Yield the path, value and parent of all values other than mappings and lists with entries."""
    if path in exempt:
        return
    if isinstance(node, Mapping) and node:
        if len(set(map(str, node))) < len(node):
            raise UserError(f"{file} is corrupted: {'.'.join(path)} contains a key twice, as text and as a number.")
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)), node, exempt, file)
    elif isinstance(node, list) and node:
        for k, value in enumerate(node):
            yield from _leaves(value, (*path, str(k)), node, exempt, file)
    else:
        yield path, node, parent


def _check_leaf(
    path: KeyPath, value: Any, parent: Any, config: Mapping[str, Any], file: Path, exempt: set[KeyPath]
) -> None:
    section, key = path[0], path[-1]
    if "_target_" in path:
        _check_named(path, value, parent, file)
        return
    getter = isinstance(parent, Mapping) and parent.get("_target_") in GETTERS
    if getter and key == "path" and (*path[:-1], "_target_") not in exempt:
        _check_named(path, value, parent, file)
        return
    if section == "callbacks" and len(path) == 2 and isinstance(value, str) and not PLAIN_NAME.fullmatch(value):
        raise _refused(path, value, file, "which is not the name of a callback")
    if key == "cache" and value is not None and section in ("data", "evaluation") and path != ("data", "cache"):
        raise _refused(path, value, file, "where files would be written")
    if section == "data" and key == "download" and value and len(path) > 2:
        raise _refused(path, value, file, "and a download would write files")
    if section in WRITING_SECTIONS:
        _check_location(path, value, config, file)


def _check_named(path: KeyPath, value: Any, parent: Any, file: Path) -> None:
    """Check a value that is an import path."""
    section = path[0]
    if path[-1] not in ("_target_", "path"):
        raise _refused(path, value, file, "which is not an import path")
    if value in GETTERS:
        # A sampler is merged with the changes of `evaluation.samplers`, which could replace the path.
        if "path" in parent and "_args_" not in parent and "sampler" not in path and "samplers" not in path:
            return
        raise _refused(path, value, file, "which is not called with these arguments")
    try:
        check_target(value, section)
    except NotTrusted as error:
        package = str(value).partition(".")[0]
        foreign = package.isidentifier() and package not in (*sys.stdlib_module_names, *_KNOWN)
        own = f" If the package {package} is your own, set {VARIABLE}={package} instead." if foreign else ""
        raise UserError(
            f"{file} names {'.'.join(path)}={_short(value)}, which {error} and therefore not called: add trust=true"
            f" (Python: trust=True) if you trust whoever made the folder.{own}"
        ) from error


def _check_location(path: KeyPath, value: Any, config: Mapping[str, Any], file: Path) -> None:
    """Check an argument of a callback, a logger or the Trainer, which must not lead out of the run folder."""
    if path[0] == "logger" and len(path) > 2:
        options = config["logger"].get(path[1]) if isinstance(config["logger"], Mapping) else None
        target = options.get("_target_") if isinstance(options, Mapping) else None
        if isinstance(target, str) and target.startswith(OWN_LOGGERS):
            if path[2] not in OWN_LOGGER_KEYS:
                raise _refused(path, value, file, "which only you may choose")
            return
    if "_args_" in path:
        raise _refused(path, value, file, "and arguments without a name cannot be checked")
    arguments = path[1:] if path[:1] == ("trainer",) else path[2:]
    names = any(LOCATION_KEY.search(name) for name in arguments)
    if names and isinstance(value, bool | int | float | None):
        return
    if (names and not isinstance(value, str)) or (isinstance(value, str) and _leads_out(value, names, file.parent)):
        raise _refused(path, value, file, "outside the run folder")


def _leads_out(value: str, is_location: bool, folder: Path) -> bool:
    """Return whether a value is a URL, or a path out of ``folder``.

    Args:
        is_location: whether the value is a path, relative to the working directory. Other values, such as a format of
            file names, are relative to such a path.
    """
    if "://" in value or "\0" in value or (is_location and "$" in value):
        return True
    absolute = value.startswith(("/", "~", "\\\\", "$")) or re.match(r"[A-Za-z]:[\\/]", value) is not None
    if not absolute and not is_location:
        return ".." in re.split(r"[\\/]", value)
    return not Path(value).absolute().resolve().is_relative_to(folder.absolute().resolve())


def _refused(path: KeyPath, value: Any, file: Path, reason: str) -> UserError:
    key = ".".join(path)
    return UserError(
        f"{file} sets {key}={_short(value)}, {reason}: set it yourself (++{key}=VALUE), or add trust=true (Python:"
        " trust=True) if you trust whoever made the folder."
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def check_choices(choices: Any, file: Path) -> dict[str, str | list[str] | None]:
    """Return the config group choices of a stored config, which become part of the command line.

    Raises:
        UserError: one of them is not the plain name of an option of a plain group.
    """
    if not isinstance(choices, Mapping):
        raise UserError(f"{file} is corrupted: choices is not a mapping of config groups to options.")
    for group, choice in choices.items():
        options = choice if isinstance(choice, list) else [choice]
        if not isinstance(group, str) or not GROUP.fullmatch(group):
            raise UserError(f"{file} is corrupted: choices.{_short(group)} is not a config group.")
        if not all(option is None or (isinstance(option, str) and OPTION.fullmatch(option)) for option in options):
            raise UserError(f"{file} is corrupted: choices.{group}={_short(choice)} is not the name of an option.")
    return dict(choices)


def check_links(folder: Path) -> None:
    """Raise `UserError` if a link in a run folder leads out of it, since files would be written through it.

    The folder ``wandb`` has links to its own files, and nothing is written through them.
    """
    root = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            if not path.is_symlink() and name in files and not path.is_file():
                raise UserError(f"{path} is neither a file nor a folder: remove it.")  # a pipe, for instance
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(
                    f"{path} is a link out of the run folder, to {os.readlink(path)}, and files could be written"
                    " through it: replace it by a copy, or add trust=true."
                )
        folders[:] = [name for name in folders if Path(parent, name) != folder / "wandb"]
