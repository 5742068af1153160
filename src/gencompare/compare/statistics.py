"""Statistics over training seeds: means, intervals, and tests between rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from gencompare.compare import formatting
from gencompare.compare.load_runs import RunFolder
from gencompare.compare.settings import NOT_SETTINGS, flatten, settings_of
from gencompare.records import Metric, Result, RunRecord

LEVEL = 0.05
"""The chance of calling any two equal rows of a table different is at most this."""

MIN_SEEDS = 5
"""With fewer training seeds on either side nothing is tested: a t test of three against three misses most
differences of one standard deviation or two, and its level hangs on a normality that nobody can check."""


@dataclass(frozen=True)
class Verdict:
    """What the training seeds say of one row against the best row that was tested."""

    reference: int
    """Rank of the row that this one was tested against."""
    p: float | None
    """Holm's p value, (0, 1); None for that row itself."""

    @property
    def apart(self) -> bool:
        """Whether the two rows are told apart at `LEVEL`."""
        return self.p is not None and self.p <= LEVEL


def verdicts(samples: Sequence[Sequence[float] | None]) -> list[float | None]:
    """Holm's p value of each sample against the first one that can be tested; None where nothing is claimed.

    Args:
        samples: one a row, best row first: its figure for each training seed (the mean over sampling seeds within
            it); None, or fewer than `MIN_SEEDS`, for a row that takes no part.

    Returns:
        A p value for each sample; None for those that take no part and for the first one that does.

    The best row is known from the same figures that are tested, and the luckiest of many equal rows looks better than
    most. Correcting for the comparisons with it alone would therefore claim too much. So *every* pair of rows is
    tested, and Holm's correction runs over all of them: then no choice of pairs, made before or after looking, has more
    than a chance of `LEVEL` of a wrong claim. What is returned are the pairs that a reader asks about: each row against
    the best.

    Rows are taken to be independent. Rows that share their trainings (two samplers of one checkpoint), or the seeds of
    their noise, rise and fall together; their test is cautious.
    """
    taking_part = [k for k, sample in enumerate(samples) if sample is not None and len(sample) >= MIN_SEEDS]
    found: list[float | None] = [None] * len(samples)
    if len(taking_part) < 2:
        return found
    chosen = [samples[k] or () for k in taking_part]
    mean = np.array([np.mean(sample) for sample in chosen])
    error = np.array([np.var(sample, ddof=1) / len(sample) for sample in chosen])
    seeds = np.array([len(sample) for sample in chosen])
    one, two = np.triu_indices(len(chosen), k=1)
    p = holm(welch(mean[one], error[one], seeds[one], mean[two], error[two], seeds[two]))
    for k, value in zip(taking_part[1:], p[: len(chosen) - 1], strict=True):  # pairs (0, 1), (0, 2), ... come first
        found[k] = float(value)
    return found


def welch(
    mean_1: np.ndarray, error_1: np.ndarray, n_1: np.ndarray, mean_2: np.ndarray, error_2: np.ndarray, n_2: np.ndarray
) -> np.ndarray:
    r"""Two-sided p values of Welch's t test, any shape: equal means, whatever the two variances are.

        t = (m_1 - m_2) / sqrt(e_1 + e_2),   e_i = s_i^2 / n_i,
        degrees of freedom = (e_1 + e_2)^2 / (e_1^2 / (n_1 - 1) + e_2^2 / (n_2 - 1))

    Welch (1947), "The generalization of Student's problem when several different population variances are involved".
    Figures of families scatter differently from seed to seed, so no common variance is assumed. Without any scatter
    p is 1 for equal means and 0 for others, the limit of the test.

    Args: means, squared standard errors e_i, and numbers n_i of observations, each at least 2.
    """
    total = error_1 + error_2
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(mean_1 - mean_2) / np.sqrt(total)
        freedom = total**2 / (error_1**2 / (n_1 - 1) + error_2**2 / (n_2 - 1))
        p = 2 * stdtr(freedom, -t)
    return np.where(total > 0, p, np.where(mean_1 == mean_2, 1.0, 0.0))


