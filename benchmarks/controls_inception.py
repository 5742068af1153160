"""The controls under the Inception network with random weights, where the published ones cannot be had.

    python benchmarks/controls_inception.py

Writes a table to benchmarks/results/controls_inception.md. Each image is 11 GFLOP, so there are 400 of each kind, where
evaluation=inception asks for more than its 2,048 features: the distance is mostly bias, and only its order is read.
With the published weights: python run.py task=controls data=cifar10 evaluation=inception evaluation.weights=FILE.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

from random_inception import save_random_inception

from gencompare.data.fashion_mnist import FashionMNIST
from gencompare.evaluation.controls import controls
from gencompare.evaluation.evaluate import Protocol
from gencompare.evaluation.features import Extractor
from gencompare.evaluation.inception import inception
from gencompare.evaluation.source import Data
from gencompare.files import write_text
from gencompare.models.gaussian import Gaussian
from gencompare.tasks.controls import table
from gencompare.tasks.progress import stages

SIZES = {"train": 600, "val": 100, "test": 450}
SAMPLES = 400
RESULT = Path(__file__).parent / "results" / "controls_inception.md"


class Small(Protocol):
    """A protocol that takes fewer samples than features."""

    def check(self, data: Data) -> Extractor:
        return self.extractor(data.spec)


def main() -> None:
    data = FashionMNIST(os.environ.get("GENCOMPARE_DATA", "data"))
    data.splits = {name: split[slice(SIZES[name])] for name, split in data.splits.items()}
    baseline = Gaussian(data.spec).fit_to(data.batches("train"), data.batches("val"))
    with tempfile.TemporaryDirectory() as folder, stages() as progress:
        weights = save_random_inception(Path(folder) / "inception.pth")
        protocol = Small(extractor=partial(inception, weights=weights), n=SAMPLES, cache=None)
        found = controls(data, protocol, baseline=baseline, progress=progress)
    write_text(RESULT, table(found))
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
