"""task=train: train a model, evaluate it, and record the results."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from gencompare.checkpoint_files import LAST, FoundCheckpoint, find_checkpoint
from gencompare.command_line import shell_override
from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError, printable
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.resources import matmul_flops_per_second, peak_memory_bytes
from gencompare.tasks.evaluate_run import evaluate_checkpoints, evaluate_trained_run
from gencompare.tasks.runs import autoencoder_stage, dependency_costs, run_config
from gencompare.tasks.runs.build import (
    build_budget,
    build_callbacks,
    build_data,
    build_loggers,
    build_model,
    build_protocol,
    build_trainer,
    check_trainer_for_model,
    check_trainer_settings,
    stored_budget,
)
from gencompare.tasks.runs.console import print_results, print_start
from gencompare.tasks.runs.environment import environment
from gencompare.tasks.runs.interpolations import plain
from gencompare.tasks.runs.loading import check_state_dict
from gencompare.tasks.runs.processes import (
    JOB_FILE,
    SIGTERM_CODE,
    is_multiprocess,
    ranks_run,
    sigterm_exits,
    wait_for_ranks,
)
from gencompare.tasks.runs.recovery import initial_record, list_checkpoints, recover_record
from gencompare.tasks.runs.result_logging import abandon_loggers, log_config, log_results
from gencompare.tasks.runs.run_folder import claim_run_folder, is_active, refuse_existing_run
from gencompare.tasks.runs.teacher import load_teacher
from gencompare.training.budget import Budget
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.device_settings import DeviceSettings
from gencompare.training.divergence import DivergenceGuard
from gencompare.training.energy_use import TrainingEnergy
from gencompare.training.evaluation_callback import EvaluationCallback
from gencompare.training.graceful_stop import REQUEUE_SIGNALS, GracefulStop
from gencompare.training.learning_rate import LearningRateScheduler, describe_resumed_schedule
from gencompare.training.loggers import last_step
from gencompare.trust import check_links


def train(cfg: DictConfig) -> None:
    """Train the model from ``cfg`` in the folder ``cfg.out``, or continue the run in ``cfg.resume``, then evaluate it.

    If ``cfg.trained_run`` is set, another job of the sweep has trained the same weights, and they are only evaluated.
    Invalid settings are reported before anything is written or trained.
    """
    if "out" not in cfg:
        raise UserError('This config has no run folder: create it with gencompare.compose("model=ddpm", ...).')
    if cfg.get("trained_run"):
        check_checkpoint_choice(cfg.evaluation.checkpoints)
        evaluate_trained_run(cfg)
        return
    check_trainer_settings(cfg)
    folder = Path(cfg.out)
    resumed = cfg.resume is not None
    if not resumed and rank_zero_only.rank == 0:
        refuse_existing_run(folder)
    if resumed and not cfg.get("trust"):
        check_links(folder)
    found = find_checkpoint(folder / "checkpoints") if resumed else None
    checkpoint = found.content if found else None
    cfg = autoencoder_stage.use_autoencoder_settings(cfg)
    data = build_data(cfg)
    data.setup()
    model = build_model(cfg, data)
    check_optimizer(model)
    check_trainer_for_model(cfg, model)
    if found is not None:
        check_state_dict(model, found.content["state_dict"], found.path)
    protocol = None
    if isinstance(model, GenerativeModel):
        protocol = build_protocol(cfg)
        protocol.check(data)
        check_checkpoint_choice(cfg.evaluation.checkpoints)
    callbacks = build_callbacks(cfg, model, data, protocol, folder)
    if resumed and rank_zero_only.rank == 0:
        recover_record(model, data, folder)
        report_lost_steps(folder, found)
    if checkpoint is None:
        cfg = autoencoder_stage.train_autoencoder(cfg, data, train)
    trainer = build_trainer(cfg, model, callbacks, [], folder)
    if not model.closed_form:
        data.check_batch_size(trainer.world_size)
        model.check_batch_size(cfg.trainer.global_batch_size, trainer.world_size)
    known: list[dict[str, Any]] = []
    if checkpoint is None:
        # Check that the autoencoder leaves some budget before encoding the images.
        dependency_costs.remaining_budget(build_budget(cfg), dependency_costs.dependencies(cfg))
        cfg = autoencoder_stage.load_autoencoder(cfg, model, data, trainer.world_size)
        cfg = load_teacher(cfg, model, data)
    else:
        known = RunRecord.load(folder).training.get("dependencies", [])
    dependencies = dependency_costs.dependencies(cfg, known=known)
    budget = dependency_costs.remaining_budget(build_budget(cfg), dependencies)
    callbacks["clock"].budget = budget  # type: ignore[attr-defined]
    clock = checkpoint["callbacks"][TrainingClock.__name__] if checkpoint is not None else None
    notice = resume_learning_rate(callbacks, model, checkpoint, folder, budget, dependencies)
    with claim_run_folder(folder, must_be_new=not resumed), record_failures(folder):
        if rank_zero_only.rank == 0:
            if found is not None:
                found.restore()
            write_initial_record(cfg, model, data, folder, resumed, dependencies)
            device, limits = trainer.strategy.root_device, vars(build_budget(cfg))
            print_start(RunRecord.load(folder), folder, device, limits, trainer.world_size)
            if notice is not None:
                print_on_rank_zero(notice)
        record = RunRecord.load(folder)
        start_step = clock["step"] if clock else 0
        loggers = build_loggers(cfg, folder, run_id=record.environment["run_id"], start_step=start_step)
        try:
            log_config(loggers, record.config)
            trainer.loggers = loggers
            if clock and (model.closed_form or budget.progress(**clock) >= 1):
                print_on_rank_zero("The budget is already spent, so there is nothing left to train.")
            else:
                fit(trainer, model, data, callbacks, folder, found.path if found else None)
            if protocol is not None:
                if model.is_sharded:  # evaluation needs the whole model on every process
                    model = build_model(cfg, data)
                assert isinstance(model, GenerativeModel)
                model.to(trainer.strategy.root_device)
                evaluate_checkpoints(
                    cfg, model, data, protocol, folder, checkpoints=cfg.evaluation.checkpoints, weights="ema"
                )
            if rank_zero_only.rank == 0:
                record = RunRecord.update(folder, lambda r: setattr(r, "state", "finished"))
                log_results(loggers, record, folder, print_results(record, folder))
        except BaseException:
            abandon_loggers(loggers)
            raise
    wait_for_ranks(trainer)


def resume_learning_rate(
    callbacks: dict[str, pl.Callback],
    model: TrainedModel,
    checkpoint: dict[str, Any] | None,
    folder: Path,
    budget: Budget,
    dependencies: list[dict[str, Any]],
) -> str | None:
    """Tell the learning-rate callback over which budget the learning rate of a resumed run has decayed so far.

    That budget is in the checkpoint or, if an earlier version wrote it, in the stored config. Return a line for the
    user if the budget has changed.
    """
    scheduler = callbacks.get("learning_rate")
    if checkpoint is None or not isinstance(scheduler, LearningRateScheduler):
        return None
    state = checkpoint["callbacks"].get(LearningRateScheduler.__name__)
    if state is not None:
        scheduler.load_state_dict(state)
    else:
        stored = stored_budget(run_config.load(folder))
        scheduler.budget = dependency_costs.remaining_budget(stored, dependencies)
    assert scheduler.budget is not None
    counts = checkpoint["callbacks"][TrainingClock.__name__]
    return describe_resumed_schedule(model, counts, scheduler.budget, budget)


@contextmanager
def record_failures(folder: Path) -> Iterator[None]:
    """Set the record's state to interrupted or failed if the block raises outside of training."""
    try:
        with sigterm_exits():
            yield
    except BaseException as error:
        reason = " ".join(str(error).split())
        interrupted = isinstance(error, KeyboardInterrupt) or (
            isinstance(error, SystemExit) and error.code == SIGTERM_CODE
        )

        def update(record: RunRecord) -> None:
            record.state = "interrupted" if interrupted else "failed"
            record.training["error"] = reason

        # Failures and interruptions during training were recorded and reported by `fit`.
        if rank_zero_only.rank == 0 and (folder / RECORD_FILE).exists() and RunRecord.load(folder).state == "running":
            RunRecord.update(folder, update)
            if interrupted:
                print_on_rank_zero(
                    "Interrupted; checkpoints and samples are kept. Continue with: python run.py"
                    f" {shell_override('resume', folder)}"
                )
        raise


