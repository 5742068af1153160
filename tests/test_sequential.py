"""Evaluations that stop by themselves are valid at all looks together, and compute what one look would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.extractors.extractor import Extractor, IdentityExtractor
from gencompare.evaluation.extractors.selection import default_extractors
from gencompare.evaluation.metrics.kernel import GaussianKernel, KernelReference, KernelSums, kernel_distance
from gencompare.evaluation.sequential import (
    difference_looks,
    early_spending,
    even_spending,
    first_look,
    levels,
    looks,
    mean_estimate,
    mean_looks,
    sign_is_known,
)
from gencompare.generative_model import Cond, DataSpec


def features(n: int, shift: float, seed: int, dim: int = 4) -> Tensor:
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] += shift
    return x


def critical_values(shares: tuple[float, ...], spent: tuple[float, ...]) -> np.ndarray:
    return np.array([stats.norm.isf((1 - level) / 2) for level in levels(shares, spent)])


def test_critical_values_are_the_published_ones() -> None:
    assert critical_values((1.0,), (1.0,)) == pytest.approx([1.959964], abs=1e-4)
    # Pocock (1977), Biometrika 64, table 1: 2.178 at both of two looks, 2.289 at all of three.
    for num, constant in ((2, 2.178), (3, 2.289)):
        shares = tuple((k + 1) / num for k in range(num))
        paths = np.random.default_rng(0).standard_normal((400_000, num)).cumsum(1) / np.sqrt(np.arange(1, num + 1))
        first = [np.mean(np.any(np.abs(paths[:, : k + 1]) > constant, axis=1)) / 0.05 for k in range(num - 1)]
        assert critical_values(shares, (*first, 1.0)) == pytest.approx([constant] * num, abs=0.03)


@pytest.mark.parametrize("spending", [early_spending, even_spending])
def test_a_wiener_process_leaves_the_intervals_with_the_stated_probability(spending: Callable) -> None:
    ends = looks(2000, 100)
    assert ends[0] == 500 and ends[-1] == 2000
    shares = tuple(n / 2000 for n in ends)
    steps = np.random.default_rng(1).standard_normal((40_000, len(ends))) * np.sqrt(np.diff((0, *shares)))
    paths = steps.cumsum(1)
    outside = np.abs(paths) > critical_values(shares, spending(shares)) * np.sqrt(shares)
    assert np.mean(outside.any(1)) == pytest.approx(0.05, abs=0.004)
    if spending is early_spending:
        # Four standard errors at all samples are two at a quarter of them: at least half are seen there.
        assert np.mean(paths[:, 0] + 4 * shares[0] > critical_values(shares, spending(shares))[0] * 0.5) > 0.495


def test_looks_include_the_last_sample() -> None:
    assert looks(1000, 250) == [250, 500, 750, 1000]
    assert looks(1000, 300) == [300, 600, 900, 1000]
    assert looks(100, 250) == [100]


def test_chunks_give_the_distance_of_all_samples() -> None:
    reference = KernelReference.from_features(features(300, 0.0, 0), GaussianKernel())
    x = features(1500, 0.4, 1)
    sums = KernelSums(reference)
    for chunk in x.split([7, 1100, 393]):
        sums.add(chunk)
    whole, parts = kernel_distance(x, reference), sums.distance()
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    assert parts.interval == pytest.approx(whole.interval, rel=1e-9)


def test_a_paired_difference_leaves_out_pairs() -> None:
    reference = KernelReference.from_features(features(200, 0.0, 0), GaussianKernel())
    x = features(60, 0.4, 1)
    y = x + 0.3 * features(60, 0.0, 2)
    a, b = KernelSums(reference), KernelSums(reference)
    a.add(x)
    b.add(y)
    found = a.difference(b)
    assert found.value == pytest.approx(kernel_distance(x, reference).value - kernel_distance(y, reference).value)
    delete_one = []
    for k in range(60):
        kept = torch.arange(60) != k
        delete_one.append(kernel_distance(x[kept], reference).value - kernel_distance(y[kept], reference).value)
    jackknife = 59 / 60 * np.square(np.array(delete_one) - np.mean(delete_one)).sum()
    assert found.standard_error**2 == pytest.approx(jackknife)
    errors = [kernel_distance(each, reference).standard_error for each in (x, y)]
    assert found.standard_error < np.hypot(*errors), "correlated samples"
    same = a.difference(a)
    assert same.value == 0 and same.interval == (0.0, 0.0)
    with pytest.raises(UserError, match="equally many"):
        a.difference(KernelSums(reference))


def test_equal_models_are_rarely_called_different() -> None:
    reference = KernelReference.from_features(features(150, 0.0, 0), GaussianKernel())
    claims = 0
    for k in range(150):
        a, b = features(200, 0.5, 2 * k + 10), features(200, 0.5, 2 * k + 11)
        found = difference_looks(lambda n, a=a: a[:n], lambda n, b=b: b[:n], reference, 200, 25)
        claims += sign_is_known(first_look(found, sign_is_known))
    assert claims <= 150 * 0.05 + 2.5 * (150 * 0.05 * 0.95) ** 0.5


def test_a_clear_difference_is_known_at_the_first_look() -> None:
    reference = KernelReference.from_features(features(150, 0.0, 0), GaussianKernel())
    a, b = features(400, 0.0, 1), features(400, 2.0, 2)
    look = first_look(difference_looks(lambda n: a[:n], lambda n: b[:n], reference, 400, 50), sign_is_known)
    assert look.num_images == 100 and look.estimate.value < 0
    bits = torch.full((400,), 0.5) + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    assert first_look(mean_looks(lambda n: bits[:n], 400, 50), sign_is_known).num_images == 100
    estimate, expected = mean_estimate(bits), stats.t.interval(0.95, 399, bits.mean(), stats.sem(bits))
    assert estimate.interval == pytest.approx(expected, rel=1e-6)


class Noise:
    """Draws uniform images."""

    conditional = False
    spec = Digits.spec

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        return 2 * torch.rand(n, 1, 8, 8, generator=generator) - 1


class Frechet(IdentityExtractor):
    @property
    def primary(self) -> str:
        return self.frechet_name


def protocol(num_images: int = 400, max_half_width: float | None = None) -> EvaluationProtocol:
    return EvaluationProtocol([classifier], num_images=num_images, chunk_size=50, max_half_width=max_half_width)


def classifier(spec: DataSpec) -> Extractor:
    return default_extractors(spec)[-1](spec)


def test_an_evaluation_stops_when_it_is_precise(data_root: Path, tmp_path: Path) -> None:
    data = Digits()
    early, late = (evaluate(Noise(), data, protocol(max_half_width=share)) for share in (0.5, 1e-6))
    assert early.measurement.num_images == 100 and late.measurement.num_images == 400
    metric, (low, high) = early.metrics[early.primary_metric], early.details["stopped"]["interval"]
    assert metric.value is not None and high - low <= metric.value and low < metric.value < high
    # The samples are the first of those that would be drawn, so the result is that of an evaluation of so many.
    whole = evaluate(Noise(), data, protocol(num_images=100))
    assert whole.metrics[whole.primary_metric].value == pytest.approx(metric.value)
    assert early.measurement.id == whole.measurement.id != late.measurement.id


def test_mistakes_are_named(data_root: Path) -> None:
    with pytest.raises(UserError, match="max_half_width=0"):
        evaluate(Noise(), Digits(), protocol(max_half_width=0))
    with pytest.raises(UserError, match="ranks by a kernel distance"):
        evaluate(Noise(), Digits(), EvaluationProtocol(extractors=[Frechet], num_images=400, max_half_width=0.1))


def test_the_command_says_which_run_is_better(
    cli: Callable[..., int], data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["model=gaussian", "data=digits", "trainer=cpu", "logger=none", "evaluation.extractors=[classifier]"]
    for seed in (0, 1):
        assert cli(*quick, "evaluation.num_images=100", f"seed={seed}", f"hydra.run.dir=run{seed}") == 0
    capsys.readouterr()
    few = ["num_images=200", "protocol.chunk_size=50", "protocol.num_likelihood_images=200"]
    assert cli("task=difference", "run_dir=run0", "task.other=run1", *(f"evaluation.{each}" for each in few)) == 0
    output = capsys.readouterr().out
    assert "MMD, 50 images: run0 - run1 = " in output and "bits/dim" in output
    assert cli("task=difference", "run_dir=run0") == 1
    assert "task.other=RUN_FOLDER" in capsys.readouterr().err
