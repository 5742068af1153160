"""task=list_runs: print a table of runs with state, primary metric and folder."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gencompare.comparison import formatting
from gencompare.comparison.load_runs import RunFolder, load_runs
from gencompare.errors import printable
from gencompare.records import RunRecord
from gencompare.tasks.runs.loading import locate_runs
from gencompare.tasks.runs.run_folder import is_active

COLUMNS = ("created", "state", "family", "data", "seed", "metric", "n", "folder")
RIGHT_ALIGNED = ("seed", "metric", "n")


def list_runs(cfg: DictConfig) -> None:
    """Print the runs that match ``cfg.runs``, oldest first, and skipped folders with the reason."""
    folders = locate_runs(cfg.runs or f"{cfg.paths.runs}/**", Path(cfg.paths.cache))
    print_runs(folders, Console(width=formatting.WIDE))


def print_runs(folders: list[Path], console: Console) -> None:
    """Print a table with one row per run, followed by the skipped folders with the reasons."""
    loaded = load_runs(folders)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in RIGHT_ALIGNED else "left", no_wrap=True)
    for run in sorted(loaded.runs, key=lambda run: (run.record.created, str(run.folder))):
        table.add_row(*(Text(printable(cell)) for cell in row(run)))
    console.print(table, soft_wrap=True)
    skipped = f", {len(loaded.skipped)} skipped" if loaded.skipped else ""
    console.print(Text(f"{len(loaded.runs)} runs{skipped}"))
    for skip in loaded.skipped:
        console.print(Text(f"skipped: {skip}", style="yellow"), soft_wrap=True)


def row(run: RunFolder) -> tuple[str, ...]:
    """Return the cells of a run, in the order of `COLUMNS`, with the primary metric of the run's own sampler."""
    record = run.record
    value, n = formatting.MISSING, formatting.MISSING
    result = record.own_result()
    if result is not None:
        metric = result.metrics.get(result.primary_metric)
        value = (
            f"{formatting.title(result.primary_metric)} {formatting.format_metric(metric.value if metric else None)}"
        )
        n = f"{result.measurement.num_images:,}"
    data, folder = str(record.data.get("name", formatting.MISSING)), str(run.folder)
    return (
        format_time(record.created), state(run.folder, record), record.family, data, str(record.seed), value, n, folder,
    )  # fmt: skip


def format_time(created: str) -> str:
    """Format an ISO time as day, hour and minute."""
    return created[:16].replace("T", " ") or formatting.MISSING


def state(folder: Path, record: RunRecord) -> str:
    """Return the state of a run, or "died" if the record says "running" but no process uses the folder."""
    return "died" if record.state == "running" and not is_active(folder) else record.state
