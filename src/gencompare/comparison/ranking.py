"""Ranking tables, which show comparable results in order and test their differences for significance."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import combinations
from statistics import fmean

from gencompare.comparison import formatting
from gencompare.comparison.commands import METRIC_OVERRIDE, evaluation_command, training_command
from gencompare.comparison.load_runs import ComparisonOptions, LoadedRuns, RunFolder
from gencompare.comparison.sampler_description import distinguishing_settings
from gencompare.comparison.settings import differing_settings, is_model_setting
from gencompare.comparison.statistics import (
    MIN_SEEDS,
    SIGNIFICANCE_LEVEL,
    ComparisonToBest,
    RunResult,
    SeedGroup,
    adjusted_p_values,
    config_values,
    group_by_seed,
    warnings_of,
)
from gencompare.errors import UserError
from gencompare.records import Measurement, Metric, Result

# Tables

BASELINE_FAMILY = "gaussian"
"""The family that learned models must beat."""

BASELINE = "Gaussian baseline"
NEAR_BASELINE = "not distinguishable from the baseline"
NOT_BETTER = "not better than the baseline"
NO_VALUE = "no value"
TRAINED_WITH_EXTRACTOR = "trained with the extractor"
UNRANKED = {
    NOT_BETTER: "Not ranked: not better than the Gaussian baseline",
    TRAINED_WITH_EXTRACTOR: "Not ranked: trained with the network that computes the metric",
    NO_VALUE: "Not ranked: value missing or not finite",
}
"""Statuses of rows that are listed below the ranking, with their headings."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table: a result of one run, or the mean of runs that differ only in seeds."""

    group: SeedGroup
    rank: int | None
    """Rank of the row: 1 is best, and equal values share a rank. None if the row is not ranked."""
    status: str = ""
    """`BASELINE`, `NEAR_BASELINE`, a key of `UNRANKED`, or empty."""
    comparison: ComparisonToBest | None = None
    """Comparison with the best row that was tested; None if this row was not tested."""
    sampling: str = ""
    """Sampling settings that distinguish the row from other rows of the same trained model."""

    @property
    def run(self) -> RunFolder:
        return self.group.run

    @property
    def result(self) -> Result:
        return self.group.result

    @property
    def title(self) -> str:
        """Name of the row in charts and legends."""
        return " · ".join(part for part in (self.run.title, self.sampling) if part)

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return self.result.metrics.get(self.result.primary_metric, Metric(None))

    @property
    def warnings(self) -> list[str]:
        """Warnings from the evaluation about the samples or the extractor."""
        return warnings_of(self.result)


