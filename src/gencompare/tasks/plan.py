"""task=plan: how many seeds and images a difference between two rows needs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from gencompare.comparison import formatting
from gencompare.comparison.commands import seeds_command
from gencompare.comparison.load_runs import ComparisonOptions, load_runs
from gencompare.comparison.planning import Plan, plans, power_note
from gencompare.comparison.ranking import RankingTable, rank_results
from gencompare.comparison.tables import table_title
from gencompare.comparison.terminal import print_plans
from gencompare.errors import UserError, check_number, printable
from gencompare.tasks.compare_runs import parse_keys
from gencompare.tasks.runs.loading import locate_runs


def plan(cfg: DictConfig) -> None:
    """Plan a comparison from the pilot runs that match ``cfg.runs``, for the first table of their comparison.

    Print the plans that detect the difference ``cfg.task.difference`` with power ``cfg.task.power``, the cheapest
    first, and the commands of the cheapest.
    """
    if not cfg.runs:
        raise UserError("task=plan needs pilot runs: runs='GLOB', for instance runs='runs/*'.")
    for name in ("difference", "power"):
        check_number(f"task.{name}", cfg.task[name])
    options = ComparisonOptions(parse_keys(cfg.group_by), None if cfg.rank_by is None else str(cfg.rank_by))
    loaded = load_runs(locate_runs(cfg.runs, Path(cfg.paths.cache)), options)
    tables = rank_results(loaded.runs, options)
    if not tables:
        reasons = [str(skip) for skip in loaded.skipped] or ["no run has results"]
        raise UserError(f"runs={cfg.runs}: no pilot can be read: {reasons[0]}")
    table, *others = tables
    found = plans(table, cfg.task.difference, cfg.task.power)
    print(printable(table_title(table)))
    if others:
        print(f"The first of {len(tables)} tables; rank_by=METRIC selects another metric.")
    print(power_note(table))
    difference, power = map(formatting.format_percent, (cfg.task.difference, cfg.task.power))
    print(f"To detect a difference of {difference} between two rows with {power} power:")
    print_plans(found)
    print("Commands of the first plan:")
    for command in commands(table, found[0]):
        print(f"  {command}")


def commands(table: RankingTable, chosen: Plan) -> list[str]:
    """Return the commands that train the missing seeds of each ranked row, and evaluate the existing runs again."""
    rows = [row for row in table.rows if row.rank is not None]
    lines = []
    for row in rows:
        missing = [seed for seed in range(chosen.num_seeds) if seed not in row.group.seeds]
        missing = missing[: max(0, chosen.num_seeds - len(row.group.seeds))]
        if missing:
            lines.append(seeds_command(row.group.members[0][0], missing, chosen.num_images))
    if chosen.num_images != table.measurement.num_images:
        command = f"python run.py task=evaluate run_dir=RUN_FOLDER evaluation.num_images={chosen.num_images}"
        lines.append(f"{command}  # each of the {sum(len(row.group.members) for row in rows)} runs of the pilot")
    return list(dict.fromkeys(lines))
