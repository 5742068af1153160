"""Which figures may be ranked against each other, in what order, and which families have learned anything."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
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
    half_width,
)
from gencompare.compare.seeds import lines, values_of
from gencompare.compare.settings import differences, of_model
from gencompare.compare.significance import LEAST_SEEDS, Verdict, verdicts
from gencompare.compare.ways import ways
from gencompare.errors import UserError
from gencompare.protocol import Measurement
from gencompare.records import Result


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

    alike: dict[tuple[Measurement, str], list[tuple[Run, Result]]] = defaultdict(list)
    for run, result in pairs:
        alike[result.measurement, result.headline].append((run, result))
    in_order = sorted(alike.items(), key=lambda part: (part[0][0].data, _place(part[1]), part[0][0].id, part[0][1]))
    groups = [_group(part, view) for _, part in in_order]
    size = Counter(group.measurement.data for group in groups for _ in group.rows)
    return sorted(groups, key=lambda g: (-size[g.measurement.data], g.measurement.data, -len(g.rows)))


def _place(pairs: list[tuple[Run, Result]]) -> int:
    """Where these results come in their records: the primary extractor's are listed first."""
    return min(
        next((k for k, other in enumerate(run.record.results) if other.id == result.id), 0) for run, result in pairs
    )


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


def disagreements(groups: list[Group]) -> list[str]:
    """Where two metrics of the same samples disagree about the order of rows, a sentence for each pair of tables."""
    found = []
    for (i, a), (j, b) in combinations(enumerate(groups, 1), 2):
        if set(a.measurement.differences(b.measurement)) - {"extractor", "extractor_hash", "resize"}:
            continue
        first, second = (_places(group) for group in (a, b))
        shared = [key for key in first if key in second]
        swapped = [
            (x, y)
            for x, y in combinations(shared, 2)
            if (badness(first[x]) - badness(first[y])) * (badness(second[x]) - badness(second[y])) < 0
        ]
        if not swapped:
            continue
        clear = [pair for pair in swapped if all(_clear(rows[pair[0]], rows[pair[1]]) for rows in (first, second))]
        named = [f"{first[x].title} and {first[y].title}" for x, y in (clear or swapped)[:NAMED_PAIRS]]
        more = len(clear or swapped) - len(named)
        found.append(
            f"{words.title(a.headline)} (table {i}) and {words.title(b.headline)} (table {j}) disagree about the order"
            f" of {len(swapped)} of {len(shared) * (len(shared) - 1) // 2} pairs of rows,"
            f" {len(clear) or 'none'} of them beyond the intervals of both: {'; '.join(named)}"
            + (f"; and {more} more." if more else ".")
        )
    return found


NAMED_PAIRS = 5


def _places(group: Group) -> dict[tuple[str, str], Row]:
    """The ranked rows, by what they are of: their runs, and how these were sampled."""
    return {
        (" ".join(sorted(str(run.folder) for run, _ in row.line.members)), row.result.generation.id): row
        for row in group.rows
        if row.rank is not None
    }


def _clear(a: Row, b: Row) -> bool:
    return abs(badness(a) - badness(b)) > math.hypot(half_width(a.headline), half_width(b.headline))


def without_figures(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if not run.record.results]


def _group(pairs: list[tuple[Run, Result]], view: View) -> Group:
    headline = pairs[0][1].headline
    found = lines(pairs, view.by)
    rows = [Row(line, None, way=way) for line, way in zip(found, ways(found), strict=True)]
    baseline = [row for row in rows if row.run.record.family == BASELINE and words.finite(row.headline.value)]
    rows = [replace(row, standing=_standing(row, baseline)) for row in rows]
    rows.sort(key=lambda row: (row.standing in ASIDE, badness(row), row.run.label, row.result.id))
    ordered: list[Row] = []
    for row in rows:
        place = None
        if row.standing not in ASIDE and row.headline.better is not None:
            tied = ordered and ordered[-1].rank is not None and badness(ordered[-1]) == badness(row)
            place = ordered[-1].rank if tied else len(ordered) + 1
        ordered.append(replace(row, rank=place))
    return Group(pairs[0][1].measurement, headline, _tested(ordered))


def _tested(rows: list[Row]) -> list[Row]:
    """``rows``, best first, with a `Verdict` for each that is ranked and has training seeds enough."""
    samples = [row.line.by_seed(row.result.headline) if row.rank is not None else None for row in rows]
    samples = [s and _off(s, row.headline.better) for s, row in zip(samples, rows, strict=True)]
    found = verdicts(samples)
    if not any(p is not None for p in found):
        return rows
    first = next(k for k, sample in enumerate(samples) if sample is not None and len(sample) >= LEAST_SEEDS)
    reference = rows[first].rank or 0
    return [
        replace(row, verdict=Verdict(reference, p)) if p is not None or k == first else row
        for k, (row, p) in enumerate(zip(rows, found, strict=True))
    ]


def _standing(row: Row, baseline: list[Row]) -> str:
    if not words.finite(row.headline.value):
        return NO_FIGURE
    against = row.run.record.training.get("trained_against")
    measuring = (row.result.measurement.extractor, row.result.measurement.extractor_hash)
    if isinstance(against, list) and any(name in against for name in measuring):
        return OVERLAP
    if row.run.record.family == BASELINE:
        return "baseline"
    if not baseline or row.headline.better is None:
        return ""
    # The interval of a difference between two independent estimates.
    reach = math.hypot(half_width(row.headline), fmean(half_width(other.headline) for other in baseline))
    difference = badness(row) - fmean(map(badness, baseline))
    if difference and abs(difference) < reach:
        return UNDECIDED
    return NOT_LEARNED if difference >= 0 else ""


def badness(row: Row) -> float:
    """A number that is lower for a better row: the mean of what is tested, over its trainings."""
    values = row.line.by_training(row.result.headline)
    return fmean(_off(values, row.headline.better)) if values else math.inf


def _off(values: list[float], better: str | None) -> list[float]:
    """Figures such that the lower is the better. Where 1 is the ideal value, that is each one's own distance from it:
    the distance of their mean would praise luck."""
    signs = {"lower": lambda value: value, "higher": lambda value: -value, "one": lambda value: abs(value - 1)}
    return [signs[better](value) if better in signs else 0.0 for value in values]
