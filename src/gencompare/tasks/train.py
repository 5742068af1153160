"""task=train: train, evaluate, record, show."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from gencompare.command_line import shell_override
from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError
from gencompare.files import file_lock
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.hyperparameters import read_checkpoint
from gencompare.records import RECORD_FILE, RunRecord, now
from gencompare.resources import peak_memory_bytes
from gencompare.tasks.evaluate_run import measure, measure_trained
from gencompare.tasks.runs import autoencoder_stage, dependency_costs, run_config
from gencompare.tasks.runs.build import (
    build_budget,
    build_callbacks,
    build_data,
    build_loggers,
    build_model,
    build_protocol,
    build_trainer,
    check_trainer_settings,
)
from gencompare.tasks.runs.console import describe_config, print_config, print_end
from gencompare.tasks.runs.environment import environment
from gencompare.tasks.runs.loading import check_fits
from gencompare.tasks.runs.processes import (
    JOB,
    SIGTERM_CODE,
    children_of,
    several_processes,
    sigterm_raises,
    wait_for_children,
)
from gencompare.tasks.runs.sweep import LOCK
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.evaluation_callback import EvaluationCallback
from gencompare.training.graceful_stop import GracefulStop
from gencompare.training.loggers import abandon_loggers, finish_loggers


def train(cfg: DictConfig) -> None:
    """Train the model of ``cfg`` in the folder ``cfg.out``, or go on with the run ``cfg.resume``; then evaluate it.

    Where another job of a sweep has trained just that (in ``cfg.trained_in``), evaluate its run as ``cfg`` says.
    Everything that can be found wrong is found before the folder is written to, and before time is spent.
    """
    if "out" not in cfg:
        raise UserError('This config names no run folder: make it with gencompare.compose("model=ddpm", ...).')
    if cfg.get("trained_in"):
        check_choice(cfg.evaluation.checkpoints)
        measure_trained(cfg)
        return
    check_trainer_settings(cfg)
    folder = Path(cfg.out)
    resumed = cfg.resume is not None
    if not resumed and rank_zero_only.rank == 0:
        refuse_second_run(folder)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    stored = read_checkpoint(checkpoint) if resumed and checkpoint.exists() else None
    cfg = autoencoder_stage.use_autoencoder_settings(cfg)
    data = build_data(cfg)
    data.setup()
    model = build_model(cfg, data)
    check_optimizer(model)
    if stored is not None:
        check_fits(model, stored["state_dict"], checkpoint)
    protocol = None
    if isinstance(model, GenerativeModel):
        protocol = build_protocol(cfg)
        protocol.check(data)
        check_choice(cfg.evaluation.checkpoints)
    callbacks = build_callbacks(cfg, model, data, protocol, folder)
    if stored is None:
        cfg = autoencoder_stage.train_autoencoder(cfg, data, train)
    trainer = build_trainer(cfg, model, callbacks, [], folder)
    if stored is None:
        dependency_costs.remaining(
            build_budget(cfg), dependency_costs.dependencies(cfg)
        )  # refused before images are encoded
        cfg = autoencoder_stage.load_autoencoder(cfg, model, data, trainer.world_size)
    needed = dependency_costs.dependencies(
        cfg, known=RunRecord.load(folder).training.get("dependencies", []) if stored is not None else ()
    )
    budget = dependency_costs.remaining(build_budget(cfg), needed)
    callbacks["clock"].budget = budget  # type: ignore[attr-defined]
    clock = stored["callbacks"][TrainingClock.__name__] if stored is not None else None
    with claimed(folder, clear=not resumed), recorded(folder):
        if rank_zero_only.rank == 0:
            begin(cfg, model, data, folder, resumed, needed)
        run_id = RunRecord.load(folder).environment["run_id"]
        loggers = build_loggers(cfg, folder, run_id=run_id, start_step=clock["step"] if clock else 0)
        try:
            trainer.loggers = loggers
            if clock and (model.closed_form or budget.progress(**clock) >= 1):
                print_zero("The budget is spent: nothing is left to train.")
            else:
                fit(trainer, model, data, callbacks, folder, checkpoint if clock else None)
            if protocol is not None:
                assert isinstance(model, GenerativeModel)
                model.to(trainer.strategy.root_device)
                measure(cfg, model, data, protocol, folder, checkpoints=cfg.evaluation.checkpoints, weights="ema")
            if rank_zero_only.rank == 0:
                record = RunRecord.update(folder, lambda r: setattr(r, "state", "finished"))
                finish_loggers(loggers, record, folder, print_end(record, folder))
        except BaseException:
            abandon_loggers(loggers)
            raise
    wait_for_children(trainer)


@contextmanager
def claimed(folder: Path, *, clear: bool) -> Iterator[None]:
    """The run folder for this job alone; ``clear`` asks that no run is in it yet. Other ranks come with the first."""
    if rank_zero_only.rank != 0:
        yield
        return
    try:
        with file_lock(folder / LOCK, wait=False):
            if clear:
                refuse_second_run(folder)
            yield
    except BlockingIOError as error:
        raise UserError(f"Another process is at work in {folder}: wait for it, or choose another folder.") from error


def refuse_second_run(folder: Path) -> None:
    if (folder / RECORD_FILE).exists():
        raise UserError(
            f"{folder} holds a run already: go on with {shell_override('resume', folder)}, or choose another"
            " hydra.run.dir."
        )


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """The record's state is true whatever happens to the block: a run that broke off outside of training says so."""
    try:
        with sigterm_raises():
            yield
    except BaseException as error:
        why = " ".join(str(error).split())
        stopped = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == SIGTERM_CODE)

        def change(record: RunRecord) -> None:
            record.state = "interrupted" if stopped else "failed"
            record.training["error"] = why

        # What ended in training was recorded, and told, by `fit`.
        if rank_zero_only.rank == 0 and (folder / RECORD_FILE).exists() and RunRecord.load(folder).state == "running":
            RunRecord.update(folder, change)
            if stopped:
                print_zero(
                    "Stopped. What was trained and drawn is kept. Go on with: python run.py"
                    f" {shell_override('resume', folder)}"
                )
        raise


