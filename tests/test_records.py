"""Records survive a round trip, invalid ones raise a one-line error, and protocols are compared by their fields."""

from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import fields, replace
from pathlib import Path

import pytest

from gencompare.errors import UserError
from gencompare.records import RECORD_FILE, Measurement, Metric, Result, RunRecord, SampleSettings

MEASUREMENT = Measurement("digits", 500, "test", 500, "aa", "digits", "bb")


def result(value: float = 1.5, **generation: object) -> Result:
    metrics = {
        "fd_digits": Metric(value, higher_is_better=False, baseline=0.5, interval=(1.0, 2.0), unit="", note=""),
        "precision": Metric(0.75, higher_is_better=True),
    }
    made = SampleSettings(weights="ema", nfe={"net": 50.0}, **generation)  # type: ignore[arg-type]
    return Result(
        MEASUREMENT, made, metrics, primary_metric="fd_digits", seconds={"sampling": 2.0}, images={"s": "s.png"}
    )


def record(**changes: object) -> RunRecord:
    run = RunRecord(name="a <b>", family="ddpm", data={"name": "digits"}, seed=3, config={"a": [1, {"b": None}]})
    run.results = [result()]
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def test_a_record_survives_a_round_trip(tmp_path: Path):
    run = record()
    assert run.save(tmp_path) == tmp_path / RECORD_FILE
    assert RunRecord.load(tmp_path) == run
    assert RunRecord.load(tmp_path / RECORD_FILE) == run


def test_values_that_are_not_finite_are_stored_as_none(tmp_path: Path):
    run = record(training={"seconds": math.inf, "more": [math.nan, 1.0]})
    run.results = [replace(result(math.nan, seed=1), seconds={"sampling": math.nan})]
    run.results[0].metrics["kid"] = Metric(0.1, interval=(math.nan, 0.2))
    path = run.save(tmp_path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    read = RunRecord.load(tmp_path)
    assert read.training == {"seconds": None, "more": [None, 1.0]}
    assert read.results[0].metrics["fd_digits"].value is None
    assert read.results[0].metrics["kid"].interval == (None, 0.2)


def test_a_result_with_equal_settings_replaces_the_earlier_one():
    run = record()
    run.add_result(result(1.2))
    assert [r.metrics["fd_digits"].value for r in run.results] == [1.2]
    run.add_result(result(1.1, sampler="ddim"))
    run.add_result(replace(result(1.0), measurement=replace(MEASUREMENT, num_images=1000)))
    assert [r.metrics["fd_digits"].value for r in run.results] == [1.2, 1.1, 1.0]


def test_the_ratio_to_the_real_data_baseline():
    assert Metric(1.5, baseline=0.5).ratio_to_baseline == 3.0
    assert Metric(None, baseline=0.5).ratio_to_baseline is None
    assert Metric(1.5).ratio_to_baseline is None
    assert Metric(1.5, baseline=0.0).ratio_to_baseline is None


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: "[1, 2", "corrupted"),
        (lambda raw: "\0\0\0", "corrupted"),
        (lambda raw: "[1, 2]", "corrupted"),
        (lambda raw: "{}", "no schema"),
        (lambda raw: json.dumps({**raw, "schema": 99}), "schema 99"),
        (lambda raw: json.dumps({**raw, "results": None}), "corrupted"),
        (lambda raw: json.dumps({**raw, "family": ["x"]}), "family is not a str"),
        (lambda raw: json.dumps({**raw, "seed": "0"}), "seed is not a number"),
        (lambda raw: json.dumps({**raw, "images": {"a": 3}}), "images.a is not a str"),
        (lambda raw: json.dumps({**raw, "unknown_field": 1}), "unknown_field"),
        (lambda raw: json.dumps({k: v for k, v in raw.items() if k != "name"}), "name"),
        (lambda raw: json.dumps(raw).replace('"interval": [1.0, 2.0]', '"interval": [1.0]'), "interval"),
        (lambda raw: json.dumps(raw).replace('"value": 1.5', '"value": "low"'), "value is not a number"),
        (lambda raw: json.dumps(raw).replace('"nfe": {"net": 50.0}', '"nfe": {"net": {}}'), "nfe.net is not a number"),
        (lambda raw: json.dumps(raw).replace('"num_images": 500', '"num_images": null, "m": 1'), "'m'"),
    ],
)
def test_a_damaged_or_unknown_record_raises_a_one_line_error(tmp_path: Path, damage, message: str):
    path = record().save(tmp_path)
    path.write_text(damage(json.loads(path.read_text()) | {"sha256": None}))  # as if it was edited on purpose
    with pytest.raises(UserError) as error:
        RunRecord.load(tmp_path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_record_raises(tmp_path: Path):
    with pytest.raises(UserError, match=r"is not a run folder: it contains no record\.json"):
        RunRecord.load(tmp_path)


def _add_results(folder: Path, first: int) -> None:
    for seed in range(first, first + 10):
        RunRecord.update(folder, lambda run, seed=seed: run.add_result(result(seed=seed)))


def test_concurrent_updates_are_not_lost(tmp_path: Path):
    record(results=[]).save(tmp_path)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_results, args=(tmp_path, first)) for first in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(r.generation.seed for r in RunRecord.load(tmp_path).results) == list(range(30))  # type: ignore[type-var]


def test_a_failed_update_leaves_the_record_unchanged(tmp_path: Path):
    before = record().save(tmp_path).read_bytes()

    def change(run: RunRecord) -> None:
        run.name = "half done"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        RunRecord.update(tmp_path, change)
    assert (tmp_path / RECORD_FILE).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {RECORD_FILE, f".{RECORD_FILE}.lock"}


@pytest.mark.parametrize("name", [f.name for f in fields(Measurement)])
def test_protocols_are_equal_exactly_if_all_fields_are(name: str):
    value = getattr(MEASUREMENT, name)
    other = replace(MEASUREMENT, **{name: value + 1 if isinstance(value, int) else value + "x"})
    assert MEASUREMENT.id == replace(MEASUREMENT).id and not MEASUREMENT.differences(replace(MEASUREMENT))
    assert MEASUREMENT.id != other.id
    assert MEASUREMENT.differences(other) == {name: (value, getattr(other, name))}
