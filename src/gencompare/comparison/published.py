"""Results of papers, and whether runs reproduce them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources

from gencompare.comparison import formatting
from gencompare.errors import UserError
from gencompare.records import Metric, Result, RunRecord

REPORTED, HERE, ELSEWHERE = "reported", "reproduced here", "reproduced elsewhere"
"""Tiers of a published result: nobody measured it with this program; a run trained with its settings by this program
has it; images or weights that another program made have it, measured by this program."""
RELATIVE_TOLERANCE = {"fid": 0.05}
"""Differences that count as agreement, relative to the published value. FIDs of training runs that differ only in seeds
have a coefficient of variation of 1 to 2 % ("The FID lottery", 2026), so 5 % is about twice that of a difference."""
TOLERANCE = {"bpd": 0.015}
"""Absolute differences that count as agreement: papers round to 0.01, and training seeds differ by as much."""
FID_EXTRACTOR = "inception_v3_compat"
FID_IMAGES = 50_000
NEUTRAL_KEYS = ("seed", "task", "paper", "run_dir", "evaluation", "trainer", "hydra", "paths", "logger", "callbacks")
"""Keys of overrides that do not change what a paper describes. The batch size is an exception."""
BATCH_SIZE = "trainer.global_batch_size"


@dataclass(frozen=True)
class PublishedResult:
    """Metrics of one model from a paper. A metric is None if it was not reported or not looked up."""

    model: str
    source: str
    """The paper, with the table number if known."""
    data: str
    name: str = ""
    """Value of ``paper=``; empty if this project has no settings of the model."""
    overrides: tuple[str, ...] = ()
    """The settings of the paper and its evaluation."""
    fid: float | None = None
    """FID of 50,000 samples against the training images with the standard Inception network."""
    bpd: float | None = None
    """Bits/dim of test images, exact or a bound, as reported in the paper."""
    nfe: float | None = None
    """Network evaluations per sample."""
    images: float | None = None
    """Training images seen."""
    note: str = ""


def published_results(data: str) -> list[PublishedResult]:
    """Return published results on data set ``data``, sorted by FID. Results with only bits/dim come last."""
    return sorted(_published().get(data, []), key=lambda r: (r.fid is None, r.fid if r.fid is not None else r.bpd))


def find_published(name: str | None) -> PublishedResult:
    """Return the published result with settings of that name. Raise `UserError` if there is none."""
    known = {result.name: result for results in _published().values() for result in results if result.name}
    if name in known:
        return known[name]
    close = get_close_matches(str(name), known, 1)
    raise UserError(
        f"There are no settings for paper={name}."
        + (f" Did you mean paper={close[0]}?" if close else f" Choose from {', '.join(sorted(known))}.")
    )


@cache
def _published() -> dict[str, list[PublishedResult]]:
    file = resources.files("gencompare.comparison") / "published_results.json"
    return {
        data: [
            PublishedResult(data=data, **entry | {"overrides": tuple(entry.get("overrides", ()))}) for entry in entries
        ]
        for data, entries in json.loads(file.read_text(encoding="utf-8")).items()
    }


@dataclass(frozen=True)
class MetricCheck:
    """A published metric and the measured one."""

    metric: str
    """``fid`` or ``bpd``."""
    published: float
    measured: float | None
    """None if no result of the run was measured as in the paper."""

    @property
    def tolerance(self) -> float:
        relative = RELATIVE_TOLERANCE.get(self.metric)
        return TOLERANCE[self.metric] if relative is None else relative * self.published

    @property
    def agrees(self) -> bool:
        return self.measured is not None and abs(self.measured - self.published) <= self.tolerance

    def __str__(self) -> str:
        title = {"fid": "FID", "bpd": "bits/dim"}[self.metric]
        if self.measured is None:
            return f"{title}: {self.published:g} published, not measured as in the paper"
        relation = "agrees" if self.agrees else "does not agree"
        return (
            f"{title}: {self.published:g} published, {formatting.format_metric(self.measured)} measured, {relation}"
            f" within {self.tolerance:.2g}"
        )


@dataclass(frozen=True)
class Reproduction:
    """Whether a run reproduces a published result."""

    published: PublishedResult
    checks: tuple[MetricCheck, ...]
    changed: tuple[str, ...] = ()
    """Overrides of the run that change the settings of the paper, or settings of the paper that it lacks."""
    external: bool = False
    """Whether the images or weights were made by another program."""

    @property
    def tier(self) -> str:
        if self.changed or not self.checks or not all(check.agrees for check in self.checks):
            return REPORTED
        return ELSEWHERE if self.external else HERE

    def __str__(self) -> str:
        lines = [f"{self.published.model} ({self.published.source}): {self.tier}.", *map(str, self.checks)]
        if self.changed:
            lines.append(f"Not the settings of the paper: {', '.join(self.changed)}")
        return "\n".join(lines)


def check_reproduction(record: RunRecord, published: PublishedResult) -> Reproduction:
    """Compare a run's results with a published one, each measured as in the paper.

    A FID counts if 50,000 samples were compared with all official training images on the Inception network, bits/dim
    if all test images were scored. Of several results the last one counts.
    """
    checks = tuple(
        MetricCheck(metric, value, _last(find(result) for result in record.results))
        for metric, value, find in (("fid", published.fid, _fid), ("bpd", published.bpd, _bits_per_dim))
        if value is not None
    )
    external = record.state == "samples"
    changed = () if external else tuple(_changed_settings(record.overrides, published.overrides))
    return Reproduction(published, checks, changed, external)


def reproductions(records: Iterable[RunRecord]) -> dict[str, Reproduction]:
    """Return the best reproduction of each published result by runs that name it (``paper=NAME``)."""
    found: dict[str, Reproduction] = {}
    tiers = (REPORTED, ELSEWHERE, HERE)
    for record in records:
        try:
            published = find_published(record.config.get("paper"))
        except UserError:
            continue
        new = check_reproduction(record, published)
        old = found.get(published.name)
        if old is None or tiers.index(new.tier) > tiers.index(old.tier):
            found[published.name] = new
    return found


def _last(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return measured[-1] if measured else None


def _fid(result: Result) -> float | None:
    measurement = result.measurement
    as_published = (
        measurement.extractor == FID_EXTRACTOR
        and measurement.num_images == FID_IMAGES
        and measurement.reference == "train+val"
    )
    metric = result.metrics.get("fid")
    return metric.value if metric and as_published else None


def _bits_per_dim(result: Result) -> float | None:
    """Return the lowest bits/dim that was scored on all test images: an exact value, or the tightest bound."""
    scored = [
        metric.value for name, metric in result.metrics.items()
        if name.startswith("bpd_") and _all_test_images(metric) and formatting.is_finite(metric.value)
    ]  # fmt: skip
    return min((value for value in scored if value is not None), default=None)


def _all_test_images(metric: Metric) -> bool:
    images = metric.note.split(";")[0]
    return images.endswith(" test images") and " of " not in images


def _changed_settings(used: Iterable[str], published: Iterable[str]) -> list[str]:
    """Return the overrides that a run has in addition to those of the paper, and those that it lacks."""
    own, expected = [[each for each in overrides if not _is_neutral(each)] for overrides in (used, published)]
    added = [each for each in own if each not in expected]
    return [*added, *(f"without {each}" for each in expected if each not in own)]


def _is_neutral(override: str) -> bool:
    name = override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
    return name != BATCH_SIZE and name.split(".")[0] in NEUTRAL_KEYS
