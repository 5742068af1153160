"""task=compare: many runs in one table and one page."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from gencompare.compare.gather import find
from gencompare.compare.report import report
from gencompare.compare.terminal import print_tables
from gencompare.errors import UserError


def compare(cfg: DictConfig) -> None:
    """Compare the run folders that the glob ``cfg.runs`` names."""
    if not cfg.runs:
        raise UserError("task=compare needs runs='GLOB', for instance runs='runs/*'.")
    draw(find(cfg.runs), Path(cfg.task.out or cfg.out))


def draw(folders: list[Path], out: Path) -> Path:
    """Write the comparison of ``folders`` to ``out`` and print its tables. Returns the page."""
    page = report(folders, out)
    print_tables(folders)
    print(f"The comparison: {page}")
    return page
