"""Does a planned comparison detect as often as promised? Replay plans with the samples of real runs.

    python benchmarks/plan_replay.py 'runs/plan_replay/*/*'

Each run draws a pool of samples, whose kernel matrix is stored in ``--pool``. Its samples, with replacement, stand for
the model: their expected distance is known exactly. Each replay takes a random pair of rows, multiplies the distances
of one so that the pair differs by a known share, draws a pilot of three seeds and 500 images a row, plans with it for
this difference, draws the planned seeds and images, and applies the test of the comparison page. Seeds and images are
drawn with replacement, so draws are independent.
"""

from __future__ import annotations

import argparse
import json
from copy import copy
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from gencompare.comparison.load_runs import RunFolder, find_run_folders
from gencompare.comparison.planning import plans
from gencompare.comparison.ranking import RankingTable, rank_results
from gencompare.comparison.statistics import SIGNIFICANCE_LEVEL, holm, welch
from gencompare.errors import UserError
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.intervals import PAIR_IMAGES, estimate
from gencompare.files import write_text
from gencompare.records import Measurement, Metric, Result, RunRecord, SampleSettings

RESULT = Path(__file__).parent / "results" / "plan_replay.json"
METRIC, SCALE = "mmd_digits", 1000
POOL_SIZE = 1000
PILOT_SEEDS, PILOT_IMAGES = 3, 500
POWER = 0.8
DIFFERENCES = (0.1, 0.15, 0.2, 0.3)


class Pool:
    """The samples of one run, reduced to what a kernel distance needs."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as stored:
            self.kernel, self.xy, self.mean = stored["kernel"], stored["xy"], float(stored["mean"])
            self.row, self.seed = str(stored["row"]), int(stored["seed"])
            self.seconds = float(stored["seed_seconds"]), float(stored["image_seconds"])
        # With replacement, two of the samples may be the same image, so pairs include the diagonal.
        self.scale = SCALE
        self.truth = SCALE * float(self.kernel.mean(dtype=float) - 2 * self.xy.mean() + self.mean)

    def times(self, factor: float) -> Pool:
        """Return a copy whose distances are multiplied by ``factor``."""
        scaled = copy(self)
        scaled.scale, scaled.truth = factor * self.scale, factor * self.truth
        return scaled

    def draw(self, n: int, random: np.random.Generator) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the distance of n samples, its delete-one values, and the rows of the pool."""
        rows = random.integers(len(self.xy), size=n)
        count = np.bincount(rows, minlength=len(self.xy)).astype(np.float32)
        sums = (self.kernel @ count).astype(float)[rows] - np.diagonal(self.kernel)[rows]
        xy = self.xy[rows]
        value = sums.sum() / (n * (n - 1)) - 2 * xy.mean() + self.mean
        delete_one = (sums.sum() - 2 * sums) / ((n - 1) * (n - 2)) + self.mean - 2 * (xy.sum() - xy) / (n - 1)
        return self.scale * float(value), self.scale * delete_one, rows

    def metric(self, n: int, random: np.random.Generator) -> Metric:
        """Return the distance of n samples with its interval, as an evaluation does."""
        value, delete_one, rows = self.draw(n, random)
        subset = evenly_spaced_indices(n, PAIR_IMAGES)
        chosen = rows[subset.numpy()]
        q = torch.from_numpy(2 * self.scale * self.kernel[np.ix_(chosen, chosen)]).double()
        found = estimate(value, torch.from_numpy(delete_one), q, subset)
        return Metric(value, higher_is_better=False, interval=found.interval, unbiased=True)