def report_lost_steps(folder: Path, found: FoundCheckpoint | None) -> None:
    """Print which steps of a resumed run are trained again if its newest checkpoint is corrupted or missing.

    Raises:
        UserError: the run had checkpoints, and none is left.
    """
    record = RunRecord.load(folder)
    recorded = max(record.training.get("steps") or 0, last_step(folder / record.curve))
    if found is None:
        if record.checkpoints:
            raise UserError(
                f"The checkpoints of {folder}, which has {recorded} recorded steps, are missing: put back"
                f" {record.checkpoints.get('last', 'checkpoints/last.ckpt')}, or train again in another folder."
            )
        print(f"{folder} has no checkpoint yet: training starts again from the first step.", flush=True)
        return
    step = found.content["callbacks"][TrainingClock.__name__]["step"]
    if found.path.name != LAST:
        reason = f"{found.corrupted[0].name} is corrupted" if found.corrupted else f"{LAST} is missing"
        lost = f"{recorded - step} of {recorded} steps are lost and" if recorded > step else "any later steps"
        print(f"{reason}: resuming from {found.path.name}, step {step}; {lost} are trained again.", flush=True)


def check_optimizer(model: TrainedModel) -> None:
    """Raise `UserError` if the optimiser rejects its settings, or if nothing can be learned with them."""
    try:
        model.check_optimizers(model.build_optimizers())
    except (TypeError, ValueError) as error:
        raise UserError(f"model.optimizer: {' '.join(str(error).split())}") from error


