"""What a comparison of many runs costs: seconds on one core, and bytes of its page.

    python benchmarks/compare.py

Synthetic records: 200 configs of four families, five training seeds each, a learning curve of 100 points and a picture
of 20 kB. Processor time is what counts on a machine that others use too; wall time and the load stand beside it.
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

from gencompare.compare.page import report
from gencompare.files import write_json
from gencompare.records import now
from gencompare.tasks.runs.environment import environment
from synthetic import a_curve, result, write_run  # type: ignore[import-not-found]

RESULT = Path(__file__).parent / "results" / "compare.json"
FAMILIES = ("ddpm", "vae", "gan", "flow")
SEEDS = 5
SETTINGS = 60
"""Settings of a model in its config, as many as the U-Net of a diffusion model has here."""


def write_records(folder: Path, runs: int) -> list[Path]:
    random = np.random.default_rng(0)
    folders = []
    for k in range(runs):
        config, seed = divmod(k, SEEDS)
        family = FAMILIES[config % len(FAMILIES)]
        model: dict[str, Any] = {"network": {f"setting_{j}": j for j in range(SETTINGS)}, "optimizer": {"lr": config}}
        made = result(1.0 + config / 50 + 0.05 * random.standard_normal(), generation={"seed": seed})
        folders.append(
            write_run(
                folder / f"{k:04d}_{family}", [made], family=family, seed=seed, curve=a_curve(k, rows=100),
                config={"seed": seed, "family": family, "model": model}, shape=(1, 22, 22),
                training={"flops": 1e12 * (1 + config), "seconds": 60.0 + config, "steps": 100, "images_seen": 100_000},
            )
        )  # fmt: skip
    return folders


def measure(runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folders = write_records(Path(place), runs)
        picture = np.mean([(folder / "samples" / "grid.png").stat().st_size for folder in folders])
        wall, cpu = time.perf_counter(), time.process_time()
        page = report(folders, Path(place) / "out")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        sizes = {path.name: path.stat().st_size for path in sorted((Path(place) / "out").glob("compare.*"))}
        assert page.is_file()
    return {"runs": runs, "bytes_of_a_picture": picture, "cpu_seconds": cpu, "wall_seconds": wall, "bytes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[13, 100, 1000])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    measure(2)  # imports, and fonts that matplotlib looks for once
    before = os.getloadavg()
    rows = [measure(runs) for runs in args.runs]
    for row in rows:
        print(f"{row['runs']:>5} runs: {row['cpu_seconds']:.1f} s, page of {row['bytes']['compare.html'] / 1e6:.1f} MB")
    loaded = {"before": before, "after": os.getloadavg()}
    write_json(
        args.out, {"created": now(), "load": loaded, "rows": rows, "environment": environment(torch.device("cpu"))}
    )


if __name__ == "__main__":
    main()
