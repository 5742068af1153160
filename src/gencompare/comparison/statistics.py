"""Statistics over training seeds: means, confidence intervals, and significance tests between table rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from gencompare.comparison import formatting
from gencompare.comparison.load_runs import RunFolder, base_name
from gencompare.comparison.settings import NON_SETTINGS, config_settings, flatten
from gencompare.records import Metric, Result, RunRecord

SIGNIFICANCE_LEVEL = 0.05
"""Bound on the family-wise error rate, the probability that any difference in a table is wrongly claimed."""

CONFIDENCE_LEVEL = 0.95

MIN_SEEDS = 5
"""Training seeds that a row needs to be tested. A t test of three seeds against three misses most differences of one or
two standard deviations, and relies on an assumption of normality that so few values cannot support."""


# Significance tests


@dataclass(frozen=True)
class ComparisonToBest:
    """Test of one table row against the best row that was tested."""

    best_rank: int
    """Rank of the best tested row."""
    p_value: float | None
    """Holm-adjusted p value; None for the best tested row itself."""

    @property
    def significant(self) -> bool:
        """Whether the rows differ at `SIGNIFICANCE_LEVEL`."""
        return self.p_value is not None and self.p_value <= SIGNIFICANCE_LEVEL


def adjusted_p_values(samples: Sequence[Sequence[float] | None]) -> list[float | None]:
    """Compute Holm-adjusted p values of each table row against the best row that can be tested.

    The best row is chosen by the same values that are tested, and the best of many equal rows looks better than most. A
    correction only for the comparisons with the best row would therefore exceed the error rate. Instead, all pairs of
    rows are tested by Welch's t test, Holm's correction covers all pairs, and the p values of pairs with the best row
    are returned. This bounds the family-wise error rate by `SIGNIFICANCE_LEVEL`, no matter which pairs are picked,
    before or after seeing the data.

    Rows are treated as independent. Rows that share training runs (two samplers of one checkpoint) or noise seeds are
    positively correlated, which makes their test conservative.

    Args:
        samples: for each row, best row first, the metric of each training seed, averaged over its sampling seeds. A row
            with None or fewer than `MIN_SEEDS` values is not tested.

    Returns:
        A p value for each row; None for the best tested row and for rows that are not tested.
    """
    tested = [k for k, sample in enumerate(samples) if sample is not None and len(sample) >= MIN_SEEDS]
    p_values: list[float | None] = [None] * len(samples)
    if len(tested) < 2:
        return p_values
    chosen = [samples[k] or () for k in tested]
    mean = np.array([np.mean(sample) for sample in chosen])
    squared_error = np.array([np.var(sample, ddof=1) / len(sample) for sample in chosen])
    n = np.array([len(sample) for sample in chosen])
    i, j = np.triu_indices(len(chosen), k=1)
    adjusted = holm(welch(mean[i], squared_error[i], n[i], mean[j], squared_error[j], n[j]))
    # The pairs come in the order (0, 1), (0, 2), ..., so those with the best row are first.
    for k, p_value in zip(tested[1:], adjusted[: len(chosen) - 1], strict=True):
        p_values[k] = float(p_value)
    return p_values


def welch(
    mean_1: np.ndarray,
    squared_error_1: np.ndarray,
    n_1: np.ndarray,
    mean_2: np.ndarray,
    squared_error_2: np.ndarray,
    n_2: np.ndarray,
) -> np.ndarray:
    r"""Compute two-sided p values of Welch's t test for equal means with unequal variances.

    With :math:`e_i = s_i^2 / n_i`, the statistic and its degrees of freedom are

    .. math::
        t = \frac{\bar x_1 - \bar x_2}{\sqrt{e_1 + e_2}}, \qquad
        \nu = \frac{(e_1 + e_2)^2}{e_1^2 / (n_1 - 1) + e_2^2 / (n_2 - 1)}.

    The variance over seeds differs between model families, so no common variance is assumed. If both variances are 0,
    p is 1 for equal means and 0 otherwise, the limit of the test.

    Welch (1947), "The generalization of Student's problem when several different population variances are involved",
    Biometrika 34.

    Args:
        mean_1, mean_2: means, arrays of the same shape.
        squared_error_1, squared_error_2: squared standard errors :math:`e_i`.
        n_1, n_2: numbers of observations, each at least 2.
    """
    total = squared_error_1 + squared_error_2
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(mean_1 - mean_2) / np.sqrt(total)
        degrees_of_freedom = total**2 / (squared_error_1**2 / (n_1 - 1) + squared_error_2**2 / (n_2 - 1))
        p = 2 * stdtr(degrees_of_freedom, -t)
    return np.where(total > 0, p, np.where(mean_1 == mean_2, 1.0, 0.0))


def holm(p: np.ndarray) -> np.ndarray:
    r"""Compute Holm's step-down adjusted p values, in the order of ``p``.

    For sorted values :math:`p_{(1)} \le \dots \le p_{(m)}`,

    .. math:: \tilde p_{(j)} = \max_{i \le j} \min(1, (m - i + 1)\, p_{(i)}).

    Rejecting all hypotheses with :math:`\tilde p \le \alpha` bounds the family-wise error rate by :math:`\alpha` under
    any dependence.

    Holm (1979), "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.

    Args:
        p: p values, (m,).
    """
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted


def sampling_variance(metric: Metric) -> float | None:
    r"""Return the variance :math:`(\text{below} \cdot \text{above}) / z^2` of sampling, or None without an interval.

    Both margins of the interval of one evaluation at `CONFIDENCE_LEVEL` count, and z is the normal quantile.
    """
    if metric.interval is None or metric.value is None or not all(map(formatting.is_finite, metric.interval)):
        return None
    below, above = metric.value - metric.interval[0], metric.interval[1] - metric.value
    z = float(stdtrit(inf, (1 + CONFIDENCE_LEVEL) / 2))
    return below * above / z**2 if below > 0 and above > 0 else None


# Runs that differ only in seeds

NON_MODEL_SETTINGS = frozenset(NON_SETTINGS) | {
    "seed", "data.seed", "evaluation", "choices", "name", "samples", "pretrained", "debug",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.profiler",
    "callbacks.progress_bar", "callbacks.metric_logger", "callbacks.checkpoints", "callbacks.energy",
    "callbacks.evaluation.num_grid_images", "callbacks.evaluation.num_val_images",
}  # fmt: skip
"""Seeds, and settings that do not affect the trained model. Evaluation settings are compared by `Measurement` instead.
``data.seed`` determines the order of the training images and equals the seed of the run by default. Callbacks that
affect metrics are not listed: the EMA, and the evaluation that selects ``best`` and may stop training."""

AVERAGED_DETAILS = ("flops_per_sample",)
"""Details of a result that are averaged over seeds."""

RunResult = tuple[RunFolder, Result]


@dataclass(frozen=True)
class SeedGroup:
    """The runs of one table row: a single result, or the mean over several runs."""

    run: RunFolder
    """The run. For several runs, a copy of the first run, with the label of the group and mean costs."""
    result: Result
    """The result, or the mean over several results."""
    members: tuple[RunResult, ...]
    differing_settings: tuple[str, ...] = ()
    """Settings, other than seeds, that differ between the runs."""

    @property
    def seeds(self) -> list[int]:
        """The distinct training seeds."""
        return list(dict.fromkeys(run.record.seed for run, _ in self.members))

    def values_by_seed(self, name: str) -> list[float] | None:
        """Return the metric ``name`` of each training seed, averaged over its sampling seeds.

        Return None if a value is missing, or if the runs differ in more than seeds, so they are not replicates.
        """
        return None if self.differing_settings else self.values_by_training(name)

    def values_by_training(self, name: str) -> list[float] | None:
        """Return `values_by_seed`, but with one value per run if the runs differ in more than seeds."""
        values: dict[tuple[int, str], list[float]] = {}
        for run, result in self.members:
            value = result.metrics.get(name, Metric(None)).value
            if value is None or not formatting.is_finite(value):
                return None
            key = (run.record.seed, run.label if self.differing_settings else "")
            values.setdefault(key, []).append(value)
        return [fmean(each) for each in values.values()]


def group_by_seed(results: Iterable[RunResult], group_by: tuple[str, ...] = ()) -> list[SeedGroup]:
    """Group results of one protocol that differ only in seeds.

    A second result with the same seeds is not a replicate and gets a separate row.

    With ``group_by``, all runs with equal values of these config keys share a row if they were sampled in the same way
    (sampler, guidance, weights, checkpoint). A run with none of the keys keeps the row it has without ``group_by``. If
    the runs of a row differ only in seeds, nothing changes. If they differ in more, the row is the plain mean over
    training runs without an interval or a test. Their settings were chosen rather than sampled, so their spread does
    not measure the variation between training runs.
    """
    groups: dict[str, dict[tuple[str, int, int | None], RunResult]] = {}
    names: dict[str, str] = {}
    repeated: list[RunResult] = []
    models: dict[str, str] = {}
    for run, result in results:
        if run.label not in models:
            models[run.label] = _model_key(run)
        replicate = _replicate_key(run, result, models[run.label])
        values = config_values(run, group_by)
        row = replicate if values is None else json.dumps([values, _sampling_key(run, result, False)], sort_keys=True)
        names[row] = ", ".join(f"{key}={value}" for key, value in (values or {}).items())
        members = groups.setdefault(row, {})
        seeds = (replicate, run.record.seed, result.generation.seed)
        if seeds in members:
            repeated.append((run, result))
        else:
            members[seeds] = (run, result)
    unique = []
    for row, by_seeds in groups.items():
        keys = sorted(by_seeds, key=lambda seeds: (seeds[1], seeds[2] or 0))  # the page shows samples of the first seed
        unique.append(_seed_group([by_seeds[key] for key in keys], [replicate for replicate, *_ in keys], names[row]))
    return _with_unique_labels(unique) + [_seed_group([each], [""], "") for each in repeated]


def _with_unique_labels(groups: list[SeedGroup]) -> list[SeedGroup]:
    """Use the full label of the first run in the label of each group that another group of other runs shares."""
    runs_of: dict[str, set[str]] = {}
    for group in groups:
        runs_of.setdefault(group.run.label, set()).add(group.members[0][0].label)
    return [
        replace(group, run=replace(group.run, label=f"{group.members[0][0].record.name}, {group.run.label}"))
        if len(runs_of[group.run.label]) > 1
        else group
        for group in groups
    ]


def config_values(run: RunFolder, keys: tuple[str, ...]) -> dict[str, str] | None:
    """Return the values of ``keys`` in the config of ``run``, or None if it has none of the keys.

    Args:
        keys: dotted config keys (``budget.images``), ``family``, or config groups (``model.schedule`` or
            ``model/schedule``). The value of a group is the chosen option, or its settings if none was chosen.
    """
    if not keys:
        return None
    config = config_settings(run.record.config)
    choices = run.record.config.get("choices")
    flat = flatten(config) | {"family": run.record.family}
    values = {}
    for key in keys:
        dotted, group = key.replace("/", "."), key.replace(".", "/")
        if isinstance(choices, dict) and choices.get(group) is not None:
            values[key] = str(choices[group])
        elif dotted in flat:
            values[key] = flat[dotted]
        elif inside := {name: value for name, value in flat.items() if name.startswith(f"{dotted}.")}:
            values[key] = json.dumps({name.removeprefix(f"{dotted}."): value for name, value in inside.items()})
    return {key: values.get(key, formatting.MISSING) for key in keys} if values else None


def _model_key(run: RunFolder) -> str:
    """Return a key that is equal for runs that differ only in seeds and sampling, or empty if the config is unknown."""
    config = _model_settings(run)
    key = [run.record.family, run.record.data.get("hash"), config]
    return json.dumps(key, sort_keys=True, default=str) if config else ""


def _replicate_key(run: RunFolder, result: Result, model_key: str) -> str:
    """Return a key that is equal for results that differ only in seeds."""
    if not model_key:
        # The training of externally generated images is unknown.
        return f"{run.folder} {result.id}"
    return json.dumps([model_key, _sampling_key(run, result, True)], sort_keys=True)


def _model_settings(run: RunFolder) -> dict[str, Any]:
    """Return the settings that affect the trained model, without seeds."""
    return config_settings(run.record.config, NON_MODEL_SETTINGS)


def _sampling_key(run: RunFolder, result: Result, with_step: bool) -> dict[str, Any]:
    """Return the sampling settings without the seed. ``with_step`` keeps the step of an intermediate checkpoint."""
    key = {field.name: getattr(result.generation, field.name) for field in fields(result.generation)}
    del key["seed"]
    is_final = key["checkpoint"] == "best" or key["step"] == run.record.training.get("steps")
    if is_final or not with_step:
        # The step depends on the seed if validation selected it or a time limit stopped training.
        key["step"] = key["images_seen"] = "best or end"
    # The NFE of adaptive solvers varies slightly from seed to seed.
    key["nfe"] = sorted(key["nfe"] or {})
    return key


def _seed_group(members: list[RunResult], replicate_keys: list[str], name: str) -> SeedGroup:
    """Create a group labelled ``name``. Its ``members`` are replicates if all ``replicate_keys`` are equal."""
    if len(members) == 1:
        run, result = members[0]
        return SeedGroup(replace(run, label=f"{name} ({run.label})") if name else run, result, tuple(members))
    are_replicates = len(set(replicate_keys)) == 1
    trainings: dict[tuple[str, int], list[Result]] = {}
    for (run, result), key in zip(members, replicate_keys, strict=True):
        trainings.setdefault((key, run.record.seed), []).append(result)
    differing = () if are_replicates else _differing_names([run for run, _ in members])
    first_run, first = members[0]
    metrics = {
        metric: mean_over_seeds(
            [[result.metrics[metric] for result in results] for results in trainings.values()], possible_range(metric)
        )
        for metric in first.metrics
        if all(metric in result.metrics for _, result in members)
    }
    if not are_replicates:
        metrics = {name: replace(metric, interval=None) for name, metric in metrics.items()}
    nfe = {
        network: fmean((result.generation.nfe or {}).get(network, 0.0) for _, result in members)
        for network in first.generation.nfe or {}
    }
    mean = replace(
        first, metrics=metrics, seconds=_mean_values([result.seconds for _, result in members]),
        generation=replace(
            first.generation, nfe=nfe or None, step=_common_value({result.generation.step for _, result in members}),
            images_seen=_rounded_mean([result.generation.images_seen for _, result in members]),
        ),
        details=_mean_values(
            [{k: result.details[k] for k in AVERAGED_DETAILS if k in result.details} for _, result in members]
        )
        | {"warnings": list(dict.fromkeys(warning for _, result in members for warning in warnings_of(result)))},
    )  # fmt: skip
    record: RunRecord = replace(first_run.record, training=_mean_values([run.record.training for run, _ in members]))
    if not are_replicates:
        count = f"mean of {len(trainings)} runs"
    else:
        count = f"mean of {len(trainings)} seeds" if len(trainings) > 1 else f"mean of {len(members)} sampling seeds"
    label = f"{name or base_name(first_run.record)}, {count}"
    run = RunFolder(first_run.folder, record, label, "" if name else first_run.settings)
    return SeedGroup(run, mean, tuple(members), differing)


def _differing_names(runs: list[RunFolder]) -> tuple[str, ...]:
    """Return the names of the model settings that differ between ``runs``."""
    flat = [flatten(_model_settings(run)) | {"family": run.record.family} for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    differing = tuple(name for name in names if len({settings.get(name) for settings in flat}) > 1)
    return differing or ("data or training length",)


FRACTIONS = (
    "precision", "recall", "coverage", "authenticity", "confident", "label_accuracy", "class_share_min",
    "class_share_max",
)  # fmt: skip
"""Metrics between 0 and 1."""

NON_NEGATIVE = re.compile(r"fid|density|memorization|[rs]?fd_\w+(?<!_infinity)")
"""Matches metrics that are at least 0. Unbiased and extrapolated estimates may be negative."""


def possible_range(name: str) -> tuple[float, float]:
    """Return the smallest and the largest possible value of the metric ``name``."""
    if name in FRACTIONS:
        return 0.0, 1.0
    return (0.0 if NON_NEGATIVE.fullmatch(name) else -inf), inf


def mean_over_seeds(metrics: list[list[Metric]], limits: tuple[float, float] = (-inf, inf)) -> Metric:
    r"""Compute the mean of a metric over training seeds, with its confidence interval.

    The value of a seed is the mean over its sampling seeds. With k >= 2 training seeds, the interval is Student's

    .. math:: \bar x \pm t_{0.975,\,k-1}\, s / \sqrt{k}

    where s is the standard deviation over training seeds, cut at the limits of the metric. It covers the expected value
    over training runs. With one training seed, the interval covers only the expected value over sampling seeds. If the
    metric is missing for a seed, the mean is None.

    Args:
        metrics: the metric of each training seed and each of its sampling seeds.
        limits: the smallest and the largest possible value.
    """
    first = metrics[0][0]
    flat = [metric for sampling_seeds in metrics for metric in sampling_seeds]
    if not all(formatting.is_finite(metric.value) for metric in flat):
        return replace(first, value=None, interval=None, note="not finite for every seed")
    values = [fmean(float(m.value) for m in sampling_seeds if m.value is not None) for sampling_seeds in metrics]
    replicates = values if len(values) > 1 else [float(m.value) for m in flat if m.value is not None]
    t = float(stdtrit(len(replicates) - 1, (1 + CONFIDENCE_LEVEL) / 2))
    half_width = t * stdev(replicates) / sqrt(len(replicates))
    baselines = [metric.baseline for metric in flat if metric.baseline is not None]
    mean = fmean(values)
    interval = (max(mean - half_width, limits[0]), min(mean + half_width, limits[1]))
    return replace(first, value=mean, interval=interval, baseline=fmean(baselines) if baselines else None)


def _mean_values(dicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first of several dicts with numbers replaced by their mean over all dicts, recursively.

    A number that is missing in one of the dicts becomes None.
    """
    means = {}
    for name, value in dicts[0].items():
        values = [each.get(name) for each in dicts]
        numbers = [number for each in values if (number := formatting.as_number(each)) is not None]
        if all(isinstance(each, dict) for each in values):
            means[name] = _mean_values([each for each in values if isinstance(each, dict)])
        elif len(numbers) == len(values):
            means[name] = fmean(numbers)
        else:
            means[name] = None if formatting.as_number(value) is not None else value
    return means


def _common_value(values: set[int | None]) -> int | None:
    """Return the element of a one-element set, otherwise None."""
    return values.pop() if len(values) == 1 else None


def _rounded_mean(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return round(fmean(known)) if known and len(known) == len(values) else None


def warnings_of(result: Result) -> list[str]:
    """Return the warnings of an evaluation."""
    warnings = result.details.get("warnings")
    return [str(warning) for warning in warnings] if isinstance(warnings, list) else []
