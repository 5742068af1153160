"""The bars of the digits demonstration: which of them a run clears, and which the controls fail.

    python benchmarks/digits_bars.py RUN_FOLDER

Prints a Markdown table: the run's result, then copies of training images, images with one class dropped, test images
with pixel noise, and the Gaussian baseline, all under the default protocol.
"""

from __future__ import annotations

import sys

from gencompare.data.digits import Digits
from gencompare.evaluation.bars import bars
from gencompare.evaluation.controls import controls
from gencompare.models.gaussian import Gaussian
from gencompare.records import Result, RunRecord


def main() -> None:
    data = Digits()
    baseline = Gaussian(data.spec).fit_to(data.batches("train"), data.batches("val"))
    record = RunRecord.load(sys.argv[1])
    named: dict[str, Result] = {record.family: record.results[0], **controls(data, baseline=baseline)}
    first = bars(record.results[0])
    print("| images | " + " | ".join(f"{bar.name} {bar.limit}" for bar in first) + " | |")
    print("|---" * (len(first) + 2) + "|")
    for name, result in named.items():
        checked = bars(result)
        cells = [f"{bar.value:.3g}" if bar.ok else f"**{bar.value:.3g}**" for bar in checked]
        print(f"| {name} | " + " | ".join(cells) + f" | {'passes' if all(b.ok for b in checked) else 'fails'} |")


if __name__ == "__main__":
    main()