def check_checkpoint_choice(checkpoints: Any) -> None:
    """Raise `UserError` unless ``evaluation.checkpoints`` is a list with only ``last`` and ``best``, or empty."""
    if not OmegaConf.is_list(checkpoints) or not {*checkpoints} <= {"last", "best"}:
        raise UserError(f"evaluation.checkpoints={checkpoints} must be a list of last, best or both.")


def write_initial_record(
    cfg: DictConfig,
    model: TrainedModel,
    data: ImageData,
    folder: Path,
    resumed: bool,
    dependencies: list[dict[str, Any]],
) -> None:
    """Write the config and the first record of a run, or update those of a resumed run."""
    if is_multiprocess(cfg):
        run_config.save(cfg, folder / JOB_FILE)
    record = initial_record(cfg, model, data, folder, dependencies)
    cfg = run_config.without_locations(cfg)
    run_config.save(cfg, folder / run_config.FILE)
    if resumed:
        RunRecord.update(folder, lambda stored: update_resumed_record(stored, cfg, dependencies))
    else:
        record.save(folder)


def update_resumed_record(record: RunRecord, cfg: DictConfig, dependencies: list[dict[str, Any]]) -> None:
    """Update a record with the state, the config of the resuming command, and the dependencies."""
    record.state = "running"
    record.config = plain(cfg)
    record.training["dependencies"] = dependencies


def fit(
    trainer: pl.Trainer,
    model: TrainedModel,
    data: ImageData,
    callbacks: dict[str, pl.Callback],
    folder: Path,
    checkpoint: Path | None,
) -> None:
    """Train, and record the cost and state of the run even if training fails or is stopped."""
    try:
        with ranks_run(folder / JOB_FILE):
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except BaseException as error:
        if is_lost_process(error) and trainer.world_size > 1:
            message = (
                "Another process of this run ended unexpectedly: it was killed, or ran out of memory. Continue with:"
                f" python run.py {shell_override('resume', folder)}"
            )
            time.sleep(1)  # until the lock of a dead process is released
            # A record that the first process wrote before it ended says more.
            orphaned = not is_active(folder) and RunRecord.load(folder).state == "running"
            if trainer.is_global_zero or orphaned:
                record_training(trainer, callbacks, folder, state="interrupted", error=message)
            raise UserError(message) from error
        if trainer.is_global_zero:
            record_training(trainer, callbacks, folder, state="failed", error=" ".join(str(error).split()))
        raise
    stop = callbacks.get("graceful_stop")
    received = stop.received if isinstance(stop, GracefulStop) else None
    if trainer.is_global_zero:
        end = reason_for_end(model, callbacks, received)
        record_training(trainer, callbacks, folder, state="interrupted" if received else "running", end=end)
        if end == OTHER_END:
            print(f"Training ended before the budget was spent: {end}.", flush=True)
    if received:
        step, checkpoints = callbacks["clock"].step, callbacks.get("checkpoints")  # type: ignore[attr-defined]
        saved = checkpoints.saved if isinstance(checkpoints, Checkpoints) else None
        detail = "which is saved" if saved == step else f"which may have collapsed; the last checkpoint is step {saved}"
        print_on_rank_zero(
            f"Stopped after step {step}, {detail}. Continue with: python run.py {shell_override('resume', folder)}"
        )
        wait_for_ranks(trainer)
        if received in REQUEUE_SIGNALS and callable(signal.getsignal(received)):
            signal.raise_signal(received)  # submitit requeues the job, now that it is saved
        raise SystemExit(128 + received)


def is_lost_process(error: BaseException) -> bool:
    """Return whether torch.distributed failed because another process is gone."""
    text = r"Connection (closed|reset) by peer|Broken pipe|Read error|Timed out waiting|remote process exited"
    return isinstance(error, RuntimeError) and re.search(text, str(error)) is not None


