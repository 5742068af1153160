"""Runs that differ in their seed alone are one row: the mean over training seeds, and how far it can be trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from gencompare.compare import words
from gencompare.compare.gather import Run
from gencompare.compare.settings import settings_of
from gencompare.records import Metric, Result, RunRecord

CONFIDENCE = 0.95
NOT_THE_MODEL = ("seed", "evaluation", "callbacks", "choices", "name", "samples", "pretrained", "debug")
"""Settings that make no other model: how it is measured stands in its `Measurement`."""
OF_THE_MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "profiler")

Pair = tuple[Run, Result]


@dataclass(frozen=True)
class Line:
    """What one row of a table shows: a result of one run, or the mean over runs of several seeds."""

    run: Run
    """The run itself, or the first of several, under a label for all and with their mean costs."""
    result: Result
    members: tuple[Pair, ...]

    @property
    def seeds(self) -> list[int]:
        """The training seeds, each once."""
        return list(dict.fromkeys(run.record.seed for run, _ in self.members))


def lines(pairs: Iterable[Pair]) -> list[Line]:
    """``pairs``, all measured under one protocol, with those that differ in seeds alone taken together.

    A second result of equal seeds is no further evidence: it keeps a row of its own.
    """
    found: dict[str, dict[tuple[int, int | None], Pair]] = {}
    repeated: list[Pair] = []
    for run, result in pairs:
        members = found.setdefault(_but_for_seeds(run, result), {})
        seeds = (run.record.seed, result.generation.seed)
        if seeds in members:
            repeated.append((run, result))
        else:
            members[seeds] = (run, result)
    once = [tuple(members.values()) for members in found.values()]
    return [_line(*members) for members in once] + [_line(pair) for pair in repeated]


def _but_for_seeds(run: Run, result: Result) -> str:
    """Equal for two results exactly when nothing but seeds tells them apart."""
    made = {key: value for key, value in asdict(result.generation).items() if key != "seed"}
    config = {key: value for key, value in settings_of(run.record.config).items() if key not in NOT_THE_MODEL}
    if not config:
        # Images from elsewhere: nothing is known of how they came about.
        return f"{run.folder} {result.id}"
    if isinstance(config.get("trainer"), dict):
        config["trainer"] = {key: value for key, value in config["trainer"].items() if key not in OF_THE_MACHINE}
    if isinstance(config.get("data"), dict):
        # Orders the training images, and is the run's own.
        config["data"] = {key: value for key, value in config["data"].items() if key != "seed"}
    # Adaptive solvers call their network a little more or less often from seed to seed.
    made["nfe"] = sorted(made["nfe"] or {})
    return json.dumps([run.record.family, run.record.data.get("hash"), config, made], sort_keys=True, default=str)


def _line(*members: Pair) -> Line:
    if len(members) == 1:
        return Line(*members[0], members)
    by_seed: dict[int, list[Result]] = {}
    for run, result in members:
        by_seed.setdefault(run.record.seed, []).append(result)
    first, shown = members[0]
    names = [name for name in shown.metrics if all(name in result.metrics for _, result in members)]
    metrics = {name: over_seeds([[r.metrics[name] for r in results] for results in by_seed.values()]) for name in names}
    nfe = {
        name: fmean((r.generation.nfe or {}).get(name, 0.0) for _, r in members) for name in shown.generation.nfe or {}
    }
    result = replace(
        shown, metrics=metrics, seconds=_means([r.seconds for _, r in members]),
        generation=replace(shown.generation, nfe=nfe or None),
        details={"flags": list(dict.fromkeys(flag for _, r in members for flag in _flags(r)))},
    )  # fmt: skip
    record: RunRecord = replace(first.record, training=_means([run.record.training for run, _ in members]))
    count = f"mean of {len(by_seed)} seeds" if len(by_seed) > 1 else f"mean of {len(members)} sampling seeds"
    return Line(Run(first.folder, record, f"{first.label}, {count}", first.told), result, members)


def over_seeds(by_seed: list[list[Metric]]) -> Metric:
    r"""The mean of a figure over training seeds, each seed's own figure being the mean over its sampling seeds.

    With k >= 2 seeds the interval is mean +- t s / sqrt(k), s the standard deviation of the seeds' figures and t
    Student's quantile with k - 1 degrees of freedom: it holds what another training would have given on average. With
    one seed it is that of sampling alone. A figure that is missing for one seed is missing.
    """
    one = by_seed[0][0]
    every = [metric for metrics in by_seed for metric in metrics]
    if not all(words.finite(metric.value) for metric in every):
        return replace(one, value=None, interval=None, note="not finite for every seed")
    values = [fmean(float(m.value) for m in metrics if m.value is not None) for metrics in by_seed]
    repeats = values if len(values) > 1 else [float(m.value) for m in every if m.value is not None]
    half = float(stdtrit(len(repeats) - 1, (1 + CONFIDENCE) / 2)) * stdev(repeats) / sqrt(len(repeats))
    floors = [metric.floor for metric in every if metric.floor is not None]
    mean = fmean(values)
    return replace(one, value=mean, interval=(mean - half, mean + half), floor=fmean(floors) if floors else None)


def _means(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of several dicts, with the mean in place of each number that all of them hold."""
    return {
        name: fmean(c[name] for c in costs) if all(words.finite(words.number(c.get(name))) for c in costs) else value
        for name, value in costs[0].items()
    }


def _flags(result: Result) -> list[str]:
    flags = result.details.get("flags")
    return [str(flag) for flag in flags] if isinstance(flags, list) else []
