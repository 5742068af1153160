"""Compare the values of a config with the type annotations of the classes that it names, before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from gencompare.errors import UserError

SECTIONS = ("data", "model", "evaluation", "callbacks", "budget", "trainer", "logger")
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    NoneType: "null",
}
TOP_LEVEL: dict[str, Any] = {
    "seed": int,
    "num_images": int,
    "tags": list[str] | None,
    "family": str,
    "name": str | None,
}
"""Types of keys outside of the sections."""
INSTANTIATION: dict[str, Any] = {
    "_target_": str, "_partial_": bool, "_recursive_": bool, "_args_": list, "_convert_": str
}  # fmt: skip
"""Types of the keys that tell Hydra how to build an object."""


def check_types(cfg: DictConfig) -> None:
    """Raise `UserError` if a value in ``cfg`` has another type than the constructor argument that it is passed to.

    Arguments without annotations, and of classes that cannot be imported, are not checked.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    for key, hint in TOP_LEVEL.items():
        if key in values and not matches(values[key], hint):
            raise _wrong_type(key, values[key], hint)
    for section in SECTIONS:
        _check(values.get(section), section)
    extractors = (values.get("evaluation") or {}).get("extractors")
    if not matches(extractors, list[str] | None):
        raise _wrong_type("evaluation.extractors", extractors, list[str] | None)


def _check(node: Any, path: str) -> None:
    if isinstance(node, list):
        for i, item in enumerate(node):
            _check(item, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    target = node.get("_target_")
    hints = (argument_types(target) if isinstance(target, str) else {}) | INSTANTIATION
    for key, value in node.items():
        if key in hints and not _is_object(value) and not matches(value, hints[key]):
            raise _wrong_type(f"{path}.{key}", value, hints[key])
        _check(value, f"{path}.{key}")


def _wrong_type(key: str, value: Any, hint: Any) -> UserError:
    """Return the error for a value of the wrong type."""
    shown = "null" if value is None else value
    takes_text = str in (hint, *get_args(hint)) and isinstance(value, int | float)
    quotes = f" Quote it: \"{key}='{value}'\"." if takes_text else ""
    return UserError(f"{key}={shown} must be {describe(hint)}.{quotes}")


def _is_object(value: Any) -> bool:
    """Return whether a value describes an object, whose own arguments are checked instead."""
    return isinstance(value, dict) and "_target_" in value


@cache
def argument_types(target: str) -> dict[str, Any]:
    """Return the annotated types of the arguments of a class or function, including those of its base classes."""
    try:
        found = get_object(target)
        functions = [cls.__init__ for cls in reversed(found.__mro__)] if inspect.isclass(found) else [found]
        hints: dict[str, Any] = {}
        for function in functions:
            hints |= get_type_hints(function)
        return {name: hint for name, hint in hints.items() if name != "return"}
    except Exception:  # instantiating it explains what is wrong
        return {}


def matches(value: Any, hint: Any) -> bool:
    """Return whether a value of a config can be passed to an argument with the annotation ``hint``."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:  # a class since Python 3.11
        return True
    if origin in (Union, UnionType):
        return any(matches(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if hint is NoneType or hint is None:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, str)
    kind = origin or hint
    if not inspect.isclass(kind):
        return True
    if issubclass(kind, Mapping):
        return isinstance(value, dict)
    if kind is Iterable or issubclass(kind, Collection):
        return isinstance(value, list) and _elements_match(value, kind, args)
    # An object, or a function that creates one. Python converts strings to some, such as torch.dtype.
    return kind is object or not isinstance(value, int | float | list)


def _elements_match(values: list[Any], kind: type, args: tuple[Any, ...]) -> bool:
    if issubclass(kind, tuple) and args and args[-1] is not ...:
        return len(values) == len(args) and all(map(matches, values, args))
    return not args or all(_is_object(value) or matches(value, args[0]) for value in values)


def describe(hint: Any) -> str:
    """Describe the values that an annotation allows, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        literals = [value for arg in args if get_origin(arg) is Literal for value in get_args(arg)]
        names = [_one_of(literals)] if literals else []
        others = (arg for arg in args if get_origin(arg) is not Literal)
        names += [describe(arg) for arg in sorted(others, key=lambda arg: arg is NoneType)]
        return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    if origin is Literal:
        return _one_of(args)
    if hint in NAMES:
        return NAMES[hint]
    kind = origin or hint
    if inspect.isclass(kind) and issubclass(kind, Mapping):
        return "a mapping"
    if inspect.isclass(kind) and issubclass(kind, Collection):
        plural = {int: " of whole numbers", float: " of numbers", str: " of strings"}
        return "a list" + (plural.get(args[0], "") if args else "")
    return "a mapping with _target_"


def _one_of(values: Iterable[object]) -> str:
    return f"one of {', '.join(dict.fromkeys(map(str, values)))}"
