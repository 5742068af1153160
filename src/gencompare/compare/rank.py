"""Which figures may be ranked against each other, in what order, and which families have learned anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from gencompare.compare import words
from gencompare.compare.gather import Run
from gencompare.compare.seeds import Line, lines
from gencompare.protocol import Measurement
from gencompare.records import Metric, Result

BASELINE = "gaussian"
"""The family that a learned one must beat."""

NEAR_FLOOR = 3.0
"""Below this multiple of the real-against-real floor the baseline's own figure says little about what was learned."""

NOT_LEARNED = "not learned"
UNDECIDED = "undecided"
NO_FIGURE = "no figure"
OVERLAP = "trained against the extractor"
ASIDE = {
    NOT_LEARNED: "Not learned: no better than the Gaussian baseline",
    OVERLAP: "Not ranked: trained against the network that measures",
    NO_FIGURE: "Not ranked: the figure is not finite",
}
"""Standings that are listed below the ranking, each with its heading."""


@dataclass(frozen=True)
class Row:
    """One line of a table in its place: a result of one run, or the mean of runs that differ in seeds alone."""

    line: Line
    rank: int | None
    """1 is best; equal figures share a rank. None for a row that is not ranked."""
    standing: str = ""
    """``baseline``, `UNDECIDED`, a key of `ASIDE`, or empty."""

    @property
    def run(self) -> Run:
        return self.line.run

    @property
    def result(self) -> Result:
        return self.line.result

    @property
    def headline(self) -> Metric:
        return self.result.metrics.get(self.result.headline, Metric(None))


@dataclass(frozen=True)
class Group:
    """Rows that were measured in the same way: ranked first, then those of `ASIDE`."""

    measurement: Measurement
    headline: str
    rows: list[Row]

    @property
    def baseline(self) -> list[Row]:
        return [row for row in self.rows if row.standing == "baseline"]

    @property
    def near_floor(self) -> float | None:
        """The baseline's multiple of the floor, where that is so low that the baseline is no yardstick."""
        return _near_floor([row.headline for row in self.baseline])

    def sections(self) -> list[tuple[str, list[Row]]]:
        """(heading, rows); the ranking itself has no heading."""
        parts = [("", [row for row in self.rows if row.standing not in ASIDE])]
        parts += [(heading, [row for row in self.rows if row.standing == key]) for key, heading in ASIDE.items()]
        return [part for part in parts if part[1]]

    def metrics(self) -> list[str]:
        """Names of all figures, the headline first."""
        names = {name for row in self.rows for name in row.result.metrics}
        return [self.headline, *sorted(names - {self.headline}, key=words.place)]

    def notes(self) -> list[str]:
        """What a reader must know before believing the ranking."""
        return [*self._on_the_baseline(), *self._on_seeds()]

    def _on_seeds(self) -> list[str]:
        several = [row for row in self.rows if len(row.line.seeds) > 1]
        if not several:
            return []
        said = (
            "A row of several training seeds shows the mean and its 95 % interval over seeds (Student's t), never the"
            " best of them."
        )
        if len(several) < len(self.rows):
            said += " A row of one seed shows the interval of sampling alone: another training may differ by more."
        return [said]

    def _on_the_baseline(self) -> list[str]:
        title = words.title(self.headline)
        if self.measurement.conditioning not in ("unconditional", "labels"):
            return []  # the baseline takes no other condition
        if not self.baseline:
            return [
                f"The {BASELINE} baseline is missing under this protocol, so nothing here says whether a family has"
                f" learned more than class-wise Gaussians. Add it: {self.baseline_command()}"
            ]
        if self.near_floor is not None:
            return [
                f"On {self.measurement.data} the Gaussian baseline itself reaches {words.times(self.near_floor)} times"
                f" the real-against-real floor, so {title} can hardly tell a Gaussian from real images here. A row"
                f" above the baseline is therefore marked '{UNDECIDED}', not '{NOT_LEARNED}': read its other figures"
                " and look at its samples."
            ]
        return []

    def flags(self) -> list[str]:
        """What the evaluation found odd about a row's samples, or about the network that measured them."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            flags = row.result.details.get("flags")
            for flag in flags if isinstance(flags, list) else []:
                labels = found.setdefault(str(flag), [])
                labels += [row.run.label] if row.run.label not in labels else []
        return [f"{', '.join(labels)}: {flag}" for flag, labels in found.items()]

    def baseline_command(self) -> str:
        """The command that trains and measures the baseline like these rows."""
        choices = self.rows[0].run.record.config.get("choices", {})
        choices = choices if isinstance(choices, dict) else {}
        parts = [f"model={BASELINE}", f"data={choices.get('data') or self.measurement.data}"]
        if choices.get("evaluation", "default") != "default":
            parts.append(f"evaluation={choices['evaluation']}")
        if self.measurement.conditioning == "labels":
            parts.append("model.conditional=true")
        return " ".join(["python run.py", *parts])


def rank(runs: Iterable[Run]) -> list[Group]:
    """Results of ``runs`` in groups of equal `Measurement` (and headline): the data set with the most rows first."""
    pairs = [(run, result) for run in runs for result in run.record.results]

    def protocol(pair: tuple[Run, Result]) -> tuple[str, str, str]:
        measurement = pair[1].measurement
        return measurement.data, measurement.id, pair[1].headline

    groups = [_group(list(part)) for _, part in groupby(sorted(pairs, key=protocol), key=protocol)]
    size = Counter(group.measurement.data for group in groups for _ in group.rows)
    return sorted(groups, key=lambda g: (-size[g.measurement.data], g.measurement.data, -len(g.rows)))


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


def _group(pairs: list[tuple[Run, Result]]) -> Group:
    headline = pairs[0][1].headline
    baseline = [r.metrics.get(headline, Metric(None)) for run, r in pairs if run.record.family == BASELINE]
    baseline = [metric for metric in baseline if words.finite(metric.value)]
    rows = [Row(line, None, _standing(line.run, line.result, baseline)) for line in lines(pairs)]
    rows.sort(key=lambda row: (row.standing in ASIDE, _badness(row.headline), row.run.label, row.result.id))
    ordered: list[Row] = []
    for row in rows:
        place = None
        if row.standing not in ASIDE and row.headline.better is not None:
            tied = ordered and ordered[-1].rank is not None and _badness(ordered[-1].headline) == _badness(row.headline)
            place = ordered[-1].rank if tied else len(ordered) + 1
        ordered.append(Row(row.line, place, row.standing))
    return Group(pairs[0][1].measurement, headline, ordered)


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
    if not baseline or metric.better is None or _badness(metric) < fmean(map(_badness, baseline)):
        return ""
    return UNDECIDED if _near_floor(baseline) is not None else NOT_LEARNED


def _near_floor(baseline: list[Metric]) -> float | None:
    multiples = [m.over_floor for m in baseline if m.better == "lower" and m.over_floor is not None]
    return fmean(multiples) if multiples and fmean(multiples) < NEAR_FLOOR else None


def _badness(metric: Metric) -> float:
    """A number that is lower for a better figure."""
    if metric.value is None or not math.isfinite(metric.value):
        return math.inf
    return {"lower": metric.value, "higher": -metric.value, "one": abs(metric.value - 1)}.get(metric.better or "", 0.0)
