"""Write docs/results/README.md from the records that are kept there: python docs/results/table.py"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from gencompare.compare.spent import total
from gencompare.files import write_text
from gencompare.records import RunRecord

RESULTS = Path(__file__).parent
IMAGES = RESULTS.parent / "images"
HEAD = """# Records of real runs

Each folder holds `record.json` (config, environment, cost, figures with their protocol) and `curve.csv` of one run,
kept by `python docs/results/keep.py`. This page is written from them by `python docs/results/table.py`. The distances
are of the metric that was the default before `mmd_efficientnet_lite0`: a Frechet distance on a small classifier of the
data set, which rates blurred images too low ([why](../evaluation.md#the-default-metric-and-why)). The runs are
short, on one or two processor cores: they show that training works and that the distance falls, not what a family can
do. Budgets differ, so rows are no ranking. The distance while training is to validation images from 250 samples (fewer
where the command says so), at the last look in the first half of the budget and at its end; the figure at the end is to
the training images from n samples, and rises as n falls. *x Gaussian* is that figure over the baseline's
(`model=gaussian`) at the same n: a family above 1, or no nearer at its end than at half of its budget, has **not
learned** in that budget. Where a model was measured with several draws of n samples, their mean stands in its row, with
their standard deviation: the Gaussian's says how far a figure of one draw may be off, and a family that is below it by
less than two of these is named as close. Images seen and minutes count an autoencoder's too. The command is the one
that was given, at the commit that the record names: presets and defaults may have changed since.
"""
COLUMNS = """
| run | images seen | minutes | distance at half, at the end | n | distance | x floor | x Gaussian | samples | command |
|---|---|---|---|---|---|---|---|---|---|
"""
NOTES = {
    "digits": """
On digits a distance below the floor is no wonder: the reference is the training split, which the model was fitted to
and the floor's test images were not. The Gaussian baseline reaches 2.15 times the floor there
([digits](../digits.md)), so this table shows that a family's program works and ranks nothing.
Diffusion models know the digits by half of their budget: `digits_iddpm`, `_sde_subvp` and `_sde_vp` are listed for the
looks alone, of which the last is no better than that at half.
The energy-based model's chains leave the digits after the 30 steps that it was trained with. What the hierarchical
VAE was set from ends in `_two_layers`, `_two_layers_warm` and `_narrow` ([more](../hvae.md#which-posteriors)).
`_persistent` is the energy-based model before its short runs, `_vq` is on vector-quantised latents.
""",
    "eurosat64": """
Pixels against latents at equal cost, one seed each. To the eye the latents are far ahead of the Gaussian baseline, and
the distance says otherwise: [latent diffusion](../latent_diffusion.md#eurosat-64-pixels-against-latents) has more.
""",
    "fashion_mnist": """
Of the presets, all have learned. The hierarchical VAE's draws vary too little: lower temperatures make it worse, and at
temperature 1.1 it is better than at 1, which is the model. Posteriors of their own in place of residual ones brought it
most of the way (`_residual`, `_own`, of smaller budgets), more steps from smaller batches the rest; without the finest
latents (`_coarse`) it is worse ([more](../hvae.md#which-posteriors)). `_coarse` needs the commit after the one that it
names. `_persistent` is the energy-based model before its [short runs](../energy.md#short-runs-from-noise). Rows whose
names end in `_eps`, `_narrow`, `_published`, `_uniform`, `_wide`, `_euler_maruyama`, `_ten_levels`, `_told`,
`_sigma_...` and `_langevin` are what the presets were set from:
[short runs](../diffusion.md#short-runs-of-larger-images) has the comparisons.
""",
    "cifar10": """
None of these short runs is better than the Gaussian baseline on CIFAR-10. The VAE's distance falls over its budget and
rises again after that, while its loss goes on falling (the row's command with `budget.images=48000`). No samples of
these runs show objects: they have colours and textures, and the VAE's are blurs.
""",
}


@dataclass(frozen=True)
class Kept:
    """A record, with the distances that were measured while its model trained."""

    record: RunRecord
    looks: list[tuple[int, float]]
    """(images seen, distance to validation images), in order."""

    @classmethod
    def load(cls, folder: Path) -> Kept:
        with open(folder / "curve.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name.startswith("val/fd_")]
        looks = [(int(row["images"]), float(row[name])) for row in rows for name in names if row[name]]
        return cls(RunRecord.load(folder), looks)

    @property
    def halves(self) -> tuple[float, float] | None:
        """The distance at the last look in the first half of the budget, and at its end; None without two looks."""
        end, last = self.looks[-1] if self.looks else (0, 0.0)
        # A half may end within a batch.
        early = [distance for images, distance in self.looks if images <= 0.51 * end]
        return (early[-1], last) if early else None

    @property
    def ways(self) -> list[list[int]]:
        """The measurements that were made in the same way, but for the seed of the samples, by their places."""
        found: dict[str, list[int]] = {}
        for i, result in enumerate(self.record.results):
            found.setdefault(repr((result.measurement, replace(result.generation, seed=0))), []).append(i)
        return list(found.values())

    def distances(self, way: list[int]) -> list[float]:
        results = [self.record.results[i] for i in way]
        return [result.metrics[result.headline].value for result in results]

    def gaussians(self, way: list[int], baselines: list[RunRecord]) -> list[float]:
        """The distances of all draws of the baseline that were measured like this way."""
        result = self.record.results[way[0]]
        return [
            other.metrics[other.headline].value
            for baseline in baselines
            for other in baseline.results
            if (other.headline, other.measurement) == (result.headline, result.measurement)
        ]

    def over_gaussian(self, way: list[int], baselines: list[RunRecord]) -> float | None:
        """The mean distance over the mean one of the baseline's draws; None where there are none."""
        draws = self.gaussians(way, baselines)
        return fmean(self.distances(way)) / fmean(draws) if draws else None

    def learned(self, baselines: list[RunRecord]) -> bool | None:
        """Better than the baseline and than at half of the budget; None where one of the two was not measured."""
        over = self.over_gaussian(self.ways[0], baselines)
        if over is None or self.halves is None:
            return None
        return over < 1 and self.halves[1] < self.halves[0]

    def close(self, baselines: list[RunRecord]) -> bool:
        """Whether it learned, yet lies below the baseline by less than two standard deviations of that one's draws, at
        the largest n at which there are several."""
        first = self.record.results[0].generation
        known = [
            (self.record.results[i].measurement.n, fmean(self.distances([i, *more])), draws)
            for i, *more in self.ways
            if replace(self.record.results[i].generation, seed=first.seed) == first
            and len(draws := self.gaussians([i], baselines)) > 1
        ]
        if not self.learned(baselines) or not known:
            return False
        _, distance, draws = max(known)
        return distance > fmean(draws) - 2 * stdev(draws)


def baselines(kept: list[Kept]) -> list[RunRecord]:
    return [each.record for each in kept if each.record.family == "gaussian"]


def row(kept: Kept, k: int, baselines: list[RunRecord]) -> str:
    """A row of the table: the ``k``-th of the ways in which a run was measured."""
    way = kept.ways[k]
    i, distances = way[0], kept.distances(way)
    record, result = kept.record, kept.record.results[i]
    spread = f" ± {stdev(distances):.2g} ({len(way)} draws)" if len(way) > 1 else ""
    metric, taken = result.metrics[result.headline], total(record)
    over = None if record.family == "gaussian" else kept.over_gaussian(way, baselines)
    picture = picture_of(record.name, k)
    cells = [
        record.name, f"{taken['images_seen']:,}", f"{taken['device_seconds'] / 60:.1f}",
        "{:.2f}, {:.2f}".format(*kept.halves) if kept.halves else "", f"{result.measurement.n:,}",
        f"{fmean(distances):.3g}{spread}", f"{fmean(distances) / metric.floor:.3g}", f"{over:.2f}" if over else "",
        f"[picture](../images/{picture.name})" if picture.is_file() else "",
        again(record, i) if i else f"`{command(record)}`",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def picture_of(name: str, k: int) -> Path:
    """Where samples of the ``k``-th way in which a run was measured, from 0, are kept."""
    return IMAGES / (f"{name}_{k + 1}.png" if k else f"{name}.png")


def again(record: RunRecord, i: int) -> str:
    """What set another measurement of the same run apart from the first."""
    first, other = record.results[0].generation, record.results[i].generation
    checkpoint = f", checkpoint {other.checkpoint}" if other.checkpoint != first.checkpoint else ""
    return f"the same run, {other.sampler}{checkpoint}".replace("|", "\\|")


def command(record: RunRecord) -> str:
    return " ".join(["python run.py", *(w for w in record.overrides if not w.startswith(("hydra.", "logger")))])


def load() -> list[Kept]:
    return [Kept.load(path.parent) for path in sorted(RESULTS.glob("*/record.json"))]


def page() -> str:
    """The page, a table for each data set."""
    records = load()
    text = HEAD
    for data in dict.fromkeys(each.record.results[0].measurement.data for each in records):
        kept = [each for each in records if each.record.results[0].measurement.data == data]
        text += f"\n## {data}\n{COLUMNS}"
        text += "".join(row(each, k, baselines(kept)) for each in kept for k in range(len(each.ways)))
        missed = [each.record.name for each in kept if each.learned(baselines(kept)) is False]
        text += f"\nNot learned: {', '.join(missed) or 'none'}.\n"
        if close := [each.record.name for each in kept if each.close(baselines(kept))]:
            text += f"\nLearned, but so close to the baseline that one draw does not show it: {', '.join(close)}.\n"
        text += NOTES.get(data, "")
    return text


if __name__ == "__main__":
    write_text(RESULTS / "README.md", page())
