"""task=evaluate: measure a trained run, as it is or with another sampler or protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from gencompare.contract import DataSpec, GenerativeModel
from gencompare.data.base import ImageData
from gencompare.data.samples import read_samples
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import Protocol, evaluate
from gencompare.evaluation.quantize import to_uint8
from gencompare.files import sha256
from gencompare.pictures import grid, save_png
from gencompare.protocol import Generation
from gencompare.records import FILE as RECORD
from gencompare.records import Result, RunRecord, now
from gencompare.tasks import frozen
from gencompare.tasks.build import build_data, build_model, build_protocol, build_trainer
from gencompare.tasks.environment import environment
from gencompare.tasks.load import generative, load_weights
from gencompare.tasks.processes import JOB, children_of, several_processes, wait_for_children
from gencompare.tasks.progress import stages
from gencompare.tasks.show import described, print_end

DRAWN = ".drawn"
"""Folder for the samples of an evaluation that is under way."""
GRID = 100
"""Samples in the picture of a result."""


def evaluate_run(cfg: DictConfig) -> None:
    """Evaluate the checkpoint ``cfg.checkpoint`` of the run in ``cfg.run``; the result joins its record.

    With ``samples=PATH`` images from elsewhere are measured instead, and get a run folder of their own.
    """
    if cfg.samples is not None:
        evaluate_samples(cfg)
        return
    folder = run_folder(cfg)
    data = build_data(cfg)
    model = generative(build_model(cfg, data), "evaluate")
    protocol = build_protocol(cfg)
    protocol.check(data)
    RunRecord.load(folder)
    job = folder / JOB
    if several_processes(cfg):
        frozen.save(cfg, job)
    trainer = build_trainer(cfg, model, [], [], folder)
    with children_of(job):
        start_processes(trainer)
    device = trainer.strategy.root_device
    measure(cfg, model.to(device), data, protocol, folder, checkpoints=[cfg.checkpoint], weights=cfg.weights)
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
    cfg: DictConfig,
    model: GenerativeModel,
    data: ImageData,
    protocol: Protocol,
    folder: Path,
    *,
    checkpoints: list[str],
    weights: str,
) -> None:
    """Measure each of ``checkpoints`` and put the results, with a picture each, into the folder's record.

    All processes take part; the first one writes. Left out are a checkpoint of the same step as one before it, and
    ``best`` of a run that never looked for it. What is drawn is kept until its result is in the record, so an
    evaluation that is broken off goes on where it was.
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
        kept = folder / DRAWN / drawing(cfg, data, protocol, folder, checkpoint, weights)
        drawn: list[Tensor] = []
        with stages(cfg.callbacks.progress) as progress:
            result = evaluate(
                model, data, protocol, generation=generation, progress=progress, on_samples=drawn.append, keep=kept
            )
        if rank_zero_only.rank == 0:
            put(folder, result, drawn[0], data.spec)
            shutil.rmtree(kept, ignore_errors=True)


def put(folder: Path, result: Result, images: Tensor, spec: DataSpec) -> None:
    """The result into the folder's record, with a picture of the samples (``images`` as `quantize.as_stored` gives
    them)."""
    RunRecord.update(folder, lambda record: record.put(result))
    shown = images if images.dtype == torch.uint8 else to_uint8(images.clamp(-1, 1), spec)
    path = folder / "samples" / f"result_{result.id}.png"
    save_png(grid(shown[: len(shown) if spec.dims == 2 else GRID].numpy()), path)
    pictured = replace(result, pictures={**result.pictures, "samples": str(path.relative_to(folder))})
    RunRecord.update(folder, lambda record: record.put(pictured))


def drawing(cfg: DictConfig, data: ImageData, protocol: Protocol, folder: Path, checkpoint: str, weights: str) -> str:
    """A name for the samples of one evaluation: a hash of all that decides what is drawn."""
    decides = {
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "weights": [sha256(folder / "checkpoints" / f"{checkpoint}.ckpt"), weights],
        "chunks": [protocol.seed, protocol.chunk, protocol.n, protocol.reference, data.hash("train")],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def evaluate_samples(cfg: DictConfig) -> None:
    """Measure the images in ``cfg.samples`` under the same protocol as a model's; they get a record in ``cfg.out``."""
    folder = Path(cfg.out)
    if (folder / RECORD).exists():
        raise UserError(f"{folder} holds a run already: choose another hydra.run.dir.")
    data = build_data(cfg)
    protocol = build_protocol(cfg)
    protocol.check(data)
    images, labels = read_samples(Path(cfg.samples), data.spec, cache=Path(cfg.paths.cache))
    generation = Generation(sampler="unknown", checkpoint="unknown")
    drawn: list[Tensor] = []
    with stages(cfg.callbacks.progress) as progress:
        result = evaluate(
            images, data, protocol, generation=generation, labels=labels, progress=progress, on_samples=drawn.append
        )
    name = cfg.name or Path(cfg.samples).stem
    RunRecord(
        name=name, family=name, data=described(data), seed=cfg.seed, state="samples", created=now(),
        config={"samples": Path(cfg.samples).name, "choices": {k: cfg.choices[k] for k in ("data", "evaluation")}},
        overrides=list(cfg.command), environment=environment(torch.device("cpu")),
    ).save(folder)  # fmt: skip
    put(folder, result, drawn[0], data.spec)
    print_end(RunRecord.load(folder), folder)
