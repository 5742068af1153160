"""task=compare: many runs in one table and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gencompare.compare.gather import View, gather
from gencompare.compare.report import write
from gencompare.compare.terminal import print_tables
from gencompare.errors import UserError
from gencompare.tasks.gathering import located
from gencompare.tasks.mirror import mirror


def compare(cfg: DictConfig) -> None:
    """Compare the runs that ``cfg.runs`` names: a glob of run folders, or ``wandb:ENTITY/PROJECT``.

    ``by=KEY`` (or ``by=[KEY,KEY]``) makes one row of all runs that share the value of a config key; ``metric=NAME``
    ranks by another figure than the headline. With ``logger=wandb`` the comparison is sent to W&B as well.
    """
    if not cfg.runs:
        raise UserError("task=compare needs runs='GLOB', for instance runs='runs/*'.")
    view = View(keys(cfg.by), None if cfg.metric is None else str(cfg.metric))
    page = draw(located(cfg.runs, Path(cfg.paths.cache)), Path(cfg.task.out or cfg.out), view)
    if any(word.startswith("logger=") for word in cfg.command):  # a comparison is looked at more often than kept
        mirror(page, cfg.logger)


def keys(given: Any) -> tuple[str, ...]:
    """Config keys from a list, or from text with commas between them."""
    if given is None:
        return ()
    parts = list(given) if OmegaConf.is_list(given) else str(given).split(",")
    return tuple(str(part).strip() for part in parts if str(part).strip())


def draw(folders: list[Path], out: Path, view: View = View()) -> Path:
    """Write the comparison of ``folders`` to ``out`` and print its tables. Returns the page."""
    gathered = gather(folders, view)
    page = write(gathered, out)
    print_tables(gathered)
    print(f"The comparison: {page}")
    return page
