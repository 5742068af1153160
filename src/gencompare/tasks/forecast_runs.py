"""task=forecast: what longer runs will reach, from short runs, before they are trained; and whether they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gencompare.comparison.forecast import Forecasts, check_forecasts, make_forecasts, verdict
from gencompare.comparison.load_runs import ComparisonOptions, load_runs
from gencompare.comparison.ranking import rank_results
from gencompare.comparison.tables import table_title
from gencompare.comparison.terminal import print_checks, print_forecasts
from gencompare.errors import UserError, check_number, printable
from gencompare.tasks.compare_runs import parse_keys
from gencompare.tasks.runs.loading import locate_runs


def forecast(cfg: DictConfig) -> None:
    """Forecast longer runs from the short runs that match ``cfg.runs``, print them, and write them to ``cfg.out``.

    The costs are ``cfg.task.flops``, or ``cfg.task.factors`` times those of each family's longest run. With
    ``cfg.task.check``, the file of an earlier forecast, compare the runs with it instead.
    """
    if not cfg.runs:
        raise UserError("task=forecast needs runs='GLOB': short runs of three budgets, or longer ones with task.check.")
    options = ComparisonOptions(parse_keys(cfg.group_by), None if cfg.rank_by is None else str(cfg.rank_by))
    loaded = load_runs(locate_runs(cfg.runs, Path(cfg.paths.cache)), options)
    for skip in loaded.skipped:
        print(f"skipped: {skip}")
    if cfg.task.check is not None:
        forecasts = Forecasts.load(Path(cfg.task.check))
        checks = check_forecasts(forecasts, loaded.runs)
        print_checks(checks, forecasts.metric)
        print(verdict(checks))
        return
    tables = rank_results(loaded.runs, options)
    if not tables:
        raise UserError(f"runs={cfg.runs}: no run has results.")
    factors, flops = _numbers("factors", cfg.task.factors), _numbers("flops", cfg.task.flops)
    made = make_forecasts(tables[0], loaded.runs, options.group_by, factors, flops)
    print(printable(table_title(tables[0])))
    print_forecasts(made)
    interpolated = sum(each.interpolation for each in made.forecasts)
    if interpolated:
        print(f"{interpolated} of the forecasts are within the range of the short runs: they interpolate.")
    path = made.save(Path(cfg.out))
    print(printable(f"Forecast of {made.created}: {path}"))
    print(printable(f"Once longer runs are trained: python run.py task=forecast runs='GLOB' task.check={path}"))


def _numbers(name: str, values: Any) -> list[float]:
    """Return the numbers of an option that is a number, a list of numbers or null."""
    numbers = [] if values is None else list(values) if OmegaConf.is_list(values) else [values]
    for number in numbers:
        check_number(f"task.{name}", number)
    return [float(number) for number in numbers]
