"""The run record: everything that a comparison needs to know about a run, in one JSON file. No torch here."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from gencompare.errors import UserError
from gencompare.files import locked, write_json
from gencompare.migrations import migrate


@dataclass(frozen=True)
class Measurement:
    """What must agree for two figures to be ranked."""

    data: str
    """Name of the data set."""
    n: int
    """Number of generated images."""
    reference: str
    """The split that the images are held against."""
    reference_n: int
    reference_hash: str
    """Hash of the reference split's pixels."""
    extractor: str
    extractor_hash: str
    """Hash of the extractor's weights."""
    resize: str = "none"
    """How images reach the extractor's size."""
    quantization: str = "uint8"
    """Rounding of images before features are taken."""
    conditioning: str = "unconditional"
    """``unconditional``, ``labels``, or further conditions with their shapes and the split that they come from: a
    conditional model is told the class, so it plays another game."""
    label_distribution: str = "none"
    chunk: int = 0
    """Images drawn from one seed at a time."""

    @property
    def id(self) -> str:
        """A short name of the protocol: equal for two figures exactly when they may be ranked."""
        return _short_hash(asdict(self))

    def differences(self, other: Measurement) -> dict[str, tuple[Any, Any]]:
        """The fields in which the two disagree, each with both values."""
        return {
            f.name: (getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        }


@dataclass(frozen=True)
class SampleSettings:
    """How the measured samples came about: shown beside a figure, free to differ between rows."""

    weights: str = "unknown"
    """``ema``, ``raw`` or ``unknown``."""
    checkpoint: str = "unknown"
    """Rule by which the checkpoint was chosen: ``last``, or ``best`` (on validation data only)."""
    step: int | None = None
    images_seen: int | None = None
    sampler: str = "unknown"
    """The sampler and its settings, in words."""
    nfe: dict[str, float] | None = None
    """Network calls a sample, counted at each network by name."""
    guidance: str = "none"
    seed: int | None = None

    @property
    def id(self) -> str:
        return _short_hash(asdict(self))


def _short_hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


SCHEMA = 1
FILE = "record.json"


@dataclass(frozen=True)
class Metric:
    """One figure of a `Result`."""

    value: float | None
    """None where the figure came out as not finite, or of too few images; ``note`` then says why."""
    better: str | None = None
    """``lower``, ``higher``, ``one`` (ideal value 1), or None where no order is meant."""
    floor: float | None = None
    """The same figure for real images (test split) in place of samples, at the same n: how good it can get."""
    interval: tuple[float, float] | None = None
    unit: str = ""
    note: str = ""
    unbiased: bool = False
    """Whether real images give 0 on average, so that a multiple of theirs means nothing."""

    @property
    def over_floor(self) -> float | None:
        """The figure as a multiple of the same figure for real images; None where that means nothing."""
        if self.value is None or not self.floor or self.unbiased:
            return None
        return self.value / self.floor


@dataclass(frozen=True)
class Result:
    """Figures that were measured on one set of samples, with the protocol of both halves."""

    measurement: Measurement
    generation: SampleSettings
    metrics: dict[str, Metric]
    headline: str
    """Name of the metric that ranks."""
    created: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds of its parts: ``sampling``, ``metrics``, ``likelihood``."""
    details: dict[str, Any] = field(default_factory=dict)
    """What is shown and never ranked: images_per_second and flops_per_sample of sampling, class shares, flags."""
    pictures: dict[str, str] = field(default_factory=dict)
    """PNG files by title, relative to the run folder."""
    also: list[Result] = field(default_factory=list)
    """Results of further extractors on the same samples; a record lists them beside this one."""

    @property
    def id(self) -> str:
        """One place in a record: a second evaluation in the same way replaces the first."""
        return f"{self.measurement.id}-{self.generation.id}"


@dataclass
class RunRecord:
    """One run. ``state`` is ``running``, ``finished``, ``interrupted``, ``failed`` or ``samples`` (others' images)."""

    name: str
    family: str
    data: dict[str, Any]
    """name, shape, num_classes, num_levels, hash, and the size of each split."""
    seed: int = 0
    state: str = "running"
    created: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    """The command line, word by word."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Package versions, git commit and dirtiness, host, device."""
    model: dict[str, Any] = field(default_factory=dict)
    """parameters (all, and by network), conditional, noise_schedule where there is one."""
    training: dict[str, Any] = field(default_factory=dict)
    """steps, images_seen, seconds, device_seconds, images_per_second, peak_memory_bytes, flops_per_image, flops,
    trained_against; ``needed``, what else the model cannot do without (`tasks.costs`), and ``total``, the cost with
    it."""
    curve: str = "curve.csv"
    """CSV of everything that was logged while training, relative to the run folder."""
    checkpoints: dict[str, str] = field(default_factory=dict)
    """``last``, ``best``: paths relative to the run folder."""
    pictures: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    schema: int = SCHEMA

    def put(self, result: Result) -> None:
        """Add a result and those of its ``also``, each in place of an earlier one that was measured in the same way."""
        for each in (replace(result, also=[]), *result.also):
            self.results = [r for r in self.results if r.id != each.id] + [each]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``record.json`` in ``folder``, whole or not at all."""
        path = Path(folder) / FILE
        write_json(path, _finite(asdict(self)))
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RunRecord:
        """Read the record in ``folder`` (or the file itself). Raises `UserError` for a missing or damaged one."""
        path = Path(folder)
        if path.is_dir():
            path = path / FILE
        try:
            raw = json.loads(path.read_text(), parse_constant=lambda _: None)
        except FileNotFoundError as error:
            raise UserError(f"{path.parent} is not a run folder: it holds no {FILE}.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): evaluate the run again to write it anew.") from error
        return cls.from_json(raw, path)

    @classmethod
    def from_json(cls, raw: Any, path: str | os.PathLike[str] = FILE) -> RunRecord:
        if not isinstance(raw, dict) or not isinstance(raw.get("schema"), int):
            raise UserError(f"{path} is no run record: it names no schema.")
        if raw["schema"] != SCHEMA:
            raise UserError(f"{path} has schema {raw['schema']}; this version of gencompare reads schema {SCHEMA}.")
        try:
            results = [_result(r) for r in raw.pop("results")]
            record = cls(**raw | {"config": migrate(raw.get("config", {}))}, results=results)
            _check(record, cls)
            return record
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): evaluate the run again to write it anew.") from error

    @staticmethod
    def update(folder: str | os.PathLike[str], change: Callable[[RunRecord], None]) -> RunRecord:
        """Read, change and write the record of ``folder``; other processes that update it wait their turn."""
        record = RunRecord.load(folder)
        try:
            with locked(Path(folder) / f".{FILE}.lock"):
                record = RunRecord.load(folder)
                change(record)
                record.save(folder)
        except OSError as error:
            raise UserError(f"Cannot write in {folder}: {error.strerror}.") from error
        return record


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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
    """Raises TypeError where ``value``, or something in it, is not of its declared type. None passes for a number:
    that is how one that was not finite is stored."""
    if hint is Any or (hint in _PLAIN and type(value) is hint):
        return
    kinds, inner = _parts(hint)
    if kinds is UnionType:
        if value is not None:
            _check(value, next(kind for kind in inner if kind is not NoneType), name)
    elif is_dataclass(hint):
        for part, kind in _hints(hint).items():
            _check(getattr(value, part), kind, part)
    elif kinds in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise TypeError(f"{name} is no number")
    elif not isinstance(value, kinds):
        raise TypeError(f"{name} is no {kinds.__name__}")
    elif kinds is dict and inner and inner[1] is not Any:
        for key, part in value.items():
            _check(part, inner[1], f"{name}.{key}")
    elif kinds in (list, tuple) and inner:
        if kinds is tuple and len(value) != len(inner):
            raise TypeError(f"{name} has {len(value)} parts, not {len(inner)}")
        for part in value:
            _check(part, inner[0], name)


_PLAIN = (str, int, float)
_hints = cache(get_type_hints)


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint) or hint, get_args(hint)


def _finite(value: Any) -> Any:
    """The value with every NaN and infinity as None (JSON has neither)."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