def draw_pool(folders: list[Path], pool: Path) -> None:
    """Draw the samples of each run that has no file in ``pool`` yet: flow models with several numbers of steps."""
    import gencompare
    from gencompare.evaluation.evaluate import sample_for_protocol
    from gencompare.evaluation.metrics.kernel import KernelReference
    from gencompare.evaluation.reference import load_reference
    from gencompare.tasks.runs.build import build_protocol

    for folder in folders:
        record = RunRecord.load(folder)
        result = next(each for each in record.results if METRIC in each.metrics)
        own = record.results[0]
        for steps in (10, 7, 5) if record.family == "flow" else (None,):
            row = record.family if steps is None else f"{record.family}, {steps} steps"
            file = pool / f"{row}_{record.seed}.npz"
            if file.is_file():
                continue
            run = gencompare.load_run(folder)
            model: Any = run.model
            if steps is not None:
                model.sampler = replace(model.sampler, num_steps=steps)
            protocol = replace(build_protocol(run.config), num_images=POOL_SIZE, seed=record.seed)
            extractor = next(each for each in protocol.build_extractors(run.data.spec) if each.mmd_name == METRIC)
            reference: KernelReference = load_reference(run.data, protocol.reference, extractor).gaussian_kernel
            images = sample_for_protocol(model, POOL_SIZE, run.data, protocol).images
            features = extractor(images, torch.device("cpu")).features
            kernel = reference.kernel(features, features).double()
            xy = reference.kernel(features, reference.features).double().mean(1)
            pool.mkdir(parents=True, exist_ok=True)
            np.savez(
                file, kernel=kernel.float().numpy(), xy=xy.numpy(), mean=reference.mean, row=row, seed=record.seed,
                seed_seconds=record.training["device_seconds"],
                image_seconds=(own.seconds["sampling"] + own.seconds["metrics"]) / result.measurement.num_images,
            )  # fmt: skip
            print(f"Drew {file}.", flush=True)


def table(rows: dict[str, list[Pool]], seeds: int, images: int, random: np.random.Generator) -> RankingTable:
    """Return the comparison of a pilot: for each row, seeds drawn from its pool, and images of each."""
    measurement = Measurement("digits", images, "train", 1147, "", "digits", "")
    runs = []
    for name, pools in rows.items():
        for seed in range(seeds):
            pool = pools[random.integers(len(pools))]
            training, image = pool.seconds
            settings = SampleSettings(checkpoint="last", seed=seed)
            seconds = {"sampling": image * images, "metrics": 0.0}
            result = Result(measurement, settings, {METRIC: pool.metric(images, random)}, METRIC, seconds=seconds)
            family = f"{name} row"  # the family "gaussian" would exclude rows that are not better than this baseline
            record = RunRecord(
                name, family=family, data={"name": "digits"}, seed=seed, state="finished", results=[result],
                config={"model": {"name": name}}, training={"device_seconds": training},
            )  # fmt: skip
            runs.append(RunFolder(Path(f"{name}_{seed}"), record, f"{name}_{seed}"))
    (ranked,) = rank_results(runs)
    return ranked


def detected(
    rows: dict[str, list[Pool]], pair: tuple[str, str], seeds: int, images: int, random: np.random.Generator
) -> bool:
    """Run a planned comparison, and return whether its test claims the right sign of the difference of ``pair``."""
    values = {
        name: [pools[random.integers(len(pools))].draw(images, random)[0] for _ in range(seeds)]
        for name, pools in rows.items()
    }
    names = list(rows)
    mean = np.array([fmean(values[name]) for name in names])
    error = np.array([np.var(values[name], ddof=1) / seeds for name in names])
    i, j = np.triu_indices(len(names), 1)
    n = np.full(len(i), seeds)
    p = holm(welch(mean[i], error[i], n, mean[j], error[j], n))
    k = list(combinations(names, 2)).index(pair)
    right = (mean[i[k]] - mean[j[k]]) * (truth(rows[pair[0]]) - truth(rows[pair[1]])) > 0
    return bool(p[k] <= SIGNIFICANCE_LEVEL and right)


def truth(pools: list[Pool]) -> float:
    return fmean(pool.truth for pool in pools)


