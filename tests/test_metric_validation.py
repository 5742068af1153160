"""Metric validation: its image sets, and the conclusions that it draws from known values."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch

from conftest import CHECKOUT
from gencompare.data.digits import Digits
from gencompare.evaluation.metric_validation import (  # fmt: skip
    BASELINE,
    PAIRS,
    REAL,
    Candidate,
    as_json,
    image_sets,
    rank_correlation,
    score,
    score_values,
    table,
    weakest_detected,
)
from gencompare.models.gaussian import GaussianBaseline


def test_a_metric_equal_to_the_strength_is_perfect() -> None:
    levels = {("blur", 0.6): 1.0, ("blur", 1.0): 2.0, ("blur", 2.0): 3.0}
    good = {REAL: [0.0], BASELINE: [10.0], **{key: [value] for key, value in levels.items()}}
    best = score_values("good", good, 100, 1.0)
    assert best.spearman == {"blur": 1.0} and best.right == best.pairs == 5 and best.wrong == []
    assert best.relative["blur"] == {"0.6": 0.1, "1": 0.2, "2": 0.3}
    worst = score_values("bad", {key: [-of[0]] for key, of in good.items()}, 100, 1.0)
    assert worst.spearman == {"blur": -1.0} and worst.right == 0 and len(worst.wrong) == 5
    assert "blur 1 > gaussian" in worst.wrong


def test_a_strength_is_detected_if_all_subsets_exceed_all_real_ones() -> None:
    values = {
        REAL: [0.0, 0.2, 0.1], ("noise", 5): [0.15, 0.3, 0.3], ("noise", 10): [0.5, 0.6, 0.3], ("noise", 25): [2, 2, 2],
    }  # fmt: skip
    assert weakest_detected("noise", [5, 10, 25], values) == 10
    assert weakest_detected("noise", [5], values) is None
    values["noise", 25] = [0.1, 2, 2]
    assert weakest_detected("noise", [5, 10, 25], values) is None, (
        "a strength counts only if all stronger ones are detected"
    )
    assert math.isnan(rank_correlation([1, 2, 3], [1.0, math.nan, 2.0]))


def test_subsets_are_disjoint_and_have_the_given_size() -> None:
    seen = []

    def remember(own: torch.Tensor) -> dict[str, float]:
        seen.append(own[:, 0].tolist())
        return {"mean": float(own.mean())}

    features = {REAL: torch.arange(100.0)[:, None], BASELINE: torch.arange(100.0)[:, None] + 500}
    (found,) = score(Candidate("x", slice(None), remember), features, 25)
    subsets = seen[:4]
    assert [len(rows) for rows in subsets] == [25] * 4 and len({row for rows in subsets for row in rows}) == 100
    assert found.metric == "x: mean" and found.n == 25 and found.spread > 0
    assert "| x: mean | 25 |" in table([found])
    assert json.loads(json.dumps(as_json([found]), allow_nan=False))[0]["spearman"] == {}


def test_the_image_sets_include_all_that_the_pairs_name() -> None:
    data = Digits()
    baseline = GaussianBaseline(data.spec).fit(data.batches("train"), data.batches("val"))
    sets = dict(image_sets(data, 60, baseline))
    missing = {key for pair in PAIRS for key in pair} - sets.keys()
    assert missing == {("patch shuffle", 14)}, "8 x 8 pixels are too few for this grid"
    assert all(images.dtype == torch.uint8 and images.shape[1:] == (1, 8, 8) for images in sets.values())
    levels = torch.arange(17).mul(255 / 16).round()
    assert all(torch.isin(images, levels).all() for images in sets.values()), "the data's own grey levels"
    labels = data.split("test").labels
    assert labels is not None
    assert len(sets["dropped classes", 8]) < len(sets["dropped classes", 1]) < len(sets[REAL]) == 60
    distinct = {times: len(sets["repeated images", times].flatten(1).unique(dim=0)) for times in (2, 32)}
    assert distinct == {2: 30, 32: 2}
    assert torch.equal(sets["training images", 0.5][30:], sets[REAL][30:])
    again = dict(image_sets(data, 60, baseline))
    assert all(torch.equal(images, again[key]) for key, images in sets.items())


@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_pairs_of_one_kind_go_from_weak_to_strong(kind: str) -> None:
    pairs = [(a, b) for a, b in PAIRS if a[0] == b[0] == kind]
    assert pairs and all(a[1] < b[1] for a, b in pairs)


def test_the_docs_contain_the_summary_of_the_stored_studies() -> None:
    spec = importlib.util.spec_from_file_location("summary", CHECKOUT / "docs" / "metrics" / "summary.py")
    assert spec is not None and spec.loader is not None
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    page = (CHECKOUT / "docs" / "evaluation.md").read_text()
    kept = summary.studies()
    assert {"cifar10", "eurosat64"} <= kept.keys()
    assert summary.pairs_right(kept) in page and summary.relative_distances(kept) in page
