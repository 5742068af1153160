"""The table of a comparison of families, in Markdown, for its README: python docs/results/table.py FOLDER

Reads ``docs/results/FOLDER/compare.csv``, which task=compare writes beside the page.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

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
    """Print one line for each row with the default primary metric, in its order; the classifier's metrics are last."""
    with (Path(__file__).parent / folder / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    second = {row["run"]: row for row in rows if row["measurement.extractor"] != DEFAULT}
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        if row["measurement.extractor"] == DEFAULT:
            print("| " + " | ".join(_cells(row, second[row["run"]])) + " |")


def _cells(row: dict[str, str], second: dict[str, str]) -> list[str]:
    mmd, low, high = (_digits(row[f"mmd_{DEFAULT}{key}"]) for key in ("", ".low", ".high"))
    classifier = second["measurement.extractor"]
    return [
        row["family"],
        f"{mmd} [{low}, {high}]",
        _digits(row[f"fd_{DEFAULT}"]),
        f"{float(row['coverage']):.2f}",
        f"{float(row['recall']):.2f}",
        f"{float(row['nfe'] or 0):.0f}",
        f"{float(row['total_cost.flops'] or 0):.1e}",
        _digits(second[f"mmd_{classifier}"]),
        _digits(second[f"fd_{classifier}"]),
    ]


def _digits(value: str) -> str:
    """Three significant digits, without an exponent."""
    number = float(value)
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    main(*sys.argv[1:])
