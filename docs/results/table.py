"""The table of a comparison of families, in Markdown, for its README: python docs/results/table.py FOLDER

Reads ``docs/results/FOLDER/compare.csv``, which task=compare writes beside the page.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

DEFAULT = "efficientnet_lite0"
COLUMNS = (
    "family",
    "MMD ↓",
    "FD ↓",
    "coverage ↑",
    "recall ↑",
    "NFE",
    "training FLOPs",
    "classifier MMD ↓",
    "classifier FD ↓",
)


def main(folder: str) -> None:
    """Print one line for each family, in the order of the default primary metric; the classifier's metrics are last.

    Values are means over training seeds, and the interval of several seeds is that of their mean.
    """
    with (Path(__file__).parent / folder / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    default, second = (
        _by_family(row for row in rows if (row["measurement.extractor"] == DEFAULT) == is_default)
        for is_default in (True, False)
    )
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for family, seeds in default.items():
        print("| " + " | ".join(_cells(family, seeds, second[family])) + " |")


def _by_family(rows: Iterable[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["run"].partition(", seed ")[0], []).append(row)
    return found


def _cells(family: str, seeds: list[dict[str, str]], second: list[dict[str, str]]) -> list[str]:
    primary = "mean" if len(seeds) > 1 else f"mmd_{DEFAULT}"
    value, low, high = (_digits(float(seeds[0][f"{primary}{key}"])) for key in ("", ".low", ".high"))
    classifier = second[0]["measurement.extractor"]
    return [
        family,
        f"{value} [{low}, {high}]",
        _digits(_mean(seeds, f"fd_{DEFAULT}")),
        f"{_mean(seeds, 'coverage'):.2f}",
        f"{_mean(seeds, 'recall'):.2f}",
        f"{_mean(seeds, 'nfe'):.0f}",
        f"{_mean(seeds, 'total_cost.flops'):.1e}",
        _digits(_mean(second, f"mmd_{classifier}")),
        _digits(_mean(second, f"fd_{classifier}")),
    ]


def _mean(rows: list[dict[str, str]], name: str) -> float:
    return fmean(float(row[name] or 0) for row in rows)  # NFE and FLOPs of closed-form families are empty


def _digits(number: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    main(*sys.argv[1:])
