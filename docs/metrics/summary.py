"""Summary of the studies in this folder, for docs/evaluation.md: python docs/metrics/summary.py

`task=validate_metrics evaluation=study data=DATA` writes a study; its metrics.json, .md and .png are stored here as
DATA.json, DATA.md and DATA.png.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
DATA = ("cifar10", "eurosat64", "fashion_mnist", "mnist", "digits")
CLASSIFIER = "{data}"
ROWS = {
    "**EfficientNet-Lite0, 96 px, head: MMD, b = median**": "efficientnet_lite0 96 px head: MMD, b = 1 x median",
    "the same, b = half the median": "efficientnet_lite0 96 px head: MMD, b = 0.5 x median",
    "the same, cubic kernel (KID)": "efficientnet_lite0 96 px head: cubic kernel",
    "the same, CMMD": "efficientnet_lite0 96 px head: CMMD",
    "the same, Frechet": "efficientnet_lite0 96 px head: Frechet",
    "the same, 1 - coverage": "efficientnet_lite0 96 px head: 1 - coverage",
    "the same, 1 - precision": "efficientnet_lite0 96 px head: 1 - precision",
    "96 px, stage 7 (320 features): MMD": "efficientnet_lite0 96 px stage7: MMD, b = 1 x median",
    "96 px, stage 5 (112 features): MMD": "efficientnet_lite0 96 px stage5: MMD, b = 1 x median",
    "64 px, head: MMD": "efficientnet_lite0 64 px head: MMD, b = 1 x median",
    "former default (classifier): Frechet": CLASSIFIER + ": Frechet",
    "former default (classifier): MMD": CLASSIFIER + ": MMD, b = 1 x median",
}
DEGRADATIONS = (("blur", "0.6"), ("blur", "1"), ("blur", "2"), ("noise", "10"), ("noise", "25"), ("jpeg", "50"),
          ("patch shuffle", "2"), ("patch shuffle", "4"), ("mixing", "0.5"), ("dropped classes", "4"))  # fmt: skip


def studies() -> dict[str, list[dict]]:
    """The scores of each study at its largest n."""
    found = {}
    for data in DATA:
        path = HERE / f"{data}.json"
        if path.exists():
            scores = json.loads(path.read_text())["scores"]
            largest = max(score["n"] for score in scores)
            found[data] = [score for score in scores if score["n"] == largest]
    return found


def scored(scores: list[dict], data: str, metric: str) -> dict | None:
    return next((score for score in scores if score["metric"] == metric.format(data=data)), None)


def pairs_right(kept: dict[str, list[dict]]) -> str:
    """Number of obvious pairs that each metric orders as a person does."""
    heads = [f"{data}, n = {scores[0]['n']:,}" for data, scores in kept.items()]
    lines = [["metric", *heads], ["---"] * (len(heads) + 1)]
    for title, metric in ROWS.items():
        cells = [scored(scores, data, metric) for data, scores in kept.items()]
        lines.append([title, *(f"{cell['right']} of {cell['pairs']}" if cell else "" for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def relative_distances(kept: dict[str, list[dict]]) -> str:
    """Distance of degraded images relative to that of the Gaussian baseline, after subtracting that of real images."""
    lines = [
        ["data", "metric", *(f"{kind} {strength}" for kind, strength in DEGRADATIONS)],
        ["---"] * (len(DEGRADATIONS) + 2),
    ]
    for data, scores in kept.items():
        for title, metric in (("default", ROWS[next(iter(ROWS))]), ("former default", CLASSIFIER + ": Frechet")):
            score = scored(scores, data, metric)
            if score:
                values = [score["relative"].get(kind, {}).get(strength) for kind, strength in DEGRADATIONS]
                lines.append([data, title, *("" if value is None else f"{value:.2f}" for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(f"{pairs_right(studies())}\n\n{relative_distances(studies())}")
