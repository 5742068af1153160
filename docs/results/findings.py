"""The findings of docs/results.md and README.md, computed from the records in this folder.

    python docs/results/findings.py

A finding compares a metric, usually the primary one, of two rows of a study: training runs and, if a run was sampled
in several ways, a sampler. The ratio is that of geometric means over training seeds. Its 95 % interval is Welch's t
interval of the difference of mean logarithms; if both rows are the same runs, sampled in two ways, it is that of the
paired differences. With a single seed, it is made of the intervals of sampling, which say nothing about other
training seeds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from gencompare.comparison.planning import POWER
from gencompare.comparison.statistics import SIGNIFICANCE_LEVEL

RESULTS = Path(__file__).parent
PAGES = (RESULTS.parent / "results.md", RESULTS.parents[1] / "README.md")
METRIC = "mmd_efficientnet_lite0"
NUM_SIMULATIONS = 20_000


@dataclass(frozen=True)
class Row:
    """Training runs that differ only in seeds, and how they were sampled."""

    study: str
    runs: str
    """Pattern of the names of the folders."""
    sampler: str = ".*"
    """Pattern of the sampler's description; the first result that matches counts."""
    metric: str = METRIC

    def logarithms(self) -> dict[str, float]:
        """Return the logarithm of the metric of each run."""
        return {name: math.log(value) for name, value in self.values().items()}

    def values(self) -> dict[str, float]:
        """Return the value of the metric of each run."""
        return {name: found["value"] for name, found in self.metrics().items()}

    def metrics(self) -> dict[str, Mapping[str, Any]]:
        """Return the metric of each run, with its interval."""
        found = {
            record["folder"]: next(
                result["metrics"][self.metric]
                for result in record["results"]
                if self.metric in result["metrics"] and re.fullmatch(self.sampler, result["generation"]["sampler"])
            )
            for record in self.records()
        }
        if not found:
            raise ValueError(f"no runs of {self}")
        return found

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of the runs, with the name of their ``folder``."""
        for path in sorted((RESULTS / self.study).glob("*/record.json")):
            if re.fullmatch(self.runs, path.parent.name):
                yield json.loads(path.read_text()) | {"folder": path.parent.name}

    def num_images(self) -> int:
        return next(self.records())["results"][0]["measurement"]["num_images"]

    def flops(self) -> float:
        """Return the mean training FLOPs, with those of autoencoders and teachers."""
        return fmean(record["training"]["total_cost"]["flops"] for record in self.records())


@dataclass(frozen=True)
class Finding:
    """A comparison of two rows in one sentence."""

    text: str
    """With ``{ratio}``, ``{interval}``, and ``{flops}`` for the ratio of training FLOPs."""
    first: Row
    second: Row
    in_readme: bool = False

    def log_ratio(self) -> tuple[float, float, float, int]:
        """Return the mean difference of logarithms, its standard error, its degrees of freedom, and the seeds."""
        a, b = self.first.logarithms(), self.second.logarithms()
        if a.keys() == b.keys() and len(a) > 1:
            differences = [a[name] - b[name] for name in a]
            return fmean(differences), math.sqrt(variance(differences) / len(a)), len(a) - 1, len(a)
        mean = fmean(a.values()) - fmean(b.values())
        if min(len(a), len(b)) == 1:
            return mean, math.hypot(*(_sampling_error(row) for row in (self.first, self.second))), math.inf, 1
        e = [variance(x.values()) / len(x) for x in (a, b)]
        nu = sum(e) ** 2 / sum(each**2 / (len(x) - 1) for each, x in zip(e, (a, b), strict=True))
        return mean, math.sqrt(sum(e)), nu, min(len(a), len(b))

    def p_value(self) -> float | None:
        mean, error, nu, seeds = self.log_ratio()
        return float(2 * stdtr(nu, -abs(mean) / error)) if seeds > 1 else None

    def interval(self) -> tuple[float, float, float]:
        """Return the ratio and the ends of its interval."""
        mean, error, nu, _ = self.log_ratio()
        limit = 1.96 if math.isinf(nu) else float(stdtrit(nu, 1 - SIGNIFICANCE_LEVEL / 2))
        return math.exp(mean), math.exp(mean - limit * error), math.exp(mean + limit * error)

    def detectable(self) -> float | None:
        """Return the smallest ratio above 1 that the test of this pair alone detects with a power of 80 %."""
        a, b = self.first.logarithms(), self.second.logarithms()
        if min(len(a), len(b)) == 1:
            return None
        deviations = [math.sqrt(variance(x.values())) for x in (a, b)]
        if a.keys() == b.keys():
            deviations = [math.sqrt(variance(a[name] - b[name] for name in a))]
        low, high = 0.0, 10.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if _power(middle, deviations, min(len(a), len(b))) >= POWER else (middle, high)
        return math.exp(high)

    def sentence(self) -> str:
        ratio, low, high = self.interval()
        flops = self.first.flops() / self.second.flops() if "{flops}" in self.text else 1
        return self.text.format(ratio=f"{ratio:.2f}", interval=f"[{low:.2f}, {high:.2f}]", flops=f"{flops:.1f}")


def _sampling_error(row: Row) -> float:
    """Return the standard error of the logarithm that the interval of sampling stands for."""
    errors = [
        (math.log(metric["interval"][1]) - math.log(metric["interval"][0])) / (2 * 1.96)
        for metric in row.metrics().values()
    ]
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _power(difference: float, deviations: Sequence[float], num_seeds: int) -> float:
    """Simulate the power of the test: Welch's for two standard deviations, that of paired differences for one.

    With three seeds, the noncentral t distribution that planning uses is up to 10 % too high.
    """
    rng = np.random.default_rng(0)
    rows = [deviation * rng.standard_normal((num_seeds, NUM_SIMULATIONS)) for deviation in deviations]
    e = [row.var(0, ddof=1) / num_seeds for row in rows]
    nu = sum(e) ** 2 / sum(each**2 for each in e) * (num_seeds - 1)
    t = (difference + rows[0].mean(0) - sum(row.mean(0) for row in rows[1:])) / np.sqrt(sum(e))
    return float((np.abs(t) > stdtrit(nu, 1 - SIGNIFICANCE_LEVEL / 2)).mean())


def holm(p_values: Iterable[float | None]) -> list[float | None]:
    """Return Holm's adjusted p values; findings without one are left out."""
    values = list(p_values)
    order = sorted((p, k) for k, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for position, (p, k) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - position) * p))
        adjusted[k] = largest
    return adjusted


