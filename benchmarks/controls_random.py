"""The controls under networks with random weights, where the published ones cannot be had.

    python benchmarks/controls_random.py inception-v3-compat
    python benchmarks/controls_random.py vgg16

Writes a table to benchmarks/results. Each image is 11 or 15 GFLOP, so there are 400 of each kind: too few for a Frechet
distance on 2,048 or 4,096 features, which is left out. (CLIP's files are programs, of which only the published ones are
run, and DINOv2 comes from torch.hub alone.) With the published weights:
python run.py task=controls data=cifar10 evaluation=inception evaluation.weights=FILE.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from random_inception import save_random_inception
from torchvision.models import vgg16

from gencompare.data.fashion_mnist import FashionMNIST
from gencompare.evaluation.controls import controls
from gencompare.evaluation.evaluate import Protocol
from gencompare.evaluation.features import Extractor
from gencompare.evaluation.fidelity import fidelity
from gencompare.evaluation.inception import inception
from gencompare.evaluation.source import Data
from gencompare.files import write_text
from gencompare.models.gaussian import Gaussian
from gencompare.tasks.controls import table
from gencompare.tasks.progress import stages

SIZES = {"train": 600, "val": 100, "test": 450}
SAMPLES = 400
RESULTS = Path(__file__).parent / "results"


class Small(Protocol):
    """A protocol that takes fewer samples than features."""

    def check(self, data: Data) -> Extractor:
        return self.extractor(data.spec)


def save_random_vgg16(path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(vgg16(weights=None).state_dict(), path)
    return path


def main() -> None:
    (name,) = sys.argv[1:]
    data = FashionMNIST(os.environ.get("GENCOMPARE_DATA", "data"))
    data.splits = {name: split[slice(SIZES[name])] for name, split in data.splits.items()}
    baseline = Gaussian(data.spec).fit_to(data.batches("train"), data.batches("val"))
    with tempfile.TemporaryDirectory() as folder, stages() as progress:
        file = Path(folder) / "weights.pth"
        extractor = {
            "inception-v3-compat": lambda spec: inception(spec, weights=save_random_inception(file)),
            "vgg16": lambda spec: fidelity(spec, "vgg16", weights=save_random_vgg16(file)),
        }[name]
        protocol = Small(extractor=extractor, n=SAMPLES, cache=None)
        found = controls(data, protocol, baseline=baseline, progress=progress)
    result = RESULTS / f"controls_{name.replace('-', '_')}.md"
    write_text(result, table(found))
    print(result.read_text())


if __name__ == "__main__":
    main()
