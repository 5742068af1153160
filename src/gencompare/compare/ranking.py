"""Which metrics may be ranked against each other, in what order, and which differences are resolved."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import combinations
from statistics import fmean

from gencompare.compare import formatting
from gencompare.compare.load_runs import LoadedRuns, ResultView, RunFolder
from gencompare.compare.sampler_description import sampler_descriptions
from gencompare.compare.settings import differences, of_model
from gencompare.compare.statistics import (
    LEVEL,
    MIN_SEEDS,
    SeedGroup,
    Verdict,
    flags_of,
    seed_groups,
    values_of,
    verdicts,
)
from gencompare.compare.suggestions import trained_alike
from gencompare.errors import UserError
from gencompare.records import Measurement, Metric, Result


@dataclass(frozen=True)
class PublishedResult:
    """What a paper reports of one model. None where it says nothing, or where it was not looked up."""

    model: str
    source: str
    """The paper, with the table where it is known."""
    fid: float | None = None
    """Of 50,000 samples against the training images, on the standard Inception network."""
    bpd: float | None = None
    """Bits/dim of test images: exact or a bound, as the paper has it."""
    nfe: float | None = None
    """Network calls a sample."""
    images: float | None = None
    """Training images seen."""
    note: str = ""


def published_results(data: str) -> list[PublishedResult]:
    """The published figures of the data set called ``data``, by FID and then bits/dim; none for most data sets."""
    found = [PublishedResult(**entry) for entry in _file().get(data, [])]
    return sorted(found, key=lambda a: (a.fid is None, a.fid if a.fid is not None else a.bpd))


@cache
def _file() -> dict[str, list[dict]]:
    return json.loads(resources.files("gencompare.compare").joinpath("anchors.json").read_text(encoding="utf-8"))


BASELINE = "gaussian"
"""The family that a learned one must beat."""

NOT_LEARNED = "not learned"
UNDECIDED = "undecided"
NO_VALUE = "no figure"
OVERLAP = "trained against the extractor"
EXCLUDED = {
    NOT_LEARNED: "Not learned: no better than the Gaussian baseline",
    OVERLAP: "Not ranked: trained against the network that measures",
    NO_VALUE: "Not ranked: the figure is missing or not finite",
}
"""Standings that are listed below the ranking, each with its heading."""


@dataclass(frozen=True)
class TableRow:
    """One line of a table in its place: a result of one run, or the mean of runs that differ in seeds alone."""

    line: SeedGroup
    rank: int | None
    """1 is best; equal figures share a rank. None for a row that is not ranked."""
    standing: str = ""
    """``baseline``, `UNDECIDED`, a key of `ASIDE`, or empty."""
    verdict: Verdict | None = None
    """How the row stands to the best one that was tested; None for a row of too few training seeds."""
    way: str = ""
    """How it was sampled, as far as that sets it apart from other rows of its training (`ways.ways`)."""

    @property
    def run(self) -> RunFolder:
        return self.line.run

    @property
    def result(self) -> Result:
        return self.line.result

    @property
    def title(self) -> str:
        """What the row is called outside of its table: in charts and their legends."""
        return " · ".join(part for part in (self.run.title, self.way) if part)

    @property
    def metric(self) -> Metric:
        return self.result.metrics.get(self.result.primary_metric, Metric(None))

    @property
    def flags(self) -> list[str]:
        """Warnings of the evaluation about the samples, or about the network that measured them."""
        return flags_of(self.result)


@dataclass(frozen=True)
class TableSection:
    """Rows that were measured in the same way: ranked first, then those of `EXCLUDED`."""

    measurement: Measurement
    primary_metric: str
    rows: list[TableRow]

    @property
    def baseline(self) -> list[TableRow]:
        return [row for row in self.rows if row.standing == "baseline"]

    def sections(self) -> list[tuple[str, list[TableRow]]]:
        """(heading, rows); the ranking itself has no heading."""
        parts = [("", [row for row in self.rows if row.standing not in EXCLUDED])]
        parts += [(heading, [row for row in self.rows if row.standing == key]) for key, heading in EXCLUDED.items()]
        return [part for part in parts if part[1]]

    def metrics(self) -> list[str]:
        """Names of all figures, the primary_metric first."""
        names = {name for row in self.rows for name in row.result.metrics}
        return [self.primary_metric, *sorted(names - {self.primary_metric}, key=formatting.format_place)]

    def notes(self) -> list[str]:
        """What a reader must know before believing the ranking."""
        return [*self._on_the_baseline(), *self._on_seeds(), *self._on_significance()]

    def _on_seeds(self) -> list[str]:
        mixed = [
            f"{row.run.label}: its runs differ in more than seeds ({_few(row.line.mixed)}). It is their mean, without"
            " an interval and untested: such a spread says nothing of another training."
            for row in self.rows
            if row.line.mixed
        ]
        several = [row for row in self.rows if len(row.line.seeds) > 1 and not row.line.mixed]
        if not several:
            return mixed
        said = (
            "A row of several training seeds shows the mean and its 95 % interval over seeds (Student's t), never the"
            " best of them."
        )
        if self.rows[0].metric.target is not None:
            said += " Rows are ordered by how far from 1 the figures of their seeds are, on average."
        if any(len(row.line.seeds) < 2 for row in self.rows):
            said += " A row of one seed shows the interval of sampling alone: another training may differ by more."
        return [*mixed, said]

    def _on_significance(self) -> list[str]:
        """What was tested, or why nothing was."""
        ranked = [row for row in self.rows if row.rank is not None]
        if len(ranked) < 2:
            return []
        tested = [row for row in ranked if row.verdict is not None]
        if not tested:
            return [
                f"No difference is claimed to be significant: that takes two rows of at least {MIN_SEEDS} training"
                " seeds each. The intervals are all there is to go by."
            ]
        first = next(row for row in tested if row.verdict is not None and row.verdict.p is None)
        said = (
            f"Tested with the training seed as the unit: Welch's t test of every pair of the {len(tested)} rows with at"
            f" least {MIN_SEEDS} training seeds, Holm's correction over all pairs, level {LEVEL:g}; shown is each row"
            f" against #{first.rank}. A row that cannot be told apart from it may be as good, or better."
        )
        if len(tested) < len(ranked):
            said += " Of the other rows, no significance is claimed."
        return [said]

    def _on_the_baseline(self) -> list[str]:
        title = formatting.title(self.primary_metric)
        if self.measurement.conditioning not in ("unconditional", "labels"):
            return []  # the baseline takes no other condition
        if not self.baseline:
            return [
                f"The {BASELINE} baseline is missing under this protocol, so nothing here says whether a family has"
                f" learned more than class-wise Gaussians. Add it: {trained_alike(BASELINE, self)}"
            ]
        if any(row.standing == UNDECIDED for row in self.rows):
            return [
                f"A row marked '{UNDECIDED}' cannot be distinguished from the Gaussian baseline by {title} here: they"
                " differ by less than their 95 % intervals. More samples (evaluation.n) make these narrower."
            ]
        return []

    def flags(self) -> list[str]:
        """The warnings about its rows, each with the rows that it is about."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for flag in row.flags:
                labels = found.setdefault(flag, [])
                labels += [row.run.label] if row.run.label not in labels else []
        return [f"{', '.join(labels)}: {flag}" for flag, labels in found.items()]


