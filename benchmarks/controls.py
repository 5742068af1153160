"""Controls under the standard Inception network: does each figure see the fault that it is there for?

    python benchmarks/controls.py --weights FILE     published ones (pt_inception-2015-12-05-6726825d.pth)
    python benchmarks/controls.py                    random ones, where those cannot be had

Copies of training images, images with one class dropped, test images with pixel noise, and the Gaussian baseline, on the
digits. Written to benchmarks/results/controls.json.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_inception import save_random_inception

from gencompare.data.digits import Digits
from gencompare.evaluation.controls import controls
from gencompare.evaluation.evaluate import Protocol
from gencompare.evaluation.inception import inception
from gencompare.files import write_json
from gencompare.models.gaussian import Gaussian
from gencompare.records import now
from gencompare.tasks.environment import environment

RESULT = Path(__file__).parent / "results" / "controls.json"
SHOWN = ("fid", "kid", "precision", "recall", "density", "coverage", "memorization", "authenticity")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the controls under the Inception network.")
    parser.add_argument("--weights", type=Path, help="of inception-v3-compat; random ones without")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    data = Digits()
    baseline = Gaussian(data.spec).fit_to(data.batches("train"), data.batches("val"))
    with tempfile.TemporaryDirectory() as folder:
        weights = options.weights or save_random_inception(Path(folder) / "inception.pth")
        protocol = Protocol(extractor=partial(inception, weights=weights), n=options.images, cache=None)
        found = controls(data, protocol, baseline=baseline)
    rows: dict[str, Any] = {"real": {name: next(iter(found.values())).metrics[name].floor for name in SHOWN}}
    rows |= {control: {name: result.metrics[name].value for name in SHOWN} for control, result in found.items()}
    print("| images | " + " | ".join(SHOWN) + " |\n" + "|---" * (len(SHOWN) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join("–" if v is None else f"{v:.3g}" for v in row.values()) + " |")  # noqa: RUF001
    kind = "random" if options.weights is None else "given"
    about = {"created": now(), "environment": environment(torch.device("cpu")), "weights": kind}
    write_json(options.out, {**about, "data": "digits", "n": options.images, "figures": rows})
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