@dataclass(frozen=True)
class RankingTable:
    """The rows of one protocol and primary metric: ranked rows first, then those with a status in `UNRANKED`."""

    measurement: Measurement
    primary_metric: str
    rows: list[TableRow]

    def results(self) -> list[RunResult]:
        """Return the results of all rows with their runs."""
        return [member for row in self.rows for member in row.group.members]

    def sections(self) -> list[tuple[str, list[TableRow]]]:
        """Return the nonempty sections of the table as (heading, rows). The heading of the ranked rows is empty."""
        parts = [("", [row for row in self.rows if row.status not in UNRANKED])]
        parts += [(heading, [row for row in self.rows if row.status == status]) for status, heading in UNRANKED.items()]
        return [part for part in parts if part[1]]

    def metrics(self) -> list[str]:
        """Return the names of all metrics, the primary metric first."""
        names = {name for row in self.rows for name in row.result.metrics}
        return [self.primary_metric, *sorted(names - {self.primary_metric}, key=formatting.column_position)]

    def warnings(self) -> list[str]:
        """Return the warnings of all rows, each with the labels of its rows."""
        labels_of: dict[str, list[str]] = {}
        for row in self.rows:
            for warning in row.warnings:
                labels = labels_of.setdefault(warning, [])
                labels += [row.run.label] if row.run.label not in labels else []
        return [f"{', '.join(labels)}: {warning}" for warning, labels in labels_of.items()]

    def summary(self) -> str:
        """Say in one or two sentences which row is best, and whether the others may be as good."""
        ranked = [row for row in self.rows if row.rank is not None]
        if len(ranked) < 2 or ranked[0].metric.unordered:
            return ""
        best, others = ranked[0], ranked[1:]
        interval = formatting.format_interval(best.metric)
        value = formatting.join_values(formatting.format_metric(best.metric.value), interval)
        named = dict(zip(map(id, ranked), short_names(ranked), strict=True))
        text = f"{named[id(best)]} has the best {formatting.title(self.primary_metric)}, {value}."
        if best.comparison is not None and best.comparison.p_value is None:
            worse = [row for row in others if row.comparison is not None and row.comparison.significant]
            tested = [row for row in others if row.comparison is not None]
            if len(worse) == len(tested):
                return f"{text} It is significantly better than every other row that was tested ({len(tested)})."
            return f"{text} It is significantly better than {len(worse) or 'none'} of {len(tested)} other tested rows."
        others = [row for row in others if half_width(row.metric)]
        if not half_width(best.metric) or not others:
            return text
        close = [row for row in others if not _intervals_apart(best, row)]
        if close:
            names = formatting.join_names(
                [named[id(row)] for row in close[:3]] + (["others"] if len(close) > 3 else [])
            )
            count = f"{len(close)} of {len(others)} other rows" if len(others) > 1 else "The other row"
            text += f" {count} may be as good ({names}), since the interval of the difference contains 0."
        else:
            text += " The interval of its difference from every other row with an interval excludes 0."
        if any(len(row.group.seeds) < 2 for row in ranked):
            text += " Intervals of rows with one training seed do not show how much training runs differ."
        return text

    def notes(self) -> list[str]:
        """Return notes on how to read the ranking: baseline, intervals and significance."""
        return [*self._baseline_notes(), *self._seed_notes(), *self._significance_notes()]

    def _baseline_notes(self) -> list[str]:
        if self.measurement.conditioning not in ("unconditional", "labels"):
            return []  # the baseline does not support other conditions
        if not any(row.status == BASELINE for row in self.rows):
            first_run, _ = self.rows[0].group.members[0]
            baselines = [row for row in self.rows if row.run.record.family == BASELINE_FAMILY]
            if baselines:
                run, result = baselines[0].group.members[0]
                metrics = [each for each in first_run.record.overrides if each.startswith(METRIC_OVERRIDE)]
                return [
                    f"The Gaussian baseline has no {formatting.title(self.primary_metric)}. Evaluate it again:"
                    f" {evaluation_command(run, result, metrics)}"
                ]
            return [
                "The Gaussian baseline was not evaluated under this protocol, so the table does not show whether a"
                " model has learned more than class-wise Gaussians. Add it:"
                f" {training_command(BASELINE_FAMILY, self.measurement, first_run)}"
            ]
        if any(row.status == NEAR_BASELINE for row in self.rows):
            return [
                f"Rows marked '{NEAR_BASELINE}' differ from the Gaussian baseline in"
                f" {formatting.title(self.primary_metric)} by less than the half-width of the 95 % confidence interval"
                " of the difference. More samples (evaluation.num_images) narrow the interval."
            ]
        return []

    def _seed_notes(self) -> list[str]:
        notes = [
            f"{row.run.label}: its runs differ in more than seeds ({_first_names(row.group.differing_settings)}). The"
            " row is their mean, without a confidence interval or a test, since their spread does not measure the"
            " variation between training runs."
            for row in self.rows
            if row.group.differing_settings
        ]
        if not any(len(row.group.seeds) > 1 and not row.group.differing_settings for row in self.rows):
            return notes
        note = (
            "Rows with several training seeds show the mean and its 95 % confidence interval over training seeds"
            " (Student's t)."
        )
        target = self.rows[0].metric.target
        if target is not None:
            note += f" Rows are ordered by the mean distance of their seeds from {target:g}."
        if any(len(row.group.seeds) < 2 for row in self.rows):
            note += (
                " Rows with one training seed show the interval of sampling alone. Training runs may differ by more."
            )
        return [*notes, note]

    def _significance_notes(self) -> list[str]:
        ranked = [row for row in self.rows if row.rank is not None]
        if len(ranked) < 2:
            return []
        tested = [row for row in ranked if row.comparison is not None]
        if not tested:
            return [
                "No difference is claimed to be significant, since a test needs two rows with at least"
                f" {MIN_SEEDS} training seeds each. Compare the intervals instead."
            ]
        best = next(row for row in tested if row.comparison is not None and row.comparison.p_value is None)
        note = (
            f"Significance over training seeds is tested by Welch's t test between every pair of the {len(tested)} rows"
            f" with at least {MIN_SEEDS} training seeds, with Holm's correction over all pairs, at level"
            f" {SIGNIFICANCE_LEVEL:g}. The table shows each row against #{best.rank}. A row that is not significantly"
            " different may be as good or better."
        )
        if len(tested) < len(ranked):
            note += " The other rows are not tested."
        return [note]