def half_width(metric: Metric) -> float:
    """Half of the interval of ``metric``; 0 where it has none."""
    return (
        (metric.interval[1] - metric.interval[0]) / 2 if formatting.format_interval(metric) and metric.interval else 0.0
    )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def rank(runs: Iterable[RunFolder], view: ResultView = ResultView()) -> list[TableSection]:
    """Results of ``runs`` in groups of equal `Measurement` (and primary_metric): the data set with the most rows first.

    Raises `UserError` when ``view`` names a figure that no result has, or a config key that no run has.
    """
    pairs = [(run, result) for run in runs for result in run.record.results]
    if view.metric is not None:
        known = sorted({name for _, result in pairs for name in result.metrics}, key=formatting.format_place)
        if view.metric not in known:
            raise UserError(f"metric={view.metric}: no result has this figure. There are: {', '.join(known)}.")
        pairs = [(run, replace(result, primary_metric=view.metric)) for run, result in pairs]
    for key in view.by:
        if pairs and all(values_of(run, (key,)) is None for run, _ in pairs):
            raise UserError(_no_such_key(key, [run for run, _ in pairs]))

    alike: dict[tuple[Measurement, str], list[tuple[RunFolder, Result]]] = defaultdict(list)
    for run, result in pairs:
        alike[result.measurement, result.primary_metric].append((run, result))
    in_order = sorted(alike.items(), key=lambda part: (part[0][0].data, _place(part[1])))
    groups = [_group(part, view) for _, part in in_order]
    size = Counter(group.measurement.data for group in groups for _ in group.rows)
    return sorted(groups, key=lambda g: (-size[g.measurement.data], g.measurement.data, -len(g.rows)))


def _place(pairs: list[tuple[RunFolder, Result]]) -> int:
    """Where these results come in their records: the primary extractor's are listed first."""
    return min(
        next((k for k, other in enumerate(run.record.results) if other.id == result.id), 0) for run, result in pairs
    )


def ranked(gathered: LoadedRuns) -> list[TableSection]:
    """`rank` of what was gathered, computed once for the page and all files."""
    if gathered.groups is None:
        gathered.groups = rank(gathered.runs, gathered.view)
    return gathered.groups


def _no_such_key(key: str, runs: list[RunFolder]) -> str:
    differing = sorted(
        (name for table in differences(runs) for name in table.names), key=lambda name: not of_model(name)
    )
    said = f"by={key}: no run has this setting."
    return said + (f" Settings that differ: {', '.join(differing[:12])}." if differing else " No setting differs.")


