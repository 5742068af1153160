"""Store constructor arguments as plain data, and rebuild objects from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from types import FrameType, FunctionType
from typing import Any, Self

from torch import Tensor

from gencompare.errors import UserError
from gencompare.trust import VARIABLE, NotTrusted, import_trusted

GET_OBJECT = "hydra.utils.get_object"


class StoresArguments:
    """Mixin that records the constructor arguments of objects that have no attributes of the same names."""

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        # `copy` calls __new__ without arguments, then copies the attributes of the original.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        object.__setattr__(self, "_arguments", dict(list(bound.arguments.items())[1:]))
        return self


def constructor_arguments(instance: object, frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of the constructor of ``instance`` that runs in ``frame``, and of subclass constructors."""
    found: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is instance:
        names, _, keywords, values = inspect.getargvalues(frame)
        found |= {name: values[name] for name in names if name != "self"} | (values[keywords] if keywords else {})
        frame = frame.f_back
    return {name: value for name, value in found.items() if not name.startswith("__")}


def to_config(value: Any) -> Any:
    """Describe ``value`` as plain data: numbers, strings, lists, and dictionaries for objects.

    An object is described by its constructor arguments, read from attributes of the same names or from
    `StoresArguments`. Any other object becomes ``{"_missing_": "its class"}``, which `from_config` rejects.
    """
    if isinstance(value, StoresArguments):
        return {"_target_": qualified_name(type(value)), **to_config(value._arguments)}
    if isinstance(value, Tensor):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [to_config(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_config(item) for key, item in value.items()}
    if isinstance(value, partial):
        described = {"_target_": qualified_name(value.func), "_partial_": True, **to_config(value.keywords)}
        return described | ({"_args_": to_config(value.args)} if value.args else {})
    if isinstance(value, type | FunctionType):
        return {"_target_": GET_OBJECT, "path": qualified_name(value)}
    names = [
        name
        for name, parameter in inspect.signature(type(value).__init__).parameters.items()
        if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if not all(hasattr(value, name) for name in names):
        return {"_missing_": qualified_name(type(value))}
    return {"_target_": qualified_name(type(value)), **{name: to_config(getattr(value, name)) for name in names}}


def from_config(config: Any, name: str = "model") -> Any:
    """Rebuild a value from the description that `to_config` returned.

    Hydra is not used, because a checkpoint may come from anywhere, and only the classes and functions that
    `gencompare.trust` allows may be called.

    Args:
        config: the output of `to_config`.
        name: name of the value in error messages.

    Raises:
        UserError: the config names a class or function from another package, or an object whose arguments were not
            stored.
    """
    if isinstance(config, list):
        return [from_config(item, f"{name}[{i}]") for i, item in enumerate(config)]
    if not isinstance(config, Mapping):
        return config
    argument = name.partition(".")[0].partition("[")[0]
    if "_missing_" in config:
        raise UserError(
            f"The checkpoint does not contain the argument {name}, a {config['_missing_']}: pass it to"
            f" load_from_checkpoint(path, {argument}=...)."
        )
    built = {key: from_config(item, f"{name}.{key}") for key, item in config.items()}
    if "_target_" not in built:
        return built
    target, args = built.pop("_target_"), built.pop("_args_", [])
    if target == GET_OBJECT:
        return import_object(built["path"], name)
    factory = import_object(target, name)
    return partial(factory, *args, **built) if built.pop("_partial_", False) else factory(*args, **built)


def import_object(path: str, name: str = "model") -> Any:
    """Import the class or function at ``path``.

    Raises:
        UserError: the path does not exist, or a checkpoint may not name it (see `gencompare.trust`).
    """
    try:
        return import_trusted(path)
    except NotTrusted as error:
        raise UserError(
            f"The checkpoint's {name} is {path}, which {error} and therefore not called: pass it to"
            f" load_from_checkpoint(path, {name.partition('.')[0]}=...), or set {VARIABLE} to your own package."
        ) from error


def qualified_name(obj: Any) -> str:
    """Return the import path of a class or function, ``package.module.name``."""
    return f"{obj.__module__}.{obj.__qualname__}"
