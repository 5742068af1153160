"""The run record: one JSON file with everything that a comparison needs. This module does not import torch."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from gencompare.checksums import read_checked_json, write_checked_json
from gencompare.command_line import shell_override
from gencompare.errors import CorruptedFileError, UserError, printable
from gencompare.files import file_lock
from gencompare.migrations import migrate_record
from gencompare.safe_files import MAX_DEPTH, depth_exceeds


@dataclass(frozen=True)
class Measurement:
    """The protocol of an evaluation. Only metrics with equal protocols are ranked against each other."""

    data: str
    """Name of the data set."""
    num_images: int
    """Number of generated images."""
    reference: str
    """Split that the generated images are compared with."""
    num_reference_images: int
    reference_hash: str
    """Hash of the reference split's pixels."""
    extractor: str
    """Name of the feature extractor."""
    extractor_hash: str
    """Hash of the extractor's weights."""
    resize: str = "none"
    """How images are resized to the extractor's input size."""
    quantization: str = "uint8"
    """Rounding of images before feature extraction."""
    conditioning: str = "unconditional"
    """``unconditional``, ``labels``, or further conditions with their shapes and the split that provides them.
    Conditional and unconditional models are not comparable."""
    label_distribution: str = "none"
    """Source of the labels of generated images."""
    chunk_size: int = 0
    """Number of images generated with the same random seed."""

    @property
    def id(self) -> str:
        """A short hash of all fields, which is equal for equal protocols only."""
        return _short_hash(asdict(self))

    def differences(self, other: Measurement) -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ, each with the values of ``self`` and ``other``."""
        return {
            f.name: (getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        }


@dataclass(frozen=True)
class SampleSettings:
    """How samples were generated. These settings are shown with the metrics and may differ within a table."""

    weights: str = "unknown"
    """``ema``, ``raw`` (the online weights), ``posthoc:LENGTH`` (a post-hoc EMA) or ``unknown``."""
    checkpoint: str = "unknown"
    """How the checkpoint was chosen: ``last``, or ``best`` (on validation data only)."""
    step: int | None = None
    """Training step of the checkpoint."""
    images_seen: int | None = None
    """Training images up to that step."""
    sampler: str = "unknown"
    """Description of the sampler and its settings."""
    nfe: dict[str, float] | None = None
    """Network evaluations per sample, by name of the network."""
    guidance: str = "none"
    seed: int | None = None

    @property
    def id(self) -> str:
        """A short hash of all fields."""
        return _short_hash(asdict(self))


def _short_hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


SCHEMA = 2
"""Version of the record format. `migrate_record` converts earlier versions."""
RECORD_FILE = "record.json"
MAX_SIZE = 1 << 25
"""Size limit of a record in bytes (32 MiB), far above the size of a run that was evaluated a thousand times."""


@dataclass(frozen=True)
class Metric:
    """The value of one metric of a `Result`.

    A metric with neither ``higher_is_better`` nor ``target`` is shown but not used for ranking.
    """

    value: float | None
    """The value, or None if it is not finite or there are too few images; ``note`` gives the reason."""
    higher_is_better: bool | None = None
    """Whether higher values are better, as in torchmetrics; None for a metric with a ``target`` or without an order."""
    target: float | None = None
    """The ideal value of a metric that may be too high or too low, such as 1 for a ratio."""
    baseline: float | None = None
    """The real-data baseline: the same metric, computed on the same number of real test images."""
    interval: tuple[float, float] | None = None
    """95 % confidence interval."""
    unit: str = ""
    note: str = ""
    method: str = ""
    """How the value was computed, in a few words, where this differs between families."""
    unbiased: bool = False
    """Whether the metric is 0 in expectation for real images, so that a ratio to the baseline is meaningless."""

    @property
    def unordered(self) -> bool:
        """Whether no value is better than another."""
        return self.higher_is_better is None and self.target is None

    @property
    def ratio_to_baseline(self) -> float | None:
        """The value divided by the real-data baseline, or None if the ratio is missing or meaningless."""
        if self.value is None or not self.baseline or self.unbiased:
            return None
        return self.value / self.baseline


@dataclass(frozen=True)
class Result:
    """Metrics of one set of samples, with the protocol and the sampling settings."""

    measurement: Measurement
    generation: SampleSettings
    metrics: dict[str, Metric]
    primary_metric: str
    """Name of the metric used for ranking."""
    created: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds of each part: ``sampling``, ``metrics``, ``likelihood``."""
    details: dict[str, Any] = field(default_factory=dict)
    """Details that are shown but not used for ranking: images_per_second and flops_per_sample of sampling, class
    frequencies, and warnings."""
    images: dict[str, str] = field(default_factory=dict)
    """PNG files by title, relative to the run folder."""
    secondary_results: list[Result] = field(default_factory=list)
    """Results of further extractors on the same samples; `RunRecord.add_result` stores each as a separate result."""

    @property
    def id(self) -> str:
        """Identifier of the result in a record. Evaluating again with equal settings replaces the result."""
        return f"{self.measurement.id}-{self.generation.id}"

    def _cells(self) -> list[tuple[str, str, str, str]]:
        """Return the name, value, interval and real-data baseline of each metric, with the primary metric first."""

        def text(value: float | None) -> str:
            return "" if value is None else f"{value:.4g}"

        names = sorted(self.metrics, key=lambda name: name != self.primary_metric)
        return [
            (name, text(metric.value), "[{}, {}]".format(*map(text, metric.interval)) if metric.interval else "",
             text(metric.baseline))
            for name, metric in ((name, self.metrics[name]) for name in names)
        ]  # fmt: skip

    def __str__(self) -> str:
        rows = [("metric", "value", "95 % interval", "real data"), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"Warning: {each}" for each in self.details.get("warnings", []))])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("metric", "value", "95 % interval", "real data"))
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._cells()
        )
        warnings = "".join(f"<p>Warning: {html.escape(str(each))}</p>" for each in self.details.get("warnings", []))
        return f"<table><tr>{head}</tr>{rows}</table>{warnings}"


