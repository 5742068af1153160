"""Describe how samples were generated, and how the table rows of the same trained model differ."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from gencompare.comparison.statistics import SeedGroup
from gencompare.records import Result, SampleSettings


def describe_weights(generation: SampleSettings) -> str:
    """Describe the checkpoint and its weights: ``last, EMA``, ``last, no EMA`` or ``last, post-hoc EMA 0.1``."""
    names = {"ema": "EMA", "raw": "no EMA", "online": "no EMA", "unknown": ""}
    weights = names.get(generation.weights, generation.weights.replace("posthoc:", "post-hoc EMA "))
    checkpoint = "" if generation.checkpoint == "unknown" else generation.checkpoint
    return ", ".join(part for part in (checkpoint, weights) if part)


def describe_sampling(result: Result) -> str:
    """Describe weights, sampler, training step and sampling seed, if known."""
    g = result.generation
    parts = [describe_weights(g), "" if g.sampler == "unknown" else g.sampler]
    parts += [f"step {g.step:,}" if g.step is not None else "", f"sampling seed {g.seed}" if g.seed is not None else ""]
    return ", ".join(part for part in parts if part)


DISTINGUISHING: tuple[Callable[[SampleSettings], str], ...] = (
    lambda g: g.sampler,
    lambda g: "" if g.guidance in ("none", "unknown") else g.guidance,
    describe_weights,
    lambda g: "" if g.step is None else f"step {g.step:,}",
)
"""Descriptions of the settings that may differ between rows of one trained model."""


GRID = re.compile(r"\b\w+Grid\b")
"""Matches the time grid in the description of a sampler."""


def distinguishing_settings(groups: Sequence[SeedGroup]) -> list[str]:
    """Describe, for each group, the sampling settings that distinguish it from others of the same trained model.

    A sampler is described by its name and the arguments that not all of these groups share.
    """
    same_training: dict[str, list[SeedGroup]] = defaultdict(list)
    for group in groups:
        for label in _labels(group):
            same_training[label].append(group)
    descriptions = []
    for group in groups:
        others = [other for label in _labels(group) for other in same_training[label]]
        parts = []
        for describe in DISTINGUISHING:
            own = describe(group.result.generation)
            values: Collection[str] = {describe(other.result.generation) for other in others}
            if any(GRID.search(value) for value in values):
                short = len({match[0] for value in values for match in GRID.finditer(value)})
                long = len({part for value in values for part in value.split(", ") if GRID.search(part)})
                own, *values = (_name_grid(value, shorten=short == long) for value in (own, *values))
            if len(set(values)) > 1:
                parts.append(_without_shared_arguments(own, set(values)))
        descriptions.append(" · ".join(part for part in parts if part))
    return descriptions


def _name_grid(sampler: str, *, shorten: bool) -> str:
    """Name the default grid, which the description of a sampler omits; ``shorten`` drops the arguments of a grid."""
    name, *rest = sampler.split(", ")
    if rest and not GRID.search(sampler):
        return ", ".join([name, rest[0], "UniformGrid", *rest[1:]])
    matches = [(part, GRID.search(part)) for part in sampler.split(", ")]
    return ", ".join(match[0] if match and shorten else part for part, match in matches)


def _labels(group: SeedGroup) -> set[str]:
    return {group.run.label, group.members[0][0].label}


def _without_shared_arguments(own: str, descriptions: set[str]) -> str:
    """Keep the first comma-separated part of ``own`` and the parts that not all ``descriptions`` have."""
    shared = set.intersection(*(set(text.split(", ")) for text in descriptions))
    first, *rest = own.split(", ")
    return ", ".join([first, *(part for part in rest if part not in shared)])


def without_steps(text: str) -> str:
    """Remove the number of steps from a description of sampling."""
    parts = (", ".join(filter(None, re.sub(r"\b\d+ steps\b", "", part).split(", "))) for part in text.split(" · "))
    return " · ".join(part.strip() for part in parts if part.strip())
