"""The command that measures a run again under the protocol of other rows, or trains one to stand beside them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gencompare.command_line import command as to_paste
from gencompare.command_line import override, quote
from gencompare.compare.load_runs import RunFolder
from gencompare.records import Measurement, Result

if TYPE_CHECKING:
    from gencompare.compare.ranking import TableRow, TableSection

BY_OPTION = {
    "num_images": "evaluation.n", "reference": "evaluation.protocol.reference", "chunk_size": "evaluation.protocol.chunk",
}  # fmt: skip
"""Fields of a `Measurement` that one option of the command line decides."""

BY_PRESET = {"extractor", "extractor_hash", "resize"}
"""Fields that the choice of ``evaluation=`` decides."""

FOLLOWING = {"num_reference_images", "reference_hash", "label_distribution"}
"""Fields that follow from others, where the data are the same."""

FIXED = {"data": "other data", "conditioning": "another task (with labels, or without)", "quantization": "other levels"}
"""What no evaluation can bring together."""


def suggested_commands(groups: list[TableSection]) -> list[str]:
    """For each row that stands apart from the first table of its data: the command that brings it there, if one can.

    Rows of another data set, of another task, or of images that are not at hand, have none.
    """
    first: dict[str, TableSection] = {}
    found = []
    for group in groups:
        target = first.setdefault(group.measurement.data, group)
        if target is group:
            continue
        options = overrides(group.measurement, target)
        if options is not None:
            # Two extractors of one evaluation: a run that the target lists already needs no other.
            alike = not set(group.measurement.differences(target.measurement)) - BY_PRESET
            there = {(run.folder, result.generation.id) for row in target.rows for run, result in row.line.members}
            pairs = [
                (run, result)
                for row in group.rows
                for run, result in row.line.members
                if run.record.state != "samples" and not (alike and (run.folder, result.generation.id) in there)
            ]
            found += [suggested_command(run, result, options) for run, result in pairs]
    return list(dict.fromkeys(found))


def overrides(measurement: Measurement, target: TableSection) -> list[str] | None:
    """What to write on the command line; None where the rows can never be ranked together."""
    differ = set(measurement.differences(target.measurement))
    if differ & FIXED.keys() or ("reference_hash" in differ and "reference" not in differ):
        return None
    by_preset = bool(differ & BY_PRESET)
    named = [name for name in BY_OPTION if name in differ or by_preset]
    return [*([_evaluation(target)] if by_preset else []), *_options(target, named)]


def _evaluation(target: TableSection) -> str:
    return override("evaluation", preset(target.rows[0]))


def _options(target: TableSection, names: Iterable[str]) -> list[str]:
    """What decides these fields of the measurement of ``target``."""
    fields = {BY_OPTION[name]: getattr(target.measurement, name) for name in names}
    return [f"{key}={quote(value) if isinstance(value, str) else value}" for key, value in fields.items()]


def preset(row: TableRow) -> str:
    """The evaluation preset that a row was measured under."""
    choices = row.run.record.config.get("choices", {})
    return (choices.get("evaluation") if isinstance(choices, dict) else None) or "default"


def suggested_command(run: RunFolder, result: Result, options: list[str]) -> str:
    checkpoint = result.generation.checkpoint
    chosen = [f"checkpoint={checkpoint}"] if checkpoint == "best" else []
    # Records may come from anybody, and users paste this into a shell.
    return to_paste("task=evaluate", override("run", run.folder), *options, *chosen)


def trained_alike(family: str, group: TableSection) -> str:
    """The command that trains ``family`` and measures it as the rows of ``group`` are.

    Its folder lies beside that of the first row, where the comparison of these runs finds it when it is drawn again.
    """
    run = group.rows[0].line.members[0][0]
    choices = run.record.config.get("choices", {})
    data = choices.get("data") if isinstance(choices, dict) else None
    # The same images, and the network that measures, as far as the command line of that row named them.
    typed = [word for word in run.record.overrides if word.startswith(("data.", "evaluation.weights="))]
    words = [override("model", family), override("data", data or group.measurement.data), *typed]
    if preset(group.rows[0]) != "default":
        words.append(_evaluation(group))
    words += _options(group, BY_OPTION)
    if group.measurement.conditioning == "labels":
        words.append("model.conditional=true")
    return to_paste(*words, override("hydra.run.dir", _free(run.folder.parent / family)))


def _free(folder: Path) -> Path:
    """``folder``, or the first of its name with a number that is not there yet."""
    k, found = 1, folder
    while found.exists():
        k += 1
        found = folder.with_name(f"{folder.name}_{k}")
    return found
