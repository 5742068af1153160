"""Forecasts of longer runs from the records of short ones, written before the longer runs and checked against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from math import inf, isfinite
from pathlib import Path

from gencompare.checksums import read_checked_json, write_checked_json
from gencompare.comparison import formatting
from gencompare.comparison.load_runs import RunFolder
from gencompare.comparison.ranking import BASELINE_FAMILY, RankingTable
from gencompare.comparison.run_costs import total_cost
from gencompare.comparison.scaling_law import LEVEL, SAME_BUDGET, ScalingLaw, ShortRun
from gencompare.comparison.statistics import config_values, possible_range, sampling_variance
from gencompare.errors import CorruptedFileError, UserError, printable
from gencompare.records import Measurement, Metric, Result, RunRecord, newest, now

FORECAST_FILE = "forecast.json"
MAX_SIZE = 1 << 22
"""Size limit of a forecast file in bytes (4 MiB)."""


@dataclass(frozen=True)
class Forecast:
    """What one more run of a family will reach."""

    family: str
    flops: float
    value: float
    """Median, in the units of the metric."""
    interval: tuple[float, float]
    """Central interval with probability `LEVEL`."""
    num_runs: int
    """Short runs of the family."""
    interpolation: bool
    """Whether the cost is within the range of the short runs."""


@dataclass(frozen=True)
class Forecasts:
    """Forecasts with what they are made of, as stored in `FORECAST_FILE`."""

    metric: str
    measurement: Measurement
    group_by: tuple[str, ...]
    runs: list[ShortRun]
    forecasts: list[Forecast]
    created: str = field(default_factory=now)
    level: float = LEVEL

    def save(self, folder: Path) -> Path:
        """Write the forecasts to a new file in ``folder``.

        Raises:
            UserError: there is a file already, which a forecast made in advance must not replace.
        """
        path = folder / FORECAST_FILE
        if path.exists():
            raise UserError(f"{path} exists, and a forecast is not replaced: choose another folder, hydra.run.dir=DIR.")
        write_checked_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, path: Path) -> Forecasts:
        """Read a file that `save` wrote.

        Raises:
            UserError: the file is missing, corrupted, or not a forecast.
        """
        try:
            raw = read_checked_json(path, MAX_SIZE)
            raw.pop("sha256", None)
            forecasts = [Forecast(**each | {"interval": tuple(each["interval"])}) for each in raw["forecasts"]]
            if not all(isfinite(x) for each in forecasts for x in (each.flops, each.value, *each.interval)):
                raise ValueError("a number is not finite")
            datetime.fromisoformat(raw["created"])
            parts = {
                "measurement": Measurement(**raw["measurement"]), "runs": [ShortRun(**run) for run in raw["runs"]],
                "forecasts": forecasts, "group_by": tuple(raw["group_by"]),
            }  # fmt: skip
            return cls(**raw | parts)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(f"task.check={path} is no file: give the {FORECAST_FILE} of a forecast.") from error
        except CorruptedFileError:
            raise
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"task.check={path} is not a forecast of this program ({printable(error)}).") from error


def make_forecasts(
    table: RankingTable,
    runs: Sequence[RunFolder],
    group_by: tuple[str, ...] = (),
    factors: Sequence[float] = (),
    flops: Sequence[float] = (),
) -> Forecasts:
    """Forecast one more run of each family in ``table``, the fitted Gaussian aside, since it has no budget.

    Args:
        table: the results under one protocol.
        runs: all runs; each must be in the table.
        group_by: config keys that take the place of the family.
        factors: costs relative to the most expensive run of each family.
        flops: costs.

    Raises:
        UserError: a run has no result in the table, or `ScalingLaw` refuses the runs.
    """
    for name, values in (("factors", factors), ("flops", flops)):
        for value in values:
            if not 0 < value < inf:
                raise UserError(f"task.{name}={value} must be positive.")
    short = [short_run(run, _result(table, run), group_by) for run in runs if run.record.family != BASELINE_FAMILY]
    if not short:
        raise UserError("A forecast needs runs of a family that is trained: widen runs=.")
    law = ScalingLaw(short)
    metric = _metric(_result(table, next(run for run in runs if run.record.family != BASELINE_FAMILY)))
    found = []
    for family, members in law.runs.items():
        _, last = law.range(family)
        for cost in flops or [factor * last for factor in factors]:
            prediction = law.predict(family, cost)
            ends = sorted(_value(error, table.primary_metric, metric) for error in (prediction.low, prediction.high))
            value = _value(prediction.median, table.primary_metric, metric)
            interpolation = cost <= last * (1 + SAME_BUDGET)
            found.append(Forecast(family, cost, value, (ends[0], ends[1]), len(members), interpolation))
    return Forecasts(table.primary_metric, table.measurement, group_by, short, found)


def short_run(run: RunFolder, result: Result, group_by: tuple[str, ...] = ()) -> ShortRun:
    """Reduce a run to what a scaling law needs.

    Raises:
        UserError: the record has no FLOPs, or the metric has no best value or is missing.
    """
    flops = total_cost(run.record)["flops"]
    if flops is None:
        raise UserError(f"{run.label} has no training FLOPs in its record: leave it out of runs=, or train it again.")
    name, metric = result.primary_metric, _metric(result)
    if not formatting.is_finite(metric.value):
        raise UserError(f"{run.label} has no {formatting.title(name)}: evaluate it again, or leave it out of runs=.")
    error = _error(float(metric.value or 0), name, metric)
    variance = sampling_variance(metric)
    relative = variance / error**2 if variance is not None and error > 0 else 0.0
    return ShortRun(run.label, family_of(run, group_by), run.record.seed, flops, error, relative)


def family_of(run: RunFolder, group_by: tuple[str, ...]) -> str:
    """Return the family of a run, or its values of ``group_by``."""
    values = config_values(run, group_by)
    return ", ".join(f"{key}={value}" for key, value in values.items()) if values else run.record.family


def _result(table: RankingTable, run: RunFolder) -> Result:
    """Return the result of the run's own sampler under the protocol of the table."""
    result = _own_result(run.record, table.measurement, table.primary_metric)
    if result is not None:
        return result
    other = newest(run.record.results)
    if other is None:
        raise UserError(f"{run.label} has no results ({run.record.state}): resume it, or leave it out of runs=.")
    differences = formatting.describe_differences(table.measurement.differences(other.measurement))
    raise UserError(
        f"{run.label} was measured under another protocol than the other runs:"
        f" {differences or formatting.title(other.primary_metric)}. Evaluate it again, or leave it out of runs=."
    )


