"""The model parts in conf/model, so that tests cover new options without edits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from composing import options, read_yaml, roots

VARIANTS = frozenset({"iddpm", "sde_vp", "sde_subvp", "sde_ve", "vdm", "noisy_classifier"})
"""Families that differ from others in a part which has tests of its own."""


def slow_if(slow: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Return parameters of a test, of which those in ``slow`` belong to ``make test-slow``."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    """Check that all weights and buffers of ``model`` are equal to those of ``other``."""
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def part(group: str, option: str, **changes: Any) -> Any:
    """Instantiate an option of the ``model/GROUP`` group with some values changed."""
    return instantiate(OmegaConf.merge(loaded(group, option), changes), _convert_="all")


def loaded(group: str, option: str) -> Any:
    """Return the config of an option of ``model/GROUP``, merged with the options in its defaults list."""
    path = next(p for root in roots() if (p := root / "model" / group / f"{option}.yaml").is_file())
    own = read_yaml(path).copy()
    defaults = [name for name in own.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    return OmegaConf.merge(*(loaded(group, name) for name in defaults), own)


def samplers() -> list[str]:
    """Return one option per sampler class: the first by name of those that do not inherit from another option."""
    by_class: dict[type, str] = {}
    for name in sorted(options("model/sampler"), key=_inherits):
        by_class.setdefault(type(part("sampler", name)), name)
    return list(by_class.values())


def _inherits(name: str) -> bool:
    return any("defaults" in read_yaml(p) for root in roots() if (p := root / f"model/sampler/{name}.yaml").is_file())


def denoiser_samplers() -> list[str]:
    """Return `samplers` without those for networks that predict something else than a denoiser."""
    return [name for name in samplers() if name not in ("consistency", "meanflow")]
