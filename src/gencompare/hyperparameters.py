"""Reading checkpoints without running what is in them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial, reduce
from importlib import import_module
from types import FrameType, FunctionType
from typing import Any, Self

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.migrations import migrate_checkpoint

OBJECT = "hydra.utils.get_object"
TRUSTED = ("gencompare.", "torch.optim.", "torch.nn.")
"""Where classes and functions that a checkpoint names may come from; loading it calls them."""


class KeepsArguments:
    """Remembers the arguments of its constructor, for objects that do not keep them as attributes of the same names."""

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        # A copy is made without arguments, and takes over the attributes of the original.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        object.__setattr__(self, "_arguments", dict(list(bound.arguments.items())[1:]))
        return self


def constructor_arguments(instance: object, frame: FrameType | None) -> dict[str, Any]:
    """The arguments of the constructor of ``instance`` that runs in ``frame``, and of its subclasses' around it."""
    found: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is instance:
        names, _, keywords, values = inspect.getargvalues(frame)
        found |= {name: values[name] for name in names if name != "self"} | (values[keywords] if keywords else {})
        frame = frame.f_back
    return {name: value for name, value in found.items() if not name.startswith("__")}


def as_config(value: Any) -> Any:
    """``value`` as plain data: numbers, text, lists, and dictionaries that describe objects.

    An object is described by the arguments of its constructor, which it keeps as attributes of the same names or as
    `KeepsArguments`. Any other becomes ``{"_missing_": "its class"}``, which `from_config` refuses.
    """
    if isinstance(value, KeepsArguments):
        return {"_target_": as_path(type(value)), **as_config(value._arguments)}
    if isinstance(value, Tensor):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [as_config(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): as_config(each) for key, each in value.items()}
    if isinstance(value, partial):
        described = {"_target_": as_path(value.func), "_partial_": True, **as_config(value.keywords)}
        return described | ({"_args_": as_config(value.args)} if value.args else {})
    if isinstance(value, type | FunctionType):
        return {"_target_": OBJECT, "path": as_path(value)}
    names = [
        name
        for name, parameter in inspect.signature(type(value).__init__).parameters.items()
        if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if not all(hasattr(value, name) for name in names):
        return {"_missing_": as_path(type(value))}
    return {"_target_": as_path(type(value)), **{name: as_config(getattr(value, name)) for name in names}}


def from_config(config: Any, name: str = "model") -> Any:
    """The value that `as_config` described; ``name`` is what error messages call it.

    Hydra is not asked: a checkpoint may come from anywhere, so only classes and functions of `TRUSTED` packages are
    called. Raises `UserError` for others.
    """
    if isinstance(config, list):
        return [from_config(each, f"{name}[{k}]") for k, each in enumerate(config)]
    if not isinstance(config, Mapping):
        return config
    argument = name.partition(".")[0].partition("[")[0]
    if "_missing_" in config:
        raise UserError(
            f"The checkpoint does not hold the argument {name}, a {config['_missing_']}: give it to"
            f" load_from_checkpoint(path, {argument}=...)."
        )
    built = {key: from_config(each, f"{name}.{key}") for key, each in config.items()}
    if "_target_" not in built:
        return built
    target, args = built.pop("_target_"), built.pop("_args_", [])
    if target == OBJECT:
        return object_at(built["path"], name)
    found = object_at(target, name)
    return partial(found, *args, **built) if built.pop("_partial_", False) else found(*args, **built)


def object_at(path: str, name: str = "model") -> Any:
    """The class or function at ``path``. Raises `UserError` for one of a package that is not trusted, or none."""
    if not str(path).startswith(TRUSTED):
        raise UserError(
            f"The checkpoint's {name} is {path}, which is not part of gencompare and is not called: pass it yourself,"
            f" load_from_checkpoint(path, {name.partition('.')[0]}=...)."
        )
    parts = path.split(".")
    for k in range(len(parts) - 1, 0, -1):
        with suppress(ModuleNotFoundError):
            return reduce(getattr, parts[k:], import_module(".".join(parts[:k])))
    raise UserError(f"The checkpoint's {name} is {path}, which this version of gencompare does not have.")


def as_path(thing: Any) -> str:
    """Where a class or function is found: ``package.module.name``."""
    return f"{thing.__module__}.{thing.__qualname__}"


AVERAGED = "ema"
"""The key of a checkpoint under which averaged weights are."""


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content; only tensors and plain containers are admitted. Raises `UserError` for a bad file."""
    try:
        return migrate_checkpoint(torch.load(path, map_location=map_location, weights_only=True))
    except FileNotFoundError as error:
        raise UserError(f"There is no checkpoint {path}.") from error
    except Exception as error:
        raise UserError(f"{path} is damaged or no checkpoint of gencompare ({type(error).__name__}).") from error
