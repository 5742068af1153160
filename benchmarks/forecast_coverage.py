"""How often do the 90 % intervals of a forecast contain the error of a new run, if the law is known?

    python benchmarks/forecast_coverage.py

Each trial draws five families of one population, three budgets in the ratio 1 : 2 : 4 with three seeds each, and a new
run of each family at 5 and 10 times the largest budget. Takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

import numpy as np

from gencompare.comparison.scaling_law import ScalingLaw, ShortRun
from gencompare.files import write_json

RESULT = Path(__file__).parent / "results" / "forecast_coverage.json"
BUDGETS, SEEDS, FAMILIES, FACTORS = (1.0, 2.0, 4.0), 3, 5, (5, 10)


@dataclass(frozen=True)
class Population:
    r"""Families with :math:`q = a (C^b + q_\infty)\, e^{d(\log C)}`, with C in the smallest budget.

    The exponents b are N(-0.8, 0.3^2), and log-normal noise between seeds has a standard deviation from 0.03 to 0.15.
    """

    drift: float = 0.0
    r"""How much the exponent drifts: d is an integrated Wiener process with this scale, relative to the noise, over
    :math:`\log C / \log 4`."""
    bend: float = 0.0
    r"""Standard deviation of c relative to the noise, common to all families and of each, for
    :math:`d = c (\log C / \log 4)^2`."""
    floor: tuple[float, float] | None = None
    r"""Limits of :math:`q_\infty`, log-uniform; None for 0."""


POPULATIONS = {
    "power laws": Population(),
    "power laws with a constant": Population(floor=(0.003, 0.3)),
    "power laws whose exponent drifts a little": Population(drift=1.0),
    "power laws whose exponent drifts much": Population(drift=10.0),
    "power laws with a bend": Population(bend=1.0),
}


def coverage(population: Population, trials: int) -> dict[str, float]:
    """Return the share of intervals that hold, and the median ratio of their ends."""
    random = np.random.default_rng(5)
    held, ratios = [], []
    for _ in range(trials):
        noise = random.uniform(0.03, 0.15)
        common = random.standard_normal()
        errors = [_Law(population, noise, common, random) for _ in range(FAMILIES)]
        runs = [
            ShortRun("", str(f), seed, cost, error(cost, random))
            for f, error in enumerate(errors)
            for cost in BUDGETS
            for seed in range(SEEDS)
        ]
        law = ScalingLaw(runs)
        for f, error in enumerate(errors):
            for factor in FACTORS:
                found = law.predict(str(f), factor * BUDGETS[-1])
                held.append(found.low <= error(factor * BUDGETS[-1], random) <= found.high)
                ratios.append(found.high / found.low)
    return {"coverage": float(np.mean(held)), "ratio": float(np.median(ratios))}


class _Law:
    """The error of new runs of one family."""

    def __init__(self, population: Population, noise: float, common: float, random: np.random.Generator) -> None:
        self.scale, self.exponent, self.noise = exp(random.normal(3, 1)), random.normal(-0.8, 0.3), noise
        t = np.log([*BUDGETS, *(factor * BUDGETS[-1] for factor in FACTORS)]) / log(4)
        first, last = np.minimum(t[:, None], t), np.maximum(t[:, None], t)
        wiener = noise * population.drift * random.multivariate_normal(np.zeros(5), first**2 * (3 * last - first) / 6)
        bend = noise * population.bend * (common + random.standard_normal()) * t**2
        self.departure = dict(zip(np.exp(t * log(4)).round(6), wiener + bend, strict=True))
        low, high = population.floor or (1.0, 1.0)
        self.floor = exp(random.uniform(log(low), log(high))) if population.floor else 0.0

    def __call__(self, cost: float, random: np.random.Generator) -> float:
        departure = self.departure[round(cost, 6)] + self.noise * random.standard_normal()
        return self.scale * (cost**self.exponent + self.floor) * exp(departure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the coverage of forecasts on simulated laws.")
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    result = {name: coverage(population, trials) for name, population in POPULATIONS.items()}
    for name, row in result.items():
        print(f"{name}: {100 * row['coverage']:.1f} % of the intervals hold, median ratio of ends {row['ratio']:.2f}")
    write_json(RESULT, {"trials": trials, **result})


if __name__ == "__main__":
    main()
