"""Write all pages in this folder again from the records beside them: python docs/results/build.py [FOLDER ...]"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gencompare.comparison.load_runs import find_run_folders, load_runs
from gencompare.comparison.page import write_report

RESULTS = Path(__file__).parent


def folders() -> list[Path]:
    """Return the folders that contain a comparison."""
    return sorted(path for path in RESULTS.iterdir() if next(path.glob("*/record.json"), None))


def main(names: list[str]) -> None:
    """Write the page of each named folder; without names, of all folders."""
    os.chdir(RESULTS.parents[1])  # pages show paths relative to the checkout
    for folder in [RESULTS / name for name in names] or folders():
        page = write_report(load_runs(find_run_folders(f"{folder}/*")), folder)
        print(f"Wrote {page.relative_to(RESULTS.parents[1])}.", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
