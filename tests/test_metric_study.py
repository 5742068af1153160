"""The scores of metrics on faults of known distance."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from conftest import CHECKOUT
from gencompare.evaluation.metric_study import Cell, Study, disjoint_subsets, false_alarms, has_alarm, loss, score
from gencompare.records import Metric


def study(measure: Any, data: str = "a", sets: int = 8) -> Study:
    """Return a study with the losses ``measure(distance)``, and noise that is the same for all metrics."""
    random = np.random.default_rng(len(data))

    def losses(distance: float) -> dict[int, dict[str, list[float]]]:
        return {10: {"m": [measure(distance, float(noise)) for noise in 1e-3 * random.normal(size=sets)]}}

    cells = [Cell(family, k, k, losses(k)) for family in ("blur", "noise") for k in (1.0, 2.0, 3.0)]
    return Study(data, "e", losses(0), cells[::-1])


def test_a_metric_equal_to_the_distance_is_perfect_and_its_negative_the_worst() -> None:
    (best,) = score([study(lambda d, noise: d + noise), study(lambda d, noise: d + noise, "bb")])
    assert (best.tau.mean, best.power.mean, best.n, best.metric) == (1, 1, 10, "m")
    assert best.tau.interval == (1, 1) and best.power_by_family == {"blur": 1, "noise": 1}
    (worst,) = score([study(lambda d, noise: -d + noise)])
    assert (worst.tau.mean, worst.power.mean) == (-1, 0)
    (blind,) = score([study(lambda d, noise: 0.0)])
    assert (blind.tau.mean, blind.power.mean, blind.false_alarms.mean) == (0, 0, 0)


def test_studies_survive_json() -> None:
    whole = study(lambda d, noise: d + noise)
    assert Study.from_json(json.loads(json.dumps(asdict(whole)))) == whole


def test_the_interval_is_over_families() -> None:
    values = {"blur": 1.0, "noise": -1.0}
    whole = study(lambda d, noise: d)
    cells = [
        Cell(c.family, c.strength, c.distance, {10: {"m": [values[c.family] * c.distance] * 2}}) for c in whole.cells
    ]
    (mixed,) = score([Study("a", "e", whole.real, cells)])
    assert mixed.tau.mean == 0 and mixed.tau.interval == (-1, 1)
    assert mixed.tau_by_family == values


@pytest.mark.parametrize("sets", [4, 8])
def test_alarms_between_equal_distributions_have_the_nominal_rate(sets: int) -> None:
    random = np.random.default_rng(sets)
    draws = random.normal(3, 2, size=(4000, sets + 1))
    rate = fmean(has_alarm(row[0], row[1:].tolist()) for row in draws)
    assert rate == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 4000))
    studies = [study(lambda d, noise: noise, "a" * k, sets) for k in range(1, 101)]
    found = false_alarms(studies, "m", 10)
    assert found.interval[0] < 0.05 < found.interval[1] and found.mean < 0.1


def test_lower_losses_are_better() -> None:
    assert loss(Metric(2.0, higher_is_better=False)) == 2
    assert loss(Metric(2.0, higher_is_better=True)) == -2
    assert loss(Metric(0.75, target=1.0)) == loss(Metric(1.25, target=1.0)) == 0.25
    assert loss(Metric(None, higher_is_better=True)) is None and loss(Metric(2.0)) is None


def test_the_page_contains_the_tables_of_the_stored_studies() -> None:
    folder = CHECKOUT / "docs" / "results" / "metrics"
    spec = importlib.util.spec_from_file_location("ranking", folder / "ranking.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (folder / "README.md").read_text()
    for extractor, found in module.scores().items():
        assert module.faults(module.studies(), extractor) in page
        assert module.ranking(found) in page and module.families(found) in page
        assert module.candidates(module.studies(), extractor) in page
    assert module.checks() in page


def test_subsets_are_disjoint() -> None:
    rows = [list(range(103))[subset] for subset in disjoint_subsets(103, 25)]
    assert [len(subset) for subset in rows] == [25] * 4 and len({row for subset in rows for row in subset}) == 100
    assert list(disjoint_subsets(20, 25)) == []