def holm(p: np.ndarray) -> np.ndarray:
    r"""Holm's step-down p values (m,), in the order of ``p``.

    With p_(1) <= ... <= p_(m) the adjusted ones are max over i <= j of min(1, (m - i + 1) p_(i)). Rejecting those at or
    below a level a keeps the chance of any wrong rejection at a or below, whatever the dependence.

    Holm (1979), "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
    """
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted


CONFIDENCE = 0.95
NOT_THE_MODEL = frozenset(NOT_SETTINGS) | {
    "seed", "data.seed", "evaluation", "choices", "name", "samples", "pretrained", "debug",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.profiler",
    "callbacks.progress_bar", "callbacks.metric_logger", "callbacks.checkpoints", "callbacks.evaluation.num_grid_images",
    "callbacks.evaluation.num_val_images",
}  # fmt: skip
"""Settings that make no other model. How it is measured stands in its `Measurement`; ``data.seed`` orders the training
images, and is the run's own. Callbacks that change a figure do count: the average of the weights (``ema``), and the
looks that choose ``best`` and may end training."""

KEPT = ("flops_per_sample",)
"""Details of a result that have a mean over seeds."""

Pair = tuple[RunFolder, Result]


@dataclass(frozen=True)
class SeedGroup:
    """What one row of a table shows: a result of one run, or the mean over several runs."""

    run: RunFolder
    """The run itself, or the first of several, under a label for all and with their mean costs."""
    result: Result
    members: tuple[Pair, ...]
    mixed: tuple[str, ...] = ()
    """Settings other than seeds in which the members differ."""

    @property
    def seeds(self) -> list[int]:
        """The training seeds, each once."""
        return list(dict.fromkeys(run.record.seed for run, _ in self.members))

    def by_seed(self, name: str) -> list[float] | None:
        """The figure ``name`` of each training seed, the mean over its sampling seeds.

        None where one is missing, and for runs that differ in more than seeds: they are no repetitions.
        """
        return None if self.mixed else self.by_training(name)

    def by_training(self, name: str) -> list[float] | None:
        """The same, also for runs that differ in more than seeds."""
        found: dict[tuple[int, str], list[float]] = {}
        for run, result in self.members:
            value = result.metrics.get(name, Metric(None)).value
            if value is None or not formatting.format_finite(value):
                return None
            found.setdefault((run.record.seed, run.label if self.mixed else ""), []).append(value)
        return [fmean(values) for values in found.values()]


def seed_groups(pairs: Iterable[Pair], by: tuple[str, ...] = ()) -> list[SeedGroup]:
    """``pairs``, all measured under one protocol, with those that differ in seeds alone taken together.

    A second result of equal seeds is no further evidence: it keeps a row of its own.

    With ``by``, keys of the config, all runs that share the values of these keys are taken together, whatever else sets
    them apart, but for how they were sampled (sampler, guidance, weights, checkpoint). A run that has none of the keys
    keeps the row that it has without ``by``. Where the runs of a row differ in seeds alone, it is what it would be
    without ``by``. Where they differ in more, the row is the plain mean over trainings, and has no interval and no
    test: those settings are a choice that somebody made, no sample of anything, and their spread says nothing of
    another training's.
    """
    found: dict[str, dict[tuple[str, int, int | None], Pair]] = {}
    names: dict[str, str] = {}
    repeated: list[Pair] = []
    models: dict[str, str] = {}
    for run, result in pairs:
        if run.label not in models:
            models[run.label] = _model(run)
        own = _but_for_seeds(run, result, models[run.label])
        values = values_of(run, by)
        row = own if values is None else json.dumps([values, _made(run, result, settled=False)], sort_keys=True)
        names[row] = ", ".join(f"{key}={value}" for key, value in (values or {}).items())
        members = found.setdefault(row, {})
        place = (own, run.record.seed, result.generation.seed)
        if place in members:
            repeated.append((run, result))
        else:
            members[place] = (run, result)
    once = [
        _seed_group(list(members.values()), [own for own, *_ in members], names[row]) for row, members in found.items()
    ]
    return once + [_seed_group([pair], [""], "") for pair in repeated]


