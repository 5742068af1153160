"""Paired timing of variants that take turns in one process.

The speed of a machine drifts by 20 % and more within minutes, so times from separate runs are not comparable. Here,
round k of one variant is compared with round k of the other, and the median of their ratios is reported.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gencompare.records import now
from gencompare.tasks.runs.environment import environment


@dataclass
class Laps:
    """Seconds per round of one variant: wall time, and the processor time of this process, which excludes other
    programs."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def start(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        wall, cpu = self._start
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def last(self, rounds: int) -> Laps:
        return Laps(self.wall[-rounds:], self.cpu[-rounds:])


def machine() -> dict[str, Any]:
    """Describe the time, the machine and its load, and the versions of the packages."""
    return {
        "created": now(),
        "environment": environment(torch.device("cpu")),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def take_turns(variants: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 2) -> dict[str, Laps]:
    """Run each variant once per round, in random order. The first ``warm_up`` rounds are not counted."""
    laps = {name: Laps() for name in variants}
    order, names = random.Random(0), list(variants)
    for k in range(-warm_up, rounds):
        order.shuffle(names)
        for name in names:
            lap = laps[name] if k >= 0 else Laps()
            lap.start()
            variants[name]()
            lap.stop()
    return laps


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    r"""Return the median and its distribution-free 95 % confidence interval from order statistics.

    The interval from the j-th smallest to the j-th largest of n values does not contain the median with probability
    :math:`2 P(B < j)`, :math:`B \sim \text{Binomial}(n, 1/2)`.
    """
    x, n = sorted(values), len(values)
    if n < 6:
        raise ValueError(f"{n} values have no 95 % interval of the median: measure at least 6 rounds")
    tail = j = 0
    while (tail + math.comb(n, j)) / 2**n <= 0.025:
        tail += math.comb(n, j)
        j += 1
    return statistics.median(x), x[j - 1], x[n - j]


def compare(laps: Mapping[str, Laps], base: str) -> dict[str, dict[str, Any]]:
    """Return each variant's median time in ms, and (median, low, high) of its ratio to and difference from ``base``."""

    def relative_to(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
        pairs = list(zip(a, b, strict=True))
        return {
            "ms": round(1e3 * statistics.median(a), 2),
            "ratio": [round(value, 4) for value in median_interval([p / q for p, q in pairs])],
            "added_ms": [round(1e3 * value, 2) for value in median_interval([p - q for p, q in pairs])],
        }

    return {
        name: {
            "rounds": len(lap.wall),
            "wall": relative_to(lap.wall, laps[base].wall),
            "cpu": relative_to(lap.cpu, laps[base].cpu),
        }
        for name, lap in laps.items()
    }


def table(title: str, rows: Mapping[str, dict[str, Any]]) -> str:
    """Format the result of `compare` as a table."""
    lines = [f"{title}:", f"  {'':24}{'ms':>9}  {'ratio (95 %)':24}{'processor ms':>12}  ratio (95 %)"]
    for name, row in rows.items():
        wall, cpu = ("{:.3f} [{:.3f}, {:.3f}]".format(*row[key]["ratio"]) for key in ("wall", "cpu"))
        lines.append(f"  {name:24}{row['wall']['ms']:9.1f}  {wall:24}{row['cpu']['ms']:12.1f}  {cpu}")
    return "\n".join(lines)
