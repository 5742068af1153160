"""A comparison in W&B: its table, its charts and its page, as a W&B run of their own."""

from __future__ import annotations

import csv
import hashlib
import platform
import shutil
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from gencompare.compare.charts import FOLDER
from gencompare.compare.report import TABLE


def mirror(page: Path, logger: DictConfig | None, group: str | None = None) -> None:
    """Send the comparison in the folder of ``page`` to W&B, if ``logger`` (``cfg.logger``) has it.

    Args:
        group: of the W&B run; a sweep's, so that it stands beside the sweep's jobs.

    Drawn again in the same folder, it goes into the same W&B run.
    """
    if not logger or "wandb" not in logger:
        return
    import wandb

    out = page.parent.absolute()
    run_id = hashlib.sha256(f"{platform.node()}:{out}".encode()).hexdigest()[:12]
    opened = instantiate(logger.wandb, _partial_=True)(
        folder=str(out), name=f"{out.name}, compared", id=run_id, group=group
    )
    run = opened.experiment
    charts = {f"charts/{path.stem}": wandb.Image(str(path)) for path in sorted((out / FOLDER).glob("*.png"))}
    run.log({"comparison": table(out / TABLE), "page": wandb.Html(page.read_text(), inject=False), **charts})
    shutil.copy(page, run.dir)
    run.finish()


def table(path: Path) -> Any:
    """A CSV file as a `wandb.Table`."""
    import wandb

    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return wandb.Table(columns=[*head], data=[[value(cell) for cell in row] for row in rows], allow_mixed_types=True)


def value(cell: str) -> str | float | None:
    try:
        return float(cell)
    except ValueError:
        return cell or None