def by_primary_metric(groups: list[TableSection]) -> str:
    """Why the tables are not one: in which fields each protocol differs from the first one of the same data."""
    first: dict[str, tuple[int, TableSection]] = {}
    said = []
    for k, group in enumerate(groups, 1):
        data = group.measurement.data
        if data not in first:
            first[data] = (k, group)
            if k > 1:
                names = [name for name in groups[0].measurement.differences(group.measurement) if name != "data"]
                others = f" (and so differs from table 1 in {formatting.listed(names)} too)" if names else ""
                said.append(f"Table {k} is of other data, {data}{others}.")
            continue
        number, other = first[data]
        differences = formatting.unlike(other.measurement.differences(group.measurement))
        said.append(
            f"Table {k} differs from table {number} in {differences or f'primary_metric ({group.primary_metric})'}."
        )
    return " ".join(said)


def disagreements(groups: list[TableSection]) -> list[str]:
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
            f"{formatting.title(a.primary_metric)} (table {i}) and {formatting.title(b.primary_metric)} (table {j}) disagree about"
            f" the order of {len(swapped)} of {len(shared) * (len(shared) - 1) // 2} pairs of rows,"
            f" {len(clear) or 'none'} of them beyond the intervals of both: {'; '.join(named)}"
            + (f"; and {more} more." if more else ".")
        )
    return found


NAMED_PAIRS = 5


def _places(group: TableSection) -> dict[tuple[str, str], TableRow]:
    """The ranked rows, by what they are of: their runs, and how these were sampled."""
    return {
        (" ".join(sorted(str(run.folder) for run, _ in row.line.members)), row.result.generation.id): row
        for row in group.rows
        if row.rank is not None
    }


def _clear(a: TableRow, b: TableRow) -> bool:
    return abs(badness(a) - badness(b)) > math.hypot(half_width(a.metric), half_width(b.metric))


def without_metrics(runs: Iterable[RunFolder]) -> list[RunFolder]:
    return [run for run in runs if not run.record.results]


def _group(pairs: list[tuple[RunFolder, Result]], view: ResultView) -> TableSection:
    primary_metric = pairs[0][1].primary_metric
    found = seed_groups(pairs, view.by)
    rows = [TableRow(line, None, way=way) for line, way in zip(found, sampler_descriptions(found), strict=True)]
    baseline = [row for row in rows if row.run.record.family == BASELINE and formatting.format_finite(row.metric.value)]
    rows = [replace(row, standing=_standing(row, baseline)) for row in rows]
    rows.sort(key=lambda row: (row.standing in EXCLUDED, badness(row), row.run.label, row.result.id))
    ordered: list[TableRow] = []
    for row in rows:
        place = None
        if row.standing not in EXCLUDED and not row.metric.unordered:
            tied = ordered and ordered[-1].rank is not None and badness(ordered[-1]) == badness(row)
            place = ordered[-1].rank if tied else len(ordered) + 1
        ordered.append(replace(row, rank=place))
    return TableSection(pairs[0][1].measurement, primary_metric, _tested(ordered))


def _tested(rows: list[TableRow]) -> list[TableRow]:
    """``rows``, best first, with a `Verdict` for each that is ranked and has training seeds enough."""
    samples = [row.line.by_seed(row.result.primary_metric) if row.rank is not None else None for row in rows]
    samples = [s and _off(s, row.metric) for s, row in zip(samples, rows, strict=True)]
    found = verdicts(samples)
    if not any(p is not None for p in found):
        return rows
    first = next(k for k, sample in enumerate(samples) if sample is not None and len(sample) >= MIN_SEEDS)
    reference = rows[first].rank or 0
    return [
        replace(row, verdict=Verdict(reference, p)) if p is not None or k == first else row
        for k, (row, p) in enumerate(zip(rows, found, strict=True))
    ]


def _standing(row: TableRow, baseline: list[TableRow]) -> str:
    if not formatting.format_finite(row.metric.value):
        return NO_VALUE
    against = row.run.record.training.get("perceptual_networks")
    measuring = (row.result.measurement.extractor, row.result.measurement.extractor_hash)
    if isinstance(against, list) and any(name in against for name in measuring):
        return OVERLAP
    if row.run.record.family == BASELINE:
        return "baseline"
    if not baseline or row.metric.unordered:
        return ""
    # The interval of a difference between two independent estimates.
    reach = math.hypot(half_width(row.metric), fmean(half_width(other.metric) for other in baseline))
    difference = badness(row) - fmean(map(badness, baseline))
    if difference and abs(difference) < reach:
        return UNDECIDED
    return NOT_LEARNED if difference >= 0 else ""


def badness(row: TableRow) -> float:
    """A number that is lower for a better row: the mean of what is tested, over its trainings."""
    values = row.line.by_training(row.result.primary_metric)
    return fmean(_off(values, row.metric)) if values else math.inf


def _off(values: list[float], metric: Metric) -> list[float]:
    """Figures such that the lower is the better. Where 1 is the ideal value, that is each one's own distance from it:
    the distance of their mean would praise luck."""
    if metric.target is not None:
        return [abs(value - metric.target) for value in values]
    sign = 0.0 if metric.higher_is_better is None else -1.0 if metric.higher_is_better else 1.0
    return [sign * value for value in values]
