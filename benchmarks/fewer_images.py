"""Measure training options that should reach the same quality with fewer images or FLOPs.

    python benchmarks/fewer_images.py patches digits --images 40000 --seeds 0 1 --folder runs/fewer_images
    python benchmarks/fewer_images.py token_dropping digits --steps

Each option is compared with plain training of the same model: at the same number of images and, if it saves FLOPs, at
the same number of FLOPs. The last validation loss uses the same whole images, times and noise in all runs of a data
set. MMD is the metric that runs are ranked by (``--samples 0`` saves the time to draw samples for it). Finished runs in
the folder are not repeated, so the same command prints the table again. ``--steps`` times a training step with and
without the option, which take turns in one process (see paired.py), and counts its FLOPs. (With patches, it is a step
with crops.)
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import Any

import torch
from paired import compare, table, take_turns

import gencompare
from gencompare.models.diffusion import Diffusion
from gencompare.records import RunRecord
from gencompare.resources import flops_per_image
from gencompare.rng import RandomSource, generator

DIT = ["model=flow", "model/network=dit"]
MODELS = {
    "patches": {"digits": ["experiment=digits_flow"], "fashion_mnist": ["experiment=fashion_mnist_flow"]},
    "token_dropping": {
        "digits": ["data=digits", *DIT],
        "fashion_mnist": ["data=fashion_mnist", "trainer.global_batch_size=32", *DIT, "model.network.patch_size=4"],
    },
    "flips": {
        "fashion_mnist": [
            "experiment=fashion_mnist_flow", "data.train_subset_size=300", "data.random_flip=true"
        ]
    },
}  # fmt: skip
"""Overrides of the plain model, by option and data set."""
OPTIONS = {
    "patches": ["model/patches=random", "model.patches.divisors=[2]", "model.patches.weights=[1]"],
    "token_dropping": ["model.network.token_dropping=0.5"],
    "flips": ["data.random_flip=alternating"],
}
SAVES_FLOPS = ("patches", "token_dropping")
QUIET = [
    "callbacks.progress_bar=null", "callbacks.evaluation.num_evaluations=1", "callbacks.evaluation.num_grid_images=0",
    "callbacks.evaluation.num_samples=0", "evaluation.protocol.num_likelihood_images=1", "logger=csv",
]  # fmt: skip
ROUNDS = 30


def run(folder: Path, samples: int, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate a model, unless it is finished, and return what it cost and how good it is."""
    if not (folder / "record.json").is_file() or RunRecord.load(folder).state != "finished":
        evaluation = [f"evaluation.num_images={samples}"] if samples else ["evaluation.checkpoints=[]"]
        gencompare.train(gencompare.compose(*overrides, *QUIET, *evaluation, folder=folder))
    record = RunRecord.load(folder)
    with (folder / "curve.csv").open() as file:
        val_loss = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")][-1]
    mmd = record.results[0].metrics["mmd_efficientnet_lite0"].value if record.results else math.nan
    training = record.training
    return {"images": training["images_seen"], "flops": training["flops"], "val_loss": val_loss, "mmd": mmd}


def compare_runs(option: str, data: str, images: int, seeds: list[int], samples: int, folder: Path) -> None:
    """Train with and without the option, and print what each run cost and how good it is."""
    rows: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        plain = [*MODELS[option][data], f"seed={seed}"]
        with_option, place = [*plain, *OPTIONS[option]], folder / f"{option}_{data}_{images}_{seed}"
        budget = f"budget.images={images}"
        rows[f"plain, seed {seed}"] = reference = run(place / "plain", samples, [*plain, budget])
        rows[f"option, equal images, seed {seed}"] = run(place / "equal_images", samples, [*with_option, budget])
        if option in SAVES_FLOPS:
            budget = f"budget.flops={reference['flops']:.0f}"
            rows[f"option, equal FLOPs, seed {seed}"] = run(
                place / "equal_flops", samples, [*with_option, "budget.images=null", budget]
            )
    print(f"{option}, {data}:\n  {'':32}{'images':>9}{'TFLOPs':>9}{'val loss':>10}{'MMD':>9}")
    for name, row in rows.items():
        costs = f"{row['images']:9.0f}{row['flops'] / 1e12:9.3f}"
        print(f"  {name:32}{costs}{row['val_loss']:10.5f}{row['mmd']:9.2f}")


def compare_steps(option: str, data: str) -> None:
    """Time and count forward and backward passes with and without the option."""
    steps, flops = {}, {}
    for name, overrides in (("plain", []), ("option", OPTIONS[option])):
        crops = ["model.patches.full_image_prob=0"] if overrides and option == "patches" else []
        cfg = gencompare.compose(*MODELS[option][data], *overrides, *crops)
        module, model = gencompare.build(cfg)
        assert isinstance(model, Diffusion)
        x, _ = next(module.batches("train", batch_size := cfg.trainer.global_batch_size))

        def step(model: Diffusion = model.train(), x: torch.Tensor = x) -> None:
            model.losses(x, {}, RandomSource.for_batch(generator("cpu", 0), len(x)))["loss"].mean().backward()

        steps[name], flops[name] = step, flops_per_image(step, batch_size) / 1e6
    print(table(f"a step of {option}, {data}", compare(take_turns(steps, ROUNDS), base="plain")))
    counts = ", ".join(f"{name} {value:.1f}" for name, value in flops.items())
    print(f"  MFLOPs per image, forward and backward: {counts}, ratio {flops['option'] / flops['plain']:.3f}")


def main(arguments: list[str] | None = None) -> None:
    parser: Any = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="time a step instead of training")
    parser.add_argument("option", choices=list(OPTIONS))
    parser.add_argument("data", choices=["digits", "fashion_mnist"])
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=500, help="samples for MMD; 0: only the validation loss")
    parser.add_argument("--folder", type=Path, default=Path("runs/fewer_images"))
    args = parser.parse_args(arguments)
    if args.data not in MODELS[args.option]:
        parser.error(f"{args.option} is measured on {', '.join(MODELS[args.option])}")
    if args.steps:
        compare_steps(args.option, args.data)
    else:
        compare_runs(args.option, args.data, args.images, args.seeds, args.samples, args.folder)


if __name__ == "__main__":
    main()
