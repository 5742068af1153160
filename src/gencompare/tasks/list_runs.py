"""task=list_runs: what runs there are."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gencompare.compare import formatting
from gencompare.compare.load_runs import RunFolder, load_runs
from gencompare.records import RunRecord
from gencompare.tasks.runs.loading import locate_runs
from gencompare.tasks.runs.sweep import at_work

COLUMNS = ("when", "state", "family", "data", "seed", "figure", "n", "folder")
RIGHT = ("seed", "figure", "n")
WIDE = 240
"""Columns of the table where no terminal sets a width: a list that is piped into another program keeps its lines."""


def list_runs(cfg: DictConfig) -> None:
    """List the runs that ``cfg.runs`` names, the oldest first; and what could not be read, with the reason."""
    folders = locate_runs(cfg.runs or f"{cfg.paths.runs}/**", Path(cfg.paths.cache))
    console = Console()
    listed(folders, console if console.is_terminal else Console(width=WIDE))


def listed(folders: list[Path], console: Console) -> None:
    """Print a line a run."""
    gathered = load_runs(folders)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in RIGHT else "left", overflow="fold")
    for run in sorted(gathered.runs, key=lambda run: (run.record.created, str(run.folder))):
        table.add_row(*(Text(cell) for cell in line(run)))
    console.print(table)
    left = f", {len(gathered.skipped)} left out" if gathered.skipped else ""
    console.print(Text(f"{len(gathered.runs)} runs{left}"))
    for skip in gathered.skipped:
        console.print(Text(f"left out: {skip.folder}: {skip.reason}", style="yellow"), soft_wrap=True)


def line(run: RunFolder) -> tuple[str, ...]:
    """The cells of one run, by `COLUMNS`; the figure is the headline of the latest result."""
    record = run.record
    figure, n = formatting.MISSING, formatting.MISSING
    if record.results:
        result = record.results[-1]
        metric = result.metrics.get(result.primary_metric)
        figure = (
            f"{formatting.title(result.primary_metric)} {formatting.format_metric(metric.value if metric else None)}"
        )
        n = f"{result.measurement.num_images:,}"
    data, folder = str(record.data.get("name", formatting.MISSING)), str(run.folder)
    return (
        when(record.created), state(run.folder, record), record.family, data, str(record.seed), figure, n, folder,
    )  # fmt: skip


def when(created: str) -> str:
    """Day and minute of an ISO time."""
    return created[:16].replace("T", " ") or formatting.MISSING


def state(folder: Path, record: RunRecord) -> str:
    """The record's state, but that a run whose process has died says so."""
    return "broke off" if record.state == "running" and not at_work(folder) else record.state
