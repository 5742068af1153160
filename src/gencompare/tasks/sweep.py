"""The hook that Hydra calls when the last job of a sweep has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class CompareAtEnd(Callback):
    """Draws the comparison of a sweep's runs in the sweep's folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.task._target_ != "gencompare.tasks.train.train":
            return
        from gencompare.records import FILE
        from gencompare.tasks.compare import draw

        sweep = Path(config.hydra.sweep.dir)
        folders = sorted(path.parent for path in sweep.glob(f"*/{FILE}"))
        if folders:
            draw(folders, sweep)
