"""Benchmark the comparison of many runs: processor time, and size of the page.

    python benchmarks/compare.py

Synthetic records: 200 configs of four families with five training seeds each, a learning curve of 100 points and an
image of 20 kB. The processor time is printed; the wall time and the load of the machine are stored with it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gencompare.comparison.page import report
from gencompare.files import write_json
from gencompare.records import now
from gencompare.tasks.runs.environment import environment
from synthetic import result, synthetic_curve, write_run  # type: ignore[import-not-found]

RESULT = Path(__file__).parent / "results" / "compare.json"
FAMILIES = ("ddpm", "vae", "gan", "flow")
SEEDS = 5
SETTINGS = 60
"""Number of settings in a model's config, as many as for the U-Net of a diffusion model."""


def write_records(folder: Path, runs: int) -> list[Path]:
    random = np.random.default_rng(0)
    folders = []
    for k in range(runs):
        config, seed = divmod(k, SEEDS)
        family = FAMILIES[config % len(FAMILIES)]
        model: dict[str, Any] = {"network": {f"setting_{j}": j for j in range(SETTINGS)}, "optimizer": {"lr": config}}
        evaluation = result(1.0 + config / 50 + 0.05 * random.standard_normal(), generation={"seed": seed})
        folders.append(
            write_run(
                folder / f"{k:04d}_{family}", [evaluation], family=family, seed=seed,
                curve=synthetic_curve(k, rows=100),
                config={"seed": seed, "family": family, "model": model}, shape=(1, 22, 22),
                training={"flops": 1e12 * (1 + config), "seconds": 60.0 + config, "steps": 100, "images_seen": 100_000},
            )
        )  # fmt: skip
    return folders


def measure(runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = write_records(folder, runs)
        image_bytes = np.mean([(run / "samples" / "grid.png").stat().st_size for run in folders])
        wall, cpu = time.perf_counter(), time.process_time()
        page = report(folders, folder / "out")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        sizes = {path.name: path.stat().st_size for path in sorted((folder / "out").glob("compare.*"))}
        assert page.is_file()
    return {"runs": runs, "bytes_of_an_image": image_bytes, "cpu_seconds": cpu, "wall_seconds": wall, "bytes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[13, 100, 1000])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    measure(2)  # warm up: imports and the font search
    load_before = os.getloadavg()
    rows = [measure(runs) for runs in args.runs]
    for row in rows:
        print(f"{row['runs']:>5} runs: {row['cpu_seconds']:.1f} s, page of {row['bytes']['compare.html'] / 1e6:.1f} MB")
    load = {"before": load_before, "after": os.getloadavg()}
    write_json(
        args.out, {"created": now(), "load": load, "rows": rows, "environment": environment(torch.device("cpu"))}
    )


if __name__ == "__main__":
    main()
