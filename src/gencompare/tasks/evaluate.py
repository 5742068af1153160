"""task=evaluate: measure a trained run, as it is or with another sampler or protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from gencompare.contract import GenerativeModel
from gencompare.data.base import ImageData
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import Protocol, evaluate
from gencompare.pictures import grid, save_png
from gencompare.protocol import Generation
from gencompare.records import RunRecord
from gencompare.tasks import frozen
from gencompare.tasks.build import build_data, build_model, build_protocol, build_trainer
from gencompare.tasks.load import generative, load_weights
from gencompare.tasks.processes import JOB, children_of, wait_for_children
from gencompare.tasks.show import print_end

GRID = 100
"""Samples in the picture of a result."""


def evaluate_run(cfg: DictConfig) -> None:
    """Evaluate the checkpoint ``cfg.checkpoint`` of the run in ``cfg.run``; the result joins its record."""
    folder = run_folder(cfg)
    data = build_data(cfg)
    model = generative(build_model(cfg, data), "evaluate")
    protocol = build_protocol(cfg)
    protocol.check(data)
    job = folder / JOB
    frozen.save(cfg, job)
    trainer = build_trainer(cfg, model, [], [], folder)
    with children_of(job):
        start_processes(trainer)
    device = trainer.strategy.root_device
    measure(model.to(device), data, protocol, folder, checkpoints=[cfg.checkpoint], weights=cfg.weights)
    if rank_zero_only.rank == 0:
        print_end(RunRecord.load(folder), folder)
    wait_for_children(trainer)


def run_folder(cfg: DictConfig) -> Path:
    """The folder that ``run=DIR`` names."""
    if cfg.run is None:
        raise UserError(f"task={cfg.task.label} needs run=DIR, the folder of a trained run.")
    return Path(cfg.run)


def start_processes(trainer: pl.Trainer) -> None:
    """Start the further processes of a job that evaluates without training, and connect them."""
    strategy = trainer.strategy
    if strategy.launcher is not None:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)


def measure(
    model: GenerativeModel, data: ImageData, protocol: Protocol, folder: Path, *, checkpoints: list[str], weights: str
) -> None:
    """Measure each of ``checkpoints`` and put the results, with a picture each, into the folder's record.

    All processes take part; the first one writes. Left out are a checkpoint of the same step as one before it, and
    ``best`` of a run that never looked for it.
    """
    steps: set[int] = set()
    for checkpoint in checkpoints:
        if checkpoint == "best" and len(checkpoints) > 1 and not (folder / "checkpoints" / "best.ckpt").exists():
            continue
        seen = load_weights(model, folder, checkpoint=checkpoint, weights=weights)
        step = seen["step"]
        if step in steps:
            continue
        steps.add(step)
        generation = Generation(
            weights=weights if model.averaged_parameters() else "raw",
            checkpoint=checkpoint,
            step=step,
            images_seen=seen["images"],
            sampler=model.sampling_description(),
            seed=protocol.seed,
        )
        drawn: list[Tensor] = []
        result = evaluate(model, data, protocol, generation=generation, on_samples=drawn.append)
        if rank_zero_only.rank == 0:
            path = folder / "samples" / f"result_{result.id}.png"
            save_png(grid(drawn[0][:GRID].numpy()), path)
            pictured = replace(result, pictures={**result.pictures, "samples": str(path.relative_to(folder))})
            RunRecord.update(folder, lambda r, new=pictured: r.put(new))
