"""Results of papers, and whether runs reproduce them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

from gencompare.comparison import formatting
from gencompare.comparison.settings import config_settings, flatten
from gencompare.comparison.statistics import NON_MODEL_SETTINGS
from gencompare.errors import UserError
from gencompare.records import Metric, Result, RunRecord

REPORTED, HERE, ELSEWHERE = "reported", "reproduced here", "reproduced elsewhere"
"""Tiers of a published result: no run agrees with it; a run that this program trained with its settings agrees; images
or weights that another program made agree, measured by this program."""
RELATIVE_TOLERANCE = {"fid": 0.05}
"""Differences that count as agreement, relative to the published value. FIDs of training runs that differ only in seeds
have a coefficient of variation of 1 to 2 % ("The FID Lottery", 2026, https://arxiv.org/abs/2606.20536)."""
TOLERANCE = {"bpd": 0.01}
"""Absolute differences that count as agreement: one unit of the last digit that papers report."""
FID_EXTRACTOR = "inception_v3_compat"
FID_IMAGES = 50_000
REPRODUCTION = "reproduction"
"""Key of `Reproduction.summary` in ``RunRecord.model``."""


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
    likelihood: str = ""
    """Name of the estimator of ``bpd`` in ``GenerativeModel.likelihoods``."""
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
    choices = f"choose from {', '.join(sorted(known))}."
    if not name:
        raise UserError(f"task=reproduce needs paper=NAME: {choices}")
    if "," in name:
        raise UserError(f"paper={name}: give one name per command.")
    close = get_close_matches(name, known, 1)
    raise UserError(
        f"There are no settings for paper={name}."
        + (f" Did you mean paper={close[0]}?" if close else f" C{choices[1:]}")
    )


@cache
def _published() -> dict[str, list[PublishedResult]]:
    file = resources.files("gencompare.comparison") / "published_results.json"
    return {
        data: [PublishedResult(data=data, **entry | {"overrides": tuple(entry.get("overrides", ()))}) for entry in each]
        for data, each in json.loads(file.read_text(encoding="utf-8")).items()
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
    """Settings that differ from those of the paper."""
    external: bool = False
    """Whether the images or weights were made by another program."""

    @property
    def tier(self) -> str:
        if self.changed or not self.checks or not all(check.agrees for check in self.checks):
            return REPORTED
        return ELSEWHERE if self.external else HERE

    def summary(self) -> dict[str, Any]:
        """Return what the record of the run keeps."""
        measured = {check.metric: check.measured for check in self.checks}
        return {"paper": self.published.name, "tier": self.tier, "measured": measured, "changed": list(self.changed)}

    def lines(self) -> list[str]:
        lines = [f"{self.published.model} ({self.published.source}): {self.tier}.", *map(str, self.checks)]
        if self.changed:
            lines.append(f"Not the settings of the paper: {', '.join(self.changed)}")
        return lines


def check_reproduction(
    record: RunRecord, published: PublishedResult, changed: Iterable[str] = (), *, external: bool = False
) -> Reproduction:
    """Compare a run's results with a published one, each measured as in the paper.

    A FID counts if 50,000 samples were compared with all official training images on the Inception network, bits/dim
    if the paper's estimator scored all test images. Only the last checkpoint counts, and of several ways to sample it
    the first, which is the model's own.

    Args:
        record: the record of the run.
        published: the published result.
        changed: what `changed_settings` returns.
        external: whether the images or weights were made by another program.
    """
    results = [result for result in record.results if external or result.generation.checkpoint == "last"]
    found = {"fid": map(_fid, results), "bpd": (_bits_per_dim(result, published.likelihood) for result in results)}
    checks = tuple(
        MetricCheck(metric, value, next((each for each in found[metric] if each is not None), None))
        for metric, value in (("fid", published.fid), ("bpd", published.bpd))
        if value is not None
    )
    return Reproduction(published, checks, tuple(changed), external)


def changed_settings(config: Mapping[str, Any], paper: Mapping[str, Any]) -> list[str]:
    """Return the settings of a config that affect the trained model and differ from those of a paper.

    Seeds, devices, precision and evaluation may differ (`check_reproduction` checks the evaluation). Of the callbacks,
    the average of the weights counts, and stopping early.
    """
    own, expected = (flatten(config_settings(dict(each), NON_MODEL_SETTINGS)) for each in (config, paper))
    return [
        f"{key}={own.get(key, formatting.MISSING)} (paper: {expected.get(key, formatting.MISSING)})"
        for key in sorted(own.keys() | expected.keys())
        if own.get(key) != expected.get(key) and _affects_model(key)
    ]


def _affects_model(key: str) -> bool:
    group, _, rest = key.partition(".")
    if group == "callbacks":
        return rest.startswith("ema.") or rest in ("ema", "evaluation.patience")
    if group == "trainer":
        return rest == "global_batch_size"
    return group in ("data", "model", "budget")


def tiers(records: Iterable[RunRecord]) -> dict[str, str]:
    """Return the best tier of each published result among runs of ``task=reproduce``, and how many runs reach it."""
    stated: dict[str, list[str]] = {}
    for record in records:
        summary = record.model.get(REPRODUCTION)
        if isinstance(summary, dict) and summary.get("tier") in (REPORTED, HERE, ELSEWHERE):
            stated.setdefault(str(summary.get("paper")), []).append(summary["tier"])
    best = {name: next(tier for tier in (HERE, ELSEWHERE, REPORTED) if tier in found) for name, found in stated.items()}
    return {
        name: tier if tier == REPORTED else f"{tier} ({stated[name].count(tier)} of {len(stated[name])} runs)"
        for name, tier in best.items()
    }


def _fid(result: Result) -> float | None:
    measurement = result.measurement
    as_published = (
        measurement.extractor == FID_EXTRACTOR
        and measurement.num_images == FID_IMAGES
        and measurement.reference == "train+val"
    )
    metric = result.metrics.get("fid")
    return metric.value if metric and as_published else None


def _bits_per_dim(result: Result, likelihood: str) -> float | None:
    metric = result.metrics.get(f"bpd_{likelihood}")
    return metric.value if metric and _all_test_images(metric) and formatting.is_finite(metric.value) else None


def _all_test_images(metric: Metric) -> bool:
    images = metric.note.split(";")[0]
    return images.endswith(" test images") and " of " not in images
