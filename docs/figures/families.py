"""Samples of all families side by side, from committed records: python docs/figures/families.py

Writes docs/images/families.png: the first samples of each row of docs/results/fashion_mnist, best primary metric first.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

DOCS = Path(__file__).parents[1]
RESULTS = DOCS / "results" / "fashion_mnist"
METRIC = "mmd_efficientnet_lite0"
COLUMNS, NUM_IMAGES, GAP = 3, 8, 2
TITLES = {
    "ebm": "energy-based model", "hvae": "hierarchical VAE", "ldm": "latent diffusion", "flow": "flow matching",
    "iddpm": "improved DDPM", "sde_vp": "VP SDE", "sde_subvp": "sub-VP SDE", "sde_ve": "VE SDE",
    "gaussian": "Gaussian baseline", "meanflow": "MeanFlow", "consistency": "consistency model",
    "vqtransformer": "transformer over tokens", "pixelcnnpp": "PixelCNN++", "tarflow": "TarFlow", "glow": "Glow",
}  # fmt: skip


def families() -> list[tuple[float, str, np.ndarray]]:
    """The metric, the title and a strip of samples of each family with seed 0, best first."""
    found = []
    for path in RESULTS.glob("*_0/record.json"):
        record = json.loads(path.read_text())
        if path.parent.name != f"{record['family']}_0":  # a second run of the family with another budget
            continue
        result = next(each for each in record["results"] if each["primary_metric"] == METRIC)
        picture = np.asarray(Image.open(path.parent / result["images"]["samples"]))
        side = (picture.shape[0] - GAP) // 10  # a grid of 10 x 10 images with gaps
        family = record["family"]
        title = TITLES.get(family, family.upper())
        found.append((result["metrics"][METRIC]["value"], title, picture[GAP:side, GAP : NUM_IMAGES * side]))
    return sorted(found)


def main() -> None:
    """Draw the figure."""
    strips = families()
    rows = -(-len(strips) // COLUMNS)
    figure = Figure(figsize=(12, 0.86 * rows), dpi=110, facecolor="white")
    axes = figure.subplots(rows, COLUMNS)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (value, title, strip) in zip(axes.T.flat, strips, strict=False):
        axis.imshow(strip, cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{title}  (MMD {value:.0f})", fontsize=10, loc="left", pad=3)
    figure.subplots_adjust(left=0.005, right=0.995, top=0.95, bottom=0.005, wspace=0.03, hspace=0.35)
    path = DOCS / "images" / "families.png"
    figure.savefig(path)
    Image.open(path).convert("L").quantize(64).save(path, optimize=True)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
