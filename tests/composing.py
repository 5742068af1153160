"""Options and composed configs for tests, including those in ``GENCOMPARE_CONF``."""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.command_line import conf_dir


def roots() -> list[Path]:
    extra = os.environ.get("GENCOMPARE_CONF")
    return [conf_dir(), *([Path(extra)] if extra else [])]


def options(group: str) -> list[str]:
    """Return the options of a group."""
    return sorted({path.stem for root in roots() for path in (root / group).glob("*.yaml")})


@cache
def read_yaml(path: Path) -> Any:
    """Read a YAML file once. The result must not be changed."""
    return OmegaConf.load(path)


def usual_groups() -> set[str]:
    """Return the groups in the defaults list of config.yaml; other groups are appended with ``+``."""
    defaults = read_yaml(conf_dir() / "config.yaml").defaults
    return {str(key).removeprefix("optional ") for entry in defaults if not isinstance(entry, str) for key in entry}


def carrier_of(group: str) -> str | None:
    """Return an option with ``group`` in its defaults list, or None if there is none."""
    first, *rest = group.split("/")
    for carrier in options(first) if rest else []:
        for path in (root / first / f"{carrier}.yaml" for root in roots()):
            defaults = read_yaml(path).get("defaults", []) if path.is_file() else []
            if any("/".join(rest) in entry for entry in defaults if not isinstance(entry, str)):
                return f"{first}={carrier}"
    return None


def compose(*overrides: str) -> DictConfig:
    """Return the resolved config of a job, as a new copy."""
    environment = tuple(value for name, value in sorted(os.environ.items()) if name.startswith("GENCOMPARE"))
    cfg, hydra = cached_compose(overrides, environment)
    HydraConfig.instance().set_config(hydra)
    return copy.deepcopy(cfg)


@cache
def cached_compose(overrides: tuple[str, ...], environment: tuple[str, ...]) -> tuple[DictConfig, DictConfig]:
    """Return a config twice, without and with the ``hydra`` node. Composing takes a third of a second, so the result is
    cached."""
    GlobalHydra.instance().clear()
    searchpath = ",".join(f"file://{root}" for root in roots()[1:])
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        arguments = [*overrides, f"hydra.searchpath=[{searchpath}]", "hydra.job.num=0"]
        whole = hydra_compose("config", overrides=arguments, return_hydra_config=True)
        HydraConfig.instance().set_config(whole)
        cfg = copy.deepcopy(whole)
        with open_dict(cfg):
            del cfg["hydra"]
        OmegaConf.resolve(cfg)
    return cfg, whole
