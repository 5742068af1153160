"""Draw docs/images/quality_and_calls.png from the records in this folder: python docs/results/calls.py

Lines are samplers of a DDPM (``samplers``, the mean over training seeds), points all other families on digits with
their own samplers (``digits``, one seed each), after the same number of training images.
"""

from __future__ import annotations

from statistics import fmean

from findings import METRIC, RESULTS, Row
from matplotlib.figure import Figure
from studies import sampler_values

LINES = {"ancestral": "ancestral (DDPM)", "ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)"}
"""Options of the samplers, and their names."""


def main() -> None:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    values = sampler_values()
    for name, label in LINES.items():
        points = sorted((calls, fmean(found)) for calls, found in values[name].items())
        axes.plot(*zip(*points, strict=True), marker=".", label=f"DDPM, {label}")
    for record in Row("digits", ".*").records():
        result = next(result for result in record["results"] if METRIC in result["metrics"])
        calls, real = sum((result["generation"]["nfe"] or {}).values()), result["metrics"][METRIC]["baseline"]
        if record["family"] in ("gaussian", "ddpm") or not calls:
            continue
        x, y = calls, result["metrics"][METRIC]["value"]
        axes.plot(x, y, "k.", markersize=4)
        shift = 5 if record["family"] == "gan" else 1  # almost as good as the VAE
        axes.annotate(record["family"], (x, y), (4, shift), textcoords="offset points", fontsize=7)
    axes.axhline(real, color="grey", linestyle=":", linewidth=1)
    axes.annotate("real images", (1, real), (0, 3), textcoords="offset points", fontsize=7, color="grey")
    axes.set(xscale="log", yscale="log", xlabel="network calls per image", ylabel="1,000 x MMD on EfficientNet-Lite0")
    axes.set_xlim(right=420)
    axes.legend(fontsize=8)
    figure.savefig(RESULTS.parent / "images" / "quality_and_calls.png", dpi=150)


if __name__ == "__main__":
    main()
