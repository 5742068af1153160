"""The command that measures a run again, under the protocol of other rows."""

from __future__ import annotations

import shlex

from gencompare.compare.gather import Run
from gencompare.compare.rank import Group, Row
from gencompare.protocol import Measurement
from gencompare.records import Result

BY_OPTION = {
    "n": "evaluation.n", "reference": "evaluation.protocol.reference", "chunk": "evaluation.protocol.chunk",
}  # fmt: skip
"""Fields of a `Measurement` that one option of the command line decides."""

BY_PRESET = {"extractor", "extractor_hash", "resize"}
"""Fields that the choice of ``evaluation=`` decides."""

FOLLOWING = {"reference_n", "reference_hash", "label_distribution"}
"""Fields that follow from others, where the data are the same."""

FIXED = {"data": "other data", "conditioning": "another task (with labels, or without)", "quantization": "other levels"}
"""What no evaluation can bring together."""


def commands(groups: list[Group]) -> list[str]:
    """For each row that stands apart from the first table of its data: the command that brings it there, if one can.

    Rows of another data set, of another task, or of images that are not at hand, have none.
    """
    first: dict[str, Group] = {}
    found = []
    for group in groups:
        target = first.setdefault(group.measurement.data, group)
        if target is group:
            continue
        options = overrides(group.measurement, target)
        if options is not None:
            pairs = [pair for row in group.rows for pair in row.line.members if pair[0].record.state != "samples"]
            found += [command(run, result, options) for run, result in pairs]
    return list(dict.fromkeys(found))


def overrides(measurement: Measurement, target: Group) -> list[str] | None:
    """What to write on the command line; None where the rows can never be ranked together."""
    differ = set(measurement.differences(target.measurement))
    if differ & FIXED.keys() or ("reference_hash" in differ and "reference" not in differ):
        return None
    words = []
    if differ & BY_PRESET:
        words.append(f"evaluation={preset(target.rows[0])}")
    named = [name for name in BY_OPTION if name in differ or words]
    return words + [f"{BY_OPTION[name]}={getattr(target.measurement, name)}" for name in named]


def preset(row: Row) -> str:
    """The evaluation preset that a row was measured under."""
    choices = row.run.record.config.get("choices", {})
    return (choices.get("evaluation") if isinstance(choices, dict) else None) or "default"


def command(run: Run, result: Result, options: list[str]) -> str:
    checkpoint = result.generation.checkpoint
    chosen = [f"checkpoint={checkpoint}"] if checkpoint == "best" else []
    # Records may come from anybody, and users paste this into a shell.
    return shlex.join(["python", "run.py", "task=evaluate", f"run={run.folder}", *options, *chosen])
