"""Every option of conf/evaluation/metric, found by globbing, and exact answers of those that ship."""

from __future__ import annotations

import math

import pytest
import torch
from hydra.utils import instantiate

from composing import compose, options
from gencompare.evaluation.coverage import Coverage


@pytest.mark.parametrize("name", options("evaluation/metric"))
def test_laws_of_a_metric(name: str) -> None:
    cfg = compose(f"+evaluation/metric={name}")
    metric = instantiate(cfg.evaluation.protocol.metrics[name])
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 8, generator=g), torch.randn(400, 8, generator=g)
    value = metric(a, b)
    assert math.isfinite(value)
    shuffled = metric(a[torch.randperm(300, generator=g)], b[torch.randperm(400, generator=g)])
    assert shuffled == pytest.approx(value, rel=1e-5), "the order of the images must not matter"
    assert metric(b, b) != pytest.approx(metric(b + 5, b)), "sets that lie apart must not look equal"


def test_coverage_of_known_sets() -> None:
    real = torch.arange(100.0)[:, None]
    metric = Coverage(neighbours=2)
    # Inside the line a point's 2nd neighbour is at distance 1; its two ends have theirs at 2.
    assert metric(real, real) == 1
    assert metric(real + 1000, real) == 0
    assert metric(real[:50], real) == 0.51, "the 50 sampled points and the next one"
    assert metric(torch.tensor([[50.0]]), real) == 0.03, "one sample covers its neighbourhood"
