"""task=compare: many runs in one table and one page."""

from __future__ import annotations

import csv
import hashlib
import platform
import shutil
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gencompare.compare.charts import PLOTS_FOLDER
from gencompare.compare.load_runs import ComparisonOptions, load_runs
from gencompare.compare.page import CSV_FILE, write_report
from gencompare.compare.terminal import print_tables
from gencompare.errors import UserError
from gencompare.tasks.runs.loading import locate_runs


def log_to_wandb(page: Path, logger: DictConfig | None, group: str | None = None) -> None:
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
    charts = {f"charts/{path.stem}": wandb.Image(str(path)) for path in sorted((out / PLOTS_FOLDER).glob("*.png"))}
    run.log({"comparison": table(out / CSV_FILE), "page": wandb.Html(page.read_text(), inject=False), **charts})
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


def compare(cfg: DictConfig) -> None:
    """Compare the runs that ``cfg.runs`` names: a glob of run folders, or ``wandb:ENTITY/PROJECT``.

    ``group_by=KEY`` (or ``group_by=[KEY,KEY]``) makes one row of all runs that share the value of a config key; ``rank_by=NAME``
    ranks by another figure than the headline. With ``logger=wandb`` the comparison is sent to W&B as well.
    """
    if not cfg.runs:
        raise UserError("task=compare needs runs='GLOB', for instance runs='runs/*'.")
    view = ResultView(keys(cfg.group_by), None if cfg.rank_by is None else str(cfg.rank_by))
    page = draw(locate_runs(cfg.runs, Path(cfg.paths.cache)), Path(cfg.task.out or cfg.out), options)
    if any(word.startswith("logger=") for word in cfg.command):  # a comparison is looked at more often than kept
        log_to_wandb(page, cfg.logger)


def keys(given: Any) -> tuple[str, ...]:
    """Config keys from a list, or from text with commas between them."""
    if given is None:
        return ()
    parts = list(given) if OmegaConf.is_list(given) else str(given).split(",")
    return tuple(str(part).strip() for part in parts if str(part).strip())


def draw(folders: list[Path], out: Path, options: ComparisonOptions = ComparisonOptions()) -> Path:
    """Write the comparison of ``folders`` to ``out`` and print its tables. Returns the page."""
    loaded = load_runs(folders, options)
    page = write_report(loaded, out)
    print_tables(loaded)
    print(f"The comparison: {page}")
    return page
