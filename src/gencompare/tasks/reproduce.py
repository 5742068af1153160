"""task=reproduce: train with the settings of a paper, or evaluate as it does, and compare with its numbers."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from gencompare.comparison.published import check_reproduction, find_published
from gencompare.errors import printable
from gencompare.records import RunRecord
from gencompare.tasks.evaluate_run import evaluate_run
from gencompare.tasks.train import train


def reproduce(cfg: DictConfig) -> None:
    """Reproduce the published result ``cfg.paper``, print how it compares, and note the paper in the record.

    The command line already contains the settings of the paper (`gencompare.tasks.runs.run_config.add_paper_settings`).
    With ``run_dir=DIR``, ``samples=PATH`` or ``pretrained=PATH``, nothing is trained: that run, those images or those
    weights are evaluated as in the paper.
    """
    published = find_published(cfg.paper)
    if cfg.run_dir is None and cfg.samples is None and cfg.pretrained is None:
        train(cfg)
    else:
        evaluate_run(cfg)
    if rank_zero_only.rank != 0:
        return
    folder = Path(cfg.run_dir or cfg.out)
    record = RunRecord.update(folder, lambda record: record.config.update(paper=published.name))
    for line in str(check_reproduction(record, published)).splitlines():
        print(printable(line))
