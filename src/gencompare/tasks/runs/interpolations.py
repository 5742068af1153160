"""Interpolations (``${...}``) in configs: what is resolved, what stays text, and what is written to files.

Everything is resolved when a job starts, except values from environment variables. Those stay interpolations, so that a
secret is used but never written to a config, a record or a logger. Any other ``${`` is text, which is escaped in
memory and in YAML files, as OmegaConf requires.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue
from omegaconf.resolvers import oc

KeyPath = tuple[str | int, ...]

_OPENING = re.compile(r"(\\*)\$\{")
PUBLIC_SECTION = "paths"
"""Section whose values are stored even if they come from the environment, since they are folders and not secrets."""


def is_interpolation(text: object) -> bool:
    """Return whether OmegaConf would resolve ``text``: it contains ``${`` after an even number of backslashes."""
    return isinstance(text, str) and any(len(match[1]) % 2 == 0 for match in _OPENING.finditer(text))


def escape(text: str) -> str:
    """Return the form of ``text`` that OmegaConf reads as exactly this text."""
    return _OPENING.sub(lambda match: match[1] * 2 + r"\${", text)


def unescape(text: str) -> str:
    """Return the text that OmegaConf reads ``text`` as. An interpolation is returned as it is."""
    return text if is_interpolation(text) else _OPENING.sub(lambda match: match[1][: len(match[1]) // 2] + "${", text)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of plain data with every string changed, except keys."""
    if isinstance(value, dict):
        return {key: map_strings(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [map_strings(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


def find_interpolations(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the path and text of every interpolation in plain data."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from find_interpolations(each, (*path, key))
    elif is_interpolation(value):
        yield path, value


def strings(value: Any) -> Iterator[str]:
    """Yield every string in plain data, except keys."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)
    elif isinstance(value, str):
        yield value


def at(value: Any, path: KeyPath) -> Any:
    """Return the value at a path in plain data, or None."""
    for key in path:
        if isinstance(value, list):
            value = value[key] if isinstance(key, int) and key < len(value) else None
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def put(container: Any, path: KeyPath, value: Any) -> None:
    """Set the value at an existing path in plain data."""
    at(container, path[:-1])[path[-1]] = value


def resolve(cfg: DictConfig) -> DictConfig:
    """Return a config with all interpolations resolved, except those that read the environment outside of ``paths``."""
    container = map_strings(OmegaConf.to_container(cfg, resolve=True), escape)
    for path, text in environment_interpolations(cfg).items():
        put(container, path, text)
    resolved = DictConfig(container)
    OmegaConf.set_struct(resolved, OmegaConf.is_struct(cfg))
    return resolved


def environment_interpolations(cfg: DictConfig) -> dict[KeyPath, str]:
    """Return the interpolations whose values come from the environment, also through other keys, by path."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    found = {path: text for path, text in find_interpolations(raw) if path[0] != PUBLIC_SECTION}
    if not any("oc." in text for text in found.values()):
        return {}
    probe = DictConfig(raw)
    if PUBLIC_SECTION in raw:
        public = OmegaConf.to_container(cfg, resolve=True)[PUBLIC_SECTION]  # type: ignore[index]
        probe[PUBLIC_SECTION] = map_strings(public, escape)
    result = {}
    for path, text in found.items():
        node: Any = probe
        for key in path[:-1]:
            node = node[key]
        with environment_reads() as reads, suppress(MissingMandatoryValue, InterpolationToMissingValueError):
            value = node[path[-1]]
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
        if reads:
            result[path] = text
    return result


@contextmanager
def environment_reads() -> Iterator[list[str]]:
    """Provide a list that receives the names of the environment variables that interpolations read in the block."""
    names: list[str] = []

    def env(*args: Any) -> Any:
        names.append(str(args[0]))
        return oc.env(*args)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield names
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as plain data for a record or a logger: values from the environment are interpolation text."""
    return map_strings(OmegaConf.to_container(resolve(cfg), resolve=False), unescape)