def replay(rows: dict[str, list[Pool]], replays: int, out: Path) -> None:
    truths = {name: truth(pools) for name, pools in rows.items()}
    pairs = list(combinations(rows, 2))
    print(truths, flush=True)
    found: list[dict[str, Any]] = []
    for k in range(replays):
        random = np.random.default_rng([1, k])
        pair = pairs[random.integers(len(pairs))]
        difference = DIFFERENCES[random.integers(len(DIFFERENCES))]
        # Distances of the second row in another unit: their relative spread stays, and the difference is as chosen.
        scale = truths[pair[0]] / truths[pair[1]] * (2 + difference) / (2 - difference)
        scaled = rows | {pair[1]: [pool.times(scale) for pool in rows[pair[1]]]}
        try:
            plan = plans(table(scaled, PILOT_SEEDS, PILOT_IMAGES, random), difference, POWER)[0]
        except UserError:
            found.append({"pair": pair, "difference": difference, "planned": False})
            continue
        hit = detected(scaled, pair, plan.num_seeds, plan.num_images, random)
        found.append({
            "pair": pair, "difference": difference, "planned": True, "detected": hit, "power": plan.power,
            "power_of_pair": next(power for power, *names in plan.powers if set(names) == set(pair)),
            "seeds": plan.num_seeds, "images": plan.num_images,
        })  # fmt: skip
        if (k + 1) % 25 == 0 or k + 1 == replays:
            summary = report(found, truths, rows)
            print(k + 1, summary["all"], flush=True)
            write_text(out, json.dumps(summary, indent=1) + "\n")


def report(found: list[dict[str, Any]], truths: dict[str, float], rows: dict[str, list[Pool]]) -> dict[str, Any]:
    def summary(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        made = [each for each in chosen if each["planned"]]
        if not made:
            return {"replays": len(chosen), "planned": 0}
        share = fmean(e["detected"] for e in made)
        return {
            "replays": len(chosen), "planned": len(made), "promised": round(fmean(e["power"] for e in made), 4),
            "promised_for_pair": round(fmean(e["power_of_pair"] for e in made), 4),
            "detected": round(share, 4), "standard_error": round((share * (1 - share) / len(made)) ** 0.5, 4),
            "median_seeds": float(np.median([e["seeds"] for e in made])),
            "median_images": float(np.median([e["images"] for e in made])),
        }  # fmt: skip

    baseline = {True: "with gaussian", False: "without gaussian"}
    return {
        "setting": {
            "metric": METRIC, "power": POWER, "pilot_seeds": PILOT_SEEDS, "pilot_images": PILOT_IMAGES,
            "pool_images": POOL_SIZE, "pools": sum(map(len, rows.values())),
        },
        "rows": {
            name: {"truth": round(truths[name], 3), "variation": round(variation(rows[name]), 4)} for name in truths
        },
        "all": summary(found),
        "differences": {f"{d:g}": summary([each for each in found if each["difference"] == d]) for d in DIFFERENCES},
        "pairs": {
            name: summary([each for each in found if ("gaussian" in each["pair"]) == has])
            for has, name in baseline.items()
        },
        "rows_of_pairs": {name: summary([each for each in found if name in each["pair"]]) for name in rows},
    }  # fmt: skip


def variation(pools: list[Pool]) -> float:
    """Return the coefficient of variation of the expected distance over seeds."""
    return float(np.std([pool.truth for pool in pools]) / truth(pools))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="glob of run folders with checkpoints; only read for runs without a pool")
    parser.add_argument("--pool", type=Path, default=Path(".cache/plan_replay"))
    parser.add_argument("--replays", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw_pool(find_run_folders(options.runs), options.pool)
    rows: dict[str, list[Pool]] = {}
    for file in sorted(options.pool.glob("*.npz")):
        pool = Pool(file)
        rows.setdefault(pool.row, []).append(pool)
    replay(rows, options.replays, options.out)


if __name__ == "__main__":
    main()
