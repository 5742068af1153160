"""Resolvers that name the folder of a sweep, so that the same command finds it: ``${sweep_folder:}``, ``${limits:}``.

Hydra imports this module with the plugins beside it. Jobs take over the name that their sweep has resolved.
"""

from __future__ import annotations

import hashlib
import re
from operator import itemgetter
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import ListConfig, OmegaConf

UNFIT = re.compile(r"[^\w.+-]+")
"""Characters that the name of a folder does without."""


def sweep_folder(words: ListConfig, moment: str) -> str:
    """Named by what is swept and what is not, so that more values, and more seeds, join the same folder.

    What is fixed counts with its value, what is swept by its key; seeds, places and loggers do not count.

    Args:
        words: of the command line, without Hydra's own.
        moment: names the folder of a task that does not train, which is begun anew each time.
    """
    from gencompare.tasks.jobs import counts

    given: Any = OmegaConf.to_container(words, resolve=False)
    if any(word.startswith("task=") and word != "task=train" for word in given):
        return f"{moment}_sweep"
    said, read = [], []
    parsed = OverridesParser.create().parse_overrides([word for word in given if counts(word)])
    for key, word in sorted(((word.get_key_element().lstrip("+"), word) for word in parsed), key=itemgetter(0)):
        if key == "seed":
            continue
        swept = word.is_sweep_override()
        said.append(key if swept else str(word.input_line))
        if swept or key in ("data", "model", "experiment"):
            read.append(re.split(r"[./]", key)[-1] if swept else word.get_value_element_as_str())
    name = hashlib.sha256("\n".join(sorted(said)).encode()).hexdigest()[:8]
    return "_".join(["sweep", *(UNFIT.sub("-", part) for part in read), name])


def limits(budget: Any) -> str:
    """What a budget allows, such as ``10000_images``: studies at other costs are other studies."""
    options: Any = OmegaConf.to_container(budget, resolve=True)
    allowed = {key: value for key, value in options.items() if value is not None and not key.startswith("_")}
    return UNFIT.sub("-", "_".join(f"{shown(value)}_{key}" for key, value in allowed.items()) or "no_limit")


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


for resolver in (sweep_folder, limits):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, use_cache=True, replace=True)
