"""Suggested commands that evaluate runs under the same protocol."""

from __future__ import annotations

from gencompare.comparison.commands import PRESET_FIELDS, evaluation_command, evaluation_preset, protocol_overrides
from gencompare.comparison.ranking import RankingTable


def suggested_commands(tables: list[RankingTable]) -> list[str]:
    """Suggest commands that evaluate results under the protocol of the first table on the same data.

    No command is suggested for externally generated images, or if the evaluation settings cannot change the protocol.
    """
    first: dict[str, RankingTable] = {}
    commands = []
    for table in tables:
        target = first.setdefault(table.measurement.data, table)
        if target is table:
            continue
        preset = evaluation_preset(target.rows[0].run)
        overrides = protocol_overrides(table.measurement, target.measurement, preset)
        if overrides is None:
            continue
        # If only the extractor differs, the target may already list the same samples.
        same_samples = not set(table.measurement.differences(target.measurement)) - PRESET_FIELDS
        listed = {(run.folder, result.generation.id) for run, result in target.results()}
        commands += [
            evaluation_command(run, result, overrides)
            for run, result in table.results()
            if run.record.state != "samples" and not (same_samples and (run.folder, result.generation.id) in listed)
        ]
    return list(dict.fromkeys(commands))