@dataclass
class RunRecord:
    """The record of one run."""

    name: str
    family: str
    data: dict[str, Any]
    """Facts about the data set: name, shape, num_classes, num_bins, hash, and the size of each split."""
    seed: int = 0
    state: str = "running"
    """``running``, ``finished``, ``interrupted``, ``failed``, or ``samples`` for externally generated images."""
    created: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    """Command-line overrides."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Package versions, host and device, the git commit, and whether the work tree was dirty."""
    model: dict[str, Any] = field(default_factory=dict)
    """Facts about the model: parameters (in total, and by network), conditional, and noise_schedule if it has one."""
    training: dict[str, Any] = field(default_factory=dict)
    """Facts about training: steps, images_seen, seconds, device_seconds, images_per_second, peak_memory_bytes,
    evaluation_seconds (while training), energy_joules, flops_per_image, flops, flops_per_second, mfu (its share of the
    measured speed of matrix products, `gencompare.tasks.train.flops_utilization`), the reason of its ``end``,
    masked_gradients and rollbacks (`gencompare.training.divergence`), and perceptual_networks (the networks that the
    loss uses). ``dependencies`` lists the runs that the model depends on (`gencompare.tasks.runs.dependency_costs`),
    and ``total_cost`` is the training cost including them."""
    curve: str = "curve.csv"
    """CSV file with everything logged during training, relative to the run folder."""
    checkpoints: dict[str, str] = field(default_factory=dict)
    """Paths of the checkpoints ``last`` and ``best``, relative to the run folder."""
    images: dict[str, str] = field(default_factory=dict)
    """PNG files by title, relative to the run folder."""
    results: list[Result] = field(default_factory=list)
    schema: int = SCHEMA

    def add_result(self, result: Result) -> None:
        """Add a result and its secondary results; each takes the place of an earlier one with the same `Result.id`."""
        for each in (replace(result, secondary_results=[]), *result.secondary_results):
            if any(r.id == each.id for r in self.results):
                self.results = [each if r.id == each.id else r for r in self.results]
            else:
                self.results = [*self.results, each]

    def own_result(self) -> Result | None:
        """Return the result of the run's own sampler: the first one recorded for its newest checkpoint."""
        return newest(self.results)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``record.json`` to ``folder`` atomically."""
        path = Path(folder) / RECORD_FILE
        write_checked_json(path, _finite(asdict(self)))
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RunRecord:
        """Read the record of a run folder, or a record file.

        Raises:
            CorruptedFileError: the record is corrupted.
            UserError: the record is missing or from a newer version.
        """
        path = Path(folder)
        if path.is_dir():
            path = path / RECORD_FILE
        try:
            raw = read_checked_json(path, MAX_SIZE, parse_constant=lambda _: None)
        except FileNotFoundError as error:
            raise UserError(f"{path.parent} is not a run folder: it contains no {RECORD_FILE}.") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        except CorruptedFileError as error:
            raise CorruptedFileError(path, f"{error.args[1]} {_advice(path)}".strip()) from error
        return cls.from_json(raw, path)

    @classmethod
    def from_json(cls, raw: Any, path: str | os.PathLike[str] = RECORD_FILE) -> RunRecord:
        """Create a record from parsed JSON of this or an earlier schema. ``path`` is used in error messages.

        Records may come from anywhere, so their text is made `printable`.

        Raises:
            UserError: the record is corrupted, or from a newer version.
        """
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if not isinstance(schema, int):
            raise UserError(f"{path} is not a run record: it has no schema number.")
        if not 1 <= schema <= SCHEMA:
            reason = "it was written by a newer version" if schema > SCHEMA else "there is no such schema"
            raise UserError(
                f"{path} has schema {schema}, but this version of gencompare reads schemas 1 to {SCHEMA}: {reason}."
            )
        if depth_exceeds(raw, MAX_DEPTH):
            raise UserError(f"{path} is corrupted: it is nested more than {MAX_DEPTH} levels deep.")
        try:
            raw = migrate_record(_printable(raw))
            results = [_result(each) for each in raw.pop("results")]
            record = cls(**raw | {"schema": SCHEMA}, results=results)
            _check(record, cls)
            return record
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is corrupted, or from another version of gencompare ({' '.join(str(error).split())})."
            ) from error

    @staticmethod
    def update(folder: str | os.PathLike[str], change: Callable[[RunRecord], None]) -> RunRecord:
        """Read, change and write the record of ``folder`` under a lock, so that concurrent updates are not lost."""
        record = RunRecord.load(folder)
        try:
            with file_lock(Path(folder) / f".{RECORD_FILE}.lock"):
                record = RunRecord.load(folder)
                change(record)
                record.save(folder)
        except OSError as error:
            raise UserError(f"Cannot write to {folder}: {error.strerror}.") from error
        return record


def newest(results: Iterable[Result]) -> Result | None:
    """Return the first of the results with the highest training step, or None if there are none."""
    return max(results, key=lambda result: result.generation.step or 0, default=None)


def now() -> str:
    """Return the current UTC time in ISO 8601 format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _advice(path: str | os.PathLike[str]) -> str:
    """Return how to rebuild the record at ``path``."""
    command = f"python run.py {shell_override('resume', Path(path).parent)}"
    return f"To write a new record, without the earlier results, from the run's config and checkpoint: {command}"


