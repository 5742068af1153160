"""The tables of single studies in the documentation, computed from the records: python docs/results/studies.py

A cell is the mean over training seeds and the half-width of its 95 % confidence interval (Student's t).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from findings import METRIC, RESULTS, Finding, Row, fill_block
from scipy.special import stdtrit

from gencompare.comparison.statistics import SIGNIFICANCE_LEVEL

DOCS = RESULTS.parent


def cell(values: Iterable[float], digits: int = 1) -> str:
    """Format the mean and the half-width of its interval."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    limit = float(stdtrit(len(values) - 1, 1 - SIGNIFICANCE_LEVEL / 2)) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.{digits}f} ± {limit:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def schedules() -> str:
    """Return the table of noise schedules: trained with a schedule (rows), sampled on a grid (columns)."""
    grids = {
        "the schedule's own": r"DDIM, 25 steps, eta.*",
        "even in log-SNR": r"DDIM, 25 steps, LogSNRGrid.*",
        "Karras": r"DDIM, 25 steps, KarrasGrid.*",
    }
    names = {path.name.rpartition("_")[0] for path in (RESULTS / "schedules").glob("*_0")}
    values = {
        name: [list(Row("schedules", rf"{name}_\d", sampler).values().values()) for sampler in grids.values()]
        for name in names
    }
    order = sorted(names, key=lambda name: fmean(values[name][0]))
    rows = [[f"`{name}`", *map(cell, values[name])] for name in order]
    return markdown(["trained with", *grids], rows)


def guidance() -> str:
    """Return the table of scales of classifier-free guidance."""
    columns = {"MMD ↓": METRIC, "label accuracy ↑": "label_accuracy"}
    columns |= {f"{name} ↑": name for name in ("precision", "recall", "coverage")}
    scales = ["0", "1", "1.5", "2", "3", "5", "3 where sigma / alpha is 0.3 to 3"]
    rows = [
        [scale, *(
            cell(
                Row("guidance", ".*", rf".*, scale {re.escape(scale)}, x0.*", metric).values().values(),
                1 if metric == METRIC else 2,
            )
            for metric in columns.values()
        )]
        for scale in scales
    ]  # fmt: skip
    return markdown(["scale", *columns], rows)


CALLS = (1, 2, 5, 10, 20, 50, 100, 250)
SAMPLERS = {
    "Ancestral": "ancestral", "DDIM": "ddim", "Euler": "euler", "Heun": "heun", "DPMSolverPP2M, eta 0": "dpmpp_2m",
    "DPMSolverPP2M, eta 1": "dpmpp_2m_sde", "DPMSolverPP2S, eta 0": "dpmpp_2s", "DPMSolverPP2S, eta 1": "dpmpp_sde",
    "AdamsBashforth, solver_order 3, variable log_rho": "deis",
    "AdamsBashforth, solver_order 4, variable step": "ipndm",
    "AdamsBashforth, solver_order 4, variable rho": "lms", "UniPC": "unipc", "ERSDE": "er_sde", "Restart": "restart",
    "SASolver, predictor_order 3, corrector_order 4": "sa_solver", "EulerMaruyama": "euler_maruyama",
    "SASolver, predictor_order 3, corrector_order 0": "dpmpp_3m_sde", "ReverseDiffusion": "reverse_diffusion",
    "PredictorCorrector": "predictor_corrector",
}  # fmt: skip
"""Start of a sampler's description without its steps, and its option."""


def sampler_values() -> dict[str, dict[int, list[float]]]:
    """Return the MMD of each run by the option of the sampler and the number of network calls.

    Calls are rounded to the nearest of `CALLS` within a fifth: methods of second order call the network twice in each
    step but the last.
    """
    values: dict[str, dict[int, list[float]]] = {}
    for record in Row("samplers", ".*").records():
        seen = set[tuple[str, int]]()
        for result in record["results"]:
            description = re.sub(r", \d+ steps", "", result["generation"]["sampler"]) + ","
            name = next(option for start, option in SAMPLERS.items() if description.startswith(f"{start},"))
            calls = sum(result["generation"]["nfe"].values())
            nearest = min(CALLS, key=lambda each, calls=calls: abs(math.log(each / calls)))
            if METRIC in result["metrics"] and abs(nearest - calls) <= 0.2 * nearest and (name, nearest) not in seen:
                seen.add((name, nearest))
                values.setdefault(name, {}).setdefault(nearest, []).append(result["metrics"][METRIC]["value"])
    return values


def samplers() -> str:
    """Return the table of samplers (rows) and network calls (columns), the best with 20 calls first."""
    values = sampler_values()
    order = sorted(values, key=lambda name: fmean(values[name].get(20, [math.inf])))
    rows = [[f"`{name}`", *(cell(values[name][k]) if k in values[name] else "-" for k in CALLS)] for name in order]
    return markdown(["`model/sampler=`", *map(str, CALLS)], rows)


def conditional() -> str:
    """Return the table of families that were trained with and without the class of each image."""
    families = sorted({path.name.partition("_")[0] for path in (RESULTS / "conditional").glob("*_0")})
    rows = []
    for family in families:
        given, without = (Row("conditional", rf"{family}_{kind}_\d") for kind in ("conditional", "unconditional"))
        accuracy = replace(given, metric="label_accuracy").values().values()
        ratio = Finding("{ratio} {interval}", given, without).sentence()
        rows.append(
            [
                f"`{family}`",
                *(cell(row.values().values()) for row in (given, without)),
                ratio,
                cell(accuracy, 2),
            ]
        )
    return markdown(["model", "MMD, conditional ↓", "MMD, unconditional ↓", "ratio", "label accuracy ↑"], rows)


def outside() -> str:
    """Return the table of models that this project and another library trained."""
    ddpm, vae = Row("fashion_mnist", r"ddpm_\d"), Row("outside", r"vae_mlp_\d")
    rows = []
    for model, library, theirs, ours in (
        ("DDPM", "diffusers", Row("outside", r"diffusers_\d"), ddpm),
        ("DDPM, `--matched`", "diffusers", Row("outside", r"diffusers_matched_\d"), ddpm),
        ("VAE", "pythae", Row("outside", r"pythae_\d"), vae),
    ):
        ratio = Finding("{ratio} {interval}", theirs, ours).sentence()
        rows.append([model, library, *(cell(row.values().values()) for row in (theirs, ours)), ratio])
    return markdown(["model", "library", "MMD, library ↓", "MMD, this project ↓", "ratio"], rows)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "schedules": (DOCS / "schedules.md", schedules),
    "guidance": (DOCS / "diffusion.md", guidance),
    "samplers": (DOCS / "diffusion.md", samplers),
    "conditional": (DOCS / "families.md", conditional),
    "outside": (DOCS / "comparing.md", outside),
}
"""For each study, the page and the table between ``<!-- NAME -->`` and ``<!-- end -->`` there."""


def filled(name: str) -> str:
    """Return the page of a study with its current table."""
    page, table = TABLES[name]
    return fill_block(page.read_text(), name, table)


if __name__ == "__main__":
    for study, (path, _) in TABLES.items():
        path.write_text(filled(study))
