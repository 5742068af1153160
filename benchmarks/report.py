"""Write the tables of docs/performance.md from the results in benchmarks/results.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
EVALUATION = {
    "end_to_end": "", "neighbours": "precision, recall, density and coverage of ", "distance": "Frechet distance of ",
}  # fmt: skip
"""Parts of the benchmark of an evaluation, and what they compute if their setting does not say so."""
SAMPLERS = ["DDIM", "Euler", "Heun", "DPM-Solver++(2M)"]


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def ratio(row: Mapping[str, Any]) -> str:
    median, low, high = row["wall"]["ratio"]
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(variants: Mapping[str, Any], base: str) -> list[list[str]]:
    """Return one line per variant: time, ratio of times, and how many times as fast."""
    return [
        [name, f"{row['wall']['ms']:,.0f}", ratio(row) if name != base else "1", f"{1 / row['wall']['ratio'][0]:.2f}"]
        for name, row in variants.items()
    ]


def tables() -> dict[str, str]:
    """Return the tables of the page by name."""
    train, sampling, evaluation = read("train_step"), read("sampling"), read("evaluation")
    found = {}
    for channels in (32, 64):
        rows = times(train[f"network_{channels}"]["variants"], "diffusers")
        found[f"network_{channels}"] = markdown(["variant", "ms", "time / diffusers", "times as fast"], rows)
    found["trainer"] = markdown(
        ["work", "plain loop, ms", "Trainer, ms", "ratio"],
        [
            [
                train[name]["setting"],
                f"{train[name]['variants']['plain loop']['wall']['ms']:.1f}",
                f"{train[name]['variants']['gencompare trainer']['wall']['ms']:.1f}",
                f"{row[0]:.3f} [{row[1]:.3f}, {row[2]:.3f}]",
            ]
            for name in ("trainer", "trainer_on_digits")
            for row in [train[name]["variants"]["gencompare trainer"]["wall"]["ratio"]]
        ],
    )
    found["sampling"] = markdown(
        ["variant", "ms", "time / diffusers", "times as fast"], times(sampling["network"], "diffusers")
    )
    peers = list(sampling["overhead"]["DDIM"])
    found["overhead"] = markdown(
        ["sampler", *peers],
        [
            [name, *(f"{sampling['overhead'][name][peer]['microseconds_per_step']:.0f}" for peer in peers)]
            for name in SAMPLERS
        ],
    )
    found["evaluation"] = markdown(
        ["work", "peer", "time / peer"],
        [
            [work + evaluation[part]["setting"], peer, ratio(row)]
            for part, work in EVALUATION.items()
            for peer in [next(iter(evaluation[part]["variants"]))]
            for name, row in evaluation[part]["variants"].items()
            if name.startswith("gencompare")
        ],
    )
    return found


def fill(text: str) -> str:
    """Replace the tables of the page, each between two comments with its name."""
    for name, table in tables().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"{PAGE} has no place for the table {name}"
        text = pattern.sub(lambda match, table=table: match[1] + table + "\n" + match[2], text)
    return text


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
