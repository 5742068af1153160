"""The committed records are of runs that learned, and name no machine."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from gencompare.records import RunRecord

RESULTS = Path(__file__).parents[1] / "docs" / "results"
KEPT = sorted(path.parent for path in RESULTS.glob("*/record.json"))
CURVES = [folder for folder in KEPT if (folder / "curve.csv").exists()]
FAMILIES, DATA = ("vae", "gan", "ddpm"), ("fashion_mnist", "cifar10")


def looks(folder: Path) -> list[float]:
    """The distances that were measured while the model trained, in order."""
    with open(folder / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    name = next(name for name in rows[0] if name.startswith("val/fd_"))
    return [float(row[name]) for row in rows if row[name]]


@pytest.mark.parametrize("folder", CURVES, ids=lambda folder: folder.name)
def test_distance_falls_while_training(folder: Path) -> None:
    distances = looks(folder)
    assert len(distances) >= 5
    assert distances[-1] < distances[0]
    assert spearmanr(range(len(distances)), distances).statistic < -0.5


def test_each_family_of_the_spine_has_its_curve() -> None:
    assert {f"{data}_{family}" for data in DATA for family in FAMILIES} <= {folder.name for folder in CURVES}


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_record_is_finished_and_names_no_place(folder: Path) -> None:
    record = RunRecord.load(folder)
    assert record.state == "finished"
    assert all(result.metrics[result.headline].value is not None for result in record.results)
    text = (folder / "record.json").read_text()
    assert "/home/" not in text
    assert "out" not in record.config
