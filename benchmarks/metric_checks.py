"""The 15 sanity checks of fidelity and diversity metrics by Räisä et al. (2025), on sets of points.

    python benchmarks/metric_checks.py

Räisä, van Breugel and van der Schaar, "Position: All Current Generative Fidelity and Diversity Metrics are Flawed",
section 4 and appendix B, https://arxiv.org/abs/2505.22450. Each check varies one property of two simple distributions,
and states what a metric should do. This is an independent implementation of the distributions and tolerances that the
authors publish, with fewer points on each curve (9 instead of 20 to 51), one repetition instead of ten, and at most
3,162 points instead of 10,000.

The criteria are stated for metrics from 0 to 1. Distances have no upper end, so only the shape of their curves is
checked: the criteria apply to 1 - (D - min D) / (max D - min D), and where a metric should be constant, to D / max D.
The result is written to docs/results/metrics/checks.json. Takes about five minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from candidate_metrics import energy_distance, sliced_wasserstein

from gencompare.evaluation.metrics.frechet import frechet_distance
from gencompare.evaluation.metrics.kernel import CubicKernel, kernel_distance, mmd
from gencompare.evaluation.metrics.neighbors import compute_prdc
from gencompare.files import write_json
from gencompare.records import now
from gencompare.tasks.runs.environment import environment

RESULT = Path(__file__).parents[1] / "docs" / "results" / "metrics" / "checks.json"
FIDELITY, DIVERSITY = ("precision", "density"), ("recall", "coverage")
DISTANCES = ("mmd", "kd", "fd", "sliced_wasserstein", "energy_distance")
N, POINTS, REPEATS = 1000, 9, 1
DIMS = (1, 8, 64)

Criterion = Callable[[np.ndarray], bool]
"""Whether the values of a metric along a curve are as they should be."""


def near(place: int, *targets: float) -> Criterion:
    """The value at an index is one of ``targets``, up to 0.05."""
    return lambda y: any(abs(y[place] - target) <= 0.05 for target in targets)


def flat(y: np.ndarray) -> bool:
    """The values are equal up to 0.05."""
    return bool(y.max() - y.min() <= 0.05)


def settles(y: np.ndarray) -> bool:
    """The values in the second half are equal up to 0.05."""
    return flat(y[len(y) // 2 :])


def falling(y: np.ndarray) -> bool:
    """The values go from the maximum down to the minimum, up to 0.1."""
    return bool(y[0] - y[-1] >= 0.2 and y.max() - y[0] <= 0.1 and y[-1] - y.min() <= 0.1)


def rising(y: np.ndarray) -> bool:
    """The values go from the minimum up to the maximum, up to 0.1."""
    return falling(y[::-1])


def bell(place: int) -> Criterion:
    """The values are highest at an index, and lowest at one end or both, up to 0.1."""

    def shape(y: np.ndarray) -> bool:
        low = min(y[0], y[-1])
        return bool(y[place] - max(y[0], y[-1]) >= 0.2 and y.max() - y[place] <= 0.1 and low - y.min() <= 0.1)

    return shape


def falling_by(place: int) -> Criterion:
    """The values fall, by at least 0.1 up to an index."""
    return lambda y: falling(y) and bool(y[0] - y[place] >= 0.1)


def either(*criteria: Criterion) -> Criterion:
    """One of the criteria holds."""
    return lambda y: any(criterion(y) for criterion in criteria)


@dataclass(frozen=True)
class Curve:
    """One setting of a check."""

    check: str
    sets: Callable[[np.random.Generator], Iterator[tuple[np.ndarray, np.ndarray]]]
    """Draws (real, samples) for each point of the curve."""
    fidelity: tuple[Criterion, ...]
    diversity: tuple[Criterion, ...]
    shape: tuple[Criterion, ...] = field(default=())
    """Criteria of distances, for 1 minus the scaled distance."""
    constant: tuple[Criterion, ...] = field(default=())
    """Criteria of distances relative to their maximum."""


def gaussian(random: np.random.Generator, mean: object, std: object, dim: int, n: int = N) -> np.ndarray:
    return random.normal(mean, std, size=(n, dim))  # type: ignore[arg-type]


def mixture(random: np.random.Generator, means: np.ndarray, std: float, probs: np.ndarray, n: int = N) -> np.ndarray:
    centres = means[random.choice(len(means), size=n, p=probs / probs.sum())]
    return centres + std * random.normal(size=centres.shape)


def ball(random: np.random.Generator, dim: int, radius: float, n: int) -> np.ndarray:
    directions = random.normal(size=(n, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return radius * directions * random.uniform(size=(n, 1)) ** (1 / dim)


def torus(random: np.random.Generator, n: int) -> np.ndarray:
    """Draw points of a torus with radii 1 and 0.1, uniform in the angle and in the disc."""
    disc, angle = ball(random, 2, 0.1, n), random.uniform(0, 2 * np.pi, n)
    return np.stack([(1 + disc[:, 0]) * np.cos(angle), (1 + disc[:, 0]) * np.sin(angle), disc[:, 1]], 1)


def curves() -> Iterator[Curve]:
    """Yield the settings of all checks."""
    middle, last = POINTS // 2, POINTS - 1
    like_bell = (near(middle, 1), near(0, 0), near(last, 0), bell(middle))
    for dim, reach in zip(DIMS, (6, 3, 1), strict=True):
        means = np.linspace(-reach, reach, POINTS)

        def shifted(
            random: np.random.Generator, dim: int = dim, means: np.ndarray = means, outlier: str = ""
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            real, far = gaussian(random, 0, 1, dim), np.full((1, dim), means[-1])
            real = np.concatenate([real, far]) if outlier == "real" else real
            for mean in means:
                samples = gaussian(random, mean, 1, dim)
                yield real, np.concatenate([samples, far]) if outlier == "samples" else samples

        yield Curve("Gaussian mean difference", shifted, like_bell, like_bell, (bell(middle),))
        for outlier in ("real", "samples"):
            with_outlier = lambda random, shifted=shifted, outlier=outlier: shifted(random, outlier=outlier)  # noqa: E731
            yield Curve("mean difference with outlier", with_outlier, like_bell, like_bell, (bell(middle),))
    for dim, reach in zip(DIMS, (3, 1, 0.5), strict=True):

        def scaled(
            random: np.random.Generator, dim: int = dim, reach: float = reach
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            real = gaussian(random, 0, 1, dim)
            for std in np.logspace(-reach, reach, POINTS):
                yield real, gaussian(random, 0, std, dim)

        yield Curve(
            "Gaussian std difference", scaled,
            (near(middle, 1), near(0, 1), near(last, 0), falling),
            (near(middle, 1), near(0, 0), near(last, 0, 1), either(bell(middle), rising)),
            (bell(middle),),
        )  # fmt: skip
    for dim, std in zip(DIMS, (1 / 6, 1 / 3, 1), strict=True):
        modes = np.tile(np.linspace(0, 10, 10)[:, None], dim)

        def all_but_one(
            random: np.random.Generator, modes: np.ndarray = modes, std: float = std
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            real = mixture(random, modes, std, np.ones(10))
            for lost in np.linspace(0, 1, POINTS):
                yield real, mixture(random, modes, std, np.array([1, *[1 - lost] * 9]))

        def one_by_one(
            random: np.random.Generator, modes: np.ndarray = modes, std: float = std
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            real = mixture(random, modes, std, np.ones(10))
            for kept in range(10, 0, -1):
                yield real, mixture(random, modes[:kept], std, np.ones(kept))

        faithful = (near(0, 1), near(-1, 1), flat)
        late = (near(0, 1), falling_by(round(0.95 * last)))
        yield Curve("simultaneous mode dropping", all_but_one, faithful, late, (falling,))
        yield Curve("sequential mode dropping", one_by_one, faithful, (near(0, 1), falling_by(5)), (falling,))
    places = 40 * np.random.default_rng(0).uniform(size=(10, 2))

    def dropped_and_invented(random: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        real = mixture(random, places[:5], 0.25, np.ones(5))
        for count in range(1, 11):
            yield real, mixture(random, places[:count], 0.25, np.ones(count))

    yield Curve(
        "mode dropping and invention", dropped_and_invented,
        (near(4, 1), near(0, 1), falling), (near(4, 1), near(-1, 1), rising), (bell(4),),
    )  # fmt: skip
    for dim in (2, 16, 128):

        def surfaces(random: np.random.Generator, dim: int = dim) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            def surface() -> np.ndarray:
                x = random.normal(size=(N, dim))
                return x / np.linalg.norm(x, axis=1, keepdims=True)

            real = surface()
            for radius in np.linspace(0.1, 1.9, POINTS):
                yield real, radius * surface()

        yield Curve("hypersphere surface", surfaces, like_bell, like_bell, (bell(middle),))
    sizes = [round(n) for n in np.logspace(2, 3.5, 7)]
    for dim in DIMS:
        start = 1 - 0.2 ** (1 / dim)  # a fifth of the cubes' volume overlaps

        def cubes(
            random: np.random.Generator, dim: int = dim, start: float = start, real_size: int = 0
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            fixed = random.uniform(size=(real_size, dim))
            for n in sizes:
                real = fixed if real_size else random.uniform(size=(n, dim))
                yield real, random.uniform(start, start + 1, size=(n, dim))

        fifth = (settles, near(-1, 0.2))
        yield Curve("hypercube, varying size", cubes, fifth, fifth, (), (settles,))
        fixed_real = lambda random, cubes=cubes: cubes(random, real_size=N)  # noqa: E731
        yield Curve("hypercube, varying number of samples", fixed_real, fifth, fifth, (), (settles,))
    for real_is_ball in (True, False):

        def ball_and_torus(
            random: np.random.Generator, real_is_ball: bool = real_is_ball
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            real = ball(random, 3, 0.8, N) if real_is_ball else torus(random, N)
            for n in sizes:
                yield real, torus(random, n) if real_is_ball else ball(random, 3, 0.8, n)

        apart = (settles, near(-1, 0))
        yield Curve("sphere and torus", ball_and_torus, apart, apart, (), (settles,))
    for dim in DIMS:

        def one_and_two(random: np.random.Generator, dim: int = dim) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for mu in np.linspace(0, 5, POINTS):
                centres = np.tile([[-mu / 2], [mu / 2]], dim)
                real = mixture(random, centres, 1, np.ones(2))
                yield real, gaussian(random, 0, np.sqrt(1 + mu**2), dim)

        yield Curve(
            "one against two modes", one_and_two, (near(0, 1), falling), (near(0, 1), either(falling, flat)), (falling,)
        )

    def one_dimension_scaled(random: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for scale in np.logspace(-3, 3, POINTS):
            factor = np.array([1, scale])
            yield factor * gaussian(random, 0, 1, 2), factor * gaussian(random, (6, 0), 1, 2)

    disjoint = (near(0, 0), near(-1, 0), flat)
    yield Curve("scaling of one dimension", one_dimension_scaled, disjoint, disjoint, (), (flat,))

    def with_pareto(random: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        def points(mean: float) -> np.ndarray:
            return np.stack([random.normal(mean, 1, N), 1 + random.pareto(1.01, N)], 1)

        real = points(0)
        for mean in np.linspace(-6, 6, POINTS):
            yield real, points(mean)

    yield Curve("mean difference with Pareto", with_pareto, like_bell, like_bell, (bell(middle),))

    def one_disjoint_dimension(random: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for extra in np.logspace(0, 3, POINTS).astype(int):
            samples = gaussian(random, 0, 1, extra + 1)
            samples[:, 0] += 6
            yield gaussian(random, 0, 1, extra + 1), samples

    yield Curve("one disjoint dimension", one_disjoint_dimension, disjoint, disjoint, (), (flat,))
    for real_is_discrete in (True, False):

        def discretised(
            random: np.random.Generator, real_is_discrete: bool = real_is_discrete
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for scale in np.logspace(0, 3, POINTS):
                real, samples = gaussian(random, 0, scale, 1), gaussian(random, 0, scale, 1)
                yield (real.round(), samples) if real_is_discrete else (real, samples.round())

        levels = ((0,), (0, 1)) if real_is_discrete else ((1,), (0,))
        fidelity, diversity = ((near(0, *goal), near(-1, *goal), flat) for goal in levels)
        yield Curve("discrete and continuous", discretised, fidelity, diversity, (), (flat,))


def metrics(real: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """Compute all metrics of samples (n, d) against real points (m, d)."""
    y, x = (torch.from_numpy(side).float() for side in (real, samples))
    prdc = compute_prdc(x, y)
    return {
        **{name: getattr(prdc, name) for name in (*FIDELITY, *DIVERSITY)},
        "mmd": mmd(x, y).value,
        "kd": kernel_distance(x, y, CubicKernel()).value,
        "fd": frechet_distance(x, y),
        "sliced_wasserstein": sliced_wasserstein(x, y),
        "energy_distance": energy_distance(x, y),
    }


def passes(curve: Curve, metric: str, y: np.ndarray) -> bool:
    """Return whether the values of a metric along a curve meet all criteria of its kind."""
    if metric in DISTANCES:
        closeness = 1 - (y - y.min()) / (y.max() - y.min())
        relative = y / np.abs(y).max()
        return all(c(closeness) for c in curve.shape) and all(c(relative) for c in curve.constant)
    return all(criterion(y) for criterion in (curve.fidelity if metric in FIDELITY else curve.diversity))


def values(curve: Curve) -> dict[str, np.ndarray]:
    """Average each metric over the repetitions of a curve."""
    found = []
    for seed in range(REPEATS):
        points = [metrics(*sets) for sets in curve.sets(np.random.default_rng(seed))]
        found.append({name: np.array([point[name] for point in points]) for name in points[0]})
    return {name: np.mean([repeat[name] for repeat in found], 0) for name in found[0]}


def results(found: Iterator[Curve]) -> dict[str, dict[str, list[bool]]]:
    """Return by check and metric whether each setting passes."""
    table: dict[str, dict[str, list[bool]]] = {}
    for curve in found:
        for metric, y in values(curve).items():
            table.setdefault(curve.check, {}).setdefault(metric, []).append(passes(curve, metric, y))
    return table


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    table = results(curves())
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_json(RESULT, {"time": now(), "environment": environment(torch.device("cpu")), "passed": table})
    for check, row in table.items():
        print(f"{check:40}", {metric: f"{sum(ok)}/{len(ok)}" for metric, ok in row.items()})
