"""hydra/sweeper=families: each family with the settings that the data set has for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override


class Families(BasicSweeper):
    """Hydra's own sweeper, but that a job of ``model=FAMILY`` gets ``experiment=DATA_FAMILY`` where there is one."""

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        assert self.config is not None and self.hydra_context is not None
        experiments = self.hydra_context.config_loader.get_group_options("experiment")
        data = self.config.hydra.runtime.choices.data
        return [
            [with_experiment(job, experiments, data) for job in batch]
            for batch in BasicSweeper.split_arguments(overrides, max_batch_size)
        ]


def with_experiment(job: Sequence[str], experiments: Collection[str], data: str) -> list[str]:
    """The words of a job, led by those of the experiment for its family and data, unless it names one itself.

    Args:
        experiments: all there are, by name.
        data: the data set of jobs that name none.
    """
    said = dict(word.split("=", 1) for word in job if "=" in word)
    experiment = f"{said.get('data', data)}_{said.get('model')}"
    if "experiment" in said or experiment not in experiments:
        return list(job)
    return [f"experiment={experiment}", *job]
