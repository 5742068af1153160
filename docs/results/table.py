"""Write docs/results/README.md from the records that are kept there: python docs/results/table.py"""

from __future__ import annotations

import csv
from pathlib import Path

from gencompare.files import write_text
from gencompare.records import RunRecord

RESULTS = Path(__file__).parent
IMAGES = RESULTS.parent / "images"
HEAD = """# Records of real runs

Each folder holds `record.json` (config, environment, cost, figures with their protocol) and `curve.csv` of one run,
kept by `python docs/results/keep.py`. This page is written from them by `python docs/results/table.py`. The runs are
short, on one or two processor cores: they show that training works and that the distance falls, not what a family can
do. Budgets differ, so rows are no ranking. The distance while training is to validation images from 250 samples, at the
first and the last look (fewer where the command says so); the figure at the end is to the training images from n
samples, and rises as n falls. The command is the one that was
given, at the commit that the record names: presets and defaults may have changed since.
"""
COLUMNS = """
| run | images seen | minutes | distance while training | n | distance at the end | x floor | samples | command |
|---|---|---|---|---|---|---|---|---|
"""
NOTES = {
    "digits": """
On digits a distance below the floor is no wonder: the reference is the training split, which the model was fitted to
and the floor's test images were not. The Gaussian baseline reaches 2.15 times the floor there
([digits](../digits.md)), so this table shows that a family's program works and ranks nothing. The VAE's and the
energy-based model's distances are above that baseline: the VAE blends digits, and the energy-based model's have a
grain of noise. Latent diffusion took 2.4 minutes more for its autoencoder.
""",
    "fashion_mnist": """
A family above the Gaussian baseline, 0.82 from 1,000 samples and 0.97 from 500, has not learned in its budget: here
the VAE (of an earlier preset; its samples are blurs, some of no garment) and NCSN. NCSN's garments look right one by
one, and cover the real ones well, but too many are too bright or too dark. Rows whose names end in `_eps`, `_narrow`,
`_published`, `_uniform`, `_wide`, `_euler_maruyama`, `_ten_levels` and `_told` are what the presets were set from:
[short runs](../diffusion.md#short-runs-of-larger-images) has the comparisons.
""",
    "cifar10": """
None of these short runs is better than the Gaussian baseline on CIFAR-10. The VAE's distance falls over its budget;
trained on to 20,000 and 48,000 images it rose again to 15 and 17 while its loss went on falling, also with 128 latents,
with beta 0.1 or 0.01, with a Gaussian likelihood and with noise on the pixels. The GAN learns with the settings of its
experiment; with those that suffice for Fashion-MNIST (one discriminator step a batch, a penalty of 1) its distance
stayed between 6.7 and 9.4. No samples of these runs show objects: they have colours and textures, and the VAE's are
blurs.
""",
}


def rows(folder: Path, record: RunRecord) -> str:
    """A row for each way in which the run was measured."""
    return "".join(row(folder, record, i) for i in range(len(record.results)))


def row(folder: Path, record: RunRecord, i: int) -> str:
    result = record.results[i]
    metric = result.metrics[result.headline]
    looks = distances(folder / "curve.csv")
    training = record.training
    picture = picture_of(record.name, i)
    cells = [
        record.name, f"{training['images_seen']:,}", f"{training['seconds'] / 60:.1f}",
        f"{looks[0]:.2f} to {looks[-1]:.2f}" if len(looks) > 1 else "", f"{result.measurement.n:,}",
        f"{metric.value:.3g}", f"{metric.over_floor:.3g}",
        f"[picture](../images/{picture.name})" if picture.is_file() else "",
        again(record, i) if i else f"`{command(record)}`",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def picture_of(name: str, i: int) -> Path:
    """Where the samples of a run's measurement ``i``, from 0, are kept."""
    return IMAGES / (f"{name}_{i + 1}.png" if i else f"{name}.png")


def again(record: RunRecord, i: int) -> str:
    """What set another measurement of the same run apart from the first."""
    first, other = record.results[0].generation, record.results[i].generation
    checkpoint = f", checkpoint {other.checkpoint}" if other.checkpoint != first.checkpoint else ""
    return f"the same run, {other.sampler}{checkpoint}"


def distances(curve: Path) -> list[float]:
    """The distances that were measured while the model trained, in order."""
    with open(curve, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("val/fd_")]
    return [float(r[name]) for r in rows for name in names if r[name]]


def command(record: RunRecord) -> str:
    return " ".join(["python run.py", *(w for w in record.overrides if not w.startswith(("hydra.", "logger")))])


def page() -> str:
    """The page, a table for each data set."""
    records = {path.parent: RunRecord.load(path.parent) for path in sorted(RESULTS.glob("*/record.json"))}
    text = HEAD
    for data in dict.fromkeys(record.results[0].measurement.data for record in records.values()):
        kept = {folder: record for folder, record in records.items() if record.results[0].measurement.data == data}
        text += f"\n## {data}\n{COLUMNS}" + "".join(rows(*item) for item in kept.items()) + NOTES.get(data, "")
    return text


if __name__ == "__main__":
    write_text(RESULTS / "README.md", page())
