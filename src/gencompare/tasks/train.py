"""task=train: train, evaluate, record, show."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from gencompare.contract import GenerativeModel, TrainedModel
from gencompare.data.base import ImageData
from gencompare.errors import UserError
from gencompare.records import FILE as RECORD
from gencompare.records import RunRecord, now
from gencompare.tasks import frozen
from gencompare.tasks.build import (
    build_budget,
    build_callbacks,
    build_data,
    build_loggers,
    build_model,
    build_protocol,
    build_trainer,
)
from gencompare.tasks.environment import environment
from gencompare.tasks.evaluate import measure
from gencompare.tasks.processes import JOB, children_of, wait_for_children
from gencompare.tasks.show import described, print_config, print_end
from gencompare.training.checkpoints import Checkpoints, load_checkpoint
from gencompare.training.clock import Clock
from gencompare.training.flops import TrainingFlops
from gencompare.training.loggers import finish
from gencompare.training.memory import peak_memory_bytes
from gencompare.training.stop import GracefulStop


def train(cfg: DictConfig) -> None:
    """Train the model of ``cfg`` in the folder ``cfg.out``, or go on with the run ``cfg.resume``; then evaluate it."""
    folder = Path(cfg.out)
    resumed = cfg.resume is not None
    checkpoint = folder / "checkpoints" / "last.ckpt"
    clock = load_checkpoint(checkpoint)["callbacks"]["Clock"] if resumed and checkpoint.exists() else None
    data = build_data(cfg)
    data.setup()
    model = build_model(cfg, data)
    protocol = None
    if isinstance(model, GenerativeModel):
        protocol = build_protocol(cfg)
        # Everything that would spoil the evaluation is found before any time is spent on training.
        protocol.check(data)
    if rank_zero_only.rank == 0:
        begin(cfg, model, data, folder, resumed)
    record = RunRecord.load(folder)
    callbacks = build_callbacks(cfg, model, data, protocol, folder)
    loggers = build_loggers(cfg, folder, run_id=record.environment["run_id"], start_step=clock["step"] if clock else 0)
    trainer = build_trainer(cfg, model, callbacks, loggers, folder)
    if clock and (model.closed_form or build_budget(cfg).progress(**clock) >= 1):
        print_zero("The budget is spent: nothing is left to train.")
    else:
        fit(trainer, model, data, folder, checkpoint if clock else None)
    if protocol is not None:
        assert isinstance(model, GenerativeModel)
        device = trainer.strategy.root_device
        measure(
            cfg, model.to(device), data, protocol, folder, checkpoints=list(cfg.evaluation.checkpoints), weights="ema"
        )
    if rank_zero_only.rank == 0:
        record = RunRecord.update(folder, lambda r: setattr(r, "state", "finished"))
        page = print_end(record, folder)
        finish(loggers, record, folder, page)
    wait_for_children(trainer)


def begin(cfg: DictConfig, model: TrainedModel, data: ImageData, folder: Path, resumed: bool) -> None:
    """Freeze the config and write the first record."""
    if not resumed and (folder / RECORD).exists():
        raise UserError(f"{folder} holds a run already: go on with resume={folder}, or choose another hydra.run.dir.")
    frozen.save(cfg, folder / JOB)
    cfg = frozen.without_place(cfg)
    frozen.save(cfg, folder / frozen.FILE)
    print_config(cfg)
    if resumed:
        RunRecord.update(folder, lambda r: go_on(r, cfg))
        return
    RunRecord(
        name=folder.name,
        family=cfg.family,
        data=described(data),
        seed=cfg.seed,
        created=now(),
        config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
        overrides=list(cfg.command),
        environment={"run_id": uuid.uuid4().hex[:12], "sweep": cfg.sweep_name},
        model={
            "class": type(model).__name__,
            "conditional": model.conditional,
            "parameters": sum(p.numel() for p in model.parameters()),
            "averaged_parameters": sum(p.numel() for p in model.averaged_parameters().values()),
        },
    ).save(folder)


def go_on(record: RunRecord, cfg: DictConfig) -> None:
    """The record of a run that is resumed: what was changed on the command line is in force from here on."""
    record.state = "running"
    record.config = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]


def fit(trainer: pl.Trainer, model: TrainedModel, data: ImageData, folder: Path, checkpoint: Path | None) -> None:
    """Train, and keep the record's state true whatever happens."""
    try:
        with children_of(folder / JOB):
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except BaseException as error:
        if trainer.is_global_zero:
            record_training(trainer, folder, state="failed", error=" ".join(str(error).split()))
        raise
    stop = _callback(trainer, GracefulStop)
    if trainer.is_global_zero:
        record_training(trainer, folder, state="interrupted" if stop.received else "running")
    if stop.received:
        clock = _callback(trainer, Clock)
        print_zero(f"Stopped after step {clock.step}, and saved. Go on with: python run.py resume={folder}")
        wait_for_children(trainer)
        raise SystemExit(128 + stop.received)


def record_training(trainer: pl.Trainer, folder: Path, *, state: str, error: str = "") -> None:
    """What training cost so far, in the record."""
    clock, flops = _callback(trainer, Clock), _callback(trainer, TrainingFlops)
    checkpoints = _callback(trainer, Checkpoints)
    device = trainer.strategy.root_device
    figures: dict[str, Any] = {
        "steps": clock.step,
        "images_seen": clock.images,
        "seconds": clock.seconds,
        "images_per_second": clock.images / clock.seconds if clock.seconds else None,
        "flops_per_image": flops.per_image,
        "flops": flops.per_image * clock.images if flops.per_image is not None else None,
        "peak_memory_bytes": peak_memory_bytes(device),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "trained_against": [],
    }
    if error:
        figures["error"] = error

    def change(record: RunRecord) -> None:
        record.state = state
        record.environment |= environment(device)
        record.training = figures
        record.checkpoints = {
            path.stem: str(path.relative_to(folder)) for path in (checkpoints.last, checkpoints.best) if path.exists()
        }
        pictures = sorted((folder / "samples").glob("step_*.png"))
        if pictures:
            record.pictures["samples while training"] = str(pictures[-1].relative_to(folder))

    RunRecord.update(folder, change)


def _callback(trainer: pl.Trainer, kind: type) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))  # type: ignore[attr-defined]


@rank_zero_only
def print_zero(text: str) -> None:
    print(text, flush=True)
