"""The committed records are of runs that learned, and name no machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from gencompare.records import RunRecord

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "results"))

import table  # type: ignore[import-not-found]

RESULTS = Path(table.__file__).parent
KEPT = sorted(path.parent for path in RESULTS.glob("*/record.json"))
NOT_LEARNED = {"fashion_mnist_ncsn", "fashion_mnist_ncsn_told"}
"""Kept to show what goes wrong (docs/diffusion.md): their distance rises, and the page of results says so."""
LEARNED = [folder for folder in KEPT if folder.name not in NOT_LEARNED and RunRecord.load(folder).family != "gaussian"]
WANTED = {f"{data}_{family}" for data in ("fashion_mnist", "cifar10") for family in ("vae", "gan", "ddpm")}


@pytest.mark.parametrize("folder", LEARNED, ids=lambda folder: folder.name)
def test_distance_falls_while_training(folder: Path) -> None:
    distances = table.distances(folder / "curve.csv")
    assert len(distances) >= (5 if folder.name in WANTED else 2), "at half of the budget, and at its end"
    assert distances[-1] < distances[0]
    if not folder.name.startswith("digits"):  # most of digits is learned before the first look
        assert spearmanr(range(len(distances)), distances).statistic < -0.5


def test_each_family_has_its_curve() -> None:
    assert {folder.name for folder in LEARNED} >= WANTED


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_record_is_finished_and_names_no_place(folder: Path) -> None:
    record = RunRecord.load(folder)
    assert record.state == "finished"
    assert all(result.metrics[result.headline].value is not None for result in record.results)
    assert "/home/" not in (folder / "record.json").read_text()
    assert "out" not in record.config


def test_the_page_is_what_the_records_say() -> None:
    assert (RESULTS / "README.md").read_text() == table.page()
