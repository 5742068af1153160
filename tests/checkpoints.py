"""Load and compare run checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_training(one: Path, two: Path) -> None:
    """Assert that the weights, EMA weights and steps of two runs are exactly equal."""
    a, b = checkpoint(one), checkpoint(two)
    for part in ("state_dict", "ema"):
        assert a[part].keys() == b[part].keys()
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), f"{part}: {name}"
    assert a["callbacks"]["TrainingClock"]["step"] == b["callbacks"]["TrainingClock"]["step"]