def values_of(run: RunFolder, by: tuple[str, ...]) -> dict[str, str] | None:
    """What ``run`` has at each of the keys ``by``; None where it has none of them.

    A key is a dotted path into the config (``budget.images``), ``family``, or a group: ``model.schedule`` and
    ``model/schedule`` are the option that was chosen for it, where one was.
    """
    if not by:
        return None
    config = settings_of(run.record.config)
    choices = run.record.config.get("choices")
    flat = flatten(config) | {"family": run.record.family}
    found = {}
    for key in by:
        dotted, group = key.replace("/", "."), key.replace(".", "/")
        if isinstance(choices, dict) and choices.get(group) is not None:
            found[key] = str(choices[group])
        elif dotted in flat:
            found[key] = flat[dotted]
        elif inside := {name: value for name, value in flat.items() if name.startswith(f"{dotted}.")}:
            found[key] = json.dumps({name.removeprefix(f"{dotted}."): value for name, value in inside.items()})
    return {key: found.get(key, formatting.NONE) for key in by} if found else None


def _model(run: RunFolder) -> str:
    """Equal for two runs exactly when nothing but seeds and sampling tells them apart; empty where nothing is known."""
    config = _of_the_model(run)
    named = [run.record.family, run.record.data.get("hash"), config]
    return json.dumps(named, sort_keys=True, default=str) if config else ""


def _but_for_seeds(run: RunFolder, result: Result, model: str) -> str:
    """Equal for two results exactly when nothing but seeds tells them apart."""
    if not model:
        # Images from elsewhere: nothing is known of how they came about.
        return f"{run.folder} {result.id}"
    return json.dumps([model, _made(run, result, settled=True)], sort_keys=True)


def _of_the_model(run: RunFolder) -> dict[str, Any]:
    """The settings that make another model; no seed."""
    return settings_of(run.record.config, NOT_THE_MODEL)


def _made(run: RunFolder, result: Result, *, settled: bool) -> dict[str, Any]:
    """How the samples were made, but for the seed; without ``settled``, of a training of any length."""
    made = {field.name: getattr(result.generation, field.name) for field in fields(result.generation)}
    del made["seed"]
    at_the_end = made["checkpoint"] == "best" or made["step"] == run.record.training.get("steps")
    if at_the_end or not settled:
        # What validation chose, or where a limit of time ended training: an outcome of the seed, no setting.
        made["step"] = made["images_seen"] = "best or end"
    # Adaptive solvers call their network a little more or less often from seed to seed.
    made["nfe"] = sorted(made["nfe"] or {})
    return made


