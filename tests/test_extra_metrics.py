"""Invariants of every option of conf/evaluation/metric, and exact values of `GaussianMMD`."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hydra.utils import instantiate

from composing import compose, options
from gencompare.evaluation.metrics.compute import extra_metric
from gencompare.evaluation.metrics.kernel import GaussianKernel, GaussianMMD, kernel_distance


@pytest.mark.parametrize("name", options("evaluation/metric"))
def test_an_extra_metric_ignores_order_and_separates_sets(name: str) -> None:
    cfg = compose(f"+evaluation/metric={name}")
    metric = instantiate(cfg.evaluation.protocol.metrics[name])
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 8, generator=g), torch.randn(400, 8, generator=g)
    value = metric(a, b)
    assert math.isfinite(value)
    shuffled = metric(a[torch.randperm(300, generator=g)], b[torch.randperm(400, generator=g)])
    assert shuffled == pytest.approx(value, rel=1e-5), "the order of the images must not matter"
    assert metric(b, b) != pytest.approx(metric(b + 5, b)), "distant sets must not look equal"


def test_mmd_of_points_at_two_places() -> None:
    """All points of a set coincide, and the two sets are r = 5 apart, so with the bandwidth b the value is
    1000 (1 + 1 - 2 exp(-r^2 / 2b^2))."""
    a, b = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]]).repeat(4, 1)
    assert GaussianMMD(bandwidth=5)(a, b) == pytest.approx(2000 * (1 - math.exp(-0.5)))
    assert GaussianMMD(bandwidth=10, normalize=True)(2 * b, b) == pytest.approx(0, abs=1e-9)


def test_the_interval_of_mmd_is_scaled_too() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 4, generator=g), torch.randn(80, 4, generator=g)
    plain, scaled = kernel_distance(a, b, GaussianKernel(2.0)), GaussianMMD(bandwidth=2).estimate(a, b)
    assert plain.interval is not None and scaled.value == pytest.approx(1000 * plain.value)
    assert scaled.interval == pytest.approx(tuple(1000 * end for end in plain.interval))


def test_a_partial_function_keeps_its_direction() -> None:
    def shift(generated: torch.Tensor, real: torch.Tensor, scale: float = 1.0) -> float:
        return scale * float((generated.mean(0) - real.mean(0)).norm())

    shift.higher_is_better = False  # type: ignore[attr-defined]
    metric = extra_metric("name", partial(shift, scale=2.0), torch.ones(4, 2), torch.zeros(4, 2))
    assert metric.higher_is_better is False and metric.value == pytest.approx(2 * 2**0.5)