def half_width(metric: Metric) -> float:
    """Return how far the confidence interval extends to its wider side, or 0 if there is none.

    The other side may have been cut at the smallest or largest possible value.
    """
    if not formatting.format_interval(metric) or metric.interval is None or metric.value is None:
        return 0.0
    return max(metric.value - metric.interval[0], metric.interval[1] - metric.value)


def short_names(rows: list[TableRow]) -> list[str]:
    """Name rows in a sentence: without the number of seeds, and with settings only where the names are equal."""
    names = [f"{row.run.label.split(', mean of ')[0]}{f' ({row.sampling})' if row.sampling else ''}" for row in rows]
    return [name if names.count(name) == 1 else row.title for name, row in zip(names, rows, strict=True)]


def _first_names(names: tuple[str, ...], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# Building the tables


def ranking_tables(loaded: LoadedRuns) -> list[RankingTable]:
    """Rank the loaded runs by `rank_results`. The result is cached, since the page and all table files need it."""
    if loaded.tables is None:
        loaded.tables = rank_results(loaded.runs, loaded.options)
    return loaded.tables


def rank_results(runs: Iterable[RunFolder], options: ComparisonOptions = ComparisonOptions()) -> list[RankingTable]:
    """Build a table for each protocol and primary metric. Tables of the data set with the most rows come first.

    Raises:
        UserError: ``options`` names a metric that no result has, or a config key that no run has.
    """
    results = [(run, result) for run in runs for result in run.record.results]
    if options.rank_by is not None:
        known = sorted({name for _, result in results for name in result.metrics}, key=formatting.column_position)
        if options.rank_by not in known:
            raise UserError(f"rank_by={options.rank_by}: no result has this metric. Available: {', '.join(known)}.")
        results = [(run, replace(result, primary_metric=options.rank_by)) for run, result in results]
    for key in options.group_by:
        if results and all(config_values(run, (key,)) is None for run, _ in results):
            raise UserError(_unknown_key(key, [run for run, _ in results]))

    comparable: dict[tuple[Measurement, str], list[RunResult]] = defaultdict(list)
    for run, result in results:
        comparable[result.measurement, result.primary_metric].append((run, result))
    # Within a data set, the table of the primary extractor comes first.
    ordered = sorted(comparable.items(), key=lambda item: (item[0][0].data, _position_in_record(item[1])))
    tables = [_build_table(members, options) for _, members in ordered]
    num_rows = Counter(table.measurement.data for table in tables for _ in table.rows)
    return sorted(tables, key=lambda t: (-num_rows[t.measurement.data], t.measurement.data, -len(t.rows)))


def _position_in_record(results: list[RunResult]) -> int:
    """Return the lowest position of the results in their records, where results of the primary extractor come first."""
    return min(
        next((k for k, other in enumerate(run.record.results) if other.id == result.id), 0) for run, result in results
    )


def _unknown_key(key: str, runs: list[RunFolder]) -> str:
    names = [name for table in differing_settings(runs) for name in table.names]
    names.sort(key=lambda name: not is_model_setting(name))
    differing = f" Settings that differ: {', '.join(names[:12])}." if names else " No settings differ."
    known = [*names, *(name.rsplit("._target_", 1)[0] for name in names), *(n.rsplit(".", 1)[0] for n in names)]
    close = get_close_matches(key.replace("/", "."), known, 1)
    advice = f" Did you mean {close[0]}?" if close else differing
    return f"group_by={key}: no run has this setting.{advice}"


def _build_table(results: list[RunResult], options: ComparisonOptions) -> RankingTable:
    groups = group_by_seed(results, options.group_by)
    rows = [
        TableRow(group, None, sampling=sampling)
        for group, sampling in zip(groups, distinguishing_settings(groups), strict=True)
    ]
    baselines = [
        row for row in rows if row.run.record.family == BASELINE_FAMILY and formatting.is_finite(row.metric.value)
    ]
    rows = [replace(row, status=_status(row, baselines)) for row in rows]
    rows.sort(key=lambda row: (row.status in UNRANKED, badness(row), row.run.label, row.result.id))
    ranked: list[TableRow] = []
    for row in rows:
        rank = None
        if row.status not in UNRANKED and not row.metric.unordered:
            tied = ranked and ranked[-1].rank is not None and badness(ranked[-1]) == badness(row)
            rank = ranked[-1].rank if tied else len(ranked) + 1
        ranked.append(replace(row, rank=rank))
    _, first = results[0]
    return RankingTable(first.measurement, first.primary_metric, _with_tests(ranked))


def _status(row: TableRow, baselines: list[TableRow]) -> str:
    if not formatting.is_finite(row.metric.value):
        return NO_VALUE
    networks = row.run.record.training.get("perceptual_networks")
    extractor = (row.result.measurement.extractor, row.result.measurement.extractor_hash)
    if isinstance(networks, list) and any(name in networks for name in extractor):
        return TRAINED_WITH_EXTRACTOR
    if row.run.record.family == BASELINE_FAMILY:
        return BASELINE
    if not baselines or row.metric.unordered:
        return ""
    # Half-width of the interval of a difference between two independent estimates.
    interval = math.hypot(half_width(row.metric), fmean(half_width(other.metric) for other in baselines))
    difference = badness(row) - fmean(map(badness, baselines))
    if difference and abs(difference) < interval:
        return NEAR_BASELINE
    return NOT_BETTER if difference >= 0 else ""


def _with_tests(rows: list[TableRow]) -> list[TableRow]:
    """Add test results to the ranked rows among ``rows`` (best first) that have enough training seeds."""
    samples = [row.group.values_by_seed(row.result.primary_metric) if row.rank is not None else None for row in rows]
    samples = [sample and badness_of_seeds(sample, row.metric) for sample, row in zip(samples, rows, strict=True)]
    p_values = adjusted_p_values(samples)
    if not any(p_value is not None for p_value in p_values):
        return rows
    best = next(k for k, sample in enumerate(samples) if sample is not None and len(sample) >= MIN_SEEDS)
    best_rank = rows[best].rank or 0
    return [
        replace(row, comparison=ComparisonToBest(best_rank, p_value)) if p_value is not None or k == best else row
        for k, (row, p_value) in enumerate(zip(rows, p_values, strict=True))
    ]


def badness(row: TableRow) -> float:
    """Return the sort key of a row (lower is better), the mean of `badness_of_seeds` over training runs."""
    values = row.group.values_by_training(row.result.primary_metric)
    return fmean(badness_of_seeds(values, row.metric)) if values else math.inf


def badness_of_seeds(values: list[float], metric: Metric) -> list[float]:
    """Convert values of ``metric`` so that lower is better. With a target, return the distance of each value from it.

    The distance of the mean from the target would be misleading, since errors of opposite sign cancel.
    """
    if metric.target is not None:
        return [abs(value - metric.target) for value in values]
    sign = 0.0 if metric.higher_is_better is None else -1.0 if metric.higher_is_better else 1.0
    return [sign * value for value in values]


# Comparing tables


def explain_separate_tables(tables: list[RankingTable]) -> str:
    """Describe how the protocol of each table differs from that of the first table on the same data."""
    first: dict[str, tuple[int, RankingTable]] = {}
    sentences = []
    for number, table in enumerate(tables, 1):
        data = table.measurement.data
        if data not in first:
            first[data] = (number, table)
            if number > 1:
                names = [name for name in tables[0].measurement.differences(table.measurement) if name != "data"]
                titles = formatting.join_names([*map(formatting.field_title, names)])
                further = f", and also differs in {titles}" if names else ""
                sentences.append(f"Table {number} uses a different data set, {data}{further}.")
            continue
        number_of_first, other = first[data]
        differences = formatting.describe_differences(other.measurement.differences(table.measurement))
        differences = differences or f"the primary metric ({table.primary_metric})"
        sentences.append(f"Table {number} differs from table {number_of_first} in {differences}.")
    return " ".join(sentences)


MAX_NAMED_PAIRS = 5


def metric_disagreements(tables: list[RankingTable], *, beyond_intervals: bool = False) -> list[str]:
    """For each pair of tables of the same samples, describe which rows the two metrics rank in a different order.

    Args:
        tables: the tables of a comparison.
        beyond_intervals: describe only disagreements beyond the confidence intervals of both metrics.
    """
    sentences = []
    for (i, a), (j, b) in combinations(enumerate(tables, 1), 2):
        if set(a.measurement.differences(b.measurement)) - {"extractor", "extractor_hash", "resize"}:
            continue
        rows_a, rows_b = _rows_by_samples(a), _rows_by_samples(b)
        shared = [key for key in rows_a if key in rows_b]
        swapped = [
            (x, y)
            for x, y in combinations(shared, 2)
            if (badness(rows_a[x]) - badness(rows_a[y])) * (badness(rows_b[x]) - badness(rows_b[y])) < 0
        ]
        if not swapped:
            continue
        clear = [(x, y) for x, y in swapped if all(_intervals_apart(rows[x], rows[y]) for rows in (rows_a, rows_b))]
        if beyond_intervals and not clear:
            continue
        names = dict(zip(shared, short_names([rows_a[key] for key in shared]), strict=True))
        named = [f"{names[x]} and {names[y]}" for x, y in (clear or swapped)[:MAX_NAMED_PAIRS]]
        num_unnamed = len(clear or swapped) - len(named)
        sentences.append(
            f"{formatting.title(a.primary_metric)} (table {i}) and {formatting.title(b.primary_metric)} (table {j})"
            f" order {len(swapped)} of {len(shared) * (len(shared) - 1) // 2} pairs of rows differently,"
            f" {len(clear) or 'none'} of them beyond the confidence intervals of both metrics: {'; '.join(named)}"
            + (f"; and {num_unnamed} more." if num_unnamed else ".")
        )
    return sentences


def _rows_by_samples(table: RankingTable) -> dict[tuple[str, str], TableRow]:
    """Return the ranked rows, with the samples (run folders and sampling settings) as keys."""
    return {
        (" ".join(sorted(str(run.folder) for run, _ in row.group.members)), row.result.generation.id): row
        for row in table.rows
        if row.rank is not None
    }


def _intervals_apart(a: TableRow, b: TableRow) -> bool:
    return abs(badness(a) - badness(b)) > math.hypot(half_width(a.metric), half_width(b.metric))


def runs_without_results(runs: Iterable[RunFolder]) -> list[RunFolder]:
    """Return the runs whose records contain no results."""
    return [run for run in runs if not run.record.results]
