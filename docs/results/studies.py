"""The tables of single studies in the documentation, computed from the records: python docs/results/studies.py

A cell is the mean over training seeds and the half-width of its 95 % confidence interval (Student's t).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from findings import METRIC, RESULTS, Row
from scipy.special import stdtrit

from gencompare.comparison.statistics import SIGNIFICANCE_LEVEL

DOCS = RESULTS.parent


def cell(values: Iterable[float], digits: int = 1) -> str:
    """Format the mean and the half-width of its interval."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    limit = float(stdtrit(len(values) - 1, 1 - SIGNIFICANCE_LEVEL / 2)) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.{digits}f} ± {limit:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def schedules() -> str:
    """Return the table of noise schedules: trained with a schedule (rows), sampled on a grid (columns)."""
    grids = {
        "the schedule's own": r"DDIM, 25 steps, eta.*",
        "even in log-SNR": r"DDIM, 25 steps, LogSNRGrid.*",
        "Karras": r"DDIM, 25 steps, KarrasGrid.*",
    }
    names = {path.name.rpartition("_")[0] for path in (RESULTS / "schedules").glob("*_0")}
    values = {
        name: [list(Row("schedules", rf"{name}_\d", sampler).values().values()) for sampler in grids.values()]
        for name in names
    }
    order = sorted(names, key=lambda name: fmean(values[name][0]))
    rows = [[f"`{name}`", *map(cell, values[name])] for name in order]
    return markdown(["trained with", *grids], rows)


def guidance() -> str:
    """Return the table of scales of classifier-free guidance."""
    columns = {"MMD ↓": METRIC, "label accuracy ↑": "label_accuracy"}
    columns |= {f"{name} ↑": name for name in ("precision", "recall", "coverage")}
    scales = ["0", "1", "1.5", "2", "3", "5", "3 where sigma / alpha is 0.3 to 3"]
    rows = [
        [scale, *(
            cell(
                Row("guidance", ".*", rf".*, scale {re.escape(scale)}, x0.*", metric).values().values(),
                1 if metric == METRIC else 2,
            )
            for metric in columns.values()
        )]
        for scale in scales
    ]  # fmt: skip
    return markdown(["scale", *columns], rows)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "schedules": (DOCS / "schedules.md", schedules),
    "guidance": (DOCS / "diffusion.md", guidance),
}
"""For each study, the page and the table between ``<!-- NAME -->`` and ``<!-- end -->`` there."""


def filled(name: str) -> str:
    """Return the page of a study with its current table."""
    page, table = TABLES[name]
    block = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", re.DOTALL)
    return block.sub(lambda match: f"<!-- {name} -->\n{table()}\n<!-- end -->", page.read_text())


if __name__ == "__main__":
    for study, (path, _) in TABLES.items():
        path.write_text(filled(study))
