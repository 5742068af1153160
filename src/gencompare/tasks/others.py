"""task=evaluate samples=PATH or pretrained=PATH: the work of others under the same protocol, in the same comparison."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from gencompare.data.base import ImageData
from gencompare.data.samples import read_samples
from gencompare.errors import UserError
from gencompare.evaluation import evaluate as evaluation
from gencompare.protocol import Generation
from gencompare.records import FILE as RECORD
from gencompare.records import RunRecord, now
from gencompare.tasks.build import build_data, build_model, build_protocol, chosen_device
from gencompare.tasks.environment import environment
from gencompare.tasks.load import generative
from gencompare.tasks.pretrained import load_pretrained, located
from gencompare.tasks.progress import stages
from gencompare.tasks.results import put
from gencompare.tasks.show import described, print_end


def evaluate(cfg: DictConfig) -> None:
    """Measure images (``cfg.samples``), or the model of ``cfg.model`` with published weights (``cfg.pretrained``).

    They get a record in ``cfg.out``, so that ``task=compare`` finds them beside one's own runs.
    """
    given = [place for place in (cfg.samples, cfg.pretrained) if place is not None]
    if len(given) > 1:
        raise UserError("samples= and pretrained= are two evaluations: give one of them.")
    folder = Path(cfg.out)
    refuse_second_run(folder)
    data = build_data(cfg)
    protocol = build_protocol(cfg)
    protocol.check(data)
    labels = None
    drawn: list[Tensor] = []
    path = Path(given[0]) if cfg.samples is not None else located(given[0])
    if cfg.samples is not None:
        source, labels = read_samples(path, data.spec, cache=Path(cfg.paths.cache))
        generation, details = Generation(), {}
    else:
        source = generative(build_model(cfg, data), "evaluate").eval()
        load_pretrained(source, path)
        source = source.to(chosen_device(cfg))
        generation = Generation(weights="as published", checkpoint="as published")
        details = {"parameters": sum(p.numel() for p in source.parameters()), "conditional": source.conditional}
    with stages(cfg.callbacks.progress) as progress:
        result = evaluation.evaluate(
            source, data, protocol, generation=generation, labels=labels, progress=progress, on_samples=drawn.append
        )
    begin(cfg, data, Path(given[0]), details).save(folder)
    put(folder, result, drawn[0], data)
    print_end(RunRecord.load(folder), folder)


def refuse_second_run(folder: Path) -> None:
    """Raises `UserError` where ``folder`` holds a record already: two runs would become one."""
    if (folder / RECORD).exists():
        raise UserError(f"{folder} holds a run already: choose another hydra.run.dir.")


def begin(cfg: DictConfig, data: ImageData, path: Path, model: dict[str, object]) -> RunRecord:
    """The record of work that was not trained here."""
    name = cfg.name or path.stem
    return RunRecord(
        name=name, family=name if cfg.samples else cfg.family, data=described(data), seed=cfg.seed, state="samples",
        created=now(), config={"choices": {k: cfg.choices[k] for k in ("data", "evaluation")}}, model=model,
        overrides=list(cfg.command), environment=environment(torch.device("cpu")),
    )  # fmt: skip
