"""The parts of models, as conf/model lists them: a part that is added there is tested with no test edited."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from composing import options, roots


def part(group: str, option: str, **changes: Any) -> Any:
    """What the YAML of ``model/group`` builds by itself, with some of its values changed."""
    path = next(p for root in roots() if (p := root / "model" / group / f"{option}.yaml").is_file())
    return instantiate(OmegaConf.merge(OmegaConf.load(path), changes), _convert_="all")


def samplers() -> list[str]:
    """One option of each class of samplers, the first by name: further ones are other settings of the same."""
    by_class: dict[type, str] = {}
    for name in options("model/sampler"):
        by_class.setdefault(type(part("sampler", name)), name)
    return list(by_class.values())