def check_optimizer(model: TrainedModel) -> None:
    """Raises `UserError` where the optimiser does not take its settings."""
    try:
        model.build_optimizers()
    except (TypeError, ValueError) as error:
        raise UserError(f"model.optimizer: {' '.join(str(error).split())}") from error


def check_choice(checkpoints: Any) -> None:
    """Raises `UserError` unless ``evaluation.checkpoints`` names some of last and best, or none."""
    if not OmegaConf.is_list(checkpoints) or not {*checkpoints} <= {"last", "best"}:
        raise UserError(f"evaluation.checkpoints={checkpoints}: give a list of last, best or both.")


def begin(
    cfg: DictConfig, model: TrainedModel, data: ImageData, folder: Path, resumed: bool, needed: list[dict[str, Any]]
) -> None:
    """Freeze the config and write the first record."""
    if several_processes(cfg):
        run_config.save(cfg, folder / JOB)
    autoencoder = autoencoder_stage.summary(Path(cfg.autoencoder_run)) if "autoencoder_run" in cfg else None
    cfg = run_config.without_place(cfg)
    run_config.save(cfg, folder / run_config.FILE)
    print_config(cfg)
    if resumed:
        RunRecord.update(folder, lambda r: go_on(r, cfg, needed))
        return
    RunRecord(
        name=folder.name,
        family=cfg.family,
        data=describe_config(data),
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
            **({"autoencoder": autoencoder} if autoencoder else {}),
        },
        training={"dependencies": needed},
    ).save(folder)


def go_on(record: RunRecord, cfg: DictConfig, needed: list[dict[str, Any]]) -> None:
    """The record of a run that is resumed: what was changed on the command line is in force from here on."""
    record.state = "running"
    record.config = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    record.training["dependencies"] = needed


def fit(
    trainer: pl.Trainer,
    model: TrainedModel,
    data: ImageData,
    callbacks: dict[str, pl.Callback],
    folder: Path,
    checkpoint: Path | None,
) -> None:
    """Train, and keep the record's state true whatever happens."""
    try:
        with children_of(folder / JOB):
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except BaseException as error:
        if trainer.is_global_zero:
            record_training(trainer, callbacks, folder, state="failed", error=" ".join(str(error).split()))
        raise
    stop = callbacks.get("graceful_stop")
    received = stop.received if isinstance(stop, GracefulStop) else None
    if trainer.is_global_zero:
        record_training(trainer, callbacks, folder, state="interrupted" if received else "running")
    if received:
        step, checkpoints = callbacks["clock"].step, callbacks.get("checkpoints")  # type: ignore[attr-defined]
        saved = checkpoints.saved if isinstance(checkpoints, Checkpoints) else None
        said = "and saved" if saved == step else f"which may be a collapse: saved is step {saved}"
        print_zero(f"Stopped after step {step}, {said}. Go on with: python run.py {shell_override('resume', folder)}")
        wait_for_children(trainer)
        raise SystemExit(128 + received)


def record_training(
    trainer: pl.Trainer, callbacks: dict[str, pl.Callback], folder: Path, *, state: str, error: str = ""
) -> None:
    """What training cost so far, in the record."""
    clock = callbacks["clock"]
    assert isinstance(clock, TrainingClock)
    evaluation = callbacks.get("evaluation")
    evaluation = evaluation if isinstance(evaluation, EvaluationCallback) else None
    device = trainer.strategy.root_device
    figures: dict[str, Any] = {
        "steps": clock.step,
        "images_seen": clock.images,
        "seconds": clock.seconds,
        "device_seconds": clock.device_seconds,
        "images_per_second": clock.images / clock.seconds if clock.seconds else None,
        "flops_per_image": clock.flops / clock.images if clock.images else None,
        "flops": clock.flops if clock.images else None,
        "peak_memory_bytes": max(evaluation.peak_memory_bytes if evaluation else 0, peak_memory_bytes(device)),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "perceptual_networks": trainer.lightning_module.perceptual_networks,
        "missing_modes": {str(step): said for step, said in evaluation.missing.items()} if evaluation else {},
    }
    if evaluation and evaluation.last is not None:
        figures["preview"] = {"last": evaluation.last, "best": evaluation.best}
    if error:
        figures["error"] = error

    def change(record: RunRecord) -> None:
        record.state = state
        record.environment |= environment(device)
        # A latent model that is resumed has its first stage's weights from its own checkpoint, and knows no more of it.
        figures["perceptual_networks"] = figures["perceptual_networks"] or record.training.get(
            "perceptual_networks", []
        )
        figures["dependencies"] = record.training.get("dependencies", [])
        record.training = figures
        dependency_costs.print_costs(record)
        record.checkpoints = {
            name: f"checkpoints/{name}.ckpt"
            for name in ("last", "best")
            if (folder / "checkpoints" / f"{name}.ckpt").exists()
        }
        pictures = sorted((folder / "samples").glob("step_*.png"))
        if pictures:
            record.images["samples while training"] = str(pictures[-1].relative_to(folder))

    RunRecord.update(folder, change)


@rank_zero_only
def print_zero(text: str) -> None:
    print(text, flush=True)
