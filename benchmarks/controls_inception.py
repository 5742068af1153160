"""The controls under evaluation=inception with random weights, where the published ones cannot be had.

    python benchmarks/controls_inception.py FOLDER

A Frechet distance on 2048 features needs more than 2,048 images of each kind, memorisation looks at all training
images, and each is 11 GFLOP: so this takes the first images of Fashion-MNIST, as PNG files, by data=image_folder.
With the published weights: python run.py task=controls data=cifar10 evaluation=inception evaluation.weights=FILE.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from random_inception import save_random_inception

from gencompare.data.fashion_mnist import FashionMNIST
from gencompare.pictures import save_png, to_image

SIZES = {"train": 2500, "val": 100, "test": 2150}
SAMPLES = 2100


def main() -> None:
    folder = Path(sys.argv[1])
    data = FashionMNIST(os.environ.get("GENCOMPARE_DATA", "data"))
    for split, n in SIZES.items():
        images, labels = data.split(split).images[:n], data.split(split).labels
        assert labels is not None
        for k, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=False)):
            save_png(to_image(image), folder / "images" / split / str(label) / f"{k:05d}.png")
    weights = save_random_inception(folder / "inception.pth")
    words = [
        "task=controls", "data=image_folder", f"data.root={folder / 'images'}", "evaluation=inception", "logger=none",
        f"evaluation.n={SAMPLES}", f"evaluation.weights={weights}", f"hydra.run.dir={folder / 'controls'}",
    ]  # fmt: skip
    sys.exit(subprocess.run([sys.executable, "run.py", *words], check=False).returncode)


if __name__ == "__main__":
    main()
