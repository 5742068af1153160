"""The parts of models, as conf/model lists them: a part that is added there is tested with no test edited."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from composing import options, roots


def part(group: str, option: str, **changes: Any) -> Any:
    """What the YAML of ``model/group`` builds by itself, with some of its values changed."""
    return instantiate(OmegaConf.merge(loaded(group, option), changes), _convert_="all")


def loaded(group: str, option: str) -> Any:
    """The YAML of ``model/group``, with the option that it is a change of, if any, below it."""
    path = next(p for root in roots() if (p := root / "model" / group / f"{option}.yaml").is_file())
    own = OmegaConf.load(path)
    below = [name for name in own.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    return OmegaConf.merge(*(loaded(group, name) for name in below), own)


def samplers() -> list[str]:
    """One option of each class of samplers, the first by name: further ones are other settings of the same."""
    by_class: dict[type, str] = {}
    for name in options("model/sampler"):
        by_class.setdefault(type(part("sampler", name)), name)
    return list(by_class.values())