OTHER_END = "stopped by another callback"


def reason_for_end(model: TrainedModel, callbacks: dict[str, pl.Callback], received: int | None) -> str:
    """Return why training ended without an error."""
    clock, evaluation = callbacks["clock"], callbacks.get("evaluation")
    assert isinstance(clock, TrainingClock)
    if received:
        return signal.Signals(received).name
    if model.closed_form or clock.progress >= 1:
        return "budget spent"
    patience = evaluation.patience if isinstance(evaluation, EvaluationCallback) else None
    if isinstance(evaluation, EvaluationCallback) and patience is not None and evaluation.since_best >= patience:
        return "early stopping: no better evaluation"
    return OTHER_END


def record_training(
    trainer: pl.Trainer, callbacks: dict[str, pl.Callback], folder: Path, *, state: str, end: str = "", error: str = ""
) -> None:
    """Write the cost and state of training, and the reason why it ended, to the record."""
    clock = callbacks["clock"]
    assert isinstance(clock, TrainingClock)
    evaluation = callbacks.get("evaluation")
    evaluation = evaluation if isinstance(evaluation, EvaluationCallback) else None
    device = trainer.strategy.root_device
    training: dict[str, Any] = {
        "steps": clock.step,
        "images_seen": clock.images,
        "seconds": clock.seconds,
        "device_seconds": clock.device_seconds,
        "images_per_second": clock.images / clock.seconds if clock.seconds else None,
        "flops_per_image": clock.flops / clock.images if clock.images else None,
        "flops": clock.flops if clock.images else None,
        "flops_per_second": clock.flops / clock.seconds if clock.seconds else None,
        "peak_memory_bytes": max(evaluation.peak_memory_bytes if evaluation else 0, peak_memory_bytes(device)),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "perceptual_networks": trainer.lightning_module.perceptual_networks,
        "missing_modes": {str(step): text for step, text in evaluation.missing_modes.items()} if evaluation else {},
    }
    # After an error the device may be unusable.
    training["mfu"] = None if error else flops_utilization(clock, trainer)
    guard = callbacks.get("divergence")
    if isinstance(guard, DivergenceGuard):
        training |= {"masked_gradients": guard.num_masked, "rollbacks": guard.rollbacks}
    energy = callbacks.get("energy")
    training["energy_joules"] = energy.joules if isinstance(energy, TrainingEnergy) and clock.step else None
    training["end"] = end or error
    if evaluation and evaluation.done:
        training["evaluation_seconds"] = evaluation.seconds
    if evaluation and evaluation.last is not None:
        training["preview"] = {"last": evaluation.last, "best": evaluation.best}
    if error:
        training["error"] = error

    def update(record: RunRecord) -> None:
        record.state = state
        record.environment |= environment(device)
        # A resumed latent model loads its autoencoder from its checkpoint, without the list of perceptual networks.
        training["perceptual_networks"] = training["perceptual_networks"] or record.training.get(
            "perceptual_networks", []
        )
        training["dependencies"] = record.training.get("dependencies", [])
        record.training = training
        dependency_costs.update_total_cost(record)
        record.checkpoints = list_checkpoints(folder)
        grids = sorted((folder / "samples").glob("step_*.png"))
        if grids:
            record.images["samples while training"] = str(grids[-1].relative_to(folder))

    RunRecord.update(folder, update)


def flops_utilization(clock: TrainingClock, trainer: pl.Trainer) -> float | None:
    """Return the model FLOPs utilisation (MFU) of all training so far, or None if there are no FLOPs to count.

    MFU = FLOPs / (device seconds x FLOP/s of a matrix product on one device, in the precision of training).
    The term is from Chowdhery et al., PaLM, 2022 (appendix B, https://arxiv.org/abs/2204.02311); they divide by the
    manufacturer's number, here it is measured.
    """
    if not clock.flops or not clock.device_seconds:
        return None
    device, default = trainer.strategy.root_device, torch.get_float32_matmul_precision()
    with trainer.precision_plugin.forward_context():
        one = torch.ones(1, 1, device=device)
        dtype = torch.mm(one, one).dtype  # autocast may change it
    settings = next((each for each in trainer.callbacks if isinstance(each, DeviceSettings)), None)  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision(settings.matmul_precision if settings else default)
    try:
        ceiling = matmul_flops_per_second(device, dtype)
    finally:
        torch.set_float32_matmul_precision(default)
    return None if ceiling is None else clock.flops / clock.device_seconds / ceiling


@rank_zero_only
def print_on_rank_zero(text: str) -> None:
    print(printable(text), flush=True)
