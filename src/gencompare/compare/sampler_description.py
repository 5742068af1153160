"""How the samples of a row were made, in words, and what of it tells the rows of one training apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from gencompare.compare.statistics import SeedGroup
from gencompare.records import Result, SampleSettings


def weights(generation: SampleSettings) -> str:
    """Which weights of which checkpoint: ``last, EMA``."""
    kind = {"ema": "EMA", "unknown": ""}.get(generation.weights, generation.weights)
    checkpoint = "" if generation.checkpoint == "unknown" else generation.checkpoint
    return ", ".join(part for part in (checkpoint, kind) if part)


def sampler_description(result: Result) -> str:
    """All that is known of it: weights, sampler, step and seed."""
    g = result.generation
    parts = [weights(g), "" if g.sampler == "unknown" else g.sampler]
    parts += [f"step {g.step:,}" if g.step is not None else "", f"sampling seed {g.seed}" if g.seed is not None else ""]
    return ", ".join(part for part in parts if part)


PARTS: tuple[Callable[[SampleSettings], str], ...] = (
    lambda g: g.sampler,
    lambda g: "" if g.guidance in ("none", "unknown") else g.guidance,
    weights,
    lambda g: "" if g.step is None else f"step {g.step:,}",
)
"""What rows of one training may differ in."""


def sampler_descriptions(lines: Sequence[SeedGroup]) -> list[str]:
    """For each line what sets it apart from the others of its training; empty for one that stands alone.

    Of a sampler that is its name, and those of its settings that not all of them share.
    """
    neighbours: dict[str, list[SeedGroup]] = defaultdict(list)
    for line in lines:
        for name in {line.run.label, line.members[0][0].label}:
            neighbours[name].append(line)
    found = []
    for line in lines:
        near = [other for name in (line.run.label, line.members[0][0].label) for other in neighbours[name]]
        said = []
        for part in PARTS:
            own, every = part(line.result.generation), {part(other.result.generation) for other in near}
            if len(every) > 1:
                said.append(_shorter(own, every))
        found.append(" · ".join(text for text in said if text))
    return found


def _shorter(own: str, every: set[str]) -> str:
    """The first of the words between commas, and those that are not in all of ``every``."""
    shared = set.intersection(*(set(text.split(", ")) for text in every))
    first, *rest = own.split(", ")
    return ", ".join([first, *(word for word in rest if word not in shared)])


def without_steps(text: str) -> str:
    """A sampler, or a way, without its number of steps."""
    parts = (", ".join(filter(None, re.sub(r"\b\d+ steps\b", "", part).split(", "))) for part in text.split(" · "))
    return " · ".join(part.strip() for part in parts if part.strip())
