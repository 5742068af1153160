"""What a user sees: the config at the start, the figures and the places at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.syntax import Syntax

from gencompare.compare.report import report
from gencompare.compare.terminal import summary
from gencompare.data.base import SPLITS, ImageData
from gencompare.records import RunRecord

HIDDEN = (
    "choices", "command", "out", "sweep_name", "run", "resume", "runs", "by", "metric", "n", "checkpoint", "weights",
    "task", "trial",
)  # fmt: skip


def print_config(cfg: DictConfig) -> None:
    """The composed config, once."""
    shown = {key: value for key, value in OmegaConf.to_container(cfg, resolve=True).items() if key not in HIDDEN}  # type: ignore[union-attr]
    text = OmegaConf.to_yaml(OmegaConf.create(shown))
    Console().print(Syntax(text, "yaml", background_color="default", word_wrap=True))


def described(data: ImageData) -> dict[str, Any]:
    """The data set, for a record."""
    spec = data.spec
    return {
        "name": spec.name,
        "shape": list(spec.shape),
        "num_classes": spec.num_classes,
        "num_levels": spec.num_levels,
        "conditions": {name: list(shape) for name, shape in spec.conditions.items()},
        "splits": {name: len(data.split(name)) for name in SPLITS},
        "hash": data.hash("train"),
    }


def print_end(record: RunRecord, folder: Path) -> Path:
    """The result table, and where everything lies. Returns the page."""
    page = report([folder], folder)
    console = Console()
    if record.results:
        console.print(summary(record))
    places = {
        "page with the pictures": page,
        "record": folder / "record.json",
        "checkpoints": folder / "checkpoints",
        "learning curve": folder / record.curve,
    }
    for title, place in places.items():
        if place.exists():
            console.print(f"{title:>24}  {_short(place)}", highlight=False, soft_wrap=True)
    return page


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
