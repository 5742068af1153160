"""A twentieth of ``benchmarks/faults.py``: killed runs, damaged files and random overrides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forking import needs_fork
from parts import slow_if

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import faults  # type: ignore[import-not-found]

NUMBERS = {"kills": 5, "damages": 50, "overrides": 10}


@needs_fork
@pytest.mark.parametrize("experiment", slow_if({"kills", "overrides"}, NUMBERS))
def test_faults(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # the experiments change it
    for name in ("HYDRA_FULL_ERROR", "GENCOMPARE_FULL_ERROR"):
        monkeypatch.setenv(name, "0")
    counts = faults.EXPERIMENTS[experiment](NUMBERS[experiment], seed=7, folder=tmp_path)
    assert not any(counts[name] for name in faults.VIOLATIONS), capsys.readouterr().out
    assert sum(counts.values()) >= NUMBERS[experiment]


def test_the_judge_finds_violations() -> None:
    judged = {
        (1, "Error: model.lr=x must be a number.", 1.0): "explained",
        (1, "Error: model.lr=x must be a number.", 9.0): "late",
        (1, "Error: TypeError at build.py:79: 'int' object is not iterable", 1.0): "raw error",
        (1, "Traceback (most recent call last):\nError: x", 1.0): "raw error",
        (1, "Error: one\nError: two", 1.0): "raw error",
        (1, "", 1.0): "raw error",
        (0, "Warning: x", 9.0): "trained",
        (None, "", 60.0): "too slow",
    }
    for (code, output, seconds), outcome in judged.items():
        assert faults.judge(code, output, seconds)[0] == outcome


def test_a_damaged_file_that_is_used_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("1")
    assert faults.outcome_of(path.read_text, path)[0] == "used"

    def fail() -> None:
        raise ValueError("bad")

    assert faults.outcome_of(fail, path)[0] == "raw error"
