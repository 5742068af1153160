"""task=reproduce: train with the settings of a paper, or evaluate as it does, and compare with its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from gencompare.comparison.published import (
    REPRODUCTION,
    PublishedResult,
    changed_settings,
    check_reproduction,
    find_published,
)
from gencompare.errors import printable
from gencompare.records import RunRecord
from gencompare.tasks.evaluate_run import evaluate_run
from gencompare.tasks.runs.interpolations import plain
from gencompare.tasks.train import train


def reproduce(cfg: DictConfig) -> None:
    """Reproduce the published result ``cfg.paper``, print how it compares, and note it in the record.

    The command line already contains the settings of the paper (`gencompare.tasks.runs.overrides.add_paper_settings`).
    With ``run_dir=DIR``, ``samples=PATH`` or ``pretrained=PATH``, nothing is trained: that run, those images or those
    weights are evaluated as in the paper.
    """
    published = find_published(cfg.paper)
    changed = [] if cfg.samples is not None else changed_settings(plain(cfg), _settings(published))
    if cfg.run_dir is None and cfg.samples is None and cfg.pretrained is None:
        train(cfg)
    else:
        evaluate_run(cfg)
    if rank_zero_only.rank != 0:
        return
    folder = Path(cfg.run_dir or cfg.out)
    external = cfg.samples is not None or cfg.pretrained is not None
    found = check_reproduction(RunRecord.load(folder), published, changed, external=external)
    RunRecord.update(folder, lambda record: record.model.update({REPRODUCTION: found.summary()}))
    for line in found.lines():
        print(printable(line))


def _settings(published: PublishedResult) -> dict[str, Any]:
    """Return the config that the settings of the paper compose."""
    from gencompare.tasks.python_api import compose

    state = Singleton.get_state()  # the config of the job itself
    try:
        return plain(compose(*published.overrides))
    finally:
        Singleton.set_state(state)
