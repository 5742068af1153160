"""Write the tables of docs/performance.md from the results in benchmarks/results.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, STUDIES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "performance.md"
EVALUATION = {
    "end_to_end": "", "end_to_end_cached": "", "pytorch_fid": "", "pytorch_fid_cached": "", "clean_fid": "",
    "clean_fid_cached": "", "neighbours": "precision, recall, density and coverage of ",
    "distance": "Frechet distance of ",
}  # fmt: skip
"""Parts of the benchmark of an evaluation, and what they compute if their setting does not say so."""
SAMPLERS = ["DDIM", "Euler", "Heun", "DPM-Solver++(2M)"]
MODELS = ["ddpm", "edm", "dit", "gan", "vae"]
"""Parts of the benchmark of a training step in one table."""
PRIMARY = "mmd_efficientnet_lite0"
FEW_CALLS = {
    "DDIM, 50 calls": r"DDIM, 50 steps\b.*", "DDIM, 10": r"DDIM, 10 steps\b.*",
    "DPM-Solver++(2M), 10": r"DPMSolverPP2M, 10 steps(?!, times)\b.*", "optimised times, 10": r".*, 10 steps, times .*",
}  # fmt: skip
"""Samplers of the study of few network calls, and patterns of their descriptions."""
FOLDER_ROWS = {
    "index_seconds": "index, s", "decode_seconds": "decode, s", "open_seconds": "open again, s",
    "epoch_seconds": "read an epoch, s", "train_added_mib": "memory added, MiB",
}  # fmt: skip
FEW_STEPS = {"dpm_solver": "DPM-Solver++(2M), 20 steps", "edm_heun": "Heun on EDM's noise levels, 18 steps"}


def read(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def ratio(row: Mapping[str, Any]) -> str:
    median, low, high = row["wall"]["ratio"]
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(variants: Mapping[str, Any], base: str) -> str:
    """Return a table with one line per variant: time, ratio of times, and how many times as fast.

    The first step of a compiled variant, which includes the compilation, has its own column.
    """
    compiled = any("first_step_seconds" in row for row in variants.values())
    rows = [
        [
            name,
            f"{row['wall']['ms']:,.0f}",
            ratio(row) if name != base else "1",
            f"{1 / row['wall']['ratio'][0]:.2f}",
            *([f"{row['first_step_seconds']:.0f}" if "first_step_seconds" in row else ""] if compiled else []),
        ]
        for name, row in variants.items()
    ]
    head = ["variant", "ms", f"time / {base}", "times as fast", *(["first step, s"] if compiled else [])]
    return markdown(head, rows)


def training_tables(results: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("network_32", "network_64"):
        if name in results:
            found[name] = times(results[name]["variants"], "diffusers")
    rows = []
    for part in filter(results.__contains__, MODELS):
        variants = results[part]["variants"]
        peer = next(iter(variants))
        for name, row in variants.items():
            if name != peer:
                sizes = [
                    " / ".join(f"{variants[key][fact] * scale:.{digits}f}" for key in (name, peer))
                    for fact, scale, digits in (("parameters", 1e-6, 2), ("gflops_per_image", 1, 2))
                ]
                speed = f"{1 / row['wall']['ratio'][0]:.2f}"
                rows.append([results[part]["setting"], name, peer, *sizes, ratio(row), speed])
    if rows:
        head = ["work", "variant", "peer", "parameters, M / peer", "GFLOPs an image / peer", "time / peer"]
        text = "The same loop with other networks and models (`benchmarks/peers.py` says where their shapes differ):"
        found["models"] = f"{text}\n\n{markdown([*head, 'times as fast'], rows)}"
    trainers = [name for name in results if name.startswith("trainer")]
    if trainers:
        found["trainer"] = markdown(
            ["work", "plain loop, ms", "Trainer, ms", "ratio"],
            [
                [
                    results[name]["setting"],
                    f"{results[name]['variants']['plain loop']['wall']['ms']:.1f}",
                    f"{results[name]['variants']['gencompare trainer']['wall']['ms']:.1f}",
                    f"{row[0]:.3f} [{row[1]:.3f}, {row[2]:.3f}]",
                ]
                for name in trainers
                for row in [results[name]["variants"]["gencompare trainer"]["wall"]["ratio"]]
            ],
        )
    return found


def bf16_table(results: Mapping[str, Any]) -> dict[str, str]:
    """Return how many times as fast bf16 steps are as 32-bit steps of the peer, on another processor."""
    rows = []
    for part in filter(results.__contains__, ("network_32", "network_64", "edm", "dit")):
        variants = results[part]["variants"]
        peer = next(iter(variants))
        shown = ("gencompare", f"{peer}, bf16", "gencompare, bf16")
        speeds = [1 / variants[name]["wall"]["ratio"][0] for name in shown]
        rows.append([results[part]["setting"], peer, *(f"{speed:.2f}" for speed in speeds)])
    head = ["work", "peer", "gencompare, 32-bit", "peer, bf16", "gencompare, bf16"]
    return {"amx": markdown(head, rows)} if rows else {}


def sampling_tables(results: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if "network" in results:
        found["sampling"] = times(results["network"], "diffusers")
    for part, title in FEW_STEPS.items():
        if part in results:
            found[part] = f"The same networks with {title}:\n\n{times(results[part], 'diffusers')}"
    if "overhead" in results:
        peers = list(results["overhead"]["DDIM"])
        rows = [
            [name, *(f"{results['overhead'][name][peer]['microseconds_per_step']:.0f}" for peer in peers)]
            for name in SAMPLERS
        ]
        found["overhead"] = markdown(["sampler", *peers], rows)
    if "compiled" in results:
        rows = [
            [
                images,
                name,
                f"{row['wall']['ms']:,.0f}",
                *((ratio(row), f"{row['first_call_seconds']:.0f}") if name != "eager" else ("1", "-")),
            ]
            for images, variants in results["compiled"].items()
            for name, row in variants.items()
        ]
        found["compiled"] = markdown(["images", "network", "ms", "time / eager", "first call, s"], rows)
    if "chunk" in results:
        rows = [
            [name, f"{row['images']}", f"{row['seconds']:.2f}", "{:.2%} [{:.2%}, {:.2%}]".format(*row["share"])]
            for name, row in results["chunk"].items()
        ]
        found["chunk"] = markdown(["model", "images", "time, s", "after the last step of the sampler"], rows)
    return found


def evaluation_tables(results: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [work + results[part]["setting"], peer, ratio(row)]
        for part, work in EVALUATION.items()
        if part in results
        for peer in [next(iter(results[part]["variants"]))]
        for name, row in results[part]["variants"].items()
        if name.startswith("gencompare")
    ]
    return {"evaluation": markdown(["work", "peer", "time / peer"], rows)} if rows else {}


def growth_tables(results: Mapping[str, Any]) -> dict[str, str]:
    rows = []
    for part in filter(results.__contains__, ("training", "sampling", "evaluation")):
        for axis, row in results[part]["rows"].items():
            ends = [f"{row['sizes'][k]:,}: {row['seconds'][k]:.2g} s, {row['added_mib'][k]:,.0f} MiB" for k in (0, -1)]
            powers = [
                f"{row[key]['exponent']:.2f} ± {row[key]['standard_error']:.2f}" if key in row else "-"
                for key in ("time", "memory")
            ]
            further = "-"
            if "continued" in row:
                at = row["continued"]
                further = f"{at['size']:,}: {at['seconds'] / 60:,.1f} min, {at['added_mib'] / 1024:,.1f} GiB"
            rows.append([part, axis, *ends, *powers, further])
    text = []
    if rows:
        head = ["work", "against", "smallest", "largest", "time ~ size^", "memory ~ size^", "continued to"]
        text.append(
            "Time of a step, a denoiser call or an evaluation, and the memory that it adds, with exponents of a"
            f" least-squares line through the logarithms and their standard errors:\n\n{markdown(head, rows)}"
        )
    if "memory" in results:
        row = results["memory"]["rows"]
        text.append(
            f"An evaluation of {row['samples']:,} samples against {row['real_images']:,} real images of 3x32x32 with"
            f" {row['features']:,} features adds {row['added_mib']:,} MiB (limit: {row['limit_mib']:,}), images and"
            " features included."
        )
    return {"growth": "\n\n".join(text)} if text else {}


def loading_tables(results: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if "batches" in results:
        batches = results["batches"]
        per_step = batches["step"]["batches_per_step"]
        base = next(name for name in batches["variants"] if name.endswith("0 workers"))
        rows = [
            [
                name,
                f"{batches['batches_per_second'][name]:,.0f}",
                ratio(row) if name != base else "1",
                f"{per_step[name]['wall'][0]:,.0f}" if name in per_step else "-",
            ]
            for name, row in batches["variants"].items()
        ]
        head = ["loader", "batches/s", f"time / {base}", "batches read in the time of a training step"]
        found["loading"] = markdown(head, rows)
    if "folders" in results:
        folders = results["folders"]
        sizes = list(folders["sizes"])
        rows = [
            [
                text,
                *(f"{folders['sizes'][size][key]:,.3g}" for size in sizes),
                f"{folders['growth'][key]['exponent']:.2f}",
                f"{folders['growth'][key]['at_1000000']:,.3g}",
            ]
            for key, text in FOLDER_ROWS.items()
        ]
        head = ["JPEG files", *(f"{int(size):,}" for size in sizes), "exponent", "1,000,000, extrapolated"]
        found["folders"] = markdown(head, rows)
    return found


def study(name: str) -> dict[str, dict[str, Any]]:
    """Return the committed records of a study of docs/results, by name."""
    found = sorted((STUDIES / name).glob("*/record.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def primary(record: Mapping[str, Any], described: str = "") -> Mapping[str, Any] | None:
    """Return the primary metric of the first result whose sampler is described by this pattern."""
    for result in record["results"]:
        metric = result["metrics"].get(PRIMARY)
        if metric and re.fullmatch(described or ".*", result["generation"]["sampler"]):
            return metric
    return None


def few_calls_table() -> dict[str, str]:
    rows = []
    for name, record in study("few_calls").items():
        found = [primary(record, pattern) for pattern in FEW_CALLS.values()]
        cells = [
            f"{row['value']:.2f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]" if row else "-" for row in found
        ]
        rows.append([name, *cells])
    return {"few_calls": markdown(["model", *FEW_CALLS], rows)} if rows else {}


def fewer_images_table() -> dict[str, str]:
    groups: dict[tuple[str, ...], list[float]] = {}
    for record in study("fewer_images").values():
        config = record["config"]
        optimizer = config["model"]["optimizer"]
        key = (
            f"{record['training']['images_seen']:,}",
            optimizer["_target_"].rsplit(".", 1)[-1],
            f"{optimizer['lr']:g}",
            str(config["trainer"]["global_batch_size"]),
        )
        metric = primary(record)
        assert metric is not None
        groups.setdefault(key, []).append(metric["value"])
    rows = [[*key, ", ".join(f"{x:.1f}" for x in values), f"{fmean(values):.1f}"] for key, values in groups.items()]
    head = ["training images", "optimiser", "learning rate", "batch", "MMD of each seed", "mean"]
    return {"fewer_images": markdown(head, rows)} if rows else {}


def tables() -> dict[str, str]:
    """Return the tables of the page by name; a part without results has none."""
    return {
        **few_calls_table(),
        **fewer_images_table(),
        **training_tables(read("train_step")),
        **bf16_table(read("train_step_amx")),
        **sampling_tables(read("sampling_amx") | read("sampling")),
        **evaluation_tables(read("evaluation")),
        **growth_tables(read("growth")),
        **loading_tables(read("loading")),
    }


def fill(text: str) -> str:
    """Replace the tables of the page, each between two comments with its name, and empty the places without one."""
    found = tables()
    places = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    missing = found.keys() - {match[2] for match in places.finditer(text)}
    assert not missing, f"{PAGE} has no place for {', '.join(sorted(missing))}"
    return places.sub(
        lambda match: match[1] + "".join(f"{found[name]}\n" for name in [match[2]] if name in found) + match[3], text
    )


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
