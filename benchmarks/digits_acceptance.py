"""Check the acceptance criteria of the digits demonstration on a run and on images with known faults.

    python benchmarks/digits_acceptance.py RUN_FOLDER

Prints a Markdown table: the run, real test images, copies of training images, images without one class, noisy and
blurred test images, and the Gaussian baseline, all under the default protocol.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from gencompare.data.digits import Digits
from gencompare.evaluation.acceptance import accepted, criteria
from gencompare.evaluation.degradations import DEGRADATIONS
from gencompare.evaluation.evaluate import evaluate
from gencompare.evaluation.reference import quantize_split
from gencompare.models.gaussian import GaussianBaseline
from gencompare.records import Result, RunRecord


def main() -> None:
    data = Digits()
    train, test = data.split("train"), data.split("test")
    assert train.labels is not None
    copies, real = quantize_split(train.images, data.spec), quantize_split(test.images, data.spec)
    degrade = {degradation.name: degradation for degradation in DEGRADATIONS}
    sources = {
        "real test images": real,
        "copies of training images": copies[:500],
        "one class dropped": copies[train.labels != 3][:500],
        "noise of 25 grey levels": degrade["noise"](real, 25),
        "blur of 0.6 pixels": degrade["blur"](real, 0.6),
        "Gaussian baseline": GaussianBaseline(data.spec).fit(data.batches("train"), data.batches("val")),
    }
    record = RunRecord.load(sys.argv[1])
    own, *also = [r for r in record.results if r.generation == record.results[0].generation]
    named: dict[str, Result] = {record.family: replace(own, secondary_results=also)}
    named |= {name: evaluate(source, data) for name, source in sources.items()}
    first = criteria(named[record.family])
    print("| images | " + " | ".join(f"{c.name} {c.limit}" for c in first) + " | |")
    print("|---" * (len(first) + 2) + "|")
    for name, result in named.items():
        cells = [
            "-" if c.value is None else f"{c.value:.3g}" if c.met else f"**{c.value:.3g}**" for c in criteria(result)
        ]
        print(f"| {name} | " + " | ".join(cells) + f" | {'passes' if accepted(result) else 'fails'} |")


if __name__ == "__main__":
    main()