def _own_result(record: RunRecord, measurement: Measurement, metric: str) -> Result | None:
    found = newest(r for r in record.results if r.measurement == measurement and metric in r.metrics)
    return None if found is None else replace(found, primary_metric=metric)


def _metric(result: Result) -> Metric:
    return result.metrics.get(result.primary_metric, Metric(None))


def _error(value: float, name: str, metric: Metric) -> float:
    """Return the distance of a value from the best one."""
    if metric.higher_is_better is False:
        return value
    best = possible_range(name)[1]
    if not metric.higher_is_better or best == inf:
        raise UserError(f"{formatting.title(name)} has no best value to approach: choose another rank_by=METRIC.")
    return best - value


def _value(error: float, name: str, metric: Metric) -> float:
    """Return the value with this distance from the best one."""
    return error if metric.higher_is_better is False else possible_range(name)[1] - error


# Checks


@dataclass(frozen=True)
class Check:
    """A longer run beside its forecast."""

    run: str
    forecast: Forecast
    value: float
    note: str = ""
    """Why the run is no test of the forecast, or empty."""

    @property
    def holds(self) -> bool:
        """Whether the value is in the interval."""
        return self.forecast.interval[0] <= self.value <= self.forecast.interval[1]


def check_forecasts(forecasts: Forecasts, runs: Sequence[RunFolder]) -> list[Check]:
    """Compare each run with the forecast of its family at its cost. Runs without one are left out.

    Raises:
        UserError: no run has a forecast, or a run was measured under another protocol or has no value.
    """
    checks = []
    for run in runs:
        family = family_of(run, forecasts.group_by)
        cost = total_cost(run.record)["flops"] or 0.0
        near = [
            each
            for each in forecasts.forecasts
            if each.family == family and abs(cost - each.flops) <= SAME_BUDGET * each.flops
        ]
        if not near:
            continue
        forecast = min(near, key=lambda each: abs(cost - each.flops))
        result = _own_result(run.record, forecasts.measurement, forecasts.metric)
        if result is None:
            raise UserError(f"{run.label} has no result under the protocol of the forecast: evaluate it again.")
        value = _metric(result).value
        if not formatting.is_finite(value):
            value = inf  # a run that diverged is a miss
        note = "interpolation" if forecast.interpolation else ""
        if _is_earlier(run.record.created, forecasts.created):
            note = "older than the forecast"
        checks.append(Check(run.label, forecast, float(value if value is not None else inf), note))
    if not checks:
        costs = sorted({f"{each.family} {each.flops:.3g}" for each in forecasts.forecasts})
        raise UserError(
            f"No run has the family and cost of a forecast (FLOPs within {formatting.format_percent(SAME_BUDGET)}):"
            f" {', '.join(costs)}."
        )
    return checks


def _is_earlier(first: str, second: str) -> bool:
    """Return whether a time is before another. An unknown time is."""
    try:
        times = [datetime.fromisoformat(each).replace(tzinfo=None) for each in (first, second)]
    except ValueError:
        return True
    return times[0] < times[1]


def verdict(checks: Sequence[Check]) -> str:
    """Say how many intervals hold, among the runs that test a forecast."""
    tests = [check for check in checks if not check.note]
    if not tests:
        return "No run tests a forecast: each is within the range of the short runs, or older than the forecast."
    held = sum(check.holds for check in tests)
    others = len(checks) - len(tests)
    left_out = f" {others} others are no test: they interpolate, or are older than the forecast." if others else ""
    return f"{held} of {len(tests)} intervals of {formatting.format_percent(LEVEL)} hold.{left_out}"
