"""task=compare: compare runs in tables and on an HTML page."""

from __future__ import annotations

import csv
import hashlib
import platform
import shutil
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gencompare.comparison.charts import PLOTS_FOLDER
from gencompare.comparison.load_runs import ComparisonOptions, load_runs
from gencompare.comparison.page import CSV_FILE, write_report
from gencompare.comparison.terminal import print_tables
from gencompare.errors import UserError, printable
from gencompare.tasks.runs.loading import locate_runs


def log_to_wandb(page: Path, logger: DictConfig | None, group: str | None = None) -> None:
    """Log a comparison to W&B if ``logger`` includes it. The same folder always updates the same W&B run.

    Args:
        page: path of the HTML page. Its folder contains the rest of the comparison.
        logger: ``cfg.logger``.
        group: group of the W&B run, such as a sweep name.
    """
    if not logger or "wandb" not in logger:
        return
    import wandb

    out = page.parent.absolute()
    run_id = hashlib.sha256(f"{platform.node()}:{out}".encode()).hexdigest()[:12]
    wandb_logger = instantiate(logger.wandb, _partial_=True)(
        folder=str(out), name=f"{out.name}, compared", id=run_id, group=group
    )
    run = wandb_logger.experiment
    charts = {f"charts/{path.stem}": wandb.Image(str(path)) for path in sorted((out / PLOTS_FOLDER).glob("*.png"))}
    run.log({"comparison": read_table(out / CSV_FILE), "page": wandb.Html(page.read_text(), inject=False), **charts})
    shutil.copy(page, run.dir)
    run.finish()


def read_table(path: Path) -> Any:
    """Read a CSV file as a `wandb.Table`."""
    import wandb

    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    data = [[parse_cell(cell) for cell in row] for row in rows]
    return wandb.Table(columns=[*header], data=data, allow_mixed_types=True)


def parse_cell(cell: str) -> str | float | None:
    """Convert a cell to a number if possible. Return None for an empty cell."""
    try:
        return float(cell)
    except ValueError:
        return cell or None


def compare(cfg: DictConfig) -> None:
    """Compare the runs that match ``cfg.runs``, a glob of run folders or ``wandb:ENTITY/PROJECT``.

    With ``group_by=KEY`` or ``group_by=[KEY,KEY]``, runs with the same values of these config keys share a row.
    ``rank_by=NAME`` ranks runs by the metric ``NAME``. ``logger=wandb`` also logs the comparison to W&B.
    """
    if not cfg.runs:
        raise UserError("task=compare needs runs='GLOB', for instance runs='runs/*'.")
    options = ComparisonOptions(parse_keys(cfg.group_by), None if cfg.rank_by is None else str(cfg.rank_by))
    page = compare_folders(locate_runs(cfg.runs, Path(cfg.paths.cache)), Path(cfg.task.out or cfg.out), options)
    if any(
        override.startswith("logger=") for override in cfg.command
    ):  # only on request: most comparisons are temporary
        log_to_wandb(page, cfg.logger)


def parse_keys(keys: Any) -> tuple[str, ...]:
    """Parse config keys from a list or a comma-separated string."""
    if keys is None:
        return ()
    parts = list(keys) if OmegaConf.is_list(keys) else str(keys).split(",")
    return tuple(str(part).strip() for part in parts if str(part).strip())


def compare_folders(folders: list[Path], out: Path, options: ComparisonOptions = ComparisonOptions()) -> Path:
    """Write the comparison of run folders to ``out``, print its tables, and return the path of the page."""
    loaded = load_runs(folders, options)
    page = write_report(loaded, out)
    print_tables(loaded)
    print(printable(f"Comparison: {page}"))
    return page