def _result(raw: dict[str, Any]) -> Result:
    metrics = {
        name: Metric(**{**m, "interval": tuple(m["interval"]) if m.get("interval") else None})
        for name, m in raw["metrics"].items()
    }
    return Result(
        **{
            **raw,
            "measurement": Measurement(**raw["measurement"]),
            "generation": SampleSettings(**raw["generation"]),
            "metrics": metrics,
        }
    )


def _check(value: Any, hint: Any, name: str = "record") -> None:
    """Raise `TypeError` if ``value``, or anything in it, does not have its declared type.

    None passes as a number, since non-finite numbers are stored as None.
    """
    if hint is Any or (hint in _PLAIN and type(value) is hint):
        return
    origin, args = _origin_and_args(hint)
    if origin is UnionType:
        if value is not None:
            _check(value, next(arg for arg in args if arg is not NoneType), name)
    elif is_dataclass(hint):
        for attribute, of_attribute in _hints(hint).items():
            _check(getattr(value, attribute), of_attribute, attribute)
    elif origin in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise TypeError(f"{name} is not a number")
    elif not isinstance(value, origin):
        raise TypeError(f"{name} is not a {origin.__name__}")
    elif origin is dict and args and args[1] is not Any:
        for key, each in value.items():
            _check(each, args[1], f"{name}.{key}")
    elif origin in (list, tuple) and args:
        if origin is tuple and len(value) != len(args):
            raise TypeError(f"{name} has {len(value)} elements, not {len(args)}")
        for each in value:
            _check(each, args[0], name)


def _printable(value: Any) -> Any:
    """Return parsed JSON with all text made `printable`, including the names in it."""
    if isinstance(value, dict):
        return {printable(name): _printable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_printable(each) for each in value]
    return printable(value) if isinstance(value, str) else value


_PLAIN = (str, int, float)
_hints = cache(get_type_hints)


@cache
def _origin_and_args(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint) or hint, get_args(hint)


def _finite(value: Any) -> Any:
    """Return ``value`` with None in place of every NaN and infinity, which JSON does not support."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