OWN_GRID, KARRAS_GRID = r"DDIM, 25 steps, eta.*", ".*KarrasGrid.*"
GUIDED = r".*ClassifierFree, scale {}, x0 clipped"
FAMILIES = "fashion_mnist"
MEANFLOW, FLOW, TUNED = (rf"{name}(_\d)?" for name in ("meanflow", "flow", "consistency_tuned"))
FINDINGS = [
    *(
        Finding(
            f"With {calls}, MeanFlow has {{ratio}} times {{interval}} the MMD of flow matching (Fashion-MNIST, the same"
            " network and 40,000 images).",
            Row("few_steps", MEANFLOW, f"MeanFlowSampler, {k} steps.*"), Row("few_steps", FLOW, f"Euler, {k} steps.*"),
            in_readme=k == 1,
        )
        for k, calls in ((1, "one network call"), (2, "two calls"), (4, "four calls"))
    ),
    Finding(
        "With four calls, MeanFlow has {ratio} times {interval} the MMD of flow matching with 50.",
        Row("few_steps", MEANFLOW, "MeanFlowSampler, 4 steps.*"), Row("few_steps", FLOW, "Euler, 50 steps.*"),
        in_readme=True,
    ),
    *(
        Finding(
            f"With {calls}, a consistency model tuned from flow matching has {{ratio}} times {{interval}} the MMD of"
            f" its teacher with {name}.",
            Row("few_steps", TUNED, f"MultistepConsistency, {k} steps.*"), Row("few_steps", FLOW, sampler),
            in_readme=k == 2,
        )
        for k, calls, name, sampler in (
            (1, "one call", "one step of Euler", "Euler, 1 steps.*"),
            (2, "two calls", "two of DPM-Solver++", "DPMSolverPP2M, 2 steps.*"),
            (4, "four calls", "four of DPM-Solver++", "DPMSolverPP2M, 4 steps.*"),
        )
    ),
    Finding(
        "Muon with 30,000 training images has {ratio} times {interval} the MMD of Adam with 60,000 (flow matching on"
        " Fashion-MNIST).",
        Row("fewer_images", r"muon_\d"), Row("fewer_images", r"adam_\d"), in_readme=True,
    ),
    Finding(
        "The cosine schedule has {ratio} times {interval} the MMD of the linear one (DDPM on digits, 25 steps of DDIM"
        " on the schedule's own grid).",
        Row("schedules", r"cosine_\d", OWN_GRID), Row("schedules", r"linear_\d", OWN_GRID), in_readme=True,
    ),
    Finding(
        "Sampled on a Karras grid instead of the schedule's own, the cosine schedule has {ratio} times {interval} the"
        " MMD.",
        Row("schedules", r"cosine_\d", KARRAS_GRID), Row("schedules", r"cosine_\d", OWN_GRID),
    ),
    Finding(
        "Classifier-free guidance with a scale of 1.5 has {ratio} times {interval} the MMD of the conditional model"
        " alone (DDPM on digits, 25 steps of DDIM).",
        Row("guidance", ".*", GUIDED.format("1.5")), Row("guidance", ".*", GUIDED.format("1")),
    ),
    *(
        Finding(
            f"Classifier-free guidance with a scale of 5 has {{ratio}} times {{interval}} the {metric} of the"
            " conditional model alone (DDPM on digits).",
            Row("guidance", ".*", GUIDED.format("5"), metric), Row("guidance", ".*", GUIDED.format("1"), metric),
            in_readme=metric == "recall",
        )
        for metric in ("precision", "recall")
    ),
    *(
        Finding(
            f"With 10 network calls, {name} has {{ratio}} times {{interval}} the MMD of DDIM with 50 (DDPM on digits).",
            Row("samplers", ".*", f"DPMSolverPP2M, 10 steps, eta {eta},.*"),
            Row("samplers", ".*", r"DDIM, 50 steps,.*"),
            in_readme=eta == 1,
        )
        for eta, name in ((0, "DPM-Solver++(2M)"), (1, "SDE-DPM-Solver++(2M)"))
    ),
    *(
        Finding(
            f"With the class of each image, {name} has {{ratio}} times {{interval}} the MMD of the unconditional model"
            " (digits, 50,000 images).",
            Row("conditional", rf"{model}_conditional_\d"), Row("conditional", rf"{model}_unconditional_\d"),
            in_readme=model == "gan",
        )
        for model, name in (("ddpm", "the DDPM"), ("flow", "flow matching"), ("gan", "the GAN"), ("vae", "the VAE"))
    ),
    Finding(
        "The EBM has {ratio} times {interval} the MMD of the DDPM after 40,000 images of Fashion-MNIST, with {flops}"
        " times the training FLOPs.",
        Row(FAMILIES, r"ebm_\d"), Row(FAMILIES, r"ddpm_\d"), in_readme=True,
    ),
    Finding(
        "The EBM has {ratio} times {interval} the MMD of NCSN there.",
        Row(FAMILIES, r"ebm_\d"), Row(FAMILIES, r"ncsn_\d"),
    ),
    Finding(
        "The GPT over tokens has {ratio} times {interval} the MMD of diffusion in latents there.",
        Row(FAMILIES, r"vqtransformer_\d"), Row(FAMILIES, r"ldm_\d"),
    ),
    Finding(
        "Latent diffusion with half the images for each stage has {ratio} times {interval} the MMD.",
        Row(FAMILIES, r"ldm_half_\d"), Row(FAMILIES, r"ldm_\d"),
    ),
    Finding(
        "Learned variances and the hybrid loss (iDDPM) have {ratio} times {interval} the MMD of the plain DDPM in such"
        " a short run.",
        Row(FAMILIES, r"iddpm_\d"), Row(FAMILIES, r"ddpm_\d"),
    ),
    Finding(
        "The VAE has {ratio} times {interval} the MMD of the GAN there.",
        Row(FAMILIES, r"vae_\d"), Row(FAMILIES, r"gan_\d"),
    ),
    *(
        Finding(
            f"A DDPM of diffusers, {how}, has {{ratio}} times {{interval}} the MMD of this project's (Fashion-MNIST,"
            " 40,000 images).",
            Row("outside", rf"{runs}_\d"), Row(FAMILIES, r"ddpm_\d"), in_readme=True,
        )
        for runs, how in (
            ("diffusers", "trained in a plain loop with the same settings"),
            ("diffusers_matched", "also with the same initial weights, stratified times and steps of sampling"),
        )
    ),
    Finding(
        "A VAE of pythae has {ratio} times {interval} the MMD of this project's (Fashion-MNIST, 200,000 images).",
        Row("outside", r"pythae_\d"), Row("outside", r"vae_mlp_\d"),
    ),
    Finding(
        "On EuroSAT-64, diffusion in latents has {ratio} times {interval} the MMD of diffusion of pixels at equal"
        " device time, one seed.",
        Row("eurosat64", "ldm_0"), Row("eurosat64", "ddpm_0"), in_readme=True,
    ),
    Finding(
        "Ten calls at optimised times have {ratio} times {interval} the MMD of 50 of DDIM (flow matching on digits, one"
        " seed).",
        Row("few_calls", "flow", r".*, 10 steps, times .*"), Row("few_calls", "flow", r"DDIM, 50 steps\b.*"),
    ),
]  # fmt: skip


