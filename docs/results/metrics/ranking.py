"""The tables of the study of metrics, for the page in this folder: python docs/results/metrics/ranking.py

`task=measure_metrics` writes a study; its study.json is stored here as DATA_EXTRACTOR.json. checks.json is written by
`python benchmarks/metric_checks.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from gencompare.evaluation.metric_study import Share, Study, StudyScore, bootstrap, power, score, tau

HERE = Path(__file__).parent
CANDIDATES = ("sliced_wasserstein", "vendi", "fld", "energy_distance", "narrow_mmd", "wide_mmd", "normalized_mmd")
"""Metrics of benchmarks/candidate_metrics.py, which are not part of the suite."""


def studies() -> list[Study]:
    """Read the stored studies."""
    files = sorted(path for path in HERE.glob("*.json") if path.name != "checks.json")
    return [Study.from_json(study) for path in files for study in json.loads(path.read_text())["studies"]]


def scores() -> dict[str, list[StudyScore]]:
    """Score the studies, by extractor."""
    found: dict[str, list[StudyScore]] = {}
    for s in score(studies()):
        found.setdefault(s.extractor, []).append(s)
    return found


def faults(kept: list[Study], extractor: str) -> str:
    """Count the faults that an extractor was measured on, by n."""
    counts: dict[int, int] = {}
    for study in kept:
        for n in study.real if study.extractor == extractor else ():
            counts[n] = counts.get(n, 0) + len(study.cells)
    return ", ".join(f"{count} faults at n = {n:,}" for n, count in sorted(counts.items()))


def ranking(found: list[StudyScore]) -> str:
    """Format a row for each metric of one extractor, with tau, power and false alarms at each n; best tau first."""
    sizes = sorted({s.n for s in found})
    columns = ("Kendall's tau", "power", "false alarms")
    lines = [["metric", *(f"{column}, n = {n:,}" for n in sizes for column in columns)]]
    lines.append(["---"] * len(lines[0]))
    for first in (s for s in found if s.n == sizes[0]):
        own = [next((s for s in found if s.metric == first.metric and s.n == n), None) for n in sizes]
        cells = [cell for s in own for cell in (map(interval, (s.tau, s.power, s.false_alarms)) if s else [""] * 3)]
        lines.append([title(first.metric), *cells])
    return table(lines)


def families(found: list[StudyScore]) -> str:
    """Format tau and power of each metric by family of faults, at the smallest n."""
    own = [s for s in found if s.n == min(s.n for s in found)]
    names = sorted(own[0].tau_by_family)
    lines = [["metric", *names], ["---"] * (len(names) + 1)]
    for s in own:
        lines.append([title(s.metric), *(f"{s.tau_by_family[f]:.2f}, {s.power_by_family[f]:.2f}" for f in names)])
    return table(lines)


def candidates(kept: list[Study], extractor: str) -> str:
    """Format the difference of each candidate to the default metric in tau and power, at the smallest n.

    Both are measured on the same sets, so differences are taken by family before they are averaged.
    """
    own = [study for study in kept if study.extractor == extractor]
    n = min(n for study in own for n in study.real)
    lines = [["candidate", f"tau minus that of `mmd`, n = {n:,}", f"power minus that of `mmd`, n = {n:,}"], ["---"] * 3]
    measured = [metric for metric in CANDIDATES if all(metric in real for study in own for real in study.real.values())]
    for metric in measured:
        families = [(cells, study.real[n]) for study in own for cells in study.families.values()]
        taus = [tau(cells, metric, n) - tau(cells, "mmd", n) for cells, _ in families]
        powers = [power(c, real[metric], metric, n) - power(c, real["mmd"], "mmd", n) for c, real in families]
        lines.append([f"`{metric}`", interval(bootstrap(taus)), interval(bootstrap(powers))])
    return table(lines)


def checks() -> str:
    """Format the number of settings of each check that a metric passes."""
    passed = json.loads((HERE / "checks.json").read_text())["passed"]
    metrics = list(next(iter(passed.values())))
    lines = [["check", *(title(metric) for metric in metrics)], ["---"] * (len(metrics) + 1)]
    for check, row in passed.items():
        lines.append([check, *(f"{sum(row[metric])} of {len(row[metric])}" for metric in metrics)])
    lines.append(["**passed in all settings**", *(str(sum(all(row[m]) for row in passed.values())) for m in metrics)])
    return table(lines)


def title(metric: str) -> str:
    """Mark metrics that are not part of the suite."""
    return f"`{metric}` (candidate)" if metric in CANDIDATES else f"`{metric}`"


def interval(share: Share) -> str:
    """Format a mean with its 95 % interval."""
    return f"{share.mean:.2f} [{share.interval[0]:.2f}, {share.interval[1]:.2f}]"


def table(lines: list[list[str]]) -> str:
    """Format a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    kept = studies()
    for extractor, own in scores().items():
        parts = [f"{extractor}: {faults(kept, extractor)}", ranking(own), families(own), candidates(kept, extractor)]
        print("\n\n".join(parts) + "\n")
    if (HERE / "checks.json").is_file():
        print(checks())
