"""Which figures may be ranked against each other, in what order, and which families have learned anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from statistics import fmean

from gencompare.compare import words
from gencompare.compare.gather import Gathered, Run, View
from gencompare.compare.group import (
    ASIDE,
    BASELINE,
    NO_FIGURE,
    NOT_LEARNED,
    OVERLAP,
    UNDECIDED,
    Group,
    Row,
    near_floor,
)
from gencompare.compare.seeds import lines, values_of
from gencompare.compare.settings import differences, of_model
from gencompare.compare.significance import LEAST_SEEDS, Verdict, verdicts
from gencompare.compare.ways import ways
from gencompare.errors import UserError
from gencompare.records import Metric, Result


def rank(runs: Iterable[Run], view: View = View()) -> list[Group]:
    """Results of ``runs`` in groups of equal `Measurement` (and headline): the data set with the most rows first.

    Raises `UserError` when ``view`` names a figure that no result has, or a config key that no run has.
    """
    pairs = [(run, result) for run in runs for result in run.record.results]
    if view.metric is not None:
        known = sorted({name for _, result in pairs for name in result.metrics}, key=words.place)
        if view.metric not in known:
            raise UserError(f"metric={view.metric}: no result has this figure. There are: {', '.join(known)}.")
        pairs = [(run, replace(result, headline=view.metric)) for run, result in pairs]
    for key in view.by:
        if pairs and all(values_of(run, (key,)) is None for run, _ in pairs):
            raise UserError(_no_such_key(key, [run for run, _ in pairs]))

    def protocol(pair: tuple[Run, Result]) -> tuple[str, str, str]:
        measurement = pair[1].measurement
        return measurement.data, measurement.id, pair[1].headline

    groups = [_group(list(part), view) for _, part in groupby(sorted(pairs, key=protocol), key=protocol)]
    size = Counter(group.measurement.data for group in groups for _ in group.rows)
    return sorted(groups, key=lambda g: (-size[g.measurement.data], g.measurement.data, -len(g.rows)))


def ranked(gathered: Gathered) -> list[Group]:
    """`rank` of what was gathered, computed once for the page and all files."""
    if gathered.groups is None:
        gathered.groups = rank(gathered.runs, gathered.view)
    return gathered.groups


def _no_such_key(key: str, runs: list[Run]) -> str:
    differing = sorted(
        (name for table in differences(runs) for name in table.names), key=lambda name: not of_model(name)
    )
    said = f"by={key}: no run has this setting."
    return said + (f" Settings that differ: {', '.join(differing[:12])}." if differing else " No setting differs.")


def apart(groups: list[Group]) -> str:
    """Why the tables are not one: in which fields each protocol differs from the first one of the same data."""
    first: dict[str, tuple[int, Group]] = {}
    said = []
    for k, group in enumerate(groups, 1):
        data = group.measurement.data
        if data not in first:
            first[data] = (k, group)
            if k > 1:
                names = [name for name in groups[0].measurement.differences(group.measurement) if name != "data"]
                others = f" (and so differs from table 1 in {words.listed(names)} too)" if names else ""
                said.append(f"Table {k} is of other data, {data}{others}.")
            continue
        number, other = first[data]
        differences = words.unlike(other.measurement.differences(group.measurement))
        said.append(f"Table {k} differs from table {number} in {differences or f'headline ({group.headline})'}.")
    return " ".join(said)


def without_figures(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if not run.record.results]


def _group(pairs: list[tuple[Run, Result]], view: View) -> Group:
    headline = pairs[0][1].headline
    baseline = [r.metrics.get(headline, Metric(None)) for run, r in pairs if run.record.family == BASELINE]
    baseline = [metric for metric in baseline if words.finite(metric.value)]
    found = lines(pairs, view.by)
    rows = [
        Row(line, None, _standing(line.run, line.result, baseline), way=way)
        for line, way in zip(found, ways(found), strict=True)
    ]
    rows.sort(key=lambda row: (row.standing in ASIDE, badness(row.headline), row.run.label, row.result.id))
    ordered: list[Row] = []
    for row in rows:
        place = None
        if row.standing not in ASIDE and row.headline.better is not None:
            tied = ordered and ordered[-1].rank is not None and badness(ordered[-1].headline) == badness(row.headline)
            place = ordered[-1].rank if tied else len(ordered) + 1
        ordered.append(replace(row, rank=place))
    return Group(pairs[0][1].measurement, headline, _tested(ordered))


def _tested(rows: list[Row]) -> list[Row]:
    """``rows``, best first, with a `Verdict` for each that is ranked and has training seeds enough.

    Where 1 is the ideal value, what is tested is how far from 1 each seed's figure is.
    """
    samples = [_figures(row) for row in rows]
    found = verdicts(samples)
    if not any(p is not None for p in found):
        return rows
    first = next(k for k, sample in enumerate(samples) if sample is not None and len(sample) >= LEAST_SEEDS)
    reference = rows[first].rank or 0
    return [
        replace(row, verdict=Verdict(reference, p)) if p is not None or k == first else row
        for k, (row, p) in enumerate(zip(rows, found, strict=True))
    ]


def _figures(row: Row) -> list[float] | None:
    values = row.line.by_seed(row.result.headline) if row.rank is not None else None
    return [abs(value - 1) for value in values] if values and row.headline.better == "one" else values


def _standing(run: Run, result: Result, baseline: list[Metric]) -> str:
    metric = result.metrics.get(result.headline, Metric(None))
    if not words.finite(metric.value):
        return NO_FIGURE
    against = run.record.training.get("trained_against")
    measuring = (result.measurement.extractor, result.measurement.extractor_hash)
    if isinstance(against, list) and any(name in against for name in measuring):
        return OVERLAP
    if run.record.family == BASELINE:
        return "baseline"
    if not baseline or metric.better is None or badness(metric) < fmean(map(badness, baseline)):
        return ""
    return UNDECIDED if near_floor(baseline) is not None else NOT_LEARNED


def badness(metric: Metric) -> float:
    """A number that is lower for a better figure."""
    if metric.value is None or not math.isfinite(metric.value):
        return math.inf
    return {"lower": metric.value, "higher": -metric.value, "one": abs(metric.value - 1)}.get(metric.better or "", 0.0)
