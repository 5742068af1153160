"""A table of a comparison: its rows in their places, and what a reader must know before believing their order."""

from __future__ import annotations

from dataclasses import dataclass

from gencompare.compare import words
from gencompare.compare.gather import Run
from gencompare.compare.remedy import trained_alike
from gencompare.compare.seeds import Line, flags_of
from gencompare.compare.significance import LEAST_SEEDS, LEVEL, Verdict
from gencompare.protocol import Measurement
from gencompare.records import Metric, Result

BASELINE = "gaussian"
"""The family that a learned one must beat."""

NOT_LEARNED = "not learned"
UNDECIDED = "undecided"
NO_FIGURE = "no figure"
OVERLAP = "trained against the extractor"
ASIDE = {
    NOT_LEARNED: "Not learned: no better than the Gaussian baseline",
    OVERLAP: "Not ranked: trained against the network that measures",
    NO_FIGURE: "Not ranked: the figure is missing or not finite",
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
    verdict: Verdict | None = None
    """How the row stands to the best one that was tested; None for a row of too few training seeds."""
    way: str = ""
    """How it was sampled, as far as that sets it apart from other rows of its training (`ways.ways`)."""

    @property
    def run(self) -> Run:
        return self.line.run

    @property
    def result(self) -> Result:
        return self.line.result

    @property
    def title(self) -> str:
        """What the row is called outside of its table: in charts and their legends."""
        return " · ".join(part for part in (self.run.title, self.way) if part)

    @property
    def headline(self) -> Metric:
        return self.result.metrics.get(self.result.headline, Metric(None))

    @property
    def flags(self) -> list[str]:
        """Warnings of the evaluation about the samples, or about the network that measured them."""
        return flags_of(self.result)


@dataclass(frozen=True)
class Group:
    """Rows that were measured in the same way: ranked first, then those of `ASIDE`."""

    measurement: Measurement
    headline: str
    rows: list[Row]

    @property
    def baseline(self) -> list[Row]:
        return [row for row in self.rows if row.standing == "baseline"]

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
        if self.rows[0].headline.better == "one":
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
                f"No difference is claimed to be significant: that takes two rows of at least {LEAST_SEEDS} training"
                " seeds each. The intervals are all there is to go by."
            ]
        first = next(row for row in tested if row.verdict is not None and row.verdict.p is None)
        said = (
            f"Tested with the training seed as the unit: Welch's t test of every pair of the {len(tested)} rows with at"
            f" least {LEAST_SEEDS} training seeds, Holm's correction over all pairs, level {LEVEL:g}; shown is each row"
            f" against #{first.rank}. A row that cannot be told apart from it may be as good, or better."
        )
        if len(tested) < len(ranked):
            said += " Of the other rows, no significance is claimed."
        return [said]

    def _on_the_baseline(self) -> list[str]:
        title = words.title(self.headline)
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
    return (metric.interval[1] - metric.interval[0]) / 2 if words.interval(metric) and metric.interval else 0.0


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
