"""Runs that cannot be compared are skipped with a reason, and the others are compared."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.page import report
from gencompare.comparison.published import published_results
from gencompare.comparison.ranking import explain_separate_tables, rank_results
from gencompare.errors import UserError
from gencompare.records import SCHEMA
from synthetic import DIGITS, result, write_run


@pytest.mark.parametrize(
    "schema, message", [(0, "has schema 0"), (SCHEMA + 1, f"has schema {SCHEMA + 1}"), ("1", "no schema")]
)
def test_a_record_of_an_unknown_schema_is_skipped_with_the_reason(tmp_path: Path, schema: Any, message: str) -> None:
    good = write_run(tmp_path / "good", [result(1.0)])
    other = write_run(tmp_path / "other", [result(2.0)], schema=schema)
    loaded = load_runs([good, other])
    assert [run.label for run in loaded.runs] == ["good"]
    (skipped,) = loaded.skipped
    assert skipped.folder == other and message in skipped.reason and str(other / "record.json") in skipped.reason
    report([good, other], tmp_path / "out")
    for name in ("compare.html", "compare.md"):
        assert message in (tmp_path / "out" / name).read_text().replace("\\", "")


def test_damaged_records_are_listed(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", [result(1.0)])
    damaged = {
        "empty": "",
        "list": "[]",
        "null": "null",
        "binary": "\x00\x01",
        "deep": '{"schema": 1, "results": [{}]}',
    }
    folders = []
    for name, text in damaged.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "record.json").write_text(text)
        folders.append(folder)
    (tmp_path / "folder" / "record.json").mkdir(parents=True)
    folders.append(tmp_path / "folder")
    raw = json.loads((good / "record.json").read_text())
    raw["results"][0]["metrics"]["fd_digits"]["value"] = "low"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "record.json").write_text(json.dumps(raw))
    loaded = load_runs([good, *folders, tmp_path / "text"])
    assert [run.label for run in loaded.runs] == ["good"] and len(loaded.skipped) == len(folders) + 1
    with pytest.raises(UserError, match="No run can be compared"):
        report(folders, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_record_without_read_permission_is_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [result(1.0)])
    (folder / "record.json").chmod(0)
    assert "corrupted" in load_runs([folder]).skipped[0].reason


def test_each_data_set_has_its_own_table(tmp_path: Path) -> None:
    cifar = replace(DIGITS, data="cifar10", extractor="cifar10")
    for name, measurement in (("a", DIGITS), ("b", DIGITS), ("c", cifar)):
        data = {"name": measurement.data}
        write_run(tmp_path / name, [result(1.0, measurement)], family=name, data=data, with_grid=False)
    tables = rank_results(load_runs(sorted(tmp_path.iterdir())).runs)
    assert [[row.run.label for row in table.rows] for table in tables] == [["a", "b"], ["c"]]
    assert "Table 2 uses a different data set, cifar10" in explain_separate_tables(tables)
    assert published_results("cifar10")
    report(sorted(tmp_path.iterdir()), tmp_path / "out")
    assert (tmp_path / "out" / "compare.tex").read_text().count(r"\begin{tabular}") == 2


def test_a_malformed_config_does_not_stop_the_comparison(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"choices": "none"}, {"model": [1, 2]}, {"data": None, "trainer": 3}, {"budget": {"images": float("inf")}},
    ]  # fmt: skip
    for k, config in enumerate(odd):
        training = {"flops": "many", "seconds": None, "steps": [1]}
        model = {"autoencoder": "x", "noise_schedule": [3, {"t": 1, "log_snr": [1]}, {"t": ["a"]}, None][k]}
        write_run(tmp_path / f"r{k}", [result(1.0 + k)], config=config, training=training, model=model, with_grid=False)
    page = report(sorted(tmp_path.iterdir()), tmp_path / "out")
    assert page.is_file() and len(load_runs(sorted(tmp_path.glob("r*"))).runs) == 4


@pytest.mark.parametrize("name", ["runs=runs/s[12]/*", "runs=a=1/*", "task.out=(x)"])
def test_an_unquoted_glob_is_refused_with_the_quoted_override(name: str, cli: Any, capsys: Any) -> None:
    assert cli("task=compare", name) == 2
    said = capsys.readouterr().err
    key, _, value = name.partition("=")
    assert said.count("\n") == 1 and f"Quote it: {key}=" in said.replace('"', "").replace("'", "")
    word = shlex.split(said.split("Quote it: ")[1].split(" (python")[0])[0]
    override = OverridesParser.create().parse_override(word)
    assert (override.key_or_group, override.value()) == (key, value)