def _seed_group(members: list[Pair], own: list[str], name: str) -> SeedGroup:
    """The row of ``members``, which differ in seeds alone where all of ``own`` are equal; ``name`` is theirs."""
    if len(members) == 1:
        run, result = members[0]
        return SeedGroup(replace(run, label=f"{name} ({run.label})") if name else run, result, tuple(members))
    trainings: dict[tuple[str, int], list[Result]] = {}
    for (run, result), key in zip(members, own, strict=True):
        trainings.setdefault((key, run.record.seed), []).append(result)
    mixed = _differing([run for run, _ in members]) if len(set(own)) > 1 else ()
    first, shown = members[0]
    metrics = {
        metric: over_seeds([[r.metrics[metric] for r in results] for results in trainings.values()])
        for metric in shown.metrics
        if all(metric in result.metrics for _, result in members)
    }
    if len(set(own)) > 1:
        metrics = {metric: replace(figure, interval=None) for metric, figure in metrics.items()}
    nfe = {
        network: fmean((r.generation.nfe or {}).get(network, 0.0) for _, r in members)
        for network in shown.generation.nfe or {}
    }
    result = replace(
        shown, metrics=metrics, seconds=_means([r.seconds for _, r in members]),
        generation=replace(
            shown.generation, nfe=nfe or None, step=_only({r.generation.step for _, r in members}),
            images_seen=_rounded_mean([r.generation.images_seen for _, r in members]),
        ),
        details=_means([{k: r.details[k] for k in KEPT if k in r.details} for _, r in members])
        | {"warnings": list(dict.fromkeys(flag for _, r in members for flag in flags_of(r)))},
    )  # fmt: skip
    record: RunRecord = replace(first.record, training=_means([run.record.training for run, _ in members]))
    if len(set(own)) > 1:
        count = f"mean of {len(trainings)} runs"
    else:
        count = f"mean of {len(trainings)} seeds" if len(trainings) > 1 else f"mean of {len(members)} sampling seeds"
    run = RunFolder(first.folder, record, f"{name or first.label}, {count}", "" if name else first.told)
    return SeedGroup(run, result, tuple(members), mixed)


def _differing(runs: list[RunFolder]) -> tuple[str, ...]:
    """Names of the settings of a model that are not the same in all of ``runs``."""
    flat = [flatten(_of_the_model(run)) | {"family": run.record.family} for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    differ = tuple(name for name in names if len({settings.get(name) for settings in flat}) > 1)
    return differ or ("data or length of training",)


def over_seeds(by_seed: list[list[Metric]]) -> Metric:
    r"""The mean of a figure over training seeds, each seed's own figure being the mean over its sampling seeds.

    With k >= 2 seeds the interval is mean +- t s / sqrt(k), s the standard deviation of the seeds' figures and t
    Student's quantile with k - 1 degrees of freedom: it holds what another training would have given on average. With
    one seed it is that of sampling alone. A figure that is missing for one seed is missing.
    """
    one = by_seed[0][0]
    every = [metric for metrics in by_seed for metric in metrics]
    if not all(formatting.format_finite(metric.value) for metric in every):
        return replace(one, value=None, interval=None, note="not finite for every seed")
    values = [fmean(float(m.value) for m in metrics if m.value is not None) for metrics in by_seed]
    repeats = values if len(values) > 1 else [float(m.value) for m in every if m.value is not None]
    half = float(stdtrit(len(repeats) - 1, (1 + CONFIDENCE) / 2)) * stdev(repeats) / sqrt(len(repeats))
    floors = [metric.baseline for metric in every if metric.baseline is not None]
    mean = fmean(values)
    return replace(one, value=mean, interval=(mean - half, mean + half), baseline=fmean(floors) if floors else None)


def _means(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of several dicts, with the mean in place of each number that all of them hold, inner ones too.

    A number that one of them lacks is not known.
    """
    found = {}
    for name, value in costs[0].items():
        every = [c.get(name) for c in costs]
        numbers = [number for one in every if (number := formatting.format_number(one)) is not None]
        if all(isinstance(one, dict) for one in every):
            found[name] = _means([one for one in every if isinstance(one, dict)])
        elif len(numbers) == len(every):
            found[name] = fmean(numbers)
        else:
            found[name] = None if formatting.format_number(value) is not None else value
    return found


def _only(values: set[int | None]) -> int | None:
    """The one value of a set, or None."""
    return values.pop() if len(values) == 1 else None


def _rounded_mean(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return round(fmean(known)) if known and len(known) == len(values) else None


def flags_of(result: Result) -> list[str]:
    """The warnings of one evaluation."""
    flags = result.details.get("warnings")
    return [str(flag) for flag in flags] if isinstance(flags, list) else []