def table() -> str:
    """Return the table of docs/results.md."""
    lines = ["| finding | detectable | p | runs |", "| --- | --- | --- | --- |"]
    for finding, p in zip(FINDINGS, holm(f.p_value() for f in FINDINGS), strict=True):
        ratio, seeds = finding.detectable(), finding.log_ratio()[3]
        runs = f"{seeds} seed{'s' if seeds > 1 else ''}, {finding.first.num_images():,} images"
        lines.append(
            f"| {finding.sentence()} | {f'{ratio:.2f}' if ratio else '-'} | {'-' if p is None else _p(p)}"
            f" | [{runs}](results/{finding.first.study}/compare.md) |"
        )
    return "\n".join(lines)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def bullets() -> str:
    """Return the list in README.md: the findings that are marked for it, with their p value."""
    p_values = holm(finding.p_value() for finding in FINDINGS)
    return "\n".join(
        f"- {finding.sentence()}" + ("" if p is None else f" (p {_p(p) if p < 0.001 else f'= {_p(p)}'})")
        for finding, p in zip(FINDINGS, p_values, strict=True)
        if finding.in_readme
    )


def fill(text: str) -> str:
    """Replace the blocks between ``<!-- findings -->`` or ``<!-- findings list -->`` and ``<!-- end -->``."""
    for name, content in (("findings", table), ("findings list", bullets)):
        text = fill_block(text, name, content)
    return text


def fill_block(text: str, name: str, content: Callable[[], str]) -> str:
    """Replace what is between ``<!-- NAME -->`` and ``<!-- end -->``, if the text has such a block."""
    block = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", re.DOTALL)
    return block.sub(lambda _: f"<!-- {name} -->\n{content()}\n<!-- end -->", text)


def main() -> None:
    for page in PAGES:
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
